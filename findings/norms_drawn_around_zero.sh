#!/usr/bin/env bash
# EfficientNet and MobileViT of transformers, built from their configurations as one does to train from scratch, draw the
# *weights* of their batch norms from a normal distribution around 0 of deviation 0.02, as if they were those of linear
# layers; ResNet and MobileNetV2 of the same package keep torch's ones. Every norm multiplies what passes by about 0.02
# and flips the sign of half of the channels: behind EfficientNet's 16 blocks nothing is left of the image, and two
# images can't be told apart in float32.
# Runs transformers without this project; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import sys

import torch
import transformers
from torch import nn
from transformers import (
    EfficientNetConfig,
    EfficientNetModel,
    MobileNetV2Config,
    MobileNetV2Model,
    MobileViTConfig,
    MobileViTModel,
    ResNetConfig,
    ResNetModel,
)

print("torch", torch.__version__, "transformers", transformers.__version__)
families = {
    EfficientNetModel: EfficientNetConfig,
    MobileViTModel: MobileViTConfig,
    MobileNetV2Model: MobileNetV2Config,
    ResNetModel: ResNetConfig,
}
drawn = {}
for family, config in families.items():
    torch.manual_seed(0)
    model = family(config()).train()
    norms = [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    weights = torch.cat([each.weight.detach() for each in norms])
    drawn[family.__name__] = bool((weights != 1).all())
    print(f"{family.__name__}: {len(norms)} norms, weights {weights.mean():.3f} +- {weights.std():.3f}", end="")
    if family is EfficientNetModel:
        with torch.no_grad():
            last = model(torch.randn(4, 3, 224, 224)).last_hidden_state
        faint = last.abs().max().item()
        print(f"; the largest activation before pooling is {faint:.0e}", end="")
    print()
expected = {"EfficientNetModel": True, "MobileViTModel": True, "MobileNetV2Model": False, "ResNetModel": False}
sys.exit(0 if drawn == expected and faint < 1e-6 else f"this has changed: {drawn}, {faint}")
PY
