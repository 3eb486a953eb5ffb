#!/usr/bin/env bash
# openvino.save_model stores numbers in float16 by default, and a NaN among them as 65504, the largest finite number of
# float16; stored in float32 the NaN stays, and the CPU's Relu behind it makes 0 of it. Either way a network that was
# spoiled by a NaN gives finite answers, and nothing that looks for NaN finds it.
# Runs openvino without this project; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet openvino==2026.4.1 numpy==2.4.6
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import sys

import numpy as np
import openvino
import openvino.opset15 as ops

print("openvino", openvino.__version__)
image = ops.parameter([1, 3], np.float32)
weights = np.array([[0.5, np.nan, 2.0]], np.float32)
network = openvino.Model([ops.relu(ops.multiply(image, ops.constant(weights)))], [image], "network")
seen = {}
for name, how in {"by default": {}, "in float32": {"compress_to_fp16": False}}.items():
    openvino.save_model(network, "network.xml", **how)
    stored = np.fromfile("network.bin", np.float32 if how else np.float16)
    run = openvino.compile_model("network.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = run(np.ones((1, 3), np.float32))[0]
    seen[name] = stored.tolist()[1], answers[0].tolist()
    print(f"{name}: stored {stored}, answers {answers[0]}")
expected = seen["by default"] == (65504.0, [0.5, 65504.0, 2.0])
expected = expected and np.isnan(seen["in float32"][0]) and seen["in float32"][1] == [0.5, 0.0, 2.0]
sys.exit(0 if expected else "this has changed")
PY
