"""What a reader of TensorBoard finds, read back from real event files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from fitting import fit
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from small_models import Small
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_bn import ActivationStatsMonitor
from lightning_bn.activations.column import Scale
from lightning_bn.activations.heatmap import draw_channels, draw_grid
from lightning_bn.activations.registry import COLUMNS, ENTRIES, STATISTICS
from lightning_bn.activations.report import Report, image_names, verdict_markdown
from lightning_bn.activations.sample import ABSENT, KNOWN, Sample
from lightning_bn.activations.sample_to_table import LayerTable
from lightning_bn.activations.tensor_to_moments import histogram_edges
from lightning_bn.activations.tensorboard import TensorBoardSink

pytest.importorskip("matplotlib")


TEXT = "activations/layers/text_summary"


def read(directory: Path | str) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0, "scalars": 0, "histograms": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStatsMonitor, Path, EventAccumulator]:
    """One real fit, its directory and its event file."""
    monitor = ActivationStatsMonitor(every_n_steps=2, histograms="rest.0", scalars="bn*", heatmaps=True)
    logger = TensorBoardLogger(tmp_path_factory.mktemp("runs"))
    fit(monitor, max_epochs=2, logger=logger)
    return monitor, Path(logger.log_dir), read(logger.log_dir)


def test_scalars_are_those_of_the_table(run: Any) -> None:
    """Each worst, median and layer's scalar in the event file, step by step, follows from the rows of the table."""
    monitor, _, events = run
    frame = pd.DataFrame(monitor.table())
    frame = frame[frame.layer != "input"]
    for prefix, stage in (("activations", "train"), ("activations_val", "val")):
        of_stage = frame[frame.stage == stage].astype({"zero_fraction": float, "drift_mean": float})
        for name in ("zero_fraction", "drift_mean", "std"):
            by_step = of_stage.groupby("step")[name]
            for tag, expected in (("median", by_step.median()), ("worst", by_step.max())):
                if (name, tag) != ("std", "worst"):
                    found = {event.step: event.value for event in events.Scalars(f"{prefix}/{name}/{tag}")}
                    assert found == pytest.approx(expected.to_dict(), rel=1e-6)
    steps = [event.step for event in events.Scalars("activations/std/worst")]
    assert steps == [0, 2, 4, 6, 8, 10]
    own = {event.step: event.value for event in events.Scalars("activations/std/bn1")}
    assert own == pytest.approx(
        {row["step"]: row["std"] for row in monitor.table() if (row["layer"], row["stage"]) == ("bn1", "train")}
    )
    assert "activations/std/rest.0" not in events.Tags()["scalars"]


def test_the_numbers_of_a_sample_are_one_event(run: Any) -> None:
    """An event of its own for each costs as much as a layer's sample."""
    _, directory, _ = run
    (file,) = directory.glob("events.out.*")
    tags = [[value.tag for value in event.summary.value] for event in EventFileLoader(str(file)).Load()]
    sizes = [len(each) for each in tags if any("/worst" in tag for tag in each)]
    assert len(sizes) == 6 + 2  # samples of training, and validations
    assert min(sizes) > 20


class Doubled(TensorBoardLogger):
    """A user's own, which does something to each number."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics({name: 2 * value for name, value in metrics.items()}, step)


def test_a_loggers_prefix_and_own_way_to_log_are_kept(tmp_path: Path) -> None:
    """The numbers go where the logger puts all others."""
    prefixed, doubled = TensorBoardLogger(tmp_path, "prefixed", prefix="mine"), Doubled(tmp_path, "doubled")
    fit(ActivationStatsMonitor(every_n_steps=2), max_epochs=1, logger=[prefixed, doubled])
    mine, twice = read(prefixed.log_dir), read(doubled.log_dir)
    plain = [event.value for event in mine.Scalars("mine-activations/std/median")]
    assert len(plain) > 2
    assert [event.value for event in twice.Scalars("activations/std/median")] == pytest.approx([2 * v for v in plain])


def test_every_tag_is_documented(run: Any) -> None:
    """The event file has the tags of the table in lightning_bn.activations.tensorboard and, beside the module's own, no
    others."""
    _, _, events = run
    tags = events.Tags()
    ours = [tag for tag in tags["scalars"] if tag not in ("train_loss", "val_loss", "val_acc", "epoch")]
    names = {"worst", "worst_layer", "median", "smallest", "largest", "bn1"}
    assert {tag.split("/")[0] for tag in ours} == {"activations", "activations_val"}
    assert {tag.split("/")[1] for tag in ours} <= set(COLUMNS)
    assert {tag.split("/")[2] for tag in ours} == names
    maps = {
        "std",
        "zero_fraction",
        "nonfinite",
        "drift_mean",
        "drift_var",
        "channel_mean",
        "channel_std",
    }
    assert set(tags["images"]) == {f"activations_map/{image_names()[name]}" for name in maps}
    assert set(tags["tensors"]) == {
        "custom_scalars__config__",
        "activations/layers/text_summary",
        "activations/rows/text_summary",
    }
    assert tags["histograms"] == ["activations_histogram/rest.0"]


@pytest.mark.filterwarnings("ignore:html5lib:DeprecationWarning")
def test_each_chart_shows_the_stage_that_its_panel_names(run: Any) -> None:
    """The tags that the browser asks TensorBoard for, of each panel of Custom Scalars, are of its stage and have
    data."""
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import OutputFormat, ScalarsPlugin

    _, directory, _ = run
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(directory))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(directory))
    context = TBContext(logdir=str(directory), data_provider=provider, multiplexer=multiplexer)
    scalars = ScalarsPlugin(context)
    layout = json.loads(CustomScalarsPlugin(context).layout_impl(RequestContext(), ""))
    prefixes = {"Batch norm, training": "activations/", "Batch norm, validation": "activations_val/"}
    assert [category["title"] for category in layout["category"]] == list(prefixes)
    (name,) = multiplexer.Runs()
    for category in layout["category"]:
        assert len(category["chart"]) == 6
        for chart in category["chart"]:
            (series,) = chart["margin"]["series"]
            tags = {series[part] for part in ("value", "lower", "upper")}
            assert len(tags) >= 2, "a line alone can't be told from another"
            assert all(tag.startswith(prefixes[category["title"]]) for tag in tags)
            if "dead" in chart["title"]:
                continue  # of layers of eight channels and more, which this model has not
            for tag in tags:
                points, _ = scalars.scalars_impl(RequestContext(), tag, name, "", OutputFormat.JSON)
                assert len(points) == (6 if category["title"].endswith("training") else 2)


def test_images_are_complete_at_the_end(run: Any) -> None:
    """Heat maps are drawn at the end of a run; each is a readable picture."""
    _, _, events = run
    drawn = events.Images(f"activations_map/{image_names()['std']}")
    assert [event.step for event in drawn][-1] == 10
    picture = Image.open(io.BytesIO(drawn[-1].encoded_image_string))
    assert (picture.mode, picture.size) == ("RGB", (drawn[-1].width, drawn[-1].height))


def test_the_histogram_is_of_the_sampled_activations(tmp_path: Path) -> None:
    """Counts and edges in the event file are those of the activations of that step, counted by a loop."""
    outputs: list[Tensor] = []

    class Keeps(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            handle = self.bn1.register_forward_hook(
                lambda module, args, output: outputs.append(output.detach().clone())
            )
            loss = super().training_step(batch, batch_idx)
            handle.remove()
            return loss

    logger = TensorBoardLogger(tmp_path)
    fit(
        ActivationStatsMonitor(every_n_steps=4, histograms="bn1"), module=Keeps(), max_epochs=1, logger=logger, val=None
    )
    events = read(logger.log_dir).Histograms("activations_histogram/bn1")
    assert [event.step for event in events] == [0, 4]
    edges = histogram_edges().tolist()
    for event in events:
        value = event.histogram_value
        numbers = outputs[event.step].double().flatten().tolist()
        assert value.num == len(numbers)
        below = value.min
        for limit, count in zip(value.bucket_limit, value.bucket, strict=True):
            assert count == sum(below < number <= limit for number in numbers)
            assert limit in edges
            below = limit


def test_the_csv_lies_beside_the_event_file(run: Any) -> None:
    """pandas.read_csv(...) gives monitor.table(), to six digits."""
    monitor, directory, _ = run
    found = pd.read_csv(directory / "activation_stats.csv")
    expected = pd.DataFrame(monitor.table())
    assert (found[["layer", "stage", "step", "epoch"]] == expected[["layer", "stage", "step", "epoch"]]).all(axis=None)
    np.testing.assert_allclose(found[list(COLUMNS)].to_numpy(float), expected[list(COLUMNS)].to_numpy(float), rtol=1e-5)


def test_a_sick_layer_is_named_with_its_step(tmp_path: Path) -> None:
    """The text names the layer that dies in the run and the first sampled step at which it was dead, above what was
    sick before."""

    class Dies(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 5:
                with torch.no_grad():
                    self.rest[3].weight.zero_()
                    self.rest[3].bias.fill_(-1.0)
            return super().training_step(batch, batch_idx)

    logger = TensorBoardLogger(tmp_path)
    fit(ActivationStatsMonitor(every_n_steps=2), module=Dies(lr=0.0), max_epochs=2, logger=logger, val=None)
    texts = read(logger.log_dir).Tensors("activations/layers/text_summary")
    text = next(event for event in texts if event.step == 6).tensor_proto.string_val[0].decode()
    lines = text.splitlines()
    assert any(
        line.startswith("- Sick: rest.3: share of affine weights near zero 1 (limit 0.5) at step 6") for line in lines
    )
    assert "| `rest.4` | share of activations that are zero | 6 |  | 1 | 0.95 |" in lines


def test_a_large_run_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 layers, half of them batch norms, 10,000 steps at the default interval, the values pure noise: under 60 tags
    and 30 MB."""
    pictures: dict[str, Any] = {}
    # The last picture of each statistic, the largest, stands for all of them: they are as many and as large, and drawn
    # once.
    monkeypatch.setattr("lightning_bn.activations.report.draw_grid", lambda grid, statistic: pictures[statistic.name])
    monkeypatch.setattr("lightning_bn.activations.report.draw_channels", lambda *args: pictures["channels"])
    generator = np.random.default_rng(0)
    layers = [f"model.layer{place // 50}.{place}.{'relu' if place % 2 else 'bn'}" for place in range(200)]

    is_relu = np.array([layer.endswith("relu") for layer in layers])
    states = np.full((len(layers), len(COLUMNS)), KNOWN, dtype=np.int8)
    for column, entry in enumerate(ENTRIES):
        # None by default, none without sigmoids, none but of the input.
        optional = ("saturated_fraction", "constant_channels", "effective_rank")
        if entry.of in ("gradient", "given", "weight") or entry.name in optional:
            states[:, column] = ABSENT
        elif entry.of == "norm":
            states[is_relu, column] = ABSENT
        elif entry.name in ("zero_fraction", "dead_fraction", "died_channels"):
            states[~is_relu, column] = ABSENT

    def sample() -> Sample:
        # So wide that pictures hardly compress, and no wider: thousands of episodes would be another test.
        values = np.where(states == KNOWN, np.exp(0.2 * generator.normal(size=states.shape)), np.nan)
        channels = {layer: (torch.randn(64).numpy(), torch.rand(64).numpy()) for layer in layers}
        return Sample(tuple(layers), tuple(layers), values, states, lambda: channels)

    table = LayerTable()
    samples = [sample() for _ in range(200)]
    for place, each in enumerate(samples):
        table.append("train", 50 * place, 0, each)
    for name in ("std", "zero_fraction", "dead_fraction", "nonfinite", "drift_mean", "drift_var"):
        pictures[name] = draw_grid(table.grid("train", name), STATISTICS[name])
    noise = [generator.normal(size=64) for _ in layers]
    pictures["channels"] = draw_channels(layers, noise, Scale(-3, 3, "RdBu_r", "unit"), "Channels")

    from lightning_bn.activations.sample_to_table import scalars

    table = LayerTable()
    writer = SummaryWriter(str(tmp_path))
    report = Report([TensorBoardSink(writer)])
    for place, each in enumerate(samples):
        for stage in ("train", "val") if place % 10 == 9 else ("train",):
            table.append(stage, 50 * place, 0, each)
            table.append_csv(tmp_path / "activation_stats.csv")
            prefix = "activations" if stage == "train" else "activations_val"
            for name, value in scalars(each).items():
                writer.add_scalar(f"{prefix}/{name}", value, 50 * place)
            if stage == "train":
                report.update(table, each, 50 * place)
    report.draw(table, samples[-1], 9950)
    writer.close()
    tags = read(tmp_path).Tags()
    assert sum(len(found) for found in tags.values() if isinstance(found, list)) < 60
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 30e6


def test_text_of_a_healthy_run() -> None:
    """Where nothing is sick the text says so, and still names the worst layers."""
    table = LayerTable()
    sample = Sample.of({"a": {"std": 1.0}, "b": {"std": 2.0, "kurtosis": 2.0}})
    table.append("train", 1500, 3, sample)
    text = verdict_markdown(table, sample)
    assert "**Step 1,500.**\n\n- Healthy: 2 layers were within their limits at 1 sample of training." in text
    assert "| standard deviation of the activations | `b` | 2 | 1e-07 to 1000 |" in text
    assert "| kurtosis of the channels' root mean squares | `b` | 2 | none |" in text


def test_a_row_that_a_last_validation_adds_has_its_number_told() -> None:
    """Its scalars of that validation name it by that number."""
    told: list[str] = []
    sink = SimpleNamespace(text=lambda tag, markdown, step: told.append(markdown) if tag == "on/rows" else None)
    table, report = LayerTable(), Report([sink], prefix="on", heatmaps=False)
    trained, validated = (Sample.of({name: {"std": 1.0} for name in names}) for names in ("a", "ab"))
    table.append("train", 0, 0, trained)
    report.update(table, trained, 0)
    table.append("val", 0, 0, validated)
    report.finish(table, trained, 0)
    assert ["| 1 | `b` |" in text for text in told] == [False, True]


def test_heat_maps_can_be_left_out(tmp_path: Path) -> None:
    """heatmaps=False draws nothing, and matplotlib is not needed."""
    logger = TensorBoardLogger(tmp_path)
    fit(ActivationStatsMonitor(every_n_steps=1, heatmaps=False), max_epochs=1, logger=logger)
    assert read(logger.log_dir).Tags()["images"] == []


def test_the_page_stands_for_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default TensorBoard gets heat maps where its tab can't be shown, for want of plotly, and only there."""
    for folder, is_there in (("page", True), ("no_page", False)):
        monkeypatch.setattr("lightning_bn.callbacks.loggers.plotly_file", lambda found=is_there: found or None)
        logger = TensorBoardLogger(tmp_path / folder)
        fit(ActivationStatsMonitor(every_n_steps=2), max_epochs=1, logger=logger)
        assert (read(logger.log_dir).Tags()["images"] == []) is is_there


class Recovers(Small):
    """Its first norm gives its ReLU nothing but negative values for three steps."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.bn1.bias.fill_(-100.0 if 4 <= self.global_step < 7 else 0.0)
        return super().training_step(batch, batch_idx)


def test_the_text_is_never_stale(tmp_path: Path) -> None:
    """The last text of a run is its verdict at the end, also where all that has changed is that a layer recovered; and
    a run in which nothing changes gets one text, however long it is."""
    logger = TensorBoardLogger(tmp_path)
    monitor = ActivationStatsMonitor(every_n_steps=1, verbose=False)
    fit(monitor, module=Recovers(lr=0.0), max_epochs=3, logger=logger, val=None)
    assert monitor.verdict()[0].startswith("Was sick")
    texts = [event.tensor_proto.string_val[0].decode() for event in read(logger.log_dir).Tensors(TEXT)]
    assert f"- {monitor.verdict()[0]}" in texts[-1]
    logger = TensorBoardLogger(tmp_path / "healthy")
    fit(ActivationStatsMonitor(every_n_steps=1), module=Small(lr=0.0), max_epochs=6, logger=logger, val=None)
    assert len(read(logger.log_dir).Tensors(TEXT)) == 1


def test_what_was_seen_is_drawn_when_a_run_breaks(tmp_path: Path) -> None:
    """After an exception the heat maps show all samples up to it."""

    class Breaks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise RuntimeError("stop")

    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        fit(ActivationStatsMonitor(every_n_steps=1, heatmaps=True), Breaks(), logger=logger, val=None)
    assert [event.step for event in read(logger.log_dir).Images(f"activations_map/{image_names()['std']}")][-1] == 5
