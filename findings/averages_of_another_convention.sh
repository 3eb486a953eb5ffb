#!/usr/bin/env bash
# Three model families of transformers hand torch's BatchNorm2d the momentum of another framework's convention, where it
# is the weight of the *old* value: 0.99 (EfficientNet), 0.9997 (MobileNetV1) and 0.997 (MobileNetV2) by default. In torch
# it is the weight of the new batch, so their running statistics are those of the last batch: a second batch leaves 1,
# 0.03 and 0.3 per cent of the first one's mean.
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
    MobileNetV1Config,
    MobileNetV1Model,
    MobileNetV2Config,
    MobileNetV2Model,
)

print("torch", torch.__version__, "transformers", transformers.__version__)
families = {
    EfficientNetModel: EfficientNetConfig,
    MobileNetV1Model: MobileNetV1Config,
    MobileNetV2Model: MobileNetV2Config,
}
seen = {}
for family, config in families.items():
    torch.manual_seed(0)
    model = family(config()).train()
    first = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    dark, bright = torch.zeros(4, 3, 64, 64), torch.ones(4, 3, 64, 64)
    with torch.no_grad():
        model(dark)
        model(bright)
        together = first.running_mean.clone()
        model(bright)
    kept = ((together - first.running_mean).abs().max() / first.running_mean.abs().max()).item()
    seen[family.__name__] = first.momentum if kept < 0.02 else f"{first.momentum}, and {kept:.2%}"
    print(f"{family.__name__}: momentum {first.momentum}; a third batch, equal to the second, moves the mean by {kept:.2%}")
expected = {"EfficientNetModel": 0.99, "MobileNetV1Model": 0.9997, "MobileNetV2Model": 0.997}
sys.exit(0 if seen == expected else f"this has changed: {seen}")
PY
