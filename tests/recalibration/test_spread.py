"""What layers keep of the spread of images: the right numbers, with the model, and nothing else."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lightning_bn
from lightning_bn import convert_batch_norm, keep_spread, recalibrate, to_torch
from lightning_bn.recalibration.spread import DRAWS, SIZES, Spread, spread_of

Array = NDArray[np.float64]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)
    )


def images(number: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 2, 6, 6, generator=generator) + torch.randn(number, 1, 1, 1, generator=generator)


def spread(layer: nn.Module) -> Spread:
    found = spread_of(layer)
    assert found is not None
    return found


def moments_of_each_image(data: Tensor, layer: nn.Module) -> Array:
    """(N, 2, C), by loops over images and channels."""
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    values = data.detach().double().flatten(2).numpy() if data.dim() > 2 else data.detach().double().numpy()[..., None]
    found = np.zeros((len(values), 2, values.shape[1]))
    for image in range(len(values)):
        for channel in range(values.shape[1]):
            x = (values[image, channel] - mean[channel]) / np.sqrt(var[channel] + layer.eps)
            found[image, :, channel] = sum(x) / len(x), sum(x * x) / len(x)
    return found


@pytest.mark.parametrize("convert", [lambda model: model, convert_batch_norm], ids=["torch", "package"])
@pytest.mark.parametrize("exact", [False, True])
def test_center_and_scale_are_those_of_the_images(convert: Callable[[nn.Module], nn.Module], exact: bool) -> None:
    """Mean and standard deviation from image to image, of the network as it is at inference: not of the one that
    normalises each batch."""
    model, data = network(), images()
    convert(model)
    recalibrate(model, data.split(40), spread=True, exact=exact, progress=False)
    model.eval()
    for place in (1, 5):
        with torch.no_grad():
            expected = moments_of_each_image(model[:place](data), model[place])
        kept = spread(model[place])
        np.testing.assert_allclose(kept.center.numpy(), expected.mean(0), atol=1e-5)
        np.testing.assert_allclose(kept.scale.numpy(), expected.std(0, ddof=1), rtol=1e-4)
        assert kept.images == len(data)


def test_draws_are_as_chance_has_them() -> None:
    """As often as not, n images deviate as the theory of means says: 1 on average, whatever n is; and a single one as
    each image does."""
    model, data = network(), images(1200)
    recalibrate(model, data.split(100), spread=True, progress=False)
    model.eval()
    with torch.no_grad():
        moments = moments_of_each_image(model[:1](data), model[1])
    kept = spread(model[1])
    for row in range(len(SIZES)):
        assert abs(float(kept.draws[row].exp().mean()) - 1) < 0.2
    alone = (((moments - moments.mean(0)) / moments.std(0, ddof=1)) ** 2).mean((1, 2)) / (1 - 1 / len(data))
    quantiles = np.linspace(0.01, 0.99, 50)
    found = np.quantile(kept.draws[0].exp().numpy() - 1e-3, quantiles)
    np.testing.assert_allclose(found, np.quantile(alone, quantiles), rtol=0.1)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_drawn_is_judged_by_the_other_images_alone(size: int) -> None:
    """Of 8 images each draw is one of the combinations, its distance from the others' mean in their unbiased variance;
    and all of them are drawn."""
    model, data = network(), images(8)
    recalibrate(model, data.split(4), spread=True, progress=False)
    model.eval()
    with torch.no_grad():
        moments = moments_of_each_image(model[:1](data), model[1])
    expected = []
    for drawn in itertools.combinations(range(8), size):
        others = np.delete(moments, drawn, 0)
        squares = (moments[list(drawn)].mean(0) - others.mean(0)) ** 2 / others.var(0, ddof=1)
        expected.append(squares.mean() / (1 / size + 1 / len(others)))
    found = spread(model[1]).draws[SIZES.index(size)].double().exp().numpy() - 1e-3
    nearest = np.abs(found[:, None] - np.array(expected)).argmin(1)
    np.testing.assert_allclose(found, np.array(expected)[nearest], rtol=1e-3)
    assert set(nearest) == set(range(len(expected)))


def test_it_depends_on_the_images_alone() -> None:
    """Batches of other sizes, the same images in the same order: the same spread."""
    one, other = network(), network()
    recalibrate(one, images().split(300), spread=True, exact=True, progress=False)
    recalibrate(other, images().split(7), spread=True, exact=True, progress=False)
    for place in (1, 5):
        for name, value in spread(one[place]).state().items():
            if name != "counts":  # of which one is a check sum
                assert torch.allclose(value, spread(other[place]).state()[name], atol=1e-3), name


def test_of_many_images_each_has_the_same_chance() -> None:
    """Of 6,000 images that come in order 2,000 are kept, as many of the last as of the first."""
    layer = nn.Sequential(nn.BatchNorm1d(1))
    data = torch.arange(6000.0).unsqueeze(1)
    recalibrate(layer, data.split(100), spread=True, progress=False)
    kept = spread(layer[0])
    assert kept.images == DRAWS
    assert kept.all_images == len(data)
    assert abs(kept.center[0].item()) < 1e-5
    assert abs(kept.draws[0].exp().mean().item() - 1) < 0.05
    assert abs(kept.scale[0].item() - 1) < 0.05


def test_images_that_are_not_finite_are_left_out() -> None:
    """The image, not its batch."""
    model, data = network(), images()
    data[7] = torch.nan
    recalibrate(model, [data[:7], data[8:]], spread=True, progress=False)
    clean = copy.deepcopy(spread(model[1]))
    report = recalibrate(model, data.split(50), spread=True, prior=float("inf"), progress=False)
    assert report.spread_images == len(data) - 1
    assert torch.allclose(clean.center, spread(model[1]).center, atol=1e-5)


def test_nothing_else_is_touched() -> None:
    """Gradients, modes, the random state and the weights are as before, and ``prior=inf`` leaves the statistics."""
    model = network().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    recalibrate(model, images().split(50), spread=True, prior=float("inf"), progress=False)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(module.training for module in model.modules() if not isinstance(module, Spread))
    assert torch.equal(state, torch.get_rng_state())


def test_rollback_takes_it_away() -> None:
    """The first rollback leaves a model as before; one of a second measurement gives the first back."""
    model = network()
    keys = list(model.state_dict())
    first = recalibrate(model, images().split(50), spread=True, progress=False)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, (images() * 2).split(50), spread=True, progress=False).rollback()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    first.rollback()
    assert list(model.state_dict()) == keys


def test_an_error_in_the_second_pass_changes_nothing() -> None:
    """The statistics, which were written already, are those from before."""
    model, calls = network(), 0
    before = copy.deepcopy(model.state_dict())

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("in the second pass")
        return model(batch)

    with pytest.raises(RuntimeError, match="second pass"):
        recalibrate(model, images().split(50), forward=forward, spread=True, progress=False)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpoints_load_both_ways() -> None:
    """A plain one into a model with a spread, which it empties; one with a spread into a new model that has room; and
    that of `to_torch` into a plain model; all strictly. Room that is empty is not saved."""
    model, plain = network(), network()
    names = list(plain.state_dict())
    recalibrate(model, images().split(50), spread=True, progress=False)
    served = keep_spread(network())
    assert list(served.state_dict()) == names
    served.load_state_dict(model.state_dict())
    assert torch.equal(spread(served[1]).draws, spread(model[1]).draws)
    assert spread(served[5]).images == 300
    served.load_state_dict(plain.state_dict())
    assert spread(served[1]).images == 0
    assert list(served.state_dict()) == names
    plain.load_state_dict(to_torch(copy.deepcopy(model)).state_dict())
    with pytest.raises(RuntimeError, match="spread"):
        plain.load_state_dict(model.state_dict())


def test_it_is_private_training_state() -> None:
    """Copied and pickled with the layer, moved and not narrowed, neither a parameter nor a buffer."""
    model = network()
    recalibrate(model, images().split(50), spread=True, progress=False)
    draws = spread(model[1]).draws.clone()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half().float()):
        assert torch.equal(spread(twin[1]).draws, draws)
    assert not any("spread" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])


class Odd(nn.Module):
    """A layer that is called twice, one that gets rows of its own, and one that runs in some batches alone."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rows, self.some = nn.BatchNorm1d(2), nn.BatchNorm1d(1), nn.BatchNorm1d(2)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows(x.reshape(-1, 1))
        y = self.twice(x) + self.twice(3 * x)
        self.batches += 1
        return self.some(y) if x[0, 0] > 0 else y


def test_which_layers_have_none_is_said() -> None:
    """By name, with the reason; a layer that is called twice has one, over both calls."""
    torch.manual_seed(0)
    model, data = Odd(), torch.randn(100, 2)
    data[::10, 0] = torch.tensor([1.0, -1.0]).repeat(5)

    class Rows(Odd):
        def forward(self, x: Tensor) -> Tensor:
            y = self.twice(x) + self.twice(3 * x)
            self.rows(x.reshape(-1, 1))
            return self.some(y) if x[0, 0] > 0 else y

    model = Rows()
    report = recalibrate(model, data.split(10), spread=True, progress=False)
    assert report.no_spread == (
        "rows: what it gets is not one row for each image",
        "some: it did not run",
    )
    assert "No spread: rows: what it gets" in str(report)
    both = np.stack([moments_of_each_image(factor * data, model.twice) for factor in (1, 3)]).mean(0)
    np.testing.assert_allclose(spread(model.twice).center.numpy(), both.mean(0), atol=1e-5)
    assert spread(model.twice).calls == 2


def test_a_mask_leaves_out_what_is_padding() -> None:
    """Of padded sequences the valid positions count, and each sequence once, however long it is."""
    torch.manual_seed(0)
    layer = lightning_bn.BatchNorm1d(3)
    lengths = torch.arange(100) % 7 + 1
    mask = torch.arange(7) < lengths.unsqueeze(1)
    data = torch.randn(100, 3, 7)
    padded = torch.where(mask.unsqueeze(1), data, 1e3)
    recalibrate(layer, [padded], forward=lambda layer, batch: layer(batch, mask), spread=True, progress=False)
    each = [moments_of_each_image(data[[place], :, :length], layer) for place, length in enumerate(lengths.tolist())]
    np.testing.assert_allclose(spread(layer).center.numpy(), np.concatenate(each).mean(0), atol=1e-5)


def test_what_can_not_be_measured_is_refused() -> None:
    """Batches that can be read only once, and a dry run, before anything runs."""
    model = network()
    with pytest.raises(ValueError, match=r"reads the batches twice, and this list_iterator.*Pass a loader or a list"):
        recalibrate(model, iter([images()]), spread=True)
    with pytest.raises(ValueError, match=r"spread=True, dry_run=True"):
        recalibrate(model, [images()], spread=True, dry_run=True)
    assert spread_of(model[1]) is None
