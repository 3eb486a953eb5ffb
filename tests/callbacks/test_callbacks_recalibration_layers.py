"""Which layers the recalibration callback takes, and which it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from fitting import fit
from small_models import Small
from torch import Tensor, nn

from lightning_bn import BatchNormRecalibration


def test_layers_that_forward_does_not_reach_are_named() -> None:
    """A forward that leaves layers out can't be told from outside: those keep their statistics and a warning names
    them."""

    class Half(Small):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.bn1(self.first(inputs))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.rest(self(batch[0])), batch[1])

    callback = BatchNormRecalibration()
    with pytest.warns(UserWarning, match=r"rest\.3 did not run .*forward=") as caught:
        fit(callback, module=Half(), val=None)
    assert len([each for each in caught if "rest.3" in str(each.message)]) == 1
    assert callback.report.not_run == ("rest.3",)


def test_layers_that_go_while_the_fit_runs_are_named() -> None:
    """One layer is taken out, one is replaced: the report names the first and recalibrates the second."""

    class Loses(Small):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.rest[3] = nn.Identity()
                self.bn1 = nn.BatchNorm1d(5)

    callback = BatchNormRecalibration()
    fit(callback, module=Loses(), val=None, max_epochs=2)
    assert callback.report.gone == ("rest.3",)
    assert "No longer in the model: rest.3." in str(callback.report)
    assert callback.report.as_dict()["gone"] == ["rest.3"]
    assert [layer.name for layer in callback.report.layers] == ["bn1"]


def test_every_layer_frozen_is_not_said_of_layers_left_in_eval_mode() -> None:
    """The two are told apart, and the mend of the second is named."""
    frozen = Small()
    for layer in (frozen.bn1, frozen.rest[3]):
        layer.requires_grad_(False)
    with pytest.warns(UserWarning, match="every batch-norm layer is frozen"):
        fit(BatchNormRecalibration(), module=frozen, val=None)

    class LeftInEval(Small):
        def on_train_batch_start(self, *args: Any) -> None:
            self.eval()

    with pytest.warns(
        UserWarning, match=r"bn1, rest\.3 can learn, but no batch-norm layer was in training mode.*train\(\)"
    ) as caught:
        fit(BatchNormRecalibration(), module=LeftInEval(), val=None)
    assert not any("every batch-norm layer is frozen" in str(each.message) for each in caught)
