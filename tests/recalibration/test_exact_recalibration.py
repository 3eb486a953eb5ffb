"""exact=True: the statistics of the network as it runs at inference, and what a forward may do while it waits in
lockstep."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from recalibration_models import cnn, everything, full_batch, largest_errors, mlp, statistics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_bn import recalibrate
from lightning_bn.recalibration.lockstep import Lockstep
from lightning_bn.recalibration.spilling import Spilling


def exact(model: nn.Module, data: Tensor, size: int, **options: object) -> dict[str, tuple[Tensor, Tensor]]:
    recalibrate(model, data.split(size), exact=True, progress=False, **options)  # type: ignore[arg-type]
    return statistics(model)


def sorted_by_class(data: Tensor) -> Tensor:
    return data[data.flatten(1).sum(1).argsort()]


@pytest.mark.parametrize("size", [2, 7, 32])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (205, 10)), (cnn, (101, 1, 6, 6))], ids=["mlp", "cnn"])
def test_exact_is_the_full_batch(make: Callable[[], nn.Module], shape: tuple[int, ...], size: int) -> None:
    """Eight batch norms and more, class-sorted order, a partial last batch: 1e-4 of the variance everywhere; one pass
    is far off."""
    model, data = make(), sorted_by_class(torch.randn(shape))
    truth = full_batch(model, data)
    mean, variance = largest_errors(exact(copy.deepcopy(model), data, size), truth)
    assert mean < 1e-4
    assert variance < 1e-4
    recalibrate(model, data.split(size), progress=False)
    assert largest_errors(statistics(model), truth)[1] > 1e-2


def test_order_and_cut_do_not_matter() -> None:
    """Batches of one, of any size, permuted: the same statistics."""
    model, data = mlp(4), torch.randn(60, 10)
    truth = full_batch(model, data)
    for sizes in ([1] * 60, [59, 1], [3, 20, 37]):
        shuffled = data[torch.randperm(60)]
        twin = copy.deepcopy(model)
        recalibrate(twin, shuffled.split(sizes), exact=True, progress=False)
        assert max(largest_errors(statistics(twin), truth)) < 1e-5


def test_within_batch_variances_and_the_prior_are_what_the_layers_run_with() -> None:
    """With pooled=False and with a prior too, deeper layers see what inference with the new statistics shows them."""
    model, data = mlp(3), torch.randn(40, 10)
    for options in ({"pooled": False}, {"prior": 30.0}):
        twin = copy.deepcopy(model)
        exact(twin, data, 8, **options)
        seen = twin.eval()[2][0](twin[:2](data))
        var = (
            torch.stack([part.var(0) for part in seen.split(8)]).mean(0)
            if "pooled" in options
            else seen.var(0) * 40 / 70 + 30 / 70
        )
        torch.testing.assert_close(twin[2][1].running_var, var, rtol=1e-5, atol=1e-6)


class Skipping(nn.Module):
    """Batches whose first value is negative go around the middle layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        skip = bool(x[0, 0] < 0)
        x = self.first(x)
        return self.last(x if skip else torch.relu(self.middle(x)))


def test_a_batch_may_skip_a_layer() -> None:
    """The last layer waits for those that took the longer way, and its statistics are those of all."""
    model, data = Skipping(), torch.randn(64, 4)
    exact(model, data, 4)
    skip = torch.stack([part[0, 0] < 0 for part in data.split(4)]).repeat_interleave(4)
    assert 0 < skip.sum() < 64
    x = (data.double() - data.double().mean(0)) / (data.double().var(0) + 1e-5).sqrt()
    middle = x[~skip]
    torch.testing.assert_close(model.middle.running_mean.double(), middle.mean(0), rtol=1e-4, atol=1e-6)
    x[~skip] = torch.relu((middle - middle.mean(0)) / (middle.var(0) + 1e-5).sqrt())
    torch.testing.assert_close(model.last.running_mean.double(), x.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.last.running_var.double(), x.var(0), rtol=1e-4, atol=1e-6)


class Branches(nn.Module):
    """Each batch runs two layers, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        order = (self.left, self.right) if x[0, 0] < 0 else (self.right, self.left)
        return sum(layer(x) for layer in order)  # type: ignore[return-value]


def test_branches_may_run_in_another_order_in_each_batch() -> None:
    """Nobody waits endlessly, and each layer has all the data."""
    model, data = Branches(), torch.randn(40, 4)
    found = exact(model, data, 4)
    for mean, var in found.values():
        torch.testing.assert_close(mean, data.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, data.var(0), rtol=1e-5, atol=1e-6)


class Recurrent(nn.Module):
    """One layer called as often as the batch is long, then another."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(x.shape[1]):
            last = self.cell(x[:, step])
        return self.head(last)


def test_a_layer_may_be_called_several_times_and_not_equally_often() -> None:
    """It is merged over its calls, and the layer behind it still gets all batches at once."""
    batches = [torch.randn(6, length, 3) * 2 + 1 for length in (1, 3, 2)]
    model = Recurrent()
    report = recalibrate(model, batches, exact=True, progress=False)
    data = torch.cat([batch.flatten(0, 1) for batch in batches])
    torch.testing.assert_close(model.cell.running_mean, data.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.cell.running_var, data.var(0), rtol=1e-5, atol=1e-6)
    assert [(layer.samples, layer.batches) for layer in report.layers] == [(36, 3), (18, 3)]


SEEN: list[bool] = []  # not an attribute: what a pass writes there is undone


class Modes(nn.Module):
    """Autocast, grad and inference modes that begin in front of a batch norm and end behind it, and differ from batch
    to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bn, self.end = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        half = bool(x[0, 0] < 0)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=half),
            torch.set_grad_enabled(half),
            torch.inference_mode(not half),
        ):
            x = self.bn(self.linear(x))
            state = (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), not torch.is_inference_mode_enabled())
            SEEN.extend([flag == half for flag in state])
            SEEN.append(self.linear(x.float()).dtype == (torch.bfloat16 if half else torch.float32))
        SEEN.append(
            not torch.is_autocast_enabled("cpu")
            and not torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
        )
        return self.end(x.float())


def test_modes_inside_the_forward_stay_with_their_batch() -> None:
    """What torch keeps by thread is handed over at each stop: behind the layer it is what it was before, and after all
    too."""
    model = Modes()
    data = torch.randn(40, 4)
    before = everything(model)
    report = recalibrate(model, data.split(4), exact=True, progress=False)
    assert SEEN
    assert all(SEEN)
    report.rollback()
    assert before == everything(model)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_holds_inside_and_after(mode) -> None:
    """The caller's autocast is in force in every batch; inference mode is left for the pass, and what is written serves
    training."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    dtypes: set[torch.dtype] = set()
    model[1].register_forward_pre_hook(lambda layer, inputs: dtypes.add(inputs[0].dtype))
    data = torch.randn(20, 4)
    for lockstep in (True, False):
        dtypes.clear()
        with mode():
            autocast = torch.is_autocast_enabled("cpu")
            report = recalibrate(model, data.split(5), exact=lockstep, progress=False)
            assert torch.is_autocast_enabled("cpu") == autocast
        assert dtypes == {torch.bfloat16 if autocast else torch.float32}
        report.rollback()
        model(data).sum().backward()
        assert model[1].running_mean.isfinite().all()


class Generators(nn.Module):
    """A forward that pulls its layers' outputs through generators, one inside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def _outputs(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return sum(value for value in (2 * output for output in self._outputs(x)))  # type: ignore[return-value]


class Checkpointed(nn.Module):
    """Each block under activation checkpointing, reentrant (through C++) or not."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = mlp(3, 10), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"
)  # torch's reentrant checkpoint, under no_grad
@pytest.mark.parametrize(
    ("model", "width"),
    [(Generators(), 4), (Checkpointed(True), 10), (Checkpointed(False), 10)],
    ids=["generators", "reentrant", "checkpoint"],
)
def test_a_forward_may_stop_inside_anything(model: nn.Module, width: int) -> None:
    """Generators, and calls through C++ and back."""
    data = torch.randn(50, width)
    truth = full_batch(model, data)
    assert max(largest_errors(exact(copy.deepcopy(model), data, 7), truth)) < 1e-4


USER = contextvars.ContextVar("USER", default="nobody")


def test_context_variables_of_the_caller_are_seen() -> None:
    """A batch runs in a copy of the caller's context, and what it sets stays with it."""
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(USER.get())
        USER.set(f"batch {len(seen)}")
        mine = USER.get()
        model(batch)
        seen.append(USER.get() == mine)

    token = USER.set("caller")
    recalibrate(nn.BatchNorm1d(2), torch.randn(3, 5, 2).unbind(), exact=True, progress=False, forward=forward)
    assert (seen, USER.get()) == (["caller", "caller", "caller", True, True, True], "caller")
    USER.reset(token)


@pytest.mark.parametrize("batch", range(5))
@pytest.mark.parametrize("place", range(3))
def test_an_exception_in_one_batch_stops_all(batch: int, place: int) -> None:
    """Every waiting forward is left through its finally clauses, all is as before, and the user gets his own
    exception."""
    model, data = mlp(3), list(torch.randn(5, 4, 10))
    entered, left = [], []

    def forward(model: nn.Module, pair: tuple[int, Tensor]) -> None:
        number, x = pair
        entered.append(number)
        try:
            for step, block in enumerate(model):
                if (number, step) == (batch, place):
                    raise KeyError("the user's own")
                x = block(x)
        finally:
            left.append(number)

    before = everything(model)
    with pytest.raises(KeyError, match="the user's own"):
        recalibrate(model, list(enumerate(data)), exact=True, progress=False, forward=forward)
    assert sorted(entered) == sorted(left)
    assert before == everything(model)
    assert (
        max(largest_errors(exact(copy.deepcopy(model), torch.cat(data), 4), full_batch(model, torch.cat(data)))) < 1e-4
    )


def test_a_forward_that_swallows_the_end_is_ended_nevertheless() -> None:
    """A bare except around a layer catches the end of the run; the next layer ends it again."""
    first, second = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model = nn.ModuleList([first, second])

    def forward(model: nn.Module, x: Tensor) -> None:
        try:
            first(x)
        except BaseException:
            second(x)
        if x[0, 0] > 4:
            raise KeyError

    with pytest.raises(KeyError):
        recalibrate(model, [torch.randn(4, 2) * 0 + k for k in range(6)], exact=True, progress=False, forward=forward)


@pytest.mark.parametrize("names", ["abc", "bac"])
def test_jobs_go_on_only_when_all_have_come(names: str) -> None:
    """Lockstep itself: whoever skipped a stop waits at the next one for those who have not, whoever came first."""
    places = {"a": [0, 2], "b": [0, 1, 2], "c": []}
    log: list[str] = []
    lockstep = Lockstep(lambda stop: stop, lambda place: log.append(f"open {place}"), Spilling(None, nn.Module()))

    def job(name: str, places: list[int]) -> Callable[[], None]:
        def run() -> None:
            for place in places:
                lockstep.stop(place)
                log.append(f"{name}{place}")

        return run

    lockstep.run(job(name, places[name]) for name in names)
    rounds = " ".join(log).split("open ")[1:]
    assert [sorted(found.split()) for found in rounds] == [["0", "a0", "b0"], ["1", "b1"], ["2", "a2", "b2"]]


class InAThread(nn.Module):
    """Calls its layer from a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.norm, x).result()


def test_a_layer_called_from_a_thread_of_the_model_is_named_as_the_reason() -> None:
    """What happened and what to do; nothing is changed, and without exact it works."""
    model, batches = InAThread(), [torch.randn(8, 2) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"called from a thread.*Let the forward call its layers itself, or leave exact"
    ):
        recalibrate(model, batches, exact=True, progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert recalibrate(model, batches, progress=False).layers[0].samples == 16


def test_a_pass_that_begins_another_is_told_so() -> None:
    """The forward of an exact pass begins an exact pass over the same layers: a message, and nothing is changed."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    batches = [torch.randn(8, 2) for _ in range(2)]
    before = copy.deepcopy(model.state_dict())

    def forward(model: nn.Module, batch: Tensor) -> None:
        recalibrate(model, batches, exact=True, progress=False)

    with pytest.raises(RuntimeError, match=r"began another over the same layers\. Run the inner one before, or after"):
        recalibrate(model, batches, exact=True, forward=forward, progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    recalibrate(model, batches, exact=True, progress=False)
