"""max(x, 0), written as Max or Clip, becomes Relu.

GELU written out stays: as one operator its constants are other numbers, which is for lowering (`targets/gelu.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from rewrite.ir.edit import Editor, is_operator, scalar_of, shape_of


def raise_relu(editor: Editor) -> None:
    """Every hand-written Relu of the main graph."""
    for node in list(editor.graph):
        _raise_relu(editor, node)


def _raise_relu(editor: Editor, node: ir.Node) -> None:
    operand = None
    if is_operator(node, "Max") and len(node.inputs) == 2:
        operand = next((a for a, b in (node.inputs, node.inputs[::-1]) if scalar_of(b) == 0), None)
    elif is_operator(node, "Clip") and len(node.inputs) == 2 and scalar_of(node.inputs[1]) == 0:
        operand = node.inputs[0]
    output = node.outputs[0] if node.outputs else None
    if operand is None or output is None or shape_of(operand) != shape_of(output):
        return
    if operand.dtype is None or not operand.dtype.is_floating_point():
        return
    editor.take_over(output, editor.node("Relu", [operand], before=node, name=f"{output.name}_relu", like=output))
