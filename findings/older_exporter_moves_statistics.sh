#!/usr/bin/env bash
# torch.onnx.export(dynamo=False, training=TrainingMode.TRAINING) of a model that is in eval mode moves the running
# statistics of that model: what it returns to its owner is another network than the one that was passed in.
# Runs torch without this project; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import io
import sys
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
print("torch", torch.__version__)
seen = {}
for mode in ("EVAL", "PRESERVE", "TRAINING"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = model[1].running_mean.clone()
    batch = torch.randn(8, 3, 8, 8) + 5
    answer = model(batch)
    torch.onnx.export(model, (batch,), io.BytesIO(), dynamo=False, training=getattr(torch.onnx.TrainingMode, mode))
    moved = not torch.equal(before, model[1].running_mean)
    seen[mode] = moved
    print(mode, "eval afterwards:", not model.training, " statistics moved:", moved,
          " answer changed by", (model.eval()(batch) - answer).abs().max().item())
sys.exit(0 if seen == {"EVAL": False, "PRESERVE": False, "TRAINING": True} else "this has changed")
PY
