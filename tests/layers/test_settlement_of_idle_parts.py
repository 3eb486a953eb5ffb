"""Rows that are used again in each forward, and hooks of a model's parts that are removed while nobody needs them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from settlements import AVERAGES, Record, agree, batches, few_averages, net
from torch import Tensor, nn

from lightning_bn import Averaging, BatchNorm1d, settle_together
from lightning_bn.averaging import Batch


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


@few_averages
def test_parts_without_hooks_are_found_when_they_are_called_by_themselves(name: str) -> None:
    """A part that has run inside of its model alone has no hooks; its own first call settles at once, the next ones
    together."""
    model = net(name)
    record = Record(model)
    model(batches()[0])
    assert [hooks(part) for part in (model.body, model.side, model.head)] == [0, 0, 0]
    features = [torch.randn(4, 5) * t for t in range(1, 6)]
    for batch in features:
        model.head(batch)
    assert record.deferred[-5:] == [False, True, True, True, True]
    for batch in batches():
        model(batch)  # and is never idle again
        model.head(features[0])
    assert all(record.deferred[-10:])
    agree(model, record, AVERAGES[name][1])


@few_averages
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_whose_parts_rest(name: str, way: object) -> None:
    """The copy's statistics are right, of the whole and of its parts, and a part's copy holds no more than the part."""
    model = net(name)
    model(batches()[0])
    twin = way(model)  # type: ignore[operator]
    twin.head[1](torch.randn(4, 4))
    assert hooks(model.head) == 0
    twin.load_state_dict(net(name).state_dict())
    record = Record(twin)
    for batch in batches():
        twin(batch)
        twin.head(torch.randn(4, 5))
    agree(twin, record, AVERAGES[name][1])
    alone = pickle.dumps(model.head)
    assert len(alone) < len(pickle.dumps(model)) / 2


def test_settling_together_again_sets_no_hook_twice() -> None:
    """Idle updates are replaced, not doubled."""
    model = net("plain")
    model(batches()[0])
    settle_together(model)
    model.head[1](torch.randn(4, 4))
    assert hooks(model.head) == 3
    model.head(torch.randn(4, 5))
    assert model.head[1].num_batches_tracked == 3


@few_averages
def test_a_layer_called_by_itself_after_an_interrupt(name: str) -> None:
    """Its batch counts, though the forward that had given it scratch rows was never told of its end."""
    model = net(name)
    record = Record(model)
    model(batches()[0])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.body[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(batches()[1])
    handle.remove()
    model.head[1](torch.randn(4, 4))
    agree(model, record, AVERAGES[name][1])


class Newest(Averaging):
    """A rule that keeps what it was given, and does not say that it is elementwise."""

    def initial_state(self, num_features: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {}

    def update(self, running_mean: Tensor, running_var: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        self.__dict__.setdefault("seen", []).append(batch.mean)
        return batch.mean, batch.var


def test_what_a_rule_keeps_is_not_written_by_later_forwards() -> None:
    """The rows are used again and again; a rule's own copy of a batch's mean stays that batch's."""
    model = settle_together(nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, averaging=Newest()), nn.Linear(3, 3)))
    means = []
    model[1].register_forward_pre_hook(lambda _, args: means.append(args[0].detach().mean(0)))
    for _ in range(4):
        model(torch.randn(8, 3))
    torch.testing.assert_close(model[1].averaging.seen, means)


@few_averages
def test_many_forwards_before_one_backward(name: str) -> None:
    """The rows that autograd has kept of the first forward are written by the second, and the gradients are those of
    plain layers; also second ones."""
    model, theirs = net(name), net("plain")
    theirs.load_state_dict(model.state_dict(), strict=False)
    gradients = []
    for each in (model, theirs):
        inputs = [batch.double().requires_grad_() for batch in batches(3)]
        loss = sum(each.double()(batch).square().sum() for batch in inputs)
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        gradients.append([*first, *second])
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


class Fallback(nn.Module):
    """Goes on with other data where a layer refuses what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = BatchNorm1d(4, averaging=AVERAGES[name][0])
        self.last = BatchNorm1d(4, averaging=AVERAGES[name][0])

    def forward(self, batch: Tensor) -> Tensor:
        try:
            return self.last(self.layer(batch))
        except RuntimeError:
            return self.last(batch.float())


@few_averages
def test_rows_that_a_call_has_not_written(name: str) -> None:
    """A call that raises in the kernel, where everything else is as in the forward before, has not run."""
    model = settle_together(Fallback(name))
    model(torch.randn(8, 4))
    before = {key: value.clone() for key, value in model.layer.state_dict().items()}
    model(torch.randint(5, (8, 4)))
    assert all(torch.equal(value, before[key]) for key, value in model.layer.state_dict().items())
    assert model.last.num_batches_tracked == 2


@few_averages
def test_another_shape_another_mode_and_a_setting_from_forward_to_forward(name: str) -> None:
    """Whatever is not as in the forward before is noticed, in any order."""
    model = net(name)
    record = Record(model)
    for step, batch in enumerate(batches(24)):
        model.use_side = step % 5 != 0
        model.side[1].train(step % 4 != 0)
        model.body[1].track_running_stats = step % 7 != 0
        model.head[1].momentum = 0.1  # another object of the same value
        if step == 11:
            model.body[4].running_mean = model.body[4].running_mean.clone()
        model(batch if step % 3 else batches(1)[0])
    agree(model, record, AVERAGES[name][1])
