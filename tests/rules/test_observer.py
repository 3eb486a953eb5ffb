"""What the observer sees of a batch, what it costs, and when its hooks on the layers rest."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fitting import quiet, trainer
from found import findings, of
from small_data import data
from small_models import Module, Net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn import Finding, ModeCheck, check
from lightning_bn.rules import batch_pattern
from lightning_bn.rules.arguments import Setting
from lightning_bn.rules.inspection import Inspection
from lightning_bn.rules.observer import Observer


def layer_hooks(module: nn.Module) -> int:
    """Return the number of hooks on batch-norm layers."""
    layers = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers)


class Count(TorchDispatchMode):
    """Counts the operations that are launched, which views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched += not any(
            result.alias_info and not result.alias_info.is_write for result in func._schema.returns
        )
        return func(*args, **(kwargs or {}))


def launched(batches: int, *callbacks: ModeCheck) -> int:
    """Return the operations of a fit of `batches` batches in a real Trainer."""
    torch.manual_seed(0)
    module = Module()
    with quiet(), Count() as count:
        trainer(*callbacks, limit_val_batches=0, log_every_n_steps=1000).fit(module, data(batches=batches))
    return count.launched


@pytest.mark.parametrize("patience", [batch_pattern.PATIENCE, 1000])
def test_launches_nothing(monkeypatch: pytest.MonkeyPatch, patience: int) -> None:
    """Twenty more batches of the first epoch are one look each at the model's input, by which BN307 tells sorted data,
    and no more: a mean, a variance, and the two in one tensor."""
    monkeypatch.setattr(batch_pattern, "PATIENCE", patience)
    plain = launched(60) - launched(40)
    checked = launched(60, ModeCheck(action="log")) - launched(40, ModeCheck(action="log"))
    assert plain > 20 * 10
    assert checked - plain == 20 * 3


def observed(model: nn.Module, batches: int = 8, device: str = "cpu") -> Inspection:
    """Train `model` under inspection, without a look at any value."""
    inspection = Inspection(model, Setting())
    inspection.attach([model])
    for index in range(batches):
        inspection.begin_batch("train", index, index)
        loss = model(torch.randn(16, 1, 6, 6, device=device)).square().mean()
        inspection.trace(loss)
        loss.backward()
        inspection.end_batch()
    return inspection


def test_waits_for_no_value() -> None:
    """On the meta device, which has no values, all of it works, and finds what there is to find."""
    with torch.device("meta"):
        model = Net()
    model.backbone.requires_grad_(False)
    found = observed(model, device="meta").findings
    assert [finding.layers for finding in of("BN201", found)] == [("backbone.0.1", "backbone.1.1")]
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.head[2].running_mean.sum().item()


class TestForward:
    def one(self, run: Callable[[nn.BatchNorm1d], Any]) -> tuple[Any, ...]:
        """Return the one forward that is recorded while `run` runs a layer."""
        layer = nn.BatchNorm1d(3)
        observer = Observer(nn.Sequential(layer))
        observer.attach([])
        observer.begin()
        run(layer)
        observer.end()
        observer.close()
        (forward,) = observer.forwards
        return forward

    @pytest.mark.parametrize("keyword", [True, False])
    def test_facts(self, keyword: bool) -> None:
        """Mode, whether statistics moved, grad, and the size of the input, given by place or by name."""
        data = {"input": torch.randn(4, 3, 5)}
        forward = self.one(lambda layer: layer(**data) if keyword else layer(data["input"]))
        assert (forward.training, forward.moved, forward.grad, forward.samples, forward.values) == (
            True,
            True,
            True,
            4,
            20,
        )
        assert (forward.layer, forward.failed, forward.recomputed, forward.call) == (0, False, False, -1)

    def test_in_eval_mode(self) -> None:
        """An eval forward moves nothing, also where somebody else writes the count in between."""

        def run(layer: nn.BatchNorm1d) -> None:
            layer.num_batches_tracked.add_(1)
            with torch.no_grad():
                layer.eval()(torch.randn(4, 3))

        forward = self.one(run)
        assert (forward.training, forward.moved, forward.grad) == (False, False, False)

    def test_failed(self) -> None:
        """A forward that raises is recorded as such."""

        def run(layer: nn.BatchNorm1d) -> None:
            with pytest.raises(ValueError, match="more than 1 value"):
                layer(torch.randn(1, 3))

        forward = self.one(run)
        assert (forward.failed, forward.moved, forward.values) == (True, False, 1)

    def test_made_in_inference_mode(self) -> None:
        """A layer whose tensors keep no version is judged by its flags."""
        with torch.inference_mode():
            layer = nn.BatchNorm1d(3)
            observer = Observer(layer)
            observer.attach([])
            observer.begin()
            layer(torch.randn(4, 3))
        assert [forward.moved for forward in observer.forwards] == [True]
        observer.close()


class TestRest:
    """While batches are alike no layer has a hook; what is unlike is seen all the same."""

    def test_rests(self) -> None:
        """After three batches alike the layers are without hooks, and the records say what they did before."""
        model = Net()
        inspection = observed(model)
        assert inspection.observer.idle
        assert layer_hooks(model) == 0
        assert [(forward.layer, forward.moved) for forward in inspection.observer.forwards] == [
            (0, True),
            (1, True),
            (2, True),
        ]
        inspection.close()

    @pytest.mark.parametrize("kind", ["batch sizes", "a layer by itself"])
    def test_irregular(self, kind: str) -> None:
        """Batches that are never alike, or forwards that can't be foreseen, keep the hooks."""
        model = Net()
        inspection = Inspection(model, Setting())
        inspection.attach([model])
        for index in range(8):
            inspection.begin_batch("train", index, index)
            model(torch.randn(16 + index * (kind == "batch sizes"), 1, 6, 6)).sum().backward()
            if kind != "batch sizes":
                model.head[2](torch.randn(4, 8))
            inspection.end_batch()
        assert layer_hooks(model) > 0
        inspection.close()
        assert layer_hooks(model) == 0

    def test_each_epoch_is_looked_at(self) -> None:
        """A part that is frozen after the first epoch is found in the second one."""

        class FreezesLater(Module):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.model.backbone.requires_grad_(False)

        (finding,) = of("BN201", findings(FreezesLater(), loader=data(batches=8), max_epochs=2))
        assert finding.step == 8


Event = Callable[["Odd", Tensor], Tensor | None]


class Odd(Module):
    """Does something else once, in its tenth batch."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event
        self.hooks: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.hooks.append(layer_hooks(self))
        loss = self.loss(batch)
        other = self.event(self, batch[0]) if batch_idx == 9 else None
        return loss if other is None else other


def without_grad(module: Odd, images: Tensor) -> None:
    with torch.no_grad():
        module(images)


def another_input(module: Odd, images: Tensor) -> None:
    module(images + 1)


def other_weights(module: Odd, images: Tensor) -> Tensor:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    return module(images).square().mean()


def one_sample(module: Odd, images: Tensor) -> None:
    with pytest.raises(ValueError, match="more than 1 value"):
        module(images[:1])


def untracked(module: Odd, images: Tensor) -> None:
    module.model.head[2].track_running_stats = False
    module(images)
    module.model.head[2].track_running_stats = True


def a_layer_alone(module: Odd, images: Tensor) -> None:
    module.model.head[2](torch.randn(16, 8))


def told(event: Event) -> tuple[list[tuple[Any, ...]], list[int]]:
    """Return what was found in a run with `event`, and the hooks on layers at the head of each step."""
    torch.manual_seed(0)
    module = Odd(event)
    found: list[Finding] = findings(module, loader=data(batches=16), check=ModeCheck(action="log", ignore=["BN208"]))
    return [
        (finding.code, finding.level, finding.layers, finding.step, finding.message) for finding in found
    ], module.hooks


class TestWakes:
    @pytest.mark.parametrize("event", [without_grad, another_input, other_weights, one_sample, untracked])
    def test_same_findings(self, event: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A single odd call is found at its batch, word for word as with hooks that never rest."""
        found, hooks = told(event)
        assert hooks[9] == 0
        assert hooks[10] > 0
        monkeypatch.setattr(batch_pattern, "PATIENCE", 1000)
        expected, hooks = told(event)
        assert min(hooks) > 0
        assert found == expected != []
        assert any(step == 9 for *_, step, _ in found)

    def test_a_layer_alone(self) -> None:
        """A layer called by itself can't be foreseen: that its statistics moved once more is seen at the end of the
        batch."""
        found, hooks = told(a_layer_alone)
        assert (hooks[9], hooks[10] > 0) == (0, True)
        assert [finding[:4] for finding in found] == [("BN202", "info", ("model.head.2",), 9)]

    def test_patience_grows(self) -> None:
        """Whoever breaks the pattern is watched for longer afterwards, so that hooks don't come and go all the time."""
        _, hooks = told(another_input)
        assert [count > 0 for count in hooks] == [True] * 3 + [False] * 7 + [True] * 5 + [False]


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_says_nothing(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        """A copy of the model made while it is watched is not watched, and holds nothing of the observer."""
        model = Net()
        observer = Observer(model)
        observer.attach([model])
        observer.begin()
        other = copied(model)
        other(torch.randn(4, 1, 6, 6))
        assert observer.forwards == []
        hooks = [
            hook
            for part in other.modules()
            for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        ]
        assert len(hooks) == 8
        assert [vars(hook.__self__) for hook in hooks] == [{}] * 8
        model(torch.randn(4, 1, 6, 6))
        assert len(observer.forwards) == 3
        observer.close()


class TestOtherModules:
    """Modules that come, go or are replaced while a fit runs."""

    def test_replaced_when_training_starts(self) -> None:
        """A part exchanged in the module's own hook, which comes after all callbacks', is the one that is looked at."""

        class Exchanges(Module):
            def on_train_start(self) -> None:
                self.model.backbone = Net().backbone.requires_grad_(False)

        (finding,) = of("BN201", findings(Exchanges()))
        assert finding.layers == ("model.backbone.0.1", "model.backbone.1.1")

    def test_added_in_a_later_epoch(self) -> None:
        """A layer that comes with the second epoch is looked at from then on, its configuration too; what was told is
        not told again."""

        class Grows(Module):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.model.head.append(nn.BatchNorm1d(2, momentum=0.0))

        module = Grows()
        module.model.backbone.requires_grad_(False)
        found = findings(module, max_epochs=3)
        assert [(f.code, f.layers, f.step) for f in found if f.level != "info"] == [
            ("BN201", ("model.backbone.0.1", "model.backbone.1.1"), 0),
            ("BN301", ("model.head.5",), 6),
        ]
        assert layer_hooks(module) == 0

    def test_removed(self) -> None:
        """A layer that is gone has no hook left and is not spoken of; `check` afterwards finds nothing wrong."""

        class Shrinks(Module):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.gone = [self.model.head[2]]
                    self.model.head[2] = nn.Identity()

        module = Shrinks()
        found = findings(module, max_epochs=3)
        assert [finding for finding in found if finding.level != "info"] == []
        assert layer_hooks(module.gone[0]) == 0
        assert check(module) == []
