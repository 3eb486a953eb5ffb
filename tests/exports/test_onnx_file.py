"""Weights of an ONNX file that operations compute from constants each time the program runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_bn.exports.onnx_file import read_onnx
from lightning_bn.exports.program import Leaf, loaded


def weights(path: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> list[Leaf]:
    """Return the weights of a program whose `nodes` compute ``w``, by which it multiplies its input ``x``."""
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph), str(path))
    return [layer.weight for layer in read_onnx(path).layers]


def test_a_product_no_larger_than_its_factors_is_computed(tmp_path: Path) -> None:
    """In float16 where a factor was rounded to that: who compares it has to know how coarse it is."""
    matrix, scale = np.array([[1.0, 2.0], [3.0, 4.0]], np.float16), np.array([0.1, 0.2], np.float32)
    nodes = [helper.make_node("Cast", ["half"], ["m"], to=1), helper.make_node("Mul", ["m", "scale"], ["w"])]
    (weight,) = weights(tmp_path / "x.onnx", nodes, half=matrix, scale=scale)
    found = loaded(weight)
    assert found.numpy().dtype == np.float16
    np.testing.assert_allclose(found.numpy(), matrix * scale, rtol=2e-3)


def test_a_product_larger_than_its_factors_is_not(tmp_path: Path) -> None:
    """A file of some bytes could ask for any memory."""
    nodes = [helper.make_node("Mul", ["column", "row"], ["w"])]
    assert weights(tmp_path / "x.onnx", nodes, column=np.ones((9, 1), np.float32), row=np.ones(9, np.float32)) == []


def test_what_the_input_is_a_part_of_is_no_weight(tmp_path: Path) -> None:
    """Nor is what an operation makes of itself, in a damaged file."""
    one = np.ones((2, 2), np.float32)
    assert weights(tmp_path / "x.onnx", [helper.make_node("Mul", ["x", "one"], ["w"])], one=one) == []
    assert weights(tmp_path / "x.onnx", [helper.make_node("Add", ["w", "one"], ["w"])], one=one) == []
