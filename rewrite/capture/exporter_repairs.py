"""What the exporters from torch write that is not what the module says, put right before anything else reads it."""

from __future__ import annotations

import onnx_ir as ir


def repair(model: ir.Model) -> ir.Model:
    """`model`, an exporter's graph without functions, with every value under its own name and biases of one axis."""
    _distinct_names(model.graph)
    for node in model.graph.all_nodes():
        _drop_misshapen_bias(node)
    return model


def _distinct_names(graph: ir.Graph) -> None:
    """Rename results that have the name of an input, a weight or another result.

    A module with a buffer `mean` that also computes a mean gets two values of this name: in memory they are two, in
    a file one, so that whoever reads it back finds it invalid or takes one for the other.
    """
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken:
                number = 1
                while f"{value.name}_{number}" in taken:
                    number += 1
                value.name = f"{value.name}_{number}"
            taken.add(value.name)


def _drop_misshapen_bias(node: ir.Node) -> None:
    """A 3-D convolution without bias is written with zeros of shape (channels, 2), which is no bias of ONNX.

    Such zeros are Expand(CastLike(0), Concat(channels, 2)); see microsoft/onnxscript issue 2931.
    """
    if node.op_type != "Conv" or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    expand = node.inputs[2].producer()
    if expand is None or expand.op_type != "Expand":
        return
    zero, shape = (value.producer() if value is not None else None for value in expand.inputs)
    if shape is None or shape.op_type != "Concat" or zero is None or zero.op_type != "CastLike":
        return
    number = ir.convenience.get_const_tensor(zero.inputs[0]) if zero.inputs[0] is not None else None
    if number is not None and not number.numpy().any():
        node.resize_inputs(2)
