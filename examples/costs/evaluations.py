"""Statistics that an evaluation should not be read with."""

from __future__ import annotations

from digits import Classifier, ConvNet, digits
from torch import nn
from torch.utils.data import DataLoader

from costs.base import Batch, Outcome, Setting, mistake, norms, train, validate
from lightning_bn import recalibrate


@mistake("BN204", "a checkpoint of parameters alone, validated")
def parameters_alone(setting: Setting, mend: bool) -> Outcome:
    trained, module = Classifier(ConvNet()), Classifier(ConvNet())
    train(trained, setting)
    module.load_state_dict(dict(trained.named_parameters()), strict=False)
    if mend:
        recalibrate(module.model, digits(seed=setting.seed)[0], progress=False)
    return validate(module, setting)


class Shifts(Classifier):
    """Normalises pixels, some of which are always 0 in training; validation sees the images one pixel to the left."""

    def __init__(self) -> None:
        first = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64))
        super().__init__(nn.Sequential(first, nn.ReLU(), nn.Linear(64, 10)))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step((batch[0].roll(1, -1), batch[1]), batch_idx)


@mistake("BN210", "pixels that are 0 in training and not in validation, each with a batch norm")
def shifts(setting: Setting, mend: bool) -> Outcome:
    module = Shifts()
    outcome = train(module, setting)
    if not mend:
        return outcome
    images = [images.roll(1, -1) for images, _ in digits(seed=setting.seed)[1]]
    recalibrate(module.model, images, progress=False)
    return validate(module, setting)


@mistake("BN211", "`track_running_stats=False`, validated in batches of 200", batch_size=200)
@mistake("BN211", "`track_running_stats=False`, validated in batches of 2", batch_size=2)
def untracked(setting: Setting, mend: bool, batch_size: int) -> Outcome:
    model = ConvNet()
    if not mend:
        for norm in norms(model):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return train(Classifier(model), setting, validation=DataLoader(digits(seed=setting.seed)[1].dataset, batch_size))
