"""Which layers and batches a pass of BatchNormRecalibration covers, what a failure leaves, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fitting import fit, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from small_data import loader, training_data
from small_models import Small
from states import matches_weights, same, snapshot
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_bn import BatchNormRecalibration
from lightning_bn.callbacks.lightning_internals import training_loader


def test_layers_that_do_not_learn_keep_their_statistics() -> None:
    """Frozen by requires_grad or by eval, before the fit or on_train_epoch_start: also though validation puts all
    layers in eval."""

    class Freezing(Small):
        def on_train_epoch_start(self) -> None:
            self.rest[3].eval()

    for when in ("fit_end", "validation"):
        torch.manual_seed(0)
        module = Freezing()
        before = snapshot(module)
        callback = BatchNormRecalibration(when=when)
        fit(callback, module=module)
        assert torch.equal(module.rest[3].running_mean, before["rest.3.running_mean"])
        assert [layer.name for layer in callback.report.layers] == ["bn1"]


def test_a_wholly_frozen_model_is_left_alone_with_a_warning() -> None:
    """At the end of a long training nothing is raised because there is nothing to do."""
    torch.manual_seed(0)
    module = Small()
    for layer in (module.bn1, module.rest[3]):
        layer.requires_grad_(False).eval()
    before = snapshot(module)
    with (
        pytest.warns(UserWarning, match="every batch-norm layer is frozen"),
        pytest.warns(UserWarning, match="in eval mode at the start"),
    ):
        fit(BatchNormRecalibration(), module=module)
    assert same(
        [module.bn1.running_mean, module.bn1.running_var], [before["bn1.running_mean"], before["bn1.running_var"]]
    )


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("batch", range(6))
def test_whatever_is_raised_at_whatever_batch_changes_nothing(batch: int, failure: type[BaseException]) -> None:
    """The statistics, modes, hooks and random numbers are those before the recalibration, and the exception comes
    through."""
    calls = 0

    def forward(module: pl.LightningModule, inputs: Any) -> None:
        nonlocal calls
        module(inputs[0])
        calls += 1
        if calls == batch + 1:
            raise failure("injected")

    plain, _ = fit()
    torch.manual_seed(0)
    module = Small()
    torch.manual_seed(1)
    runner = trainer(BatchNormRecalibration(forward=forward), max_epochs=2)
    with pytest.raises((failure, SystemExit)):
        runner.fit(module, loader(), DataLoader(training_data(), 16))
    assert same(plain.state_dict().values(), module.state_dict().values())
    assert all(m.training for m in module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Endless(IterableDataset[Any]):
    """A stream without length or end."""

    def __iter__(self) -> Any:
        while True:
            yield from training_data()


@pytest.mark.parametrize(
    ("train", "options", "batches"),
    [
        (None, {"limit_train_batches": 3}, 3),
        (None, {"limit_train_batches": 0.5}, 3),
        (None, {"fast_dev_run": True}, 1),
        (None, {"max_epochs": -1, "max_steps": 8}, 6),
        (DataLoader(Endless(), 8), {"max_epochs": -1, "max_steps": 8, "val_check_interval": 4}, 200),
        (DataLoader(Endless(), 8), {"limit_train_batches": 4, "max_epochs": 1}, 4),
    ],
    ids=["limit", "share", "fast_dev_run", "max_steps", "endless", "endless, limited"],
)
@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_how_long_the_pass_is(when: str, train: Any, options: dict[str, Any], batches: int) -> None:
    """The pass takes what an epoch of the fit takes, and num_batches=200 of a stream without end."""
    callback = BatchNormRecalibration(when=when)
    fit(callback, train=train, **options)
    assert callback.report.batches == batches


def test_tolerance_and_exact_are_passed_on() -> None:
    """tolerance stops early on a long stream; exact gives other statistics from the second layer on, and the same in
    the first."""
    callback = BatchNormRecalibration(tolerance=0.1)
    fit(callback, train=DataLoader(Endless(), 8), limit_train_batches=300, max_epochs=1, val=None)
    assert callback.report.stopped_by == "tolerance"
    assert 8 <= callback.report.batches < 200
    one_pass, _ = fit(BatchNormRecalibration())
    exact, _ = fit(BatchNormRecalibration(exact=True))
    assert torch.allclose(one_pass.bn1.running_var, exact.bn1.running_var, rtol=1e-5)
    assert not torch.allclose(one_pass.rest[3].running_var, exact.rest[3].running_var, rtol=1e-3)


def test_another_dataloader() -> None:
    """dataloader= takes the place of the training data."""
    inputs = training_data().tensors[0][:16] + 3
    module, _ = fit(BatchNormRecalibration(dataloader=[(inputs[:10],), (inputs[10:],)]))
    assert matches_weights(module.state_dict(), inputs)


def test_mixed_precision() -> None:
    """The pass runs under the Trainer's precision; the statistics stay in float32 and near the oracle's."""
    dtypes = set()

    class Listening(Small):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            dtypes.add((self.training, outputs.dtype))
            return outputs

    module, _ = fit(BatchNormRecalibration(), module=Listening(), precision="bf16-mixed")
    assert dtypes == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert module.bn1.running_var.dtype == torch.float32
    assert torch.isfinite(module.bn1.running_var).all()


def test_two_of_them_side_by_side() -> None:
    """One for the validations, one for the end of the fit, each with a state of its own."""
    first, second = BatchNormRecalibration(when="validation"), BatchNormRecalibration()
    fit(first, second)
    assert (first.state_dict()["count"], second.state_dict()["count"]) == (2, 1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("when", ["fit_end", "validation"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_recalibrates_as_often(when: str, stop: int, tmp_path: Path) -> None:
    """A run stopped after any epoch and resumed ends with the count, the weights and the statistics of one that was not
    stopped."""
    whole = BatchNormRecalibration(when=when)
    plain, _ = fit(whole, max_epochs=3, train=loader(shuffle=False))
    # The end of the stopped run's own training is no part of the checkpoint.
    fit(
        BatchNormRecalibration(when=when),
        ModelCheckpoint(tmp_path, save_last=True),
        max_epochs=stop,
        train=loader(shuffle=False),
    )
    resumed = BatchNormRecalibration(when=when)
    module, _ = fit(
        resumed,
        ModelCheckpoint(tmp_path, save_last=True),
        max_epochs=3,
        train=loader(shuffle=False),
        module=Small(),
        ckpt_path=tmp_path / "last.ckpt",
    )
    assert resumed.state_dict() == whole.state_dict()
    assert matches_weights(module.state_dict())
    if stop == 3:
        assert same(plain.state_dict().values(), module.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"when": "epoch_end"}, ValueError, "'fit_end' or 'validation'"),
        ({"every_n_epochs": 0}, ValueError, "at least 1"),
        ({"num_batches": 0}, ValueError, "at least 1"),
        ({"tolerance": 0.0}, ValueError, "tolerance"),
        ({"tolerance": 0.1, "exact": True}, ValueError, "exact"),
        ({"dataloader": iter([])}, TypeError, "used up after one pass"),
        ({"mode": "less", "monitor": "val_loss"}, ValueError, "'min'"),
        ({"checkpoints": "best"}, ValueError, r"checkpoints=\('best', 'last'\)"),
        ({"checkpoints": ("first",)}, ValueError, "'best' and 'last'"),
    ],
)
def test_a_wrong_argument_is_told_at_once(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    """A mistake in the call is raised by the call, and names the call to make."""
    with pytest.raises(error, match=text):
        BatchNormRecalibration(**arguments)


@pytest.mark.parametrize(
    ("callback", "options", "text"),
    [
        (lambda: BatchNormRecalibration(monitor="val_loss"), {"val": None}, "no validation to compare by"),
        (lambda: BatchNormRecalibration(checkpoints=("best",)), {}, "no ModelCheckpoint"),
        (lambda: BatchNormRecalibration(), {"module": BoringModel()}, "no batch-norm layer"),
    ],
)
def test_a_fit_that_can_not_be_served_is_told_before_it_trains(
    callback: Any, options: dict[str, Any], text: str
) -> None:
    """Nobody trains for a day to learn that the recalibration was impossible."""
    with pytest.raises(MisconfigurationException, match=text):
        fit(callback(), **options)


def test_a_metric_that_is_not_logged_is_named() -> None:
    """The error says which metrics there are: at the end of the sanity check, or without one in a warning, for which no
    trained model is given up; the statistics are untouched."""
    plain, _ = fit(num_sanity_val_steps=0)
    with pytest.raises(MisconfigurationException, match="val_loss, val_acc"):
        fit(BatchNormRecalibration(monitor="val_f1"))
    with pytest.warns(UserWarning, match=r"has stopped.*monitor='val_f1'.*val_loss, val_acc"):
        module, _ = fit(BatchNormRecalibration(monitor="val_f1"), num_sanity_val_steps=0)
    assert same(plain.state_dict().values(), module.state_dict().values())


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_part() -> None:
    """Layers inside a compiled submodule are recalibrated like the others."""
    torch.manual_seed(0)
    module = Small()
    module.rest = torch.compile(module.rest, backend="eager")
    callback = BatchNormRecalibration()
    fit(callback, module=module)
    assert {layer.name for layer in callback.report.layers} == {"bn1", "rest.3"}
    assert matches_weights(module.state_dict())


def test_a_lightning_without_the_private_part_is_told() -> None:
    """Where a part of Lightning that is not public is gone, the error names it and the argument that does without
    it."""
    _, runner = fit()
    runner.fit_loop._combined_loader = None
    with pytest.raises(RuntimeError, match=r"trainer\.fit_loop\._combined_loader is missing.*dataloader="):
        training_loader(runner)
