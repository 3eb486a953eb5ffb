"""check_export on callables, and what exporting gives back, whatever is done to the model inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn import Window, check_export, convert_batch_norm, exporting

BATCH = torch.randn(6, 3) * 2 + 1


def trained(*more: nn.Module) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), *more, nn.Linear(8, 2))
    for _ in range(20):
        net(torch.randn(16, 3) * 2 + 1)
    return net.eval()


def codes(run: Any, reference: Any, batch: Any = BATCH, **how: Any) -> list[str]:
    return [finding.code for finding in check_export(run, reference, batch, **how)]


def test_each_fault_has_its_code() -> None:
    """The model itself is sound, also in 16 bits; a mode, a dropout, other statistics and NaN are told apart."""
    net = trained()
    assert codes(net, net) == []
    assert codes(copy.deepcopy(net), net) == []
    half = copy.deepcopy(net).half()
    assert codes(lambda batch: half(batch.half()).float(), net) == []
    by_batch = copy.deepcopy(net)
    by_batch[1].track_running_stats = False
    by_batch[1].running_mean = by_batch[1].running_var = None
    assert codes(by_batch, net) == ["BN401", "BN403"]
    dropping = trained(nn.Dropout(0.5))
    live = copy.deepcopy(dropping)
    live[2].train()
    assert codes(live, dropping) == ["BN402", "BN403"]
    other = copy.deepcopy(net)
    other[1].running_var.mul_(2)
    assert codes(other, net) == ["BN403"]
    spoiled = copy.deepcopy(net)
    spoiled[1].running_mean[0] = float("nan")
    assert codes(spoiled, net) == ["BN405"]
    assert codes(copy.deepcopy(net).train(), net) == ["BN401", "BN404", "BN403"]
    assert codes(copy.deepcopy(net).train(), net, ignore=["BN401", "BN404"]) == ["BN403"]


def test_the_reference_is_left_as_it_was() -> None:
    """It runs in eval mode whatever mode it is in."""
    net = trained().train()
    state = copy.deepcopy(net.state_dict())
    assert codes(copy.deepcopy(net).eval(), net) == []
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())


def test_several_inputs_and_outputs() -> None:
    """A tuple is the arguments and a dict the named ones; every tensor of a nested answer is compared."""
    net = trained()

    def both(first: Tensor, second: Tensor) -> dict[str, Any]:
        return {"a": net(first), "b": [net(second).numpy()]}

    def wrong(first: Tensor, second: Tensor) -> dict[str, Any]:
        return {"a": net(first), "b": [net(second).numpy() * 1.1]}

    assert codes(both, both, (BATCH, BATCH + 1)) == []
    assert codes(wrong, both, (BATCH, BATCH + 1)) == ["BN403"]
    assert codes(wrong, both, {"first": BATCH, "second": BATCH + 1}) == ["BN403"]
    assert codes(lambda batch: net(batch)[:, :1], net) == ["BN403"]  # of another shape


@pytest.mark.parametrize("batch", [BATCH[:1], BATCH[:1].expand(4, 3)], ids=["one sample", "equal samples"])
def test_a_batch_that_can_tell_nothing_is_refused(batch: Tensor) -> None:
    """The error shows what to give."""
    with pytest.raises(ValueError, match=r"two samples or more that differ, as in torch\.randn"):
        check_export(trained(), trained(), batch)
    with pytest.raises(ValueError, match="there is no rule BN101"):
        check_export(trained(), trained(), BATCH, ignore=["BN101"])


def test_exporting_gives_back_what_exporters_take() -> None:
    """Modes, flags, buffers (the same tensors with the same values), requires_grad and a window's history."""
    net = nn.Sequential(
        convert_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), Window(3)), nn.BatchNorm1d(4)
    )
    for _ in range(4):
        net(torch.randn(8, 3))
    net[1].eval()
    net[1].weight.requires_grad_(False)
    state, held = copy.deepcopy(net.state_dict()), {name: id(each) for name, each in net.named_buffers()}
    modes = [module.training for module in net.modules()]
    with pytest.raises(RuntimeError, match="an exporter"):
        _disturbed(net)
    assert [module.training for module in net.modules()] == modes
    assert {name: id(each) for name, each in net.named_buffers()} == held
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert (net[1].momentum, net[1].track_running_stats, net[1].weight.requires_grad) == (0.1, True, False)
    batch = torch.randn(8, 3)
    twin = copy.deepcopy(net)
    twin.load_state_dict(state)
    assert torch.equal(net(batch), twin(batch))  # and the window goes on as if nothing had been
    assert torch.equal(net[0][1].running_var, twin[0][1].running_var)


def _disturbed(net: nn.Sequential) -> None:
    with exporting(net):
        assert not any(module.training for module in net.modules())
        net.train()  # as an exporter does
        net(torch.randn(8, 3) + 5)
        net[1].running_mean = torch.ones(4)
        net[1].momentum, net[1].track_running_stats = None, False
        net.requires_grad_(True)
        raise RuntimeError("an exporter")
