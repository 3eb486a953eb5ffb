"""Sets of statistics in real fits: the callbacks of this package, Lightning's averages, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fitting
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from small_data import loader, training_data
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bn import (
    ActivationStatsMonitor,
    BatchNormRecalibration,
    CompareAverages,
    ModeCheck,
    StatisticsSets,
    Window,
    convert_batch_norm,
    recalibrate,
    recalibrated,
)
from lightning_bn.dashboard.view import layer_of, overview_of
from lightning_bn.journal.reader import JournalReader


class TwoDomains(pl.LightningModule):
    """Its second domain is the first one, shifted and scaled."""

    def __init__(self, *, affine: bool = False, windowed: bool = False, second_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        if windowed:
            convert_batch_norm(self.net, Window(3))
        self.sets = StatisticsSets(self.net, ["day", "night"], affine=affine)
        self.second_first = second_first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))

    def night(self, inputs: Tensor) -> Tensor:
        return inputs * 3 + 5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        if self.second_first:
            with self.sets.use("night"):
                other = F.cross_entropy(self(self.night(inputs)), labels)
        loss = F.cross_entropy(self(inputs), labels)
        if not self.second_first:
            with self.sets.use("night"):
                other = F.cross_entropy(self(self.night(inputs)), labels)
        return loss + other

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", F.cross_entropy(self(inputs), labels))
        with self.sets.use("night"):
            self.log("val_night", F.cross_entropy(self(self.night(inputs)), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def night_loader() -> DataLoader[Any]:
    inputs, labels = training_data().tensors
    return DataLoader(list(zip(inputs * 3 + 5, labels, strict=True)), 16)


def statistics(module: TwoDomains, name: str) -> dict[str, Tensor]:
    with module.sets.use(name):
        return {key: value.clone() for key, value in module.net.state_dict().items() if "running" in key}


@pytest.mark.parametrize("second_first", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_rules_are_silent(windowed: bool, second_first: bool) -> None:
    """A step with a batch in each set, and a validation that uses both, is nobody's mistake: neither two updates of one
    average, nor statistics that are not trained or do not fit."""
    check = ModeCheck(action="raise", every_n_steps=1)
    module = TwoDomains(windowed=windowed, second_first=second_first, affine=True)
    fitting.fit(check, module=module, max_epochs=8, train=loader(8), num_sanity_val_steps=0)
    assert not [finding for finding in check.findings if finding.level != "info"], check.findings
    assert not [finding for finding in check.findings if finding.code in ("BN202", "BN204", "BN207", "BN208")]


def test_two_batches_in_one_set_are_still_told() -> None:
    """The rule about two updates a batch holds within a set."""

    class Twice(TwoDomains):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with self.sets.use("night"):
                self(batch[0] + 0.1)
            return super().training_step(batch, batch_idx)

    check = ModeCheck(action="warn")
    with fitting.quiet():
        fitting.fit(check, module=Twice())
    assert "BN202" in {finding.code for finding in check.findings}


@pytest.mark.parametrize("windowed", [False, True])
def test_an_untrained_set_is_told_by_its_name(windowed: bool) -> None:
    """Evaluation in a set that no training batch has moved; where the first set is trained and used, it is not
    accused."""

    class Forgotten(TwoDomains):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    check = ModeCheck(action="warn")
    with fitting.quiet():
        fitting.fit(check, module=Forgotten(windowed=windowed))
    found = [finding for finding in check.findings if finding.code == "BN204"]
    assert found
    assert all("the set 'night'" in str(finding) for finding in found)
    assert all("recalibrate(self, batches)" in str(finding) for finding in found)


def test_an_unused_first_set_is_not_accused() -> None:
    """As with a client's own set next to a server's: training and evaluation are in the second one."""

    class Client(TwoDomains):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with self.sets.use("night"):
                return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            with self.sets.use("night"):
                self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    check = ModeCheck(action="raise")
    fitting.fit(check, module=Client(), max_epochs=8)
    assert not [finding for finding in check.findings if finding.level != "info"]


def test_a_fit_inside_of_a_set() -> None:
    """`with sets.use(name): trainer.fit(...)` trains that set, is judged as any other fit, and its checkpoint holds
    every set as it was."""

    class Plain(TwoDomains):
        training_step = lambda self, batch, batch_idx: F.cross_entropy(self(batch[0]), batch[1])  # noqa: E731
        validation_step = lambda self, batch, batch_idx: self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))  # noqa: E731

    module, check = Plain(), ModeCheck(action="raise")
    before = statistics(module, "day")
    with module.sets.use("night"):
        _, trainer = fitting.fit(check, ModelCheckpoint(save_last=True), module=module, max_epochs=8)
    assert not [finding for finding in check.findings if finding.level != "info"]
    for key, value in statistics(module, "day").items():
        assert torch.equal(value, before[key])
    again = Plain()
    again.load_state_dict(torch.load(trainer.checkpoint_callback.last_model_path, weights_only=False)["state_dict"])
    for name in ("day", "night"):
        for key, value in statistics(module, name).items():
            assert torch.equal(value, statistics(again, name)[key])


@pytest.mark.parametrize("average", [None, lambda: EMAWeightAveraging(decay=0.9, use_buffers=False)])
@pytest.mark.parametrize("when", ["fit_end", "validation"])
def test_each_set_is_recalibrated_with_its_batches(when: str, average: Callable[[], pl.Callback] | None) -> None:
    """For the weights that the fit leaves, averaged ones too, the statistics of each set are what torch computes of the
    activations of that set's images alone; the file has them."""
    loaders, kinds = {"day": loader(16), "night": night_loader()}, ("last",) if when == "fit_end" else ()
    recalibration = BatchNormRecalibration(when=when, num_batches=None, sets=loaders, checkpoints=kinds)
    module, averages = TwoDomains(), [] if average is None else [average()]
    checkpoint = ModelCheckpoint(save_last=True)
    fitting.fit(*averages, recalibration, checkpoint, module=module, num_sanity_val_steps=0)
    inputs, _ = training_data().tensors
    for name, images in (("day", inputs), ("night", module.night(inputs))):
        with torch.no_grad():
            first = module.net[0](images)
        found = statistics(module, name)
        torch.testing.assert_close(found["1.running_mean"], first.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["1.running_var"], first.var(0), rtol=1e-4, atol=1e-5)
    assert {layer.name for layer in recalibration.report.layers} == {
        f"net.{place}@{name}" for place in (1, 4) for name in ("day", "night")
    }
    if when == "fit_end":
        path = Path(checkpoint.last_model_path).with_stem("last-recalibrated")
        saved = TwoDomains()
        saved.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        found = statistics(saved, "night")["1.running_mean"]
        torch.testing.assert_close(found, saved.net[0](module.night(inputs)).mean(0), rtol=1e-4, atol=1e-5)


class BreaksAtTheEnd(TwoDomains):
    broken = False

    def on_train_epoch_end(self) -> None:
        self.broken = self.current_epoch == 1


def test_a_failure_in_one_set_leaves_all_as_they_were() -> None:
    """All or nothing, over the sets too: the first one has its statistics back where the user's function fails in the
    second."""

    def forward(module: BreaksAtTheEnd, batch: Any) -> None:
        if module.sets.active == "night" and module.broken:
            raise ZeroDivisionError
        module(batch[0])

    plain, _ = fitting.fit(module=BreaksAtTheEnd())
    module = BreaksAtTheEnd()
    recalibration = BatchNormRecalibration(sets={"day": loader(16), "night": night_loader()}, forward=forward)
    with pytest.raises(ZeroDivisionError):
        fitting.fit(recalibration, module=module)
    assert module.broken
    for name in module.sets.names:
        for key, value in statistics(plain, name).items():
            assert torch.equal(statistics(module, name)[key], value), key


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sets": {}}, TypeError, "no loader by the name"),
        ({"sets": ["day"]}, TypeError, "no loader by the name"),
        ({"sets": {"day": iter([])}}, TypeError, "used up"),
        ({"sets": {"day": None}, "dataloader": []}, ValueError, "in sets"),
    ],
)
def test_wrong_sets_of_a_recalibration(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """Said at once."""
    with pytest.raises(error, match=text):
        BatchNormRecalibration(**options)


def test_sets_that_the_module_has_not() -> None:
    """Said at the start of the fit."""
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match=r"it has \['day', 'night'\]"):
        fitting.fit(BatchNormRecalibration(sets={"dusk": None}), module=TwoDomains())


def test_recalibrate_writes_the_set_in_use() -> None:
    """And no other; rollback writes the same one, wherever it is called, and `recalibrated` too."""
    module = TwoDomains()
    images = training_data().tensors[0]
    before = {name: statistics(module, name) for name in module.sets.names}
    with module.sets.use("night"):
        report = recalibrate(module, [images], progress=False)
    mean = module.net[0](images).mean(0)
    torch.testing.assert_close(statistics(module, "night")["1.running_mean"], mean)
    assert torch.equal(statistics(module, "day")["1.running_mean"], before["day"]["1.running_mean"])
    report.rollback()
    with module.sets.use("night"), recalibrated(module, [images], progress=False):
        torch.testing.assert_close(module.net[1].running_mean, mean)
    for name, values in before.items():
        for key, value in values.items():
            assert torch.equal(statistics(module, name)[key], value)


def test_recalibrate_leaves_out_forwards_of_other_sets() -> None:
    """A forward that uses another set on its way is measured where it uses the set in place; with exact=True it is
    refused."""

    class Both(TwoDomains):
        def forward(self, inputs: Tensor) -> Tensor:
            with self.sets.use("night"):
                other = super().forward(self.night(inputs))
            return super().forward(inputs) + other

    module, images = Both(), training_data().tensors[0]
    before = statistics(module, "night")
    recalibrate(module, [images], progress=False)
    torch.testing.assert_close(module.net[1].running_mean, module.net[0](images).mean(0))
    assert torch.equal(statistics(module, "night")["1.running_mean"], before["1.running_mean"])
    with pytest.raises(ValueError, match="uses the set 'night'"):
        recalibrate(module, [images, images], exact=True, progress=False)


@pytest.mark.parametrize("second_first", [False, True])
@pytest.mark.parametrize("windowed", [False, True])
def test_the_monitor_gives_a_row_its_set(windowed: bool, second_first: bool) -> None:
    """A layer has a row for each set, and its drift is that of the set between batches."""
    monitors = []
    for shift in (5.0, 50.0):

        class Shifted(TwoDomains):
            def night(self, inputs: Tensor, shift: float = shift) -> Tensor:
                return inputs.detach() * 3 + shift

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return super().training_step(batch, batch_idx) * 0.0

        monitor = ActivationStatsMonitor(every_n_steps=1, heatmaps=False, verbose=False)
        fitting.fit(monitor, module=Shifted(windowed=windowed, second_first=second_first), max_epochs=1, val=None)
        monitors.append(monitor)
    tables = [monitor.table() for monitor in monitors]
    assert {"net.1", "net.1@night", "net.4@night"} <= {row["layer"] for row in tables[0]}
    one, other = ([row["drift_mean"] for row in table if row["layer"] == "net.1"] for table in tables)
    assert one == pytest.approx(other, nan_ok=True)
    assert not all(value != value for value in one)


def test_the_page_gives_a_row_its_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's map has a row for each set, with what that set was given, and knows what kind of layer it is of."""
    monkeypatch.chdir(tmp_path)
    monitor = ActivationStatsMonitor(every_n_steps=1, heatmaps=False, verbose=False)
    fitting.fit(monitor, module=TwoDomains(), max_epochs=1, val=None)
    journal = JournalReader.of_file(tmp_path / "lightning_bn.jsonl")
    layers = {each["name"]: each for each in overview_of(journal, "run", str(tmp_path), 0.0)["layers"]}
    of_first, of_night = layers["net.1"], layers["net.1@night"]
    assert {**of_first, "name": ""} == {**of_night, "name": ""}
    assert of_first.keys() > {"name"}
    shown = layer_of(journal, "net.1@night")["mean"]["train"]["values"]
    expected = [row["mean"] for row in monitor.table() if row["layer"] == "net.1@night"]
    assert shown == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("windowed", [False, True])
def test_averages_are_compared_on_the_first_set(windowed: bool) -> None:
    """What `CompareAverages` follows beside a layer is what that layer averages between batches, without the batches of
    other sets."""
    scores = []
    for uses_night in (True, False):

        class Maybe(TwoDomains):
            def training_step(self, batch: Any, batch_idx: int, uses_night: bool = uses_night) -> Tensor:
                if uses_night:
                    with self.sets.use("night"), torch.no_grad():
                        self(self.night(batch[0]))
                return F.cross_entropy(self(batch[0]), batch[1])

        compare = CompareAverages({"window": Window(3)}, recalibrated=False, batch=False)
        with fitting.quiet():
            fitting.fit(compare, module=Maybe(windowed=windowed), num_sanity_val_steps=0)
        scores.append(compare.metrics["window"]["val_loss"])
    assert scores[0] == scores[1]


def test_a_fit_is_resumed_with_every_set(tmp_path: Path) -> None:
    """Windows of both sets go on where they were: the resumed fit ends with the same weights and statistics."""
    whole, _ = fitting.fit(module=TwoDomains(affine=True, windowed=True), max_epochs=2, train=loader(8, shuffle=False))
    half, trainer = fitting.fit(
        module=TwoDomains(affine=True, windowed=True), max_epochs=1, train=loader(8, shuffle=False)
    )
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fitting.fit(
        module=TwoDomains(affine=True, windowed=True),
        max_epochs=2,
        train=loader(8, shuffle=False),
        ckpt_path=tmp_path / "half.ckpt",
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert half is not resumed
