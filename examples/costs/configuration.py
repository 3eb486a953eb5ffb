"""How model, batches and Trainer are set up."""

from __future__ import annotations

from digits import Classifier, ConvNet, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from costs.base import Outcome, Setting, blocks, mistake, train, validate
from lightning_bn import Window, convert_batch_norm, recalibrate


@mistake("BN308", "`Window(20)` on layers of momentum 0.001, and then torch's `SyncBatchNorm` in their places")
def replaced(setting: Setting, mend: bool) -> Outcome:
    model: nn.Module = ConvNet()
    for block in blocks(model):
        block[1].momentum = 0.001
    model = convert_batch_norm(model, Window(20))
    return train(Classifier(model if mend else nn.SyncBatchNorm.convert_sync_batchnorm(model)), setting)


@mistake("BN302", "batches of one image, for one epoch; mended by group norms")
def one_image(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    for block in blocks(model) if mend else ():
        channels = block[1].num_features
        block[1] = nn.GroupNorm(channels // 2, channels)
    return train(Classifier(model, lr=0.01), setting, batch_size=1, epochs=1)


@mistake("BN303", "convolutions with a bias before the batch norms")
def bias(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    for block in () if mend else blocks(model):
        old = block[0]
        block[0] = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=old.stride, padding=1)
    return train(Classifier(model), setting)


@mistake("BN304", "batches of 4, gradients of 8 batches accumulated")
def accumulates(setting: Setting, mend: bool) -> Outcome:
    if mend:
        return train(Classifier(ConvNet()), setting, batch_size=32)
    return train(Classifier(ConvNet()), setting, batch_size=4, accumulate_grad_batches=8)


@mistake("BN305", "dropout of 0.5 before the last batch norm; mended by a recalibration")
def dropout(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    blocks(model)[-1].insert(1, nn.Dropout(0.5))
    module = Classifier(model)
    outcome = train(module, setting)
    if not mend:
        return outcome
    recalibrate(model, digits(seed=setting.seed)[0], progress=False)
    return validate(module, setting)


@mistake("BN305", "dropout of 0.5 before each batch norm; mended by one dropout after the last")
def dropouts(setting: Setting, mend: bool) -> Outcome:
    model = ConvNet()
    for block in () if mend else blocks(model):
        block.insert(1, nn.Dropout(0.5))
    if mend:
        model.insert(4, nn.Dropout(0.5))
    return train(Classifier(model), setting)


@mistake("BN307", "sorted by class, not shuffled")
def not_shuffled(setting: Setting, mend: bool) -> Outcome:
    images, labels = digits(seed=setting.seed)[0].dataset[:]
    order = labels.argsort(stable=True)
    training = DataLoader(TensorDataset(images[order], labels[order]), 32, shuffle=mend, drop_last=True)
    return train(Classifier(ConvNet()), setting, training=training)
