"""How the public names are called: what they take, alike everywhere, what they refuse, and how they show themselves."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
import torch
from torch import nn

import lightning_bn
from lightning_bn import (
    ActivationStatsMonitor,
    BatchNorm2d,
    BatchNormRecalibration,
    BatchNormSync,
    CompareAverages,
    ConvertBatchNorm,
    Exponential,
    ModeCheck,
    Window,
    check,
    convert_batch_norm,
    recalibrate,
    to_torch,
)
from lightning_bn.choices import as_patterns, is_chosen

CHOICES: list[Any] = [
    "backbone.1",
    ["backbone.1"],
    "backb*.1",
    ["nothing", "backbone.?"],
    nn.BatchNorm1d,
    lambda name, module: name == "backbone.1",
]


class _Network(nn.Module):
    """A backbone with one batch norm, and a head with another, of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.SyncBatchNorm(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.backbone(inputs)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_means_the_same_everywhere(choice: Any) -> None:
    """A name, a pattern, a class, a function, or several: recalibrate, check and the monitor take each alike."""
    model = _Network()
    report = recalibrate(model, [torch.randn(8, 4)], layers=choice, progress=False)
    assert [layer.name for layer in report.layers] == ["backbone.1"]
    model.backbone[1].eval()
    told = [{finding.code for finding in check(model, allow_eval=allowed)} for allowed in ((), _there(choice))]
    assert told[0] - told[1]
    from lightning_bn.activations.watched_layers import select_layers

    assert "backbone.1" in select_layers(model, choice)
    assert not is_chosen(choice, "head", nn.Linear(1, 1))


def _there(choice: Any) -> Any:
    # A pattern that no module matches is an error there, which is told in tests/test_mode_check.py.
    return "backbone.?" if isinstance(choice, list) else choice


def test_patterns_of_a_class() -> None:
    """A class becomes the names of its modules."""
    assert as_patterns(_Network(), [nn.Linear, "head"]) == ("backbone.0", "head")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: ModeCheck(allow_eval=[3]), TypeError, r"ModeCheck\(allow_eval=\[3\]\): 3 is not a name"),
        (lambda: ActivationStatsMonitor(layers=3), TypeError, r"ActivationStatsMonitor\(layers=3\): 3 is not a name"),
        (lambda: recalibrate(_Network(), [], layers=3), TypeError, r"layers=3\): 3 is not a name"),
        (lambda: ActivationStatsMonitor(every_n_steps=0), ValueError, "at least 1"),
        (lambda: ActivationStatsMonitor(scalars=3), TypeError, r"Monitor\(scalars=3\): 3 is not a name"),
        (lambda: ActivationStatsMonitor(histograms=[3]), TypeError, r"Monitor\(histograms=\[3\]\): 3 is not a name"),
        (lambda: ActivationStatsMonitor(effective_rank=3), TypeError, r"Monitor\(effective_rank=3\): 3 is not a name"),
        (lambda: ModeCheck(every_n_steps=0), ValueError, "at least 1"),
        (lambda: BatchNormRecalibration(every_n_epochs=0), ValueError, "at least 1"),
        (lambda: BatchNormRecalibration(when="sometimes"), ValueError, "'fit_end' or 'validation'"),
        (lambda: CompareAverages({"w": Window(2)}, mode="best"), ValueError, "'min' where a small"),
        (lambda: ConvertBatchNorm(3), TypeError, "averaging is an Averaging"),
    ],
)
def test_wrong_arguments(call: Any, error: type[Exception], said: str) -> None:
    """A wrong value is a ValueError and an object of a wrong kind a TypeError, when the object is made."""
    with pytest.raises(error, match=said) as caught:
        call()
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (ModeCheck(), "ModeCheck()"),
        (ModeCheck(action="raise", ignore=["BN305"]), "ModeCheck(action='raise', ignore=('BN305',))"),
        (ActivationStatsMonitor("layer4.*", heatmaps=False), "ActivationStatsMonitor(layers='layer4.*', "
                                                             "heatmaps=False)"),
        (BatchNormRecalibration(when="validation", mode="max"), "BatchNormRecalibration(when='validation', "
                                                                "mode='max')"),
        (CompareAverages({"w": Window(3)}), "CompareAverages(averages={'w': Window(size=3)})"),
        (ConvertBatchNorm(Window(3)), "ConvertBatchNorm(averaging=Window(size=3))"),
        (BatchNormSync(statistics_only=True), "BatchNormSync(statistics_only=True)"),
    ],
)  # fmt: skip
def test_a_callback_shows_the_call_that_makes_it(made: object, shown: str) -> None:
    """The repr is the call, without the arguments that are left at their default."""
    assert repr(made) == shown


def test_a_layer_shows_no_momentum_that_is_not_used() -> None:
    """With an averaging, the layer's own momentum is not shown; without one it is torch's repr."""
    assert "momentum" not in repr(BatchNorm2d(4, averaging=Window(20)))
    assert repr(BatchNorm2d(4, averaging=Exponential(0.2))).count("momentum") == 1
    assert repr(BatchNorm2d(4, momentum=0.3)) == repr(nn.BatchNorm2d(4, momentum=0.3))


def test_nothing_to_convert_is_warned_of() -> None:
    """A model without batch norm is returned as it is, with a warning that names its class."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.warns(
        UserWarning, match=r"convert_batch_norm\(Sequential\(...\), Window\(size=3\)\) finds no batch-norm"
    ):
        assert convert_batch_norm(model, Window(3)) is model


def test_conversions_are_typed_as_what_they_are_given() -> None:
    """A type checker knows that a ResNet comes back as a ResNet."""
    for function in (convert_batch_norm, to_torch):
        hints = get_type_hints(function)
        assert hints["return"] is hints["module"]


def test_reports_and_findings_in_a_notebook() -> None:
    """A notebook shows a table, in which names of layers can't break the page."""
    model = nn.ModuleDict({"<b>": nn.BatchNorm1d(4)})
    report = recalibrate(model, [torch.randn(8, 4)], forward=lambda module, batch: module["<b>"](batch), progress=False)
    shown = report._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert shown.count("<tr>") == 2
    (finding, *_) = check(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.0)))
    assert f"{finding.code} {finding.level}: {finding.title}" in finding._repr_html_()
    assert "<td style" in finding._repr_html_()


def test_every_public_name_is_listed_with_the_version() -> None:
    """`dir(lightning_bn)` holds the version too."""
    assert "__version__" in dir(lightning_bn)
