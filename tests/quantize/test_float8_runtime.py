"""Why no preset places float8: what ONNX Runtime does with it on a CPU. A failing test is a new kernel."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper


def _model(nodes: list[onnx.NodeProto]) -> bytes:
    """y (4, 16) of x (4, 16), a float8 matrix w, and a scale s and zero point z for both."""
    values = np.linspace(-2, 2, 256)
    stored = [
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, [16, 16], values.tolist()),
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.25]),
        helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 16]) for name in "xy")
    graph = helper.make_graph(nodes, "float8", [x], [y], stored)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()


QUANTIZE = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
ROUNDED = [
    *(QUANTIZE, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"])),
    *(helper.make_node("DequantizeLinear", ["w", "s", "z"], ["b"]), helper.make_node("MatMul", ["a", "b"], ["y"])),
]


def test_rounded_products_do_not_open() -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"float8e4m3fn.*MatMulIntegerToFloat"):
        onnxruntime.InferenceSession(_model(ROUNDED), options)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(_model(ROUNDED), options)
    assert session.run(None, {"x": np.ones((4, 16), np.float32)})[0].shape == (4, 16)


def test_there_is_no_product_of_float8() -> None:
    product = helper.make_node("GemmFloat8", ["q", "w", "", "s", "s"], ["y"], domain="com.microsoft", dtype=1)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="Could not find an implementation for GemmFloat8"):
        onnxruntime.InferenceSession(_model([QUANTIZE, product]), options)
