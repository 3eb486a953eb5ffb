#!/usr/bin/env bash
# LightningModule.to_onnx and to_torchscript end with self.train(mode), the mode of the module as a whole, which every
# part below takes over: a backbone that was put in eval mode, as one freezes batch norms, is in training mode after an
# export in the middle of a fit, and its running statistics move from then on.
# Runs lightning without this project; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6 onnx==1.23.2 numpy==2.4.6
cd "$folder"
cat > program.py <<'PY'  # a file, since TorchScript reads the source
import sys

import lightning
import lightning.pytorch as pl
import torch
from torch import nn

print("lightning", lightning.__version__, "torch", torch.__version__)


class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


x = torch.randn(8, 4) + 3
exports = {
    "to_onnx": lambda module: module.to_onnx("network.onnx", x, dynamo=False),
    "to_torchscript(method='trace')": lambda module: module.to_torchscript(method="trace", example_inputs=x),
    "to_torchscript(method='script')": lambda module: module.to_torchscript(method="script"),
}
seen = {}
for name, export in exports.items():
    module = Network().train()
    module.backbone.eval()
    export(module)
    before = module.backbone[1].running_mean.clone()
    module(x)
    seen[name] = module.backbone.training, not torch.equal(before, module.backbone[1].running_mean)
    print(f"{name}: the backbone is in training mode: {seen[name][0]}, its statistics move: {seen[name][1]}")
sys.exit(0 if all(each == (True, True) for each in seen.values()) else "this has changed")
PY
"$folder/env/bin/python" -W ignore program.py
