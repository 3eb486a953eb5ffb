"""Several sets of statistics in one network behave as separate networks do, built of torch alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import oracles
import pytest
import torch
from small_sets import LAYERS, NAMES, Whole, assert_same, batches, loss, network, statistics, statistics_of, train
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_bn import BatchNorm1d, StatisticsSets, Window, check, settle_together


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
def test_gradients_and_statistics_are_those_of_separate_networks(layers: str, affine: bool) -> None:
    """Three sets in one step, before one backward, give to the bit the gradients of three networks of torch, which are
    added up where sets share a weight; and each set has the statistics of its network."""
    whole, separate = Whole(affine=affine, layers=layers), [network() for _ in NAMES]
    for _ in range(3):
        data = batches(3)
        whole.zero_grad()
        total = torch.zeros(())
        for name, batch in zip(NAMES, data, strict=True):
            with whole.sets.use(name):
                total = total + loss(whole.net(batch))
        total.backward()
        for model, batch in zip(separate, data, strict=True):
            model.zero_grad()
            loss(model(batch)).backward()
        # Autograd adds up from the last use to the first.
        expected = {key: [dict(model.named_parameters())[key].grad for model in separate] for key in weights(whole.net)}
        for key, parts in expected.items():
            own = affine and key.split(".")[-2] in ("1",)
            for name, gradient in zip(NAMES, parts, strict=True):
                total_gradient = gradient if own else (parts[2] + parts[1]) + parts[0]
                assert torch.equal(gradient_of(whole, name, key), total_gradient), key
    if layers in ("torch", "ours"):
        for name, model in zip(NAMES, separate, strict=True):
            with whole.sets.use(name):
                assert_same(statistics(whole.net), statistics(model))


def weights(model: nn.Module) -> list[str]:
    return [key for key, _ in model.named_parameters()]


def gradient_of(whole: Whole, name: str, key: str) -> Tensor:
    with whole.sets.use(name):
        gradient = dict(whole.net.named_parameters())[key].grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("layers", LAYERS)
def test_an_exchange_launches_nothing(layers: str) -> None:
    """There and back, no operation runs: what a set costs is the host's alone."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: object, *_: object) -> object:
            raise AssertionError(function)

    whole = Whole(affine=True, layers=layers)
    train(whole)
    with Seen(), whole.sets.use(""):
        pass
    with pytest.raises(AssertionError, match="aten"), Seen():
        torch.zeros(1)


@pytest.mark.parametrize("together", [False, True])
def test_a_window_belongs_to_its_set(together: bool) -> None:
    """Each set's window holds its own last batches, in whatever order the sets take turns."""
    model = nn.Sequential(BatchNorm1d(2, averaging=Window(3)))
    if together:
        settle_together(model)
    sets, seen = StatisticsSets(model, ["a", "b"]), {"a": [], "b": []}
    for turn, name in enumerate("aababbbaab"):
        batch = torch.randn(6, 2) * (turn + 1) + turn
        seen[name].append(oracles.channels(batch))
        with sets.use(name):
            model(batch)
    for name, inputs in seen.items():
        mean, var = oracles.window(inputs, 3, pooled=False)
        with sets.use(name):
            assert model[0].running_mean.numpy() == pytest.approx(mean, rel=1e-5)
            assert model[0].running_var.numpy() == pytest.approx(var, rel=1e-5)
            assert int(model[0].num_batches_tracked) == len(inputs)


@pytest.mark.parametrize("layers", LAYERS)
def test_a_set_is_used_inside_of_a_forward(layers: str) -> None:
    """A forward that uses another set on its way mixes nothing, also where its layers settle together at its end."""

    class Inside(Whole):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            output = self.net(first)
            with self.sets.use("width=0.5"):
                output = output + self.net(second)
            return output + self.net(first)

    model = settle_together(Inside(layers=layers))
    one, other = (LAYERS[layers](network()) for _ in range(2))
    for _ in range(3):
        first, second = batches()
        model(first, second)
        for net, batch in ((one, first), (other, second), (one, first)):
            net(batch)
    for name, net in (("clean", one), ("width=0.5", other)):
        with model.sets.use(name):
            assert_same(model.net.state_dict(), net.state_dict())


def test_it_nests_and_comes_back_after_an_exception() -> None:
    """Each block restores the set that was in place before it, whatever ends it; the same tensors are back."""
    whole = Whole()
    before = list(whole.net.buffers())

    def fail() -> None:
        with whole.sets.use(""):
            with whole.sets.use("width=0.5"), whole.sets.use("clean"):
                assert whole.sets.active == "clean"
            assert whole.sets.active == ""
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert whole.sets.active == "clean"
    assert all(one is other for one, other in zip(before, whole.net.buffers(), strict=True))


def test_uses_that_end_in_another_order() -> None:
    """A generator may hold a `use` open: in place is the newest that is still open, and at the end what was there
    before all."""
    whole = Whole()

    def in_set(name: str) -> Iterator[None]:
        with whole.sets.use(name):
            yield

    generator = in_set("width=0.5")
    next(generator)
    with whole.sets.use(""):
        generator.close()
        assert whole.sets.active == ""
    assert whole.sets.active == "clean"
    generator = in_set("")
    with whole.sets.use("width=0.5"):
        next(generator)
    assert whole.sets.active == ""
    generator.close()
    assert whole.sets.active == "clean"


def test_which_sets_wait() -> None:
    """All but the one in place, each with the tensors that the layer has in it."""
    whole = Whole(affine=True)
    layer = whole.net[1]
    expected = {name: statistics_of(whole, name)["1.running_mean"] + place for place, name in enumerate(NAMES)}
    for name in NAMES:
        with whole.sets.use(name):
            layer.running_mean.copy_(expected[name])
    for name in NAMES:
        with whole.sets.use(name):
            found = whole.sets.waiting(layer)
            assert_same(
                {**{each: part.running_mean for each, part in found.items()}, name: layer.running_mean}, expected
            )
            assert name not in found
            assert all(part.weight is not layer.weight for part in found.values())


def test_threads_take_turns() -> None:
    """Two threads that use two sets of one model leave in each what its thread alone would have left."""
    whole, alone = Whole(), [network(), network()]
    data = {name: batches(1) * 20 for name in NAMES[:2]}

    def run(name: str) -> None:
        for batch in data[name]:
            with whole.sets.use(name):
                whole.net(batch)

    threads = [threading.Thread(target=run, args=(name,)) for name in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (name, each), model in zip(data.items(), alone, strict=True):
        for batch in each:
            model(batch)
        with whole.sets.use(name):
            assert_same(statistics(whole.net), statistics(model))


def test_no_exchange_while_another_thread_is_in_a_forward() -> None:
    """Layers that settle when the forward ends can't be given other statistics by another thread before that."""
    whole, errors = Whole(layers="ours"), []

    def other() -> None:
        try:
            with whole.sets.use(""):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    def hook(*_: object) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    whole.net[2].register_forward_hook(hook)
    whole.net(batches(1)[0])
    assert "another thread runs it" in errors[0]
    assert whole.sets.active == "clean"
    other()  # afterwards it can
    assert len(errors) == 1


@pytest.mark.parametrize("layers", ["torch", "window"])
def test_compiled_once_for_all_sets(layers: str) -> None:
    """Compiled code takes the set that is in place, and is compiled once."""
    compiled, eager = Whole(layers=layers), Whole(layers=layers)
    run = torch.compile(compiled.net, backend="eager", fullgraph=True)
    for step in range(3):
        for name, batch in zip(NAMES, batches(3), strict=True):
            with compiled.sets.use(name), torch.compiler.set_stance("fail_on_recompile" if step else "default"):
                run(batch)
            with eager.sets.use(name):
                eager.net(batch)
    for name in NAMES:
        torch.testing.assert_close(statistics_of(compiled, name), statistics_of(eager, name))


@pytest.mark.parametrize("affine", [False, True])
def test_checkpointing_with_the_set_inside(affine: bool) -> None:
    """A function that is recomputed in backward uses its set again, and gives the same gradients."""

    def gradients(recompute: bool) -> list[Tensor]:
        whole = Whole(affine=affine)

        def part(batch: Tensor, name: str) -> Tensor:
            with whole.sets.use(name):
                return whole.net(batch)

        outputs = [
            checkpoint(part, batch, name, use_reentrant=False) if recompute else part(batch, name)
            for name, batch in zip(NAMES, data, strict=True)
        ]
        sum(map(loss, outputs)).backward()
        return [parameter.grad for parameter in whole.parameters()]

    data = batches(3)
    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_the_set_outside_is_refused(reentrant: bool) -> None:
    """Backward would run the layers again with another set: with other weights, and moving other statistics. Where one
    set alone was used since the last backward there is no doubt."""
    whole, (first, second) = Whole(affine=True), batches()
    first.requires_grad_()
    second.requires_grad_()

    def run(batch: Tensor) -> Tensor:
        return loss(checkpoint(whole.net, batch, use_reentrant=reentrant))

    run(first).backward()
    with whole.sets.use(""):
        run(second).backward()
    with whole.sets.use(""):
        total = run(second)
    with pytest.raises(RuntimeError, match="inside of the function that is checkpointed"):
        (total + run(first)).backward()
    run(first).backward()


def test_momentum_is_the_layers() -> None:
    """A momentum that somebody sets between two uses holds for all sets."""
    whole = Whole(layers="debiased")
    for layer in (whole.net[1], whole.net[3][1]):
        layer.momentum = 0.5
    with whole.sets.use(""):
        assert whole.net[1].averaging.momentum == 0.5


def test_sets_come_and_go() -> None:
    """`add` copies a set, `remove` takes one away."""
    whole = Whole(affine=True)
    train(whole)
    whole.sets.add("train", like="width=0.5")
    assert whole.sets.names == (*NAMES, "train")
    assert_same(whole.sets.state_dict("train"), whole.sets.state_dict("width=0.5"))
    whole.sets.add("eval")
    assert_same(whole.sets.state_dict("eval"), whole.sets.state_dict("clean"))
    whole.sets.remove("width=0.5")
    assert whole.sets.names == ("clean", "", "train", "eval")
    assert not [key for key in whole.state_dict() if "width" in key]
    whole.train()
    whole.eval()


def test_only_the_chosen_layers() -> None:
    """The others keep one set of statistics."""
    model = network()
    sets = StatisticsSets(model, ["a", "b"], layers="3.*")
    with sets.use("b"):
        model(batches(1)[0])
    assert int(model[1].num_batches_tracked) == 1
    assert int(model[3][1].num_batches_tracked) == 0


def test_checks_are_silent_about_sets() -> None:
    """No rule takes the modules that hold the sets for norms that it can't judge."""
    assert not [finding for finding in check(Whole()) if finding.rule == "BN100"]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda whole: whole.sets.use("wide"), KeyError, r"sets.use\('wide'\): there is no such set"),
        (lambda whole: whole.sets.state_dict("wide"), KeyError, "no such set"),
        (lambda whole: whole.sets.remove("clean"), ValueError, "it is the first"),
        (lambda whole: whole.sets.remove("wide"), KeyError, "no such set"),
        (lambda whole: whole.sets.add("clean"), ValueError, "there is such a set"),
        (lambda whole: whole.sets.add(3), TypeError, "named by a string"),
        (lambda whole: whole.sets.add("a", like="b"), KeyError, "like='b'"),
        (lambda whole: StatisticsSets(whole.net, ["a"]), ValueError, "has sets already"),
        (lambda whole: StatisticsSets(network(), []), ValueError, "at least one name"),
        (lambda whole: StatisticsSets(network(), ["a", "a"]), ValueError, "none twice"),
        (lambda whole: StatisticsSets(network(), [1]), TypeError, "named by a string"),
        (lambda whole: StatisticsSets(nn.Linear(1, 1), ["a"]), ValueError, "no such batch-norm layer"),
        (lambda whole: StatisticsSets(network(), ["a"], layers=3), TypeError, "not a name"),
    ],
)
def test_mistakes_are_named(call: Callable[[Whole], object], error: type[Exception], text: str) -> None:
    """With the call that was made, and nothing changed."""
    whole = Whole()
    with pytest.raises(error, match=text):
        call(whole)
    assert whole.sets.names == tuple(NAMES)
    assert whole.sets.active == "clean"


def test_a_set_in_use_is_not_removed() -> None:
    """It would leave the model without statistics."""
    whole = Whole()
    with whole.sets.use(""), pytest.raises(ValueError, match="in use"):
        whole.sets.remove("")


def test_derived_weights_are_refused_by_name() -> None:
    """With affine=True: a pruned weight is no parameter that could be exchanged."""
    model = network()
    prune.l1_unstructured(model[3][1], "weight", 2)
    with pytest.raises(ValueError, match=r"affine=True\): the weight of 3.1 is pruned"):
        StatisticsSets(model, ["a", "b"], affine=True)
    sets = StatisticsSets(model, ["a", "b"])
    with sets.use("b"):
        model(batches(1)[0])


def test_other_channels_are_refused_before_anything_is_exchanged() -> None:
    """Channels removed from a layer are not removed from its other sets."""
    whole = Whole()
    layer = whole.net[3][1]
    layer.running_mean, layer.running_var = layer.running_mean[:4], layer.running_var[:4]
    with pytest.raises(RuntimeError, match="4 channels by now"), whole.sets.use(""):
        pass
    assert whole.sets.active == "clean"
    assert len(layer.running_mean) == 4
