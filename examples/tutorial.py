# %% [markdown]
# # A tour in ten minutes
#
# A small network learns handwritten digits, with a mistake that costs it most of its accuracy.
# You will find the mistake, mend it, look inside the network, and repair running statistics that do not fit.
#
# `pip install 'lightning-bn[examples]'` installs what this notebook needs.

# %%
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import ActivationStatsMonitor, ModeCheck, check, recalibrate

pl.seed_everything(0, verbose=False)
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
labels = torch.tensor(labels)
training = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
validation = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=64)


class Classifier(pl.LightningModule):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.features = nn.Sequential(*self.block(1, 16, momentum), *self.block(16, 32, momentum))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    @staticmethod
    def block(inputs, outputs, momentum):
        return nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs, momentum=momentum), nn.ReLU()

    def forward(self, images):
        return self.head(self.features(images))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, *callbacks, epochs=3):
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, training, validation)
    return float(trainer.callback_metrics["accuracy"])


# %% [markdown]
# ## Find a mistake
#
# The features are in eval mode, as pretrained ones are when they have been loaded.
# Nothing fails, and the network learns badly.
# `ModeCheck` names the layers, the step and the line that mends it.
# With `action="log"` the findings are kept, and not shown as warnings.

# %%
module = Classifier()
module.features.eval()
guard = ModeCheck(action="log")
accuracy = fit(module, guard)
print(f"accuracy {accuracy:.2f}")
finding = next(finding for finding in guard.findings if finding.code == "BN102")
print(finding)

# %% [markdown]
# ## Mend it
#
# The fix is a line of code that runs as printed.

# %%
module = Classifier()
module.features.eval()
module.features.train()
guard, monitor = ModeCheck(action="log"), ActivationStatsMonitor(verbose=False)
mended = fit(module, guard, monitor)
print(f"accuracy {mended:.2f}")
print([finding.code for finding in guard.findings if finding.level != "info"])

# %% [markdown]
# ## Look inside
#
# `ActivationStatsMonitor` watched each activation and each batch norm: which layer was sick, and since which step.

# %%
print(monitor)

# %% [markdown]
# ## Repair statistics that do not fit
#
# With a momentum of 0.001 the running statistics remember the last thousand batches, and this run has 66.
# The weights are fine, and the evaluation is not.
# `recalibrate` estimates the statistics anew, with the weights as they are.

# %%
module = Classifier(momentum=0.001)
slow = fit(module)
report = recalibrate(module.eval(), [batch for batch, _ in training], progress=False)
with torch.no_grad():
    repaired = float((module(images[1400:]).argmax(1) == labels[1400:]).float().mean())
print(f"accuracy {slow:.2f} before, {repaired:.2f} after")
print(report)

# %% [markdown]
# `check` looks at a model at rest, and the report can undo the repair.

# %%
print(check(module))
report.rollback()

# %% [markdown]
# Next: `docs/recipes.md` has a program for your kind of training.
# `docs/symptoms.md` leads from what you see to its rule.
