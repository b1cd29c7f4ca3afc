"""Small graphs in ONNX text, with weights, for the tests of this folder."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'


def graph(text: str, weights: dict[str, np.ndarray | ir.TensorProtocol] | None = None) -> ir.Model:
    """The model of a graph in ONNX text; `weights` become initializers of the names that nothing in it defines.

    >>> model = graph("g (float[n,2] x) => (float[n,2] y) { y = Add(x, b) }", {"b": np.ones(2, np.float32)})
    >>> list(model.graph.initializers)
    ['b']
    """
    weights = weights or {}
    model = ir.from_onnx_text(HEADER + text)
    unbound = {
        value.name: value
        for node in model.graph.all_nodes()
        for value in node.inputs
        if value is not None and value.producer() is None and not value.is_graph_input()
    }
    for name, array in weights.items():
        value = unbound[name]
        value.const_value = ir.tensor(array, name=name) if isinstance(array, np.ndarray) else array
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(value.const_value.shape)
        model.graph.register_initializer(value)
    return model


MLP = """g (float[n,8] x) => (float[n,4] logits) {
    norm = LayerNormalization <axis = -1> (x, gamma)
    up = MatMul(norm, w_up)
    act = Gelu(up)
    down = MatMul(act, w_down)
    sum = Add(down, x)
    logits = MatMul(sum, w_head)
}"""


def mlp_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of `MLP`: x (n, 8), 16 hidden units, 4 classes."""
    rng = np.random.default_rng(seed)
    shapes = {"gamma": (8,), "w_up": (8, 16), "w_down": (16, 8), "w_head": (8, 4)}
    return {name: (rng.standard_normal(shape) + 0.3).astype(np.float32) for name, shape in shapes.items()}


def mlp_inputs(seed: int = 1, rows: int = 5) -> dict[str, np.ndarray]:
    """Inputs of `MLP`."""
    return {"x": np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)}
