"""What batch norm does, measured with the monitor on digits and drawn: the five pictures in
docs/batch-normalization.md."""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
from digits import Classifier, ConvNet, digits
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_bn import ActivationStatsMonitor, Exponential, Window, convert_batch_norm, paused_statistics

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")

DEPTH = 6
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def network(norm: bool, gain: float = 1.0) -> nn.Sequential:
    """3x3 convolutions and ReLUs, with or without a batch norm between them; weights drawn as He et al. (2015) do,
    times `gain`."""
    pl.seed_everything(0, verbose=False)
    model = nn.Sequential()
    for number in range(1, DEPTH + 1):
        convolution = nn.Conv2d(1 if number == 1 else 16, 16, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        convolution.weight.data *= gain
        model.add_module(f"conv{number}", convolution)
        if norm:
            model.add_module(f"bn{number}", nn.BatchNorm2d(16))
        model.add_module(f"relu{number}", nn.ReLU())
    return model.extend([nn.Flatten(), nn.Linear(16 * 8 * 8, 10)])


class BatchStatistics(Classifier):
    """Validates with the statistics of the validation batch itself, as training does."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        with paused_statistics(self.model):
            self.model.train()
            super().validation_step(batch, batch_idx)
            self.model.eval()


class Accuracies(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["val_acc"]))


def fit(module: pl.LightningModule, epochs: int, **watch: Any) -> tuple[list[float], pd.DataFrame]:
    """Train from seed 0; return the validation accuracy after each epoch, and the monitor's table of training."""
    accuracies, monitor = Accuracies(), ActivationStatsMonitor(every_n_steps=2, gradients=True, verbose=False, **watch)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[accuracies, monitor],
        logger=False,
        default_root_dir=tempfile.gettempdir(),  # where the monitor leaves the table of a run without a logger
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, *digits(batch_size=64))
    table = pd.DataFrame(monitor.table())
    return accuracies.values, table[table.stage == "train"]


def axes(title: str, panels: int = 1, sharey: bool = True) -> tuple[Figure, Any]:
    figure = Figure(figsize=(3.2 + 3.0 * panels, 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]


def save(figure: Figure, panel: Any, path: Path, ncols: int) -> None:
    """Save the figure with the panel's legend below all panels, where it covers no line."""
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=ncols, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=Path, default=Path("."), help="folder for the pictures, as in docs/images")
    options = parser.parse_args()
    kinds = {"without batch norm": False, "with batch norm": True}

    tables = {
        kind: fit(
            Classifier(network(norm), lr=0.1), options.epochs, layers=[r"*.bn*" if norm else r"*.conv*", nn.ReLU]
        )[1]
        for kind, norm in kinds.items()
    }

    figure, panels = axes("What each ReLU is given, while the layers before it learn: mean ± standard deviation", 2)
    for panel, (kind, table) in zip(panels, tables.items(), strict=True):
        for number in (2, 4, 6):
            row = table[table.layer == f"model.{'bn' if kinds[kind] else 'conv'}{number}"]
            panel.plot(row.step, row["mean"], label=f"layer {number}")
            panel.fill_between(row.step, row["mean"] - row["std"], row["mean"] + row["std"], alpha=0.2)
        panel.set(title=kind, xlabel="training step")
    save(figure, panels[0], options.images / "bn_shift.png", ncols=3)

    figure, (panel,) = axes("Which learning rates still train")
    print(f"{'learning rate':<20}" + "".join(f"{rate:>8g}" for rate in RATES))
    for kind, norm in kinds.items():
        found = [fit(Classifier(network(norm), lr=rate), options.epochs)[0][-1] for rate in RATES]
        print(f"{kind:<20}" + "".join(f"{accuracy:>8.3f}" for accuracy in found))
        panel.plot(RATES, found, "o-", label=kind)
    panel.set(xscale="log", xlabel="learning rate", ylabel=f"accuracy after {options.epochs} epochs", ylim=(0, 1))
    save(figure, panel, options.images / "bn_learning_rates.png", ncols=2)

    figure, (panel,) = axes("Gradient at the output of each ReLU, at the first step")
    print(f"\n{'gradient scale':<38}" + "".join(f"{'relu' + str(number):>9}" for number in range(1, DEPTH + 1)))
    for kind, norm in kinds.items():
        for gain, colour in ((0.5, "tab:blue"), (1.0, "tab:green"), (2.0, "tab:red")):
            table = fit(Classifier(network(norm, gain), lr=0.0), 1)[1]
            first = table[(table.step == 0) & table.layer.str.contains("relu")].grad_std
            title = f"{kind}, first weights x {gain:g}"
            print(f"{title:<38}" + "".join(f"{value:>9.1e}" for value in first))
            panel.plot(
                range(1, DEPTH + 1),
                first,
                "-" if norm else "o:",
                color=colour,
                label=title,
                linewidth=1 + 2 * norm * (2 - gain),
            )
    panel.set(yscale="log", xlabel="layer, from the input to the output", ylabel="standard deviation")
    save(figure, panel, options.images / "bn_gradients.png", ncols=2)

    # A larger rate, at which scale and shift learn enough to be seen.
    tables["with batch norm"] = fit(Classifier(network(True), lr=0.3), options.epochs)[1]
    figure, panels = axes("Share of each ReLU's inputs that are below zero, and the learned shift", 3, sharey=False)
    print(f"\n{'share below zero':<20}{'first step':>12}{'last step, least':>20}{'largest':>10}")
    for panel, (kind, table) in zip(panels, tables.items(), strict=False):
        share = table[table.layer.str.contains("relu")].pivot(index="step", columns="layer", values="zero_fraction")
        print(f"{kind:<20}{share.iloc[0].median():>12.3f}{share.iloc[-1].min():>20.3f}{share.iloc[-1].max():>10.3f}")
        panel.plot(share.index, share, label=[name.replace("model.relu", "layer ") for name in share.columns])
        panel.axhline(0.5, color="black", linestyle=":")
        panel.set(title=kind, xlabel="training step", ylim=(0, 1))
    trained = tables["with batch norm"]
    for number in range(1, DEPTH + 1):
        row = trained[trained.layer == f"model.bn{number}"]
        (line,) = panels[2].plot(row.step, row.bias_min)
        panels[2].plot(row.step, row.bias_max, color=line.get_color())
    panels[2].set(title="least and greatest shift of each layer", xlabel="training step")
    save(figure, panels[0], options.images / "bn_relu.png", ncols=6)

    figure, (panel,) = axes("The same training, evaluated with other statistics")
    averages = {
        "exponential, momentum 0.1": Exponential(0.1),
        "exponential, momentum 0.01": Exponential(0.01),
        "window of 20": Window(20),
    }
    print(f"\n{'evaluated with':<28}accuracy after each epoch")
    for title in ("the batch's own", *averages):
        pl.seed_everything(0, verbose=False)
        model = convert_batch_norm(ConvNet(), averages.get(title))
        kind = Classifier if title in averages else BatchStatistics
        found = fit(kind(model, lr=0.5), 2 * options.epochs)[0]
        print(f"{title:<28}" + " ".join(f"{accuracy:.3f}" for accuracy in found))
        panel.plot(range(1, len(found) + 1), found, "o-", label=title)
    panel.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1))
    save(figure, panel, options.images / "bn_statistics.png", ncols=2)


if __name__ == "__main__":
    main()
