"""timm's networks and norms; benchmarks/architectures.py runs many more."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import Averaging, Exponential, Window, check, convert_batch_norm, recalibrate
from lightning_bn.discovery import find_batch_norms

pytestmark = pytest.mark.filterwarnings("ignore")  # timm's and torchvision's own


timm = pytest.importorskip("timm")


def train(model: nn.Module) -> list[Tensor]:
    """Return the outputs of three steps."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    outputs = []
    for _ in range(3):
        outputs.append(model(torch.randn(4, 3, 64, 64)))
        optimizer.zero_grad()
        outputs[-1].square().sum().backward()
        optimizer.step()
    return outputs


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("averaging", [None, Exponential(0.1), Window(20)], ids=str)
def test_training_is_bit_identical(name: str, averaging: Averaging | None) -> None:
    """Of networks of torch's layers and of timm's, which have an activation in them."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    converted = convert_batch_norm(copy.deepcopy(model), averaging)
    assert check(converted) == []
    for one, other in zip(train(model), train(converted), strict=True):
        assert torch.equal(one, other)
    for key, value in model.named_parameters():
        assert torch.equal(value, converted.get_parameter(key)), key


def test_recalibration_of_norms_with_an_activation() -> None:
    """The statistics of what each layer was given, by hooks that keep it, in float64."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4).double().eval()
    batches = [torch.randn(4, 3, 64, 64, dtype=torch.float64) for _ in range(3)]
    oracle, kept = copy.deepcopy(model), {}
    for layer in find_batch_norms(oracle):
        layer.module.training = True
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: kept.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1))
        )
    with torch.no_grad():
        for batch in batches:
            oracle(batch)
    recalibrate(model, batches, progress=False)
    for layer in find_batch_norms(model):
        values = torch.cat(kept[layer.name], 1)
        torch.testing.assert_close(layer.module.running_mean, values.mean(1))
        torch.testing.assert_close(layer.module.running_var, values.var(1))


def test_a_split_norm_is_refused_by_name() -> None:
    """Its buffers are those of a part of the batch; nothing is changed."""
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.SplitBatchNorm2d(4, num_splits=2))
    with pytest.raises(TypeError, match=r"1 \(SplitBatchNorm2d\): its forward"):
        convert_batch_norm(model, Window(20))
    assert type(model[1].aux_bn[0]) is nn.BatchNorm2d
