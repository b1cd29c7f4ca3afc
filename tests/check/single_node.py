"""One-node models for tests: built from arrays, evaluated here and in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from rewrite.check.reference import evaluate
from rewrite.check.runtime import run_original

CONTRIBUTED = "com.microsoft"


def node_model(
    operator: str,
    operands: list[np.ndarray | None],
    *,
    domain: str = "",
    opset: int = 23,
    outputs: int = 1,
    constant: tuple[int, ...] = (),
    **attributes,
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A model of one node whose operands are graph inputs (or initializers, by `constant`), and the inputs' arrays."""
    names = ["" if operand is None else f"x{i}" for i, operand in enumerate(operands)]
    node = helper.make_node(
        operator, names, [f"y{i}" for i in range(outputs)], name="node", domain=domain, **attributes
    )
    given = {name: operand for name, operand in zip(names, operands) if name}
    stored = {f"x{i}" for i in constant}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in given.items()
            if name not in stored
        ],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(given[name], name) for name in given if name in stored],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(CONTRIBUTED, 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ir.from_proto(proto), {name: array for name, array in given.items() if name not in stored}


def both(operator: str, operands: list[np.ndarray | None], **options) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The node's outputs here (float64) and in ONNX Runtime (as stored)."""
    model, inputs = node_model(operator, operands, **options)
    return list(evaluate(model, inputs).values()), list(run_original(model, inputs).values())
