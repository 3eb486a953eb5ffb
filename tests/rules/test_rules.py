"""The rules without a Trainer: `check` at rest, `watch` around a loop, and what every rule owes its reader."""

from __future__ import annotations

import re
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import found
import pytest
import torch
from small_data import data
from small_models import Net
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import optimizer

from lightning_bn import Finding, ModeCheckError, Window, check, convert_batch_norm, recalibrate, watch
from lightning_bn.rules import RULES
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.exported import EXPORT_RULES
from lightning_bn.rules.fixes import expression, group_norms, modules_of
from lightning_bn.rules.inspection import Inspection
from lightning_bn.rules.observer import Observer
from lightning_bn.rules.rule import Occasion, Rule, Seen

DOCS = Path(__file__).parent.parent.parent / "docs" / "rules"


def codes(found: list[Finding]) -> list[str]:
    """Return the codes of the findings above information."""
    return [finding.code for finding in found if finding.level != "info"]


def steps(model: nn.Module, *, micro_batches: int = 1) -> None:
    """Train `model` in a plain loop."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    for number, (images, labels) in enumerate(data(), 1):
        nn.functional.cross_entropy(model(images), labels).backward()
        if number % micro_batches == 0:
            sgd.step()
            sgd.zero_grad()


class TestCheck:
    def test_sound_model(self) -> None:
        """A new model, in train mode or in eval mode, has nothing to hear."""
        assert check(Net()) == []
        assert check(Net().eval()) == []

    @pytest.mark.parametrize(("code", "spoil"), [
        ("BN102", lambda net: net.backbone.eval()),
        ("BN201", lambda net: net.backbone.requires_grad_(False)),
        ("BN203", lambda net: net.head[2].running_var.fill_(float("inf"))),
        ("BN205", lambda net: setattr(net.head[2], "track_running_stats", False)),
        ("BN206", lambda net: (setattr(net.head[2], "momentum", 0.01), net.to(torch.bfloat16))),
        ("BN301", lambda net: setattr(net.head[2], "momentum", 0)),
    ])  # fmt: skip
    def test_spoiled_model(self, code: str, spoil: object) -> None:
        """What needs no run is seen without one, and the model is left as it was."""
        net = Net()
        spoil(net)  # type: ignore[operator]
        before = {name: value.clone() for name, value in net.state_dict().items()}
        assert codes(check(net)) == [code]
        assert all(torch.equal(value, before[name]) or value.isinf().all() for name, value in net.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())

    def test_ignore_and_allow(self) -> None:
        """Both arguments work as in the callback, and both are checked."""
        net = Net()
        net.backbone.eval()
        assert check(net, allow_eval=["backbone"]) == check(net, ignore=["BN102"]) == []
        with pytest.raises(ValueError, match=r"check\(allow_eval=\['trunk'\]\)"):
            check(net, allow_eval=["trunk"])
        with pytest.raises(ValueError, match=r"check\(ignore=\['BN1'\]\)"):
            check(net, ignore=["BN1"])

    def test_loaded_checkpoint(self, tmp_path: Path) -> None:
        """A checkpoint with a NaN in its statistics is found out, by layer and channel."""
        net = Net()
        net.backbone[1][1].running_mean[2] = float("nan")
        torch.save(net.state_dict(), tmp_path / "net.pt")
        loaded = Net()
        loaded.load_state_dict(torch.load(tmp_path / "net.pt"))
        (finding,) = check(loaded.eval())
        assert (finding.code, finding.layers, finding.stage) == ("BN203", ("backbone.1.1",), "check")
        assert "channel 2" in finding.message

    def test_lazy_and_meta_layers(self) -> None:
        """Layers that have no values yet are no reason to fail."""
        assert check(nn.Sequential(nn.LazyBatchNorm1d())) == []
        with torch.device("meta"):
            assert check(Net()) == []


class TestWatch:
    def test_sound_loop(self) -> None:
        """Training and evaluating as one should is not remarked on."""
        net = Net()
        with watch(net, action="raise") as found:
            steps(net)
            net.eval()
            with torch.no_grad():
                net(torch.randn(4, 1, 6, 6))
            net.train()
            steps(net, micro_batches=3)
        assert codes(found) == []

    def test_forgotten_train(self) -> None:
        """A loop that trains in eval mode."""
        net = Net().eval()
        with watch(net, action="log") as found:
            steps(net)
        assert codes(found)[0] == "BN101"

    def test_forgotten_eval(self) -> None:
        """An evaluation in train mode, at the end of the loop or between its epochs."""
        for again in (0, 1):
            net = Net()
            with watch(net, action="log") as found:
                steps(net)
                with torch.no_grad():
                    net(torch.randn(4, 1, 6, 6))
                for _ in range(again):
                    steps(net)
            assert codes(found) == ["BN106"]

    def test_frozen_part(self) -> None:
        """A frozen part in train mode."""
        net = Net()
        net.backbone.requires_grad_(False)
        with pytest.warns(UserWarning, match="BN201") as caught, watch(net):
            steps(net)
        assert caught[0].filename == __file__

    def test_raises_at_exit(self) -> None:
        """With action "raise" the loop runs to its end first."""
        net = Net()
        net.backbone.requires_grad_(False)
        with pytest.raises(ModeCheckError, match="BN201"), watch(net, action="raise"):
            steps(net)
        assert int(net.head[2].num_batches_tracked) == 6

    def test_dead_bias(self) -> None:
        """The graph behind the model's output tells of a bias that is dead, as information."""
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        with watch(net, action="log") as found:
            steps(net)
        assert [finding.code for finding in found] == ["BN303"]

    def test_branch_never_trained(self) -> None:
        """A layer that training left out, evaluated at its start."""
        net = Net()
        net.eval_norm = nn.BatchNorm1d(2)
        with watch(net, action="log") as found:
            steps(net)
            net.eval()
            with torch.no_grad():
                net.eval_norm(net(torch.randn(4, 1, 6, 6)))
        assert codes(found) == ["BN204"]

    def test_another_models_optimizer(self) -> None:
        """A step of another model's optimizer ends no batch of this one."""
        net, other = Net().eval(), Net()
        with watch(net, action="log") as found:
            net(torch.randn(4, 1, 6, 6))
            steps(other)
        assert codes(found) == []

    def test_recalibration_inside(self) -> None:
        """This package's recalibration runs batch norm in train mode under no_grad, and moves nothing by it."""
        net = Net()
        with watch(net, action="log") as found:
            steps(net)
            recalibrate(net, [images for images, _ in data()], progress=False)
        assert codes(found) == []

    def test_leaves_no_hook(self) -> None:
        """Also when the loop fails, whose exception comes through."""
        net = Net()

        def fails() -> None:
            with watch(net, action="raise"):
                steps(net)
                raise KeyError("mistake")

        with pytest.raises(KeyError, match="mistake"):
            fails()
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
        assert not optimizer._global_optimizer_post_hooks

    def test_same_to_the_bit(self) -> None:
        """A watched loop computes what it computes unwatched."""
        torch.manual_seed(1)
        plain = Net()
        watched = Net()
        watched.load_state_dict(plain.state_dict())
        torch.manual_seed(2)
        steps(plain)
        torch.manual_seed(2)
        with watch(watched):
            steps(watched)
        assert all(
            torch.equal(one, other)
            for one, other in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
        )


def test_no_synchronisation_between_checks() -> None:
    """Fake tensors have no values, and whatever asks for one raises: the judgement of a batch does not, the check
    does."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
        )
        convert_batch_norm(net, Window(3))
        inspection = Inspection(net, Setting())
        inspection.attach([net])
        inspection.begin_epoch()
        for index in range(12):
            inspection.begin_batch("train", index, index)
            net[2].weight.requires_grad_(index % 3 > 0)  # so that every batch is judged anew
            loss = net(torch.randn(8, 1, 6, 6)).sum()
            inspection.trace(loss)
            loss.backward()
            inspection.end_batch()
        with pytest.raises(Exception, match="aten"):
            inspection.examine()
        inspection.close()


class Louder(Rule):
    """Evidence of its own, as a newcomer would write it: the first input of the model in each batch."""

    code = "BN999"
    title = "inputs get louder"
    why = "a test says so."

    def __init__(self) -> None:
        self._sizes: list[torch.Tensor] = []

    def begin_batch(self, at: Occasion) -> None:
        assert isinstance(at.observer, Observer)
        at.observer.on_input.append(lambda input: self._sizes.append(input.detach().abs().mean()))

    def end_epoch(self, at: Occasion) -> Iterator[Seen]:
        if self._sizes[-1] > 2 * self._sizes[0]:
            yield Seen([at.layers[0].name], f"{len(self._sizes)} batches")


class LouderToo(Louder):
    """Wants the same inputs."""

    code = "BN998"


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_rule_keeps_its_own_evidence(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is listed needs no other file, each inspection has evidence of its own, and so has each rule."""
    for rule in (Louder(), LouderToo()):
        monkeypatch.setitem(RULES, rule.code, rule)
    for _ in range(2):
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        inspection = Inspection(net, Setting())
        inspection.attach([net])
        inspection.begin_epoch()
        for index in range(4):
            inspection.begin_batch("train", index, index)
            net(torch.linspace(1, 2, 32).reshape(8, 4) * factor**index).sum().backward()
            inspection.end_batch()
        inspection.end_epoch()
        inspection.close()
        for code in ("BN998", "BN999"):
            told = found.of(code, inspection.findings)
            assert [(each.layers, each.seen) for each in told] == [(("1",), "4 batches")] * (factor > 1)


def test_a_method_that_nobody_calls_is_an_error() -> None:
    """A rule with an occasion misspelt would be silent for ever."""
    with pytest.raises(TypeError, match=r"Late\.end_of_epoch would never be called: a rule has .*end_epoch"):

        class Late(Rule):
            def end_of_epoch(self, at: Occasion) -> None: ...


class TestEveryRule:
    @pytest.mark.parametrize("code", RULES)
    def test_is_explained(self, code: str) -> None:
        """Each rule has its title, its reason, and a page of its own in the docs that its message leads to."""
        rule = RULES[code]
        assert rule.code == code
        assert re.fullmatch(r"BN[123]\d\d", code)
        assert rule.title[0].islower() or rule.title[:2] in ("16", "BN")
        assert rule.why.endswith(".")
        assert (DOCS / f"{code.lower()}.md").read_text().startswith(f"# {code} ")

    def test_the_docs_have_no_other(self) -> None:
        """Nor do the docs tell of a rule that is not there."""
        assert sorted(page.stem.upper() for page in DOCS.glob("bn*.md")) == sorted([*RULES, *EXPORT_RULES])
        listed = re.findall(r"^\| \[(BN\d+)\]", (DOCS / "index.md").read_text(), re.MULTILINE)
        assert listed == [*RULES, *EXPORT_RULES]


def test_modules_of_takes_no_stranger() -> None:
    """A module is named for its layers only where all of its layers are meant."""
    among = ["a.0", "a.1", "b.0.x", "b.0.y", "b.1", "c"]
    assert modules_of(["a.0", "b.0.x", "b.0.y", "c"], among) == ["a.0", "b.0", "c"]
    assert modules_of(["c"], ["c"]) == ["c"]


def test_expression_runs() -> None:
    """The expression in a fix leads to the module it names."""
    net = Net()
    for name, module in net.named_modules():
        assert eval(expression("net", name, net), {"net": net}) is module


def in_a_method(code: str) -> str:
    """Return a program that runs the code where a user puts it: there Python has names of its own for ``__x``."""
    return f"class Fit:\n    def setup(self):\n{textwrap.indent(code, ' ' * 8)}\nFit().setup()"


@pytest.mark.parametrize(
    "key",
    [
        "Layer 0",
        "my-head",
        "class",
        "a__to__b",
        "<user___rates___item>",
        "0x",
        "größe",
        "7",
        "__x",
        "it's",
        "back\\slash",
    ],
)
@pytest.mark.parametrize("holder", ["dictionary", "sequence", "module"])
def test_printed_code_runs_whatever_a_module_is_called(key: str, holder: str) -> None:
    """Fixes that call, assign to and replace a module run as printed where its name is no identifier, in each kind of
    module that can hold it."""
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    held = nn.ModuleDict() if holder == "dictionary" else nn.Sequential() if holder == "sequence" else nn.Module()
    held.add_module(key, block)
    model = nn.Sequential(nn.Sequential(OrderedDict(held=held, other=nn.BatchNorm1d(4))))

    block.eval()
    exec(in_a_method(found.only("BN102", check(model)).fix.code), {"model": model})
    assert block.training
    block[1].momentum = 0.0
    exec(in_a_method(found.only("BN301", check(model)).fix.code), {"model": model})
    assert block[1].momentum == 0.1
    exec(in_a_method(group_norms("model", [(f"0.held.{key}", 4)], model)), {"model": model, "nn": nn})
    assert isinstance(held.get_submodule(key), nn.GroupNorm)
