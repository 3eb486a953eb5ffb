"""Which modules are looked at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bn import BatchNorm1d, Window
from lightning_bn.activations.watched_layers import bounds_of, select_layers


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(2, 3), BatchNorm1d(3, averaging=Window(2)), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Dropout())
        self.head = nn.Sequential(nn.Linear(3, 2), nn.Softmax(1))


@pytest.mark.parametrize(
    ("choices", "names"),
    [
        (None, ["stem.1", "stem.2", "body.1", "body.2"]),
        ("stem.*", ["stem.0", "stem.1", "stem.2"]),
        ("stem", ["stem"]),
        (nn.Linear, ["stem.0", "body.0", "head.0"]),
        (lambda name, module: name.endswith(".2"), ["stem.2", "body.2"]),
        (["head", nn.GELU], ["body.2", "head"]),
        ([], []),
        ("nothing", []),
    ],
    ids=["default", "pattern", "name", "class", "predicate", "several", "none", "no match"],
)
def test_by_default_name_pattern_class_and_predicate(choices: object, names: list[str]) -> None:
    """Each way of choosing gives its modules, in registration order; an averaging is part of its layer and no module of
    the user's."""
    assert list(select_layers(Model(), choices)) == names


def test_compiled_modules_go_by_their_own_names() -> None:
    """torch.compile's module around a module does not show in the name, and the module found is the user's."""
    model = Model()
    norm = model.body[1]
    model.body = torch.compile(model.body)
    assert select_layers(model, nn.BatchNorm1d)["body.1"] is norm


def test_what_is_no_choice_is_told() -> None:
    """Neither a number nor a list with one is a choice."""
    for choices in (3, ["stem", 3]):
        with pytest.raises(TypeError, match="3 is not a name or a pattern"):
            select_layers(Model(), choices)


def test_bounds_are_those_of_the_function() -> None:
    """Each function of the sigmoid and tanh family stays within its bounds and comes close to both; others have
    none."""
    inputs = torch.linspace(-20, 20, 1001)
    for function in (nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardtanh(-2, 3)):
        least, greatest = bounds_of(function)
        outputs = function(inputs)
        assert (outputs.min().item(), outputs.max().item()) == (
            pytest.approx(least, abs=1e-6),
            pytest.approx(greatest, abs=1e-6),
        )
    assert [bounds_of(function) for function in (nn.ReLU(), nn.ReLU6(), nn.GELU())] == [None] * 3
