"""One pass: what goes in, and which layers."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass

import oracles
import pytest
import torch
from recalibration_models import close, estimate, everything, three
from states import as_bytes, norms
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_bn
from lightning_bn import Window, convert_batch_norm, recalibrate

# --- what goes in
# ---------------------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "image label")


@dataclass
class Sample:
    image: Tensor
    label: Tensor


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn(image * scale)


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, "label"], None),
        (lambda x: {"image": x}, None),
        (lambda x: {"image": x / 2, "scale": 2.0}, None),
        (lambda x: Pair(x, 0), None),
        (lambda x: Pair(0, x), lambda model, batch: model(batch.label)),
        (lambda x: Sample(x, torch.zeros(1)), lambda model, batch: model(batch.image)),
        (lambda x: {"deep": [{"x": x}]}, lambda model, batch: model(batch["deep"][0]["x"])),
    ],
)
def test_a_batch_of_any_form_goes_in(wrap, forward) -> None:
    """Tensors, tuples, lists and mappings by themselves; all else by `forward`; the statistics are those of the
    data."""
    data = torch.randn(20, 3) * 2 + 5
    model = Named()
    estimate(model, [wrap(part) for part in data.split(8)], forward=forward)
    close(model.bn, *oracles.mean_and_unbiased_variance(oracles.channels(data)))


@pytest.mark.parametrize(
    "batch", [{"picture": torch.zeros(4, 3)}, Sample(torch.zeros(4, 3), torch.zeros(4)), (), "text", 3]
)
def test_a_batch_that_does_not_fit_names_forward(batch: object) -> None:
    """The error shows the argument that says how a batch goes in, and nothing is changed."""
    model = Named()
    before = everything(model)
    with pytest.raises(TypeError, match="forward=lambda model, batch"):
        estimate(model, [batch])
    assert before == everything(model)


@pytest.mark.parametrize("batches", [torch.zeros(4, 3), {"image": torch.zeros(4, 3)}, "text", 3, None])
def test_one_batch_in_place_of_batches_is_told(batches: object) -> None:
    """A bare tensor or mapping would be walked row by row or key by key: it is refused with the call to make."""
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        estimate(Named(), batches)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(30.0).reshape(10, 3)


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Stream(), 4), lambda: iter(Stream()), lambda: (x.expand(2, 3) for x in Stream())]
)
def test_loaders_without_length_and_iterators_serve(make) -> None:
    """Whatever can be iterated over will do; the bar does without a total."""
    model = Named()
    batches = make()
    report = recalibrate(model, batches, forward=lambda model, batch: model(batch.reshape(-1, 3)))
    assert report.samples >= 10
    assert model.bn.num_batches_tracked == 0


def test_no_more_batches_are_drawn_than_asked_for() -> None:
    """`num_batches` reads exactly that many, also off an iterator that goes on."""
    stream = iter(torch.randn(10, 4, 3))
    report = estimate(Named(), stream, num_batches=4)
    assert (report.batches, report.stopped_by, len(list(stream))) == (4, "num_batches", 6)


def test_a_short_loader_is_used_up_and_the_report_says_so() -> None:
    """Fewer batches than asked for are no error, and no secret."""
    report = estimate(Named(), torch.randn(3, 4, 3).unbind(), num_batches=200)
    assert (report.batches, report.stopped_by) == (3, "end")
    assert "ended before the 200 batches" in str(report)
    assert "ended before" not in str(estimate(Named(), torch.randn(3, 4, 3).unbind(), num_batches=3))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("batches", "forward", "told"),
    [
        ([], None, "batches is empty"),
        (iter(()), None, "batches is empty"),
        ([torch.randn(4, 3)], lambda model, batch: batch, "ran in 1 batches"),
        ([torch.full((4, 3), math.nan)], None, "none of the 1 batches gave finite"),
        ([torch.randn(1, 3)], None, "one value per channel"),
    ],
)
def test_a_pass_that_tells_nothing_raises_and_changes_nothing(batches, forward, told: str, exact: bool) -> None:
    """No batches, no layer that ran, nothing finite, a single value: an error that says which."""
    model = Named()
    before = everything(model)
    with pytest.raises(ValueError, match=told):
        estimate(model, batches, forward=forward, exact=exact)
    assert before == everything(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_batches": 0},
        {"num_batches": 2.5},
        {"num_batches": True},
        {"tolerance": 0.0},
        {"tolerance": math.nan},
        {"prior": -1.0},
        {"prior": math.nan},
        {"exact": True, "tolerance": 0.1},
        {"layers": [3]},
        {"layers": "some"},
    ],
)
def test_a_wrong_argument_is_shown_in_its_call(wrong: dict[str, object]) -> None:
    """It raises before a batch is drawn."""
    stream = iter([torch.randn(4, 3)])
    with pytest.raises((ValueError, TypeError), match=r"recalibrate\(.*" + next(iter(wrong))):
        estimate(Named(), stream, **wrong)
    assert len(list(stream)) == 1


def test_inputs_are_moved_to_the_model(device: torch.device) -> None:
    """Batches come on the CPU and the model may be elsewhere."""
    model = Named().to(device)
    data = torch.randn(20, 3)
    estimate(model, [{"image": part} for part in data.split(8)])
    close(model.bn.cpu(), *oracles.mean_and_unbiased_variance(oracles.channels(data)))


# --- which layers
# ---------------------------------------------------------------------------------------------------------------------


class Permuted(nn.BatchNorm1d):
    """A subclass for (N, L, C), channels last."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class PermutedOurs(lightning_bn.BatchNorm1d):
    """Likewise, of this package's layer."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class WithActivation(nn.BatchNorm2d):
    """A subclass with a forward of its own, as timm's BatchNormAct2d."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        training = self.training or (self.running_mean is None and self.running_var is None)
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        buffers = (
            (self.running_mean, self.running_var) if not self.training or self.track_running_stats else (None, None)
        )
        return self.act(
            nn.functional.batch_norm(input, *buffers, self.weight, self.bias, training, self.momentum, self.eps)
        )


class Deaf(nn.BatchNorm1d):
    """A subclass whose training forward never writes its buffers."""

    def forward(self, input: Tensor) -> Tensor:
        return input * self.running_var.rsqrt()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "channel"),
    [
        (lambda: nn.BatchNorm1d(3), (12, 3), 1),
        (lambda: nn.BatchNorm1d(3), (12, 3, 5), 1),
        (lambda: nn.BatchNorm2d(3, affine=False), (12, 3, 2, 5), 1),
        (lambda: nn.BatchNorm3d(3, momentum=None), (12, 3, 2, 2, 2), 1),
        (lambda: nn.BatchNorm2d(3, momentum=0.0), (12, 3, 2, 5), 1),
        (lambda: nn.SyncBatchNorm(3), (12, 3, 2, 5), 1),
        (lambda: lightning_bn.BatchNorm2d(3), (12, 3, 2, 5), 1),
        (lambda: lightning_bn.BatchNorm2d(3, averaging=Window(4)), (12, 3, 2, 5), 1),
        (lambda: lightning_bn.BatchNorm1d(3, averaging=lightning_bn.Exponential(0.2, pooled=True)), (12, 3), 1),
        (lambda: WithActivation(3), (12, 3, 2, 5), 1),
        (lambda: convert_batch_norm(WithActivation(3), Window(4)), (12, 3, 2, 5), 1),
        (lambda: convert_batch_norm(nn.SyncBatchNorm(3), Window(4)), (12, 3, 2, 5), 1),
        (lambda: Permuted(3), (12, 7, 3), 2),
        (lambda: PermutedOurs(3, averaging=Window(4)), (12, 7, 3), 2),
        (lambda: PermutedOurs(3, momentum=0.3), (12, 7, 3), 2),
    ],
)
def test_every_kind_of_layer_gets_the_statistics_of_its_input(
    layer, shape: tuple[int, ...], channel: int, exact: bool
) -> None:
    """Torch's, synchronised, this package's, other people's; and all but the two buffers is as before."""
    model = nn.Sequential(layer())
    model(torch.randn(shape))  # a history that must stay
    data = torch.randn(shape) * 3 + 4
    before = everything(model)
    report = estimate(model, data.split(5), exact=exact)
    close(model[0], *oracles.mean_and_unbiased_variance(oracles.channels(data.movedim(channel, 1))))
    assert report.layers[0].kind == type(model[0]).__name__
    report.rollback()
    assert before == everything(model)


def test_a_layer_that_hides_its_statistics_is_named() -> None:
    """A forward that leaves nothing in the buffers can't be measured; the error says how to leave it out."""
    model = nn.Sequential(Deaf(3))
    data = [torch.rand(4, 2, 3)]
    before = everything(model)
    with pytest.raises(TypeError, match="Deaf's forward does not leave"):
        estimate(model, data)
    assert before == everything(model)


def test_a_mask_that_the_forward_passes_counts() -> None:
    """Padding is in no statistic; a batch that is all padding adds nothing."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = lightning_bn.BatchNorm1d(2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, mask=mask)

    data, mask = torch.randn(9, 2, 6) + 3, torch.rand(9, 6) < 0.6
    padded = torch.where(mask.unsqueeze(1), data, math.nan)
    batches = [{"x": x, "mask": m} for x, m in zip(padded.split(2), mask.split(2), strict=True)]
    batches.append({"x": padded[:2], "mask": torch.zeros(2, 6, dtype=torch.bool)})
    for exact in (False, True):
        model = Masked()
        report = estimate(model, batches, exact=exact)
        close(model.bn, *oracles.mean_and_unbiased_variance(data.movedim(1, -1)[mask].double().numpy()))
        assert (report.skipped, report.layers[0].batches) == (0, 5)


def moved(model: nn.Module) -> list[str]:
    return [name for name, layer in norms(model).items() if layer.track_running_stats and layer.running_mean.any()]


def test_frozen_layers_are_left_alone() -> None:
    """By default: affine parameters without grad, and eval mode in a model that trains; in a model in eval mode the
    flag tells nothing."""
    data = [torch.randn(8, 2) + 1]
    for training, expected in ((True, ["2"]), (False, ["1", "2"])):
        model = three().train(training)
        model[0].requires_grad_(False)
        model[1].eval()
        report = estimate(model, data)
        assert moved(model) == expected == [layer.name for layer in report.layers]
        assert not model[0].weight.requires_grad


def test_a_layer_without_affine_parameters_is_not_frozen() -> None:
    """It has none that could learn, and is recalibrated with the layers around it."""
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    estimate(model, [torch.randn(8, 2) + 1])
    assert moved(model) == ["0"]


def test_layers_says_which() -> None:
    """ "all" has the frozen ones too; a predicate is asked name and module; untracked layers are never among them."""
    data = [torch.randn(8, 2) + 1]
    for layers, expected in (
        ("all", ["0", "1", "2"]),
        (lambda name, module: name in "12" and module.affine, ["1", "2"]),
    ):
        model = three()
        model.append(nn.BatchNorm1d(2, track_running_stats=False))
        model.requires_grad_(False)
        estimate(model, data, layers=layers)
        assert moved(model) == expected


def test_all_frozen_names_the_argument() -> None:
    """The error says which argument to pass; so does a predicate that is never true, and a model without batch norm."""
    with pytest.raises(ValueError, match="layers='all'"):
        estimate(three().requires_grad_(False), [torch.randn(8, 2)])
    with pytest.raises(ValueError, match="means none of the 3"):
        estimate(three(), [torch.randn(8, 2)], layers=lambda name, module: False)
    with pytest.raises(ValueError, match="no batch-norm layer"):
        estimate(nn.Linear(2, 2), [torch.randn(8, 2)])
    with pytest.raises(TypeError, match="lazy"):
        estimate(nn.LazyBatchNorm1d(), [torch.randn(8, 2)])


def test_layers_left_in_eval_mode_are_not_called_frozen() -> None:
    """Where their parameters learn, the error asks whether the mode was meant; where none does, it says frozen."""
    model = three()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with pytest.raises(ValueError, match=r"can learn, but are in eval mode .* call model\.train\(\) first"):
        estimate(model, [torch.randn(8, 2)])
    with pytest.raises(ValueError, match="are frozen: none of their parameters requires grad"):
        estimate(model.requires_grad_(False), [torch.randn(8, 2)])


def test_a_layer_that_did_not_run_keeps_its_statistics_and_is_listed() -> None:
    """Zeros in place of what it had would be a silent ruin."""
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "idle": nn.BatchNorm1d(2)})
    model["idle"].running_mean.fill_(7.0)
    before = as_bytes(model["idle"].running_mean)
    report = estimate(model, [torch.randn(8, 2)], forward=lambda model, batch: model["used"](batch))
    assert report.not_run == ("idle",)
    assert as_bytes(model["idle"].running_mean) == before
    assert "Not run, unchanged: idle" in str(report)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_layer_that_is_called_twice_is_merged_over_its_calls(pooled: bool) -> None:
    """Also where it is registered under two names; the calls of one batch count as one batch."""
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"one": shared, "two": shared})
    data = torch.randn(15, 2) + 2
    report = estimate(model, data.split(6), forward=lambda m, x: (m["one"](x), m["two"](x * 3)), pooled=pooled)
    both = [oracles.channels(torch.cat((x, x * 3))) for x in data.split(6)]
    close(shared, *oracles.cumulative(both, pooled))
    assert [(layer.name, layer.samples, layer.batches) for layer in report.layers] == [("one", 30, 3)]
    assert report.samples == 15
