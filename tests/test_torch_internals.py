"""What is found without torch's own generators is what these find."""

from __future__ import annotations

import random

import torch
from torch import nn

from lightning_bn.discovery import find_unserved
from lightning_bn.torch_internals import all_modules, all_parameters, modules_by_path


class ByType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("running_var", None)


def network(seed: int) -> nn.Module:
    """Modules one below another by chance: some at several places, some in the place of one None, some with a parameter
    of another's."""
    chance = random.Random(seed)
    modules: list[nn.Module] = [ByType() if chance.random() < 0.4 else nn.Module() for _ in range(8)]
    shared = nn.Parameter(torch.zeros(1))
    for place, module in enumerate(modules):
        module.register_parameter("own", chance.choice([None, shared, nn.Parameter(torch.zeros(1))]))
        for number in range(chance.randrange(4)):
            below = chance.randrange(place + 1, 9)
            module.add_module(f"child{number}", modules[below] if below < 8 else None)
    return modules[0]


def test_modules_and_parameters_come_as_from_torch() -> None:
    """In the same order, each once, and by path as often as they are there."""
    for model in map(network, range(100)):
        assert all_modules(model) == list(model.modules())
        assert list(map(id, all_parameters(model))) == list(map(id, model.parameters()))
        assert list(modules_by_path(model).items()) == list(model.named_modules(remove_duplicate=False))


def test_a_norm_at_several_places_is_told_of_once_by_its_first() -> None:
    """As torch names it."""
    for model in map(network, range(100)):
        expected = [name for name, module in model.named_modules() if isinstance(module, ByType)]
        assert [norm.name for norm in find_unserved(model)] == expected
