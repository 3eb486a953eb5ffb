"""exact=True of code that torch.compile has made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from recalibration_models import full_batch, largest_errors, mlp, statistics
from states import norms
from torch import Tensor, nn

from lightning_bn import recalibrate

COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "as a whole": lambda model: torch.compile(model, backend="eager"),
    "within another": lambda model: nn.Sequential(torch.compile(model, backend="eager"), nn.Identity()),
}


def compiled_code(model: nn.Module) -> list[FunctionType]:
    """The functions in attributes of `model` and of what is below it that torch.compile has made."""
    values = [value for each in model.modules() for value in vars(each).values() if isinstance(value, FunctionType)]
    return [value for value in values if hasattr(value, "_torchdynamo_orig_callable")]


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("how", [*COMPILED, "in place"])
def test_a_compiled_model_is_measured(how: str, budget: int | None) -> None:
    """Code that was compiled before knows nothing of the hooks: it runs as it was written, and then as compiled
    again."""
    model, data = mlp(2), torch.randn(30, 10)
    twin, truth = copy.deepcopy(model), full_batch(model, data)
    compiled = COMPILED.get(how, lambda model: model)(model)
    if how == "in place":
        model.compile(backend="eager")
    compiled(data)
    compiled.eval()(data)
    before = [dict(vars(each)) for each in compiled.modules()]
    during: list[list[FunctionType]] = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        during.append(compiled_code(model))
        model(batch)

    assert compiled_code(compiled)
    recalibrate(compiled, data.split(7), forward=forward, exact=True, memory_budget=budget, progress=False)
    assert during == [[]] * 5
    assert max(largest_errors(statistics(model), truth)) < 1e-4
    assert before == [dict(vars(each)) for each in compiled.modules()]
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(data), twin.eval()(data))
    assert len(norms(compiled)) == 2


def test_a_compiled_function_is_measured_or_refused() -> None:
    """torch 2.14's wrapper around compiled code can't be left in another order than entered: the error names the
    argument, and nothing is changed."""
    model, data = mlp(2), torch.randn(30, 10)
    truth = full_batch(model, data)
    run = torch.compile(lambda batch: model(batch), backend="eager")
    run(data)
    before = copy.deepcopy(model.state_dict())

    def pass_() -> None:
        recalibrate(model, data.split(7), exact=True, forward=lambda _, batch: run(batch), progress=False)

    if not hasattr(torch._C, "_dynamo_save_local_dispatch_key_set"):
        pass_()
        assert max(largest_errors(statistics(model), truth)) < 1e-4
        return
    with pytest.raises(RuntimeError, match=r"exact=True.*compiled function.*forward=lambda"):
        pass_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
