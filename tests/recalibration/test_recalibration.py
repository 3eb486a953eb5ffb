"""One pass: what goes in, which layers, the figures, and the report."""

from __future__ import annotations

import copy
import json
import math
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass

import oracles
import pytest
import torch
from digits import ConvNet, digits
from recalibration_models import as_bytes, cnn, everything, largest_errors, mlp, norms, statistics
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_bn
from lightning_bn import RecalibrationReport, Window, convert_batch_norm, recalibrate, recalibrated


def quiet(model: nn.Module, batches: object, **options: object) -> RecalibrationReport:
    return recalibrate(model, batches, progress=False, **options)  # type: ignore[arg-type]


def close(layer: nn.Module, mean: object, var: object, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(layer.running_mean.double(), torch.as_tensor(mean), rtol=rtol, atol=rtol)
    torch.testing.assert_close(layer.running_var.double(), torch.as_tensor(var), rtol=rtol, atol=rtol)


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
    quiet(model, [wrap(part) for part in data.split(8)], forward=forward)
    close(model.bn, *oracles.mean_and_unbiased_variance(oracles.channels(data)))


@pytest.mark.parametrize(
    "batch", [{"picture": torch.zeros(4, 3)}, Sample(torch.zeros(4, 3), torch.zeros(4)), (), "text", 3]
)
def test_a_batch_that_does_not_fit_names_forward(batch: object) -> None:
    """The error shows the argument that says how a batch goes in, and nothing is changed."""
    model = Named()
    before = everything(model)
    with pytest.raises(TypeError, match="forward=lambda model, batch"):
        quiet(model, [batch])
    assert before == everything(model)


@pytest.mark.parametrize("batches", [torch.zeros(4, 3), {"image": torch.zeros(4, 3)}, "text", 3, None])
def test_one_batch_in_place_of_batches_is_told(batches: object) -> None:
    """A bare tensor or mapping would be walked row by row or key by key: it is refused with the call to make."""
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        quiet(Named(), batches)


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
    report = quiet(Named(), stream, num_batches=4)
    assert (report.batches, report.stopped_by, len(list(stream))) == (4, "num_batches", 6)


def test_a_short_loader_is_used_up_and_the_report_says_so() -> None:
    """Fewer batches than asked for are no error, and no secret."""
    report = quiet(Named(), torch.randn(3, 4, 3).unbind(), num_batches=200)
    assert (report.batches, report.stopped_by) == (3, "end")
    assert "ended before the 200 batches" in str(report)
    assert "ended before" not in str(quiet(Named(), torch.randn(3, 4, 3).unbind(), num_batches=3))


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
        quiet(model, batches, forward=forward, exact=exact)
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
        quiet(Named(), stream, **wrong)
    assert len(list(stream)) == 1


def test_inputs_are_moved_to_the_model(device: torch.device) -> None:
    """Batches come on the CPU and the model may be elsewhere."""
    model = Named().to(device)
    data = torch.randn(20, 3)
    quiet(model, [{"image": part} for part in data.split(8)])
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
    report = quiet(model, data.split(5), exact=exact)
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
        quiet(model, data)
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
        report = quiet(model, batches, exact=exact)
        close(model.bn, *oracles.mean_and_unbiased_variance(data.movedim(1, -1)[mask].double().numpy()))
        assert (report.skipped, report.layers[0].batches) == (0, 5)


def three() -> nn.Sequential:
    return nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(3)])


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
        report = quiet(model, data)
        assert moved(model) == expected == [layer.name for layer in report.layers]
        assert not model[0].weight.requires_grad


def test_a_layer_without_affine_parameters_is_not_frozen() -> None:
    """It has none that could learn, and is recalibrated with the layers around it."""
    model = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    quiet(model, [torch.randn(8, 2) + 1])
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
        quiet(model, data, layers=layers)
        assert moved(model) == expected


def test_all_frozen_names_the_argument() -> None:
    """The error says which argument to pass; so does a predicate that is never true, and a model without batch norm."""
    with pytest.raises(ValueError, match="layers='all'"):
        quiet(three().requires_grad_(False), [torch.randn(8, 2)])
    with pytest.raises(ValueError, match="means none of the 3"):
        quiet(three(), [torch.randn(8, 2)], layers=lambda name, module: False)
    with pytest.raises(ValueError, match="no batch-norm layer"):
        quiet(nn.Linear(2, 2), [torch.randn(8, 2)])
    with pytest.raises(TypeError, match="lazy"):
        quiet(nn.LazyBatchNorm1d(), [torch.randn(8, 2)])


def test_layers_left_in_eval_mode_are_not_called_frozen() -> None:
    """Where their parameters learn, the error asks whether the mode was meant; where none does, it says frozen."""
    model = three()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    with pytest.raises(ValueError, match=r"can learn, but are in eval mode .* call model\.train\(\) first"):
        quiet(model, [torch.randn(8, 2)])
    with pytest.raises(ValueError, match="are frozen: no affine parameter requires grad"):
        quiet(model.requires_grad_(False), [torch.randn(8, 2)])


def test_a_layer_that_did_not_run_keeps_its_statistics_and_is_listed() -> None:
    """Zeros in place of what it had would be a silent ruin."""
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "idle": nn.BatchNorm1d(2)})
    model["idle"].running_mean.fill_(7.0)
    before = as_bytes(model["idle"].running_mean)
    report = quiet(model, [torch.randn(8, 2)], forward=lambda model, batch: model["used"](batch))
    assert report.not_run == ("idle",)
    assert as_bytes(model["idle"].running_mean) == before
    assert "Not run, unchanged: idle" in str(report)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_layer_that_is_called_twice_is_merged_over_its_calls(pooled: bool) -> None:
    """Also where it is registered under two names; the calls of one batch count as one batch."""
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict({"one": shared, "two": shared})
    data = torch.randn(15, 2) + 2
    report = quiet(model, data.split(6), forward=lambda m, x: (m["one"](x), m["two"](x * 3)), pooled=pooled)
    both = [oracles.channels(torch.cat((x, x * 3))) for x in data.split(6)]
    close(shared, *oracles.cumulative(both, pooled))
    assert [(layer.name, layer.samples, layer.batches) for layer in report.layers] == [("one", 30, 3)]
    assert report.samples == 15


# --- the figures
# ----------------------------------------------------------------------------------------------------------------------

CUTS = [[60], [30, 30], [2] * 30, [1] * 60, [7] * 8 + [4], [59, 1], [2, 2, 4, 8, 16, 28]]


@pytest.mark.parametrize("layout", ["rows", "images", "channels_last"])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_the_first_layers_statistics_are_those_of_the_whole_data_for_any_cut(sizes: list[int], layout: str) -> None:
    """To 1e-6, batches of one included."""
    data = torch.randn(60, 4, *(() if layout == "rows" else (5, 3))) * torch.tensor([0.1, 1.0, 5.0, 2.0]).view(
        -1, *[1] * (layout != "rows") * 2
    )
    if layout == "channels_last":
        data = data.contiguous(memory_format=torch.channels_last)
    layer = nn.BatchNorm1d(4) if layout == "rows" else nn.BatchNorm2d(4)
    quiet(layer, data.split(sizes))
    mean, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
    assert ((layer.running_mean.double() - torch.tensor(mean)).abs() / torch.tensor(var).sqrt()).max() < 1e-6
    assert (layer.running_var.double() / torch.tensor(var) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(4000, 3), (400, 3, 4, 5), (400, 3, 20)])
def test_a_large_mean_does_not_drown_the_variance(shape: tuple[int, ...], exact: bool) -> None:
    """Mean 1000, standard deviation 0.01: E[x^2]-E[x]^2 in float32 says 0 or anything."""
    data = 1000 + 0.01 * torch.randn(shape)
    layouts = [data, data.contiguous(memory_format=torch.channels_last)] if len(shape) == 4 else [data]
    for layout in layouts:
        layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3)
        quiet(layer, layout.split(70), exact=exact)
        _, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
        assert (layer.running_var.double() / torch.tensor(var) - 1).abs().max() < 1e-3


def test_pooled_says_which_variance() -> None:
    """True, of all the data together, the spread between batches included; False, the average of the unbiased
    within-batch variances."""
    data = torch.randn(40, 3) + torch.arange(40.0).unsqueeze(1)
    for pooled in (True, False):
        layer = nn.BatchNorm1d(3)
        quiet(layer, data.split(12), pooled=pooled)
        close(layer, *oracles.cumulative([oracles.channels(part) for part in data.split(12)], pooled))


def test_half_precision_layers_are_measured_in_float32() -> None:
    """The moments of bfloat16 data are exact to the rounding of the buffer."""
    layer = nn.BatchNorm2d(3).bfloat16()
    data = (torch.randn(64, 3, 4, 4) * 3 + 10).bfloat16()
    quiet(layer, data.split(10))
    mean, var = oracles.mean_and_unbiased_variance(oracles.channels(data))
    assert torch.equal(layer.running_mean, torch.tensor(mean).bfloat16())
    assert torch.equal(layer.running_var, torch.tensor(var).bfloat16())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prior", [0, 4, 100.0, math.inf])
def test_the_prior_counts_as_samples(prior: float, exact: bool) -> None:
    """mean = N / (N + n) old + n / (N + n) new, and so the variance, with images for samples; inf keeps the bits, 0
    forgets all."""
    layer = nn.BatchNorm2d(2)
    layer.running_mean.copy_(torch.tensor([3.0, -0.0]))
    layer.running_var.copy_(torch.tensor([0.5, 2.0]))
    old = [value.double().numpy() for value in statistics(layer)[""]]
    bits = [as_bytes(value) for value in statistics(layer)[""]]
    data = torch.randn(12, 2, 4, 4) * 2 - 1
    quiet(layer, data.split(5), prior=prior, exact=exact)
    weight = 0.0 if math.isinf(prior) else 12 / (12 + prior)
    new = oracles.mean_and_unbiased_variance(oracles.channels(data))
    close(layer, *(before * (1 - weight) + after * weight for before, after in zip(old, new, strict=True)))
    if math.isinf(prior):
        assert bits == [as_bytes(value) for value in statistics(layer)[""]]


def test_poisoned_statistics_are_mended() -> None:
    """NaN in the old statistics is not carried over, and the report can still be sorted and written as JSON."""
    model = three()
    model[1].running_var.fill_(math.nan)
    report = quiet(model, [torch.randn(8, 2)])
    assert model[1].running_var.isfinite().all()
    assert str(report).splitlines()[2].startswith("1 ")
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["layers"][1]["log_variance_ratio_rms"] is None


@pytest.mark.parametrize("exact", [False, True])
def test_batches_that_are_not_finite_are_left_out_and_counted(exact: bool) -> None:
    """The statistics are those of the others."""
    data = torch.randn(10, 6, 2)
    poisoned = data.clone()
    poisoned[3, 1, 0], poisoned[7, 2, 1] = math.nan, math.inf
    model = three()
    report = quiet(model, poisoned.unbind(), exact=exact)
    good = data[[k for k in range(10) if k not in (3, 7)]]
    close(model[0], *oracles.mean_and_unbiased_variance(oracles.channels(good.flatten(0, 1))))
    assert (report.batches, report.skipped, {layer.batches for layer in report.layers}) == (10, 2, {8})
    assert "left out: 2 batches" in str(report)


def test_dropout_is_off_and_only_while_it_lasts() -> None:
    """The variance behind dropout p=0.5 is that of inference, half of that in training."""
    data = torch.randn(4000, 2)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    quiet(model, data.split(500))
    close(model[1], *oracles.mean_and_unbiased_variance(oracles.channels(data)))
    assert model[0].training


def test_a_model_that_is_frozen_in_parts_runs_as_at_inference() -> None:
    """A layer that is not chosen normalises with its own statistics, in eval mode."""
    model = three()
    model[0].running_mean.fill_(10.0)
    data = torch.randn(30, 2)
    quiet(model, data.split(7), layers=lambda name, module: name == "1")
    close(model[1], *oracles.mean_and_unbiased_variance(oracles.channels((data - 10) / math.sqrt(1 + 1e-5))), rtol=1e-5)


class Forces(nn.Module):
    """A model whose forward is a derivative of itself, with one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.bn(torch.tanh(self.bn(x)) * 2).square().sum()
        return torch.autograd.grad(energy, x)[0]


@pytest.mark.parametrize("exact", [False, True])
def test_a_forward_that_goes_backward_finds_the_statistics_it_ran_with(exact: bool) -> None:
    """The second call's statistics do not overwrite those that the first call's gradient needs."""
    model = Forces()
    report = quiet(model, torch.randn(4, 8, 3).unbind(), exact=exact)
    assert report.layers[0].samples == 64


class Caching(nn.Module):
    """A model that makes a table when it first runs, and multiplies with it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(1.0, 4.0)
        return self.bn(self.linear(x) * self.table)


@pytest.mark.parametrize("exact", [False, True])
def test_what_a_model_makes_on_the_way_serves_for_training(exact: bool) -> None:
    """Also where the caller is in inference mode, as Lightning is in validation: tensors made there can't be trained
    with."""
    model = Caching()
    with torch.inference_mode():
        quiet(model, torch.randn(4, 8, 3).unbind(), exact=exact)
    model(torch.randn(8, 3)).sum().backward()
    assert model.linear.weight.grad is not None


# --- when to stop
# ---------------------------------------------------------------------------------------------------------------------


def test_the_standard_error_is_that_of_the_batch_means() -> None:
    """rms over channels of sqrt(var of the batch means / k), in standard deviations: the textbook's, for equal
    batches."""
    images = torch.randn(30, 4, 2, 1, 1) + torch.randn(30, 1, 2, 1, 1) * 2
    data = images.expand(30, 4, 2, 3, 3) + 0.1 * torch.randn(30, 4, 2, 3, 3)
    layer = nn.BatchNorm2d(2)
    report = quiet(layer, data.unbind())
    values = data.double()
    error = values.mean((1, 3, 4)).std(0) / math.sqrt(30) / values.movedim(2, 0).flatten(1).std(1, correction=0)
    assert report.layers[0].standard_error == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)


def test_tolerance_stops_at_the_first_batch_that_meets_it() -> None:
    """Not before 8 batches; the report says after how many, and the figure is below the tolerance there and was not
    before."""
    data = torch.randn(100, 4, 2)
    model = three()
    report = quiet(model, data.unbind(), tolerance=0.07)
    assert report.stopped_by == "tolerance"
    assert 8 < report.batches < 100
    assert max(layer.standard_error for layer in report.layers) < 0.07
    earlier = quiet(three(), data[: report.batches - 1].unbind())
    assert max(layer.standard_error for layer in earlier.layers) >= 0.07
    assert quiet(three(), data.unbind(), tolerance=100.0).batches == 8


def test_a_tolerance_that_is_not_reached_is_told() -> None:
    """The data is used up, and the report says so."""
    report = quiet(three(), torch.randn(9, 4, 2).unbind(), tolerance=1e-9)
    assert (report.stopped_by, report.batches) == ("end", 9)
    assert "tolerance 1e-09 was not reached" in str(report)


def test_tolerance_on_digits_saves_three_quarters_of_the_data() -> None:
    """With batches of 32, tolerance 0.1: within a quarter of the data, mean validation accuracy over 5 seeds within 0.5
    points."""
    batches, differences = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        training, validation = digits(32, seed=seed)
        model = trained(ConvNet(8), training)
        accuracy = []
        for tolerance in (0.1, None):
            with recalibrated(model, training, tolerance=tolerance, progress=False) as report:
                accuracy.append(accuracy_of(model, validation))
            batches.append(report.batches)
        differences.append(accuracy[0] - accuracy[1])
    assert max(batches[::2]) <= len(training) / 4
    assert abs(sum(differences) / 5) < 0.5


def trained(model: nn.Module, training: DataLoader) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for images, labels in training:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy_of(model: nn.Module, validation: DataLoader) -> float:
    model.eval()
    right = torch.cat([(model(images).argmax(1) == labels).float() for images, labels in validation])
    model.train()
    return 100 * right.mean().item()


# --- the report, and back
# -------------------------------------------------------------------------------------------------------------


def test_a_dry_run_reports_and_changes_nothing() -> None:
    """What it says is what a real run then does."""
    model, data = mlp(3), torch.randn(40, 10)
    before = everything(model)
    dry = quiet(model, data.split(9), dry_run=True)
    dry.rollback()
    assert before == everything(model)
    real = quiet(model, data.split(9))
    assert dry.layers == real.layers
    assert str(dry).startswith("Would recalibrate 3")
    assert str(real).startswith("Recalibrated 3")


def test_the_report_has_the_figures_of_every_layer() -> None:
    """Against a naive computation from the statistics before and after."""
    model, data = mlp(3), torch.randn(40, 10) * 4 + 1
    model(data)
    before = statistics(model)
    report = quiet(model, data.split(9))
    for layer in report.layers:
        (old_mean, old_var), (new_mean, new_var) = before[layer.name], statistics(model)[layer.name]
        shift = [
            abs(float(n - o)) / math.sqrt(float(v) + 1e-5) for o, n, v in zip(old_mean, new_mean, old_var, strict=True)
        ]
        ratio = [abs(math.log((float(n) + 1e-5) / (float(o) + 1e-5))) for o, n in zip(old_var, new_var, strict=True)]
        assert layer.mean_shift_max == pytest.approx(max(shift), rel=1e-5)
        assert layer.mean_shift_rms == pytest.approx(math.sqrt(sum(s * s for s in shift) / len(shift)), rel=1e-5)
        assert layer.log_variance_ratio_max == pytest.approx(max(ratio), rel=1e-5)
        assert layer.log_variance_ratio_rms == pytest.approx(
            math.sqrt(sum(r * r for r in ratio) / len(ratio)), rel=1e-5
        )
        assert (layer.samples, layer.batches, layer.kind) == (40, 5, "BatchNorm1d")


def test_the_report_prints_as_an_aligned_table_with_the_worst_layer_first() -> None:
    """One row a layer, all of one width, sorted by how far the statistics moved."""
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(12)])
    model[7].running_mean.fill_(50.0)
    text = str(quiet(model, torch.randn(4, 8, 2).unbind()))
    _, header, *rows = text.splitlines()
    assert {len(header)} == {len(row) for row in rows}
    assert len(rows) == 12
    assert header.split()[:3] == ["layer", "kind", "samples"]
    assert rows[0].split()[:4] == ["7", "BatchNorm1d", "32", "4"]


def test_as_dict_is_ready_for_json() -> None:
    """Plain values under the names that the docs give."""
    report = quiet(three(), torch.randn(4, 8, 2).unbind())
    found = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert (found["batches"], found["samples"], found["skipped"], found["not_run"]) == (4, 32, 0, [])
    assert [layer["name"] for layer in found["layers"]] == ["0", "1", "2"]


def test_rollback_is_exact() -> None:
    """To the bit, in place, -0.0 and denormals included."""
    model = three()
    model[0].running_mean.copy_(torch.tensor([-0.0, 1e-42]))
    data = [torch.randn(8, 2)]
    before = everything(model)
    report = quiet(model, data)
    assert before != everything(model)
    report.rollback()
    assert before == everything(model)


@pytest.mark.parametrize(
    "averaging",
    [
        Window(3),
        Window(3, pooled=True),
        lightning_bn.Exponential(0.1, pooled=True),
        lightning_bn.Cumulative(pooled=True),
    ],
)
def test_training_goes_on_after_a_rollback_as_if_nothing_had_been(averaging: lightning_bn.Averaging) -> None:
    """The history of an average is private and never touched: bit for bit, over more batches than a window holds."""
    model, data = convert_batch_norm(three(), averaging), torch.randn(12, 8, 2)
    for batch in data[:4]:
        model(batch)
    twin = copy.deepcopy(model)
    quiet(model, data.unbind()).rollback()
    for batch in data[4:]:
        model(batch)
        twin(batch)
        assert {k: as_bytes(v) for k, v in model.state_dict().items()} == {
            k: as_bytes(v) for k, v in twin.state_dict().items()
        }


def test_the_new_statistics_serve_until_the_next_training_batch() -> None:
    """Then a window is again the last batches', and an exponential average blends the batch into them."""
    data = torch.randn(6, 8, 2) + 3
    window, exponential = convert_batch_norm(three(), Window(3)), three()
    for batch in data[:4]:
        window(batch)
        exponential(batch)
    twin = copy.deepcopy(window)
    for model in (window, exponential):
        quiet(model, data.unbind())
        assert not torch.equal(model[0].running_mean, twin[0].running_mean)
    new = exponential[0].running_mean.clone()
    for model in (window, twin, exponential):
        model(data[4])
    assert torch.equal(window[0].running_mean, twin[0].running_mean)
    torch.testing.assert_close(exponential[0].running_mean, 0.9 * new + 0.1 * data[4].mean(0))


def test_recalibrated_lends_the_statistics_to_the_block() -> None:
    """Inside the new ones, outside the old ones to the bit, also on an exception; the report is what `as` gives."""
    model, data = cnn(1), torch.rand(20, 1, 5, 5) + 2
    before = everything(model)
    with recalibrated(model, data.split(6), progress=False, prior=3) as report:
        inside = statistics(model)
        assert report.batches == 4
    assert before == everything(model)
    with pytest.raises(KeyError), recalibrated(model, data.split(6), progress=False):
        raise KeyError
    assert before == everything(model)
    quiet(model, data.split(6), prior=3)
    assert largest_errors(statistics(model), inside) == (0, 0)


# --- the bar
# ----------------------------------------------------------------------------------------------------------------------


def test_the_bar_tells_the_layers_and_the_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """`progress=False` is silent."""
    data = torch.randn(12, 4, 2)
    quiet(three(), data.unbind(), tolerance=0.01)
    assert capsys.readouterr() == ("", "")
    recalibrate(three(), data.unbind(), tolerance=0.01)
    shown = capsys.readouterr().err
    assert "Recalibrating 3 batch-norm layers" in shown
    assert "12/12" in shown
    assert "std error 0." in shown
    recalibrate(three(), data.unbind(), exact=True, num_batches=5)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "layer 3 of 3" in shown
