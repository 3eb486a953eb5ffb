"""The one block at the end of a run, from whichever of the callbacks are in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fitting import fit, trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from small_data import training_data
from small_models import Small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_bn import ActivationStatsMonitor, BatchNormRecalibration, ModeCheck


class ForwardInEval(Small):
    """A mistake: the batch norms are in eval mode in the training step."""

    def on_train_epoch_start(self) -> None:
        self.bn1.eval()


def block(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


@pytest.mark.filterwarnings("ignore:BN")
def test_one_block_from_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict, the open mistakes, what was repaired, and how to see it all, in this order, each once; and no run is
    healthy beside an open mistake."""
    callbacks = [BatchNormRecalibration(), ModeCheck(), ActivationStatsMonitor(every_n_steps=1)]
    fit(*callbacks, module=ForwardInEval(), logger=CSVLogger(tmp_path), max_epochs=2)
    lines = block(capsys)
    begins = ["layers were within their limits", "Open ", "BatchNormRecalibration:", "lightning-bn report"]
    places = [[number for number, line in enumerate(lines) if text in line] for text in begins]
    assert all(places), lines
    assert [each[0] for each in places] == sorted(each[0] for each in places), lines
    assert len(places[0]) == len(places[2]) == len(places[3]) == 1
    assert any(line.startswith("Open ") and "BN204" in line and "bn1" in line for line in lines), "\n".join(lines)
    assert not any("Healthy" in line for line in lines)
    folder = lines[-1].partition("lightning-bn report ")[2].split("  ")[0].strip('"')
    assert (Path(folder) / "lightning_bn.jsonl").is_file()


@pytest.mark.filterwarnings("ignore:BN")
@pytest.mark.parametrize("checks_first", [True, False])
def test_no_text_of_tensorboard_is_healthy_beside_a_mistake(tmp_path: Path, checks_first: bool) -> None:
    """The last text of the verdict, whichever callback comes first; and the text that numbers the layers."""
    check, monitor = ModeCheck(), ActivationStatsMonitor(every_n_steps=1, verbose=False)
    both = [check, monitor] if checks_first else [monitor, check]
    logger = TensorBoardLogger(tmp_path, version=0)
    fit(*both, module=ForwardInEval(), logger=logger, max_epochs=2)
    assert monitor.verdict()[0].startswith("Healthy: ")
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    *_, told = events.Tensors("activations/layers/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    assert "Healthy" not in text
    assert "- A mistake of modes or statistics is open" in text
    (numbers,) = events.Tensors("activations/rows/text_summary")
    assert "| 1 | `bn1` |" in numbers.tensor_proto.string_val[0].decode()


def test_a_healthy_run_and_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is only likely stays a note: how many there are, which, and where they are; the run is healthy."""
    check = ModeCheck()
    fit(check, ActivationStatsMonitor(every_n_steps=1), logger=CSVLogger(tmp_path), max_epochs=2)
    lines = block(capsys)
    notes = [finding for finding in check.findings if finding.level == "info"]
    assert [*notes] == check.findings != []
    assert any(line.startswith("Healthy: ") for line in lines)
    (told,) = [line for line in lines if "of ModeCheck" in line]
    assert told.startswith(f"{len(notes)} note")
    assert all(note.code in told for note in notes)


def test_action_log_stays_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ModeCheck(action="log") by itself prints nothing; without any callback's words there is no block."""
    fit(ModeCheck(action="log"), module=ForwardInEval(), logger=CSVLogger(tmp_path), max_epochs=1)
    assert "lightning-bn report" not in capsys.readouterr().out


class Stops(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            raise RuntimeError("stop")


def test_after_an_error_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that an error ends has its block too; and so has each further run of the Trainer, by itself."""
    monitor, check = ActivationStatsMonitor(every_n_steps=1), ModeCheck()
    with pytest.raises(RuntimeError, match="stop"):
        fit(monitor, check, Stops(), logger=CSVLogger(tmp_path), max_epochs=1)
    assert sum("lightning-bn report" in line for line in block(capsys)) == 1
    runner = trainer(ActivationStatsMonitor(), ModeCheck(), logger=CSVLogger(tmp_path))
    for _ in range(2):
        runner.validate(Small(), DataLoader(training_data(), 16), verbose=False)
        assert sum(line.startswith(("Healthy", "Sick")) for line in block(capsys)) == 1


def test_one_that_has_failed_keeps_nobody_from_speaking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that has stopped is not waited for."""
    monkeypatch.delenv("LIGHTNING_BN_RERAISE", raising=False)
    monkeypatch.setattr(ModeCheck, "_look", lambda self: 1 / 0)
    with pytest.warns(UserWarning, match="ModeCheck has stopped"):
        fit(ModeCheck(), ActivationStatsMonitor(every_n_steps=1), max_epochs=1)
    assert "Healthy: " in capsys.readouterr().out
