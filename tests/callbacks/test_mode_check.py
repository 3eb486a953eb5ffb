"""The callback itself: what it reports and how, what it mends, and that it leaves nothing behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import quiet, trainer
from found import findings, of, serious
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_data import BATCHES, data
from small_models import Module, Net
from states import hooks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import ModeCheck, ModeCheckError


def broken() -> Module:
    """Return a module that breaks BN102, and BN201 in another part."""
    module = Module()
    module.model.head.eval()
    module.model.head[2].running_mean.fill_(0.1)  # as pretrained
    module.model.backbone.requires_grad_(False)
    return module


class Raises(Module):
    """Fails in the middle of a stage."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if self.stage == "train" and batch_idx == 2:
            self.model.eval()
            raise KeyError("mistake")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.stage == "validate" and not self.trainer.sanity_checking:
            raise KeyError("mistake")
        super().validation_step(batch, batch_idx)


class TestReport:
    def test_warns_once_for_each_cause(self) -> None:
        """Every finding above information is one warning, however many layers it has and however long the run."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check = ModeCheck()
            trainer(check, max_epochs=3).fit(broken(), data(), data(batches=2))
        messages = [str(each.message) for each in caught if str(each.message).startswith("BN")]
        assert [message.split()[0] for message in messages] == ["BN102", "BN201"] == serious(check.findings)[:2]
        assert messages == [finding.message for finding in check.findings if finding.level != "info"]

    def test_logs_only(self) -> None:
        """With action "log" nothing is warned of, and the findings are all there."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check = ModeCheck(action="log")
            trainer(check).fit(broken(), data(), data(batches=2))
        assert not any(str(each.message).startswith("BN") for each in caught)
        assert serious(check.findings) == ["BN102", "BN201"]

    def test_information_neither_warns_nor_raises(self) -> None:
        """Information goes to the list alone."""
        check = ModeCheck(action="raise")
        found = findings(Module(), check=check, accumulate_grad_batches=2)
        assert {finding.level for finding in found} == {"info"}

    def test_raises(self) -> None:
        """The error carries the findings, and its text is their messages."""
        with pytest.raises(ModeCheckError) as error:
            findings(broken(), check=ModeCheck(action="raise"))
        assert [finding.code for finding in error.value.findings] == ["BN102", "BN201"]
        assert "fix:" in str(error.value)

    def test_message(self) -> None:
        """At most six lines: what and where, what was seen, why it matters, the fix, how to silence it and where to
        read on."""
        for finding in findings(broken()):
            lines = finding.message.splitlines()
            assert len(lines) <= 6
            assert lines[0].startswith(f"{finding.code} {finding.level}: ")
            assert [line.split(":")[0].strip() for line in lines[1:]] == ["where", "seen", "why", "fix", "quiet"]
            assert f'ignore=["{finding.code}"]' in lines[-1]
            assert f"lightning-bn rules {finding.code}" in lines[-1]

    def test_ignore(self) -> None:
        """A rule that is ignored is not looked at."""
        assert serious(findings(broken(), check=ModeCheck(action="log", ignore=["BN102"]))) == ["BN201"]

    def test_two_fits_of_one_module(self) -> None:
        """What was told in one fit is not told again in the next."""
        check, module = ModeCheck(action="log"), broken()
        findings(module, check=check)
        assert serious(findings(module, check=check)) == ["BN102", "BN201"]

    def test_tensorboard(self, tmp_path: Path) -> None:
        """TensorBoard gets the findings as a table, and a count of each level."""
        check = ModeCheck(action="log")
        with quiet():
            run = trainer(check, logger=TensorBoardLogger(tmp_path, name="", version=""))
            run.fit(broken(), data(), data(batches=2))
        events = EventAccumulator(str(tmp_path)).Reload()
        text = events.Tensors("batch_norm/mode_check/findings/text_summary")[-1].tensor_proto.string_val[0].decode()
        header, rule, *rows = text.splitlines()
        assert header.count("|") == rule.count("|") == 6
        assert len(rows) == len(check.findings)
        assert all(f"| {finding.code} |" in text for finding in check.findings)
        assert events.Scalars("batch_norm/mode_check/warnings")[-1].value == 2

    def test_any_logger(self, tmp_path: Path) -> None:
        """A logger without texts gets the counts."""
        with quiet():
            run = trainer(ModeCheck(action="log"), logger=CSVLogger(tmp_path, name="", version=""))
            run.fit(broken(), data(), data(batches=2))
        assert "batch_norm/mode_check/warnings" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


class ToEval(Module):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if batch_idx == 1:
            self.model.eval()
        return loss


class NotRestored(Module):
    def on_validation_model_train(self) -> None:
        pass


class TestFix:
    def test_whole_module(self) -> None:
        """BN101 mended: train mode for all but what is frozen or listed in `allow_eval`."""
        module = Module()
        module.eval()
        module.model.backbone[0].requires_grad_(False)
        check = ModeCheck(action="raise", fix=["BN101"], allow_eval=["model.backbone.1"])
        (finding,) = of("BN101", findings(module, check=check))
        assert finding.mended
        assert "fixed at once" in finding.message
        modes = {name: part.training for name, part in module.named_modules()}
        assert modes[""]
        assert modes["model.head.2"]
        assert modes["model.head.3"]
        assert not modes["model.backbone.0.1"]
        assert not modes["model.backbone.1.1"]

    @pytest.mark.parametrize(("module", "code"), [(broken, "BN102"), (ToEval, "BN103"), (NotRestored, "BN105")])
    def test_modes(self, module: Any, code: str) -> None:
        """BN102, BN103 and BN105 mended: from the next batch on every part that learns is in train mode."""
        net = module()
        (finding,) = of(code, findings(net, check=ModeCheck(action="log", fix=[code])))
        assert finding.mended
        assert all(part.training for part in net.model.modules())

    def test_frozen(self) -> None:
        """BN201 mended: the frozen layers stand still from the second batch on."""
        module = Module()
        module.model.backbone.requires_grad_(False)
        assert of("BN201", findings(module, check=ModeCheck(action="raise", fix=["BN201"])))[0].mended
        assert [int(module.model.backbone[i][1].num_batches_tracked) for i in (0, 1)] == [1, 1]
        assert int(module.model.head[2].num_batches_tracked) == BATCHES

    def test_others_still_raise(self) -> None:
        """A finding that was not to be mended raises beside one that was."""
        with pytest.raises(ModeCheckError) as error:
            findings(broken(), check=ModeCheck(action="raise", fix=["BN102"]))
        assert [finding.code for finding in error.value.findings] == ["BN201"]


class TestArguments:
    @pytest.mark.parametrize(("arguments", "shown"), [
        ({"action": "shout"}, "action='shout'"),
        ({"ignore": ["BN999"]}, "BN999"),
        ({"ignore": "BN101"}, r"\['BN101'\]"),
        ({"fix": ["BN203"]}, "BN203"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
    ])  # fmt: skip
    def test_wrong(self, arguments: dict[str, Any], shown: str) -> None:
        """A wrong argument raises at once, with the call made."""
        with pytest.raises(ValueError, match=shown):
            ModeCheck(**arguments)

    def test_pattern_without_a_module(self) -> None:
        """A pattern that no module has is a mistake, and raises before the first batch; no hook is set."""
        module = Module()
        with pytest.raises(ValueError, match=r"allow_eval=\['bakbone'\]"):
            findings(module, check=ModeCheck(allow_eval=["bakbone"]))
        assert module.global_step == 0
        assert hooks(module) == 0


class TestLeavesNoTrace:
    @pytest.mark.parametrize("model", [Net, nn.Flatten])
    def test_training_is_the_same_to_the_bit(self, model: Any) -> None:
        """Weights, statistics, modes and the RNG are those of a run without the callback."""
        states, draws = [], []
        for callbacks in ((), (ModeCheck(action="log", every_n_steps=1),)):
            torch.manual_seed(3)
            module = Module(nn.Sequential(model(), nn.Flatten(), nn.LazyLinear(2)))
            module(next(iter(data()))[0])
            with quiet():
                trainer(*callbacks, max_epochs=2).fit(module, data(), data(batches=2))
            states.append({**module.state_dict(), "modes": torch.tensor([part.training for part in module.modules()])})
            draws.append(torch.rand(()))
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert torch.equal(*draws)

    @pytest.mark.parametrize("stage", ["train", "validate"])
    def test_no_hook_after_an_exception(self, stage: str) -> None:
        """The user's exception comes through as it is, the half-run batch is not judged by its modes, and every hook is
        gone."""
        module, check = Raises(stage), ModeCheck(action="raise")
        with pytest.raises(KeyError, match="mistake"):
            findings(module, check=check)
        assert hooks(module) == 0
        assert serious(check.findings) == []

    def test_no_hook_after_each_stage(self) -> None:
        """Nor after a fit, an evaluation, or an error of its own."""
        module, check = Module(), ModeCheck(action="log")
        with quiet():
            run = trainer(check)
            run.fit(module, data(), data(batches=2))
            assert hooks(module) == 0
            run.test(module, data(batches=2), verbose=False)
            assert hooks(module) == 0
            with pytest.raises(ModeCheckError):
                findings(module.eval(), check=ModeCheck(action="raise"))
        assert hooks(module) == 0

    def test_hooks_of_others_stay(self) -> None:
        """It removes its own hooks alone."""
        module = Module()
        calls = []
        module.model.backbone[0][1].register_forward_hook(lambda *_: calls.append(1))
        findings(module)
        assert hooks(module) == 1
        assert calls


class TrainsInValidation(Module):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.model.train()
        self.loss(batch)


class TestCompiled:
    """Hooks are traced to nothing, and the counts of batches speak."""

    def run(self, module: Module) -> ModeCheck:
        check = ModeCheck(action="log", every_n_steps=2)
        module.model = torch.compile(module.model, backend="eager", fullgraph=True)
        findings(module, check=check)
        return check

    def test_says_what_it_cannot_see(self) -> None:
        """Layers that move and are never seen are named, as information."""
        (finding,) = of("BN100", self.run(Module()).findings)
        assert finding.level == "info"
        assert finding.layers == ("model.backbone.0.1", "model.backbone.1.1", "model.head.2")

    def test_validation_that_writes(self) -> None:
        """Statistics that validation wrote are seen by comparison."""
        assert of("BN104", self.run(TrainsInValidation()).findings)

    def test_frozen_and_moving(self) -> None:
        """So are the statistics of a frozen layer."""
        module = Module()
        module.model.backbone.requires_grad_(False)
        assert of("BN201", self.run(module).findings)

    def test_twice_per_batch(self) -> None:
        """So is a batch that counts twice."""

        class Twice(Module):
            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                self(batch[0])
                return self.loss(batch)

        (finding,) = of("BN202", self.run(Twice()).findings)
        assert "up to 4 in 2 batches" in finding.message


def test_stands_behind_other_callbacks() -> None:
    """What another callback does to modes before a batch is not laid to the training step, whatever the order they were
    given in."""

    class Freezes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.model.backbone.eval()

    check = ModeCheck(action="log")
    with quiet():
        trainer(check, Freezes()).fit(Module(), data(), data(batches=2))
    assert of("BN103", check.findings) == []
    assert of("BN102", check.findings)[0].layers == ("model.backbone",)


def test_mends_every_time() -> None:
    """What is mended once and broken again is mended again, though it is told once."""

    class EvalEachEpoch(Module):
        def on_train_epoch_start(self) -> None:
            self.eval()

    module, check = EvalEachEpoch(), ModeCheck(action="log", fix=["BN101"])
    assert len(of("BN101", findings(module, check=check, max_epochs=3))) == 1
    assert int(module.model.head[2].num_batches_tracked) == 3 * (BATCHES - 1)


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_an_evaluation_after_a_fit_of_many_batches(what: str) -> None:
    """What a rule saw of two epochs of training is put away; the same Trainer evaluates after it."""

    class Whole(Module):
        test_step = Module.validation_step

        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self(batch[0])

    runner, module = trainer(ModeCheck(action="raise"), max_epochs=2), Whole()
    runner.fit(module, DataLoader(data(4, 30).dataset, 4, shuffle=True), data(batches=1))
    getattr(runner, what)(module, data(batches=2))
