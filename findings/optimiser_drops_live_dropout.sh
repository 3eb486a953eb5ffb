#!/usr/bin/env bash
# onnxruntime's default graph optimisations remove a Dropout whose training_mode input is the constant true, where it
# stands between two operations, and keep the same Dropout where the graph begins with it: whether the answers of one
# exported training graph are random depends on the place of the layer and on the optimisation level.
# Runs onnxruntime without this project; fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

print("onnx", onnx.__version__, "onnxruntime", ort.__version__)


def session(nodes, constants, level):
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [image], [answer], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
dropout = helper.make_node("Dropout", ["a", "ratio", "training"], ["b"])
graphs = {
    "between two operations": [
        helper.make_node("Relu", ["x"], ["a"]), dropout, helper.make_node("Relu", ["b"], ["y"]),
    ],
    "at the beginning": [
        helper.make_node("Dropout", ["x", "ratio", "training"], ["b"]), helper.make_node("Relu", ["b"], ["y"]),
    ],
}
batch = np.arange(1, 321, dtype=np.float32).reshape(80, 4)
seen = {}
for place, nodes in graphs.items():
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        (answer,) = session(nodes, constants, level).run(["y"], {"x": batch})
        seen[place, level.name] = bool((answer == 0).any())
        print(f"{place}, {level.name}: dropout live: {seen[place, level.name]}")
expected = {
    ("between two operations", "ORT_DISABLE_ALL"): True,
    ("between two operations", "ORT_ENABLE_ALL"): False,
    ("at the beginning", "ORT_DISABLE_ALL"): True,
    ("at the beginning", "ORT_ENABLE_ALL"): True,
}
sys.exit(0 if seen == expected else "this has changed")
PY
