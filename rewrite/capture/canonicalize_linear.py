"""Linear maps: one form, x·W + b on the last axis, with W an initializer in that orientation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import (
    FOLDABLE_ELEMENTS,
    Editor,
    array_of,
    attribute_of,
    constant_of,
    is_operator,
    only_use,
    shape_of,
)
from rewrite.ir.weights import Constant, Scale, Transpose, Weight, weight_of


def split_gemms(editor: Editor) -> None:
    """Gemm → MatMul + Add: α·A'·B' + β·C, with α folded into B, β into C, and B' stored transposed where it may be.

    Left alone: α or β other than 1 on an operand that is not constant.
    """
    for node in list(editor.graph):
        if is_operator(node, "Gemm"):
            _split_gemm(editor, node)


def _split_gemm(editor: Editor, node: ir.Node) -> None:
    left, right = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = attribute_of(node, "alpha", 1.0), attribute_of(node, "beta", 1.0)
    if left is None or right is None or left.dtype is None:
        return
    if (alpha != 1.0 and constant_of(right) is None) or (
        bias is not None and beta != 1.0 and constant_of(bias) is None
    ):
        return
    output = node.outputs[0]
    if attribute_of(node, "transA", 0):
        left = _transposed(editor, left, node)
    if alpha != 1.0:
        right = _scaled(editor, right, alpha)
    if attribute_of(node, "transB", 0):
        right = _transposed(editor, right, node)
    if bias is not None and beta != 1.0:
        bias = _scaled(editor, bias, beta)
    name = f"{output.name}_matmul" if bias is not None else f"{output.name}_product"
    product = editor.node("MatMul", [left, right], before=node, name=name, like=output)
    if bias is not None:
        product = editor.node("Add", [product, bias], before=node, name=f"{output.name}_sum", like=output)
    editor.take_over(output, product)
    editor.graph.remove(node, safe=True)


def _scaled(editor: Editor, value: ir.Value, factor: float) -> ir.Value:
    tensor = constant_of(value)
    assert tensor is not None, "callers scale constants only"
    weight = Scale(weight_of(tensor), Constant(np.asarray(np.float32(factor), np.float64)))
    return editor.derived(("scale", id(value), factor), f"{value.name}_scaled", weight, tensor.dtype)


def _transposed(editor: Editor, value: ir.Value, before: ir.Node) -> ir.Value:
    shape = shape_of(value)
    swapped = (shape[1], shape[0]) if shape is not None else None
    return editor.node(
        "Transpose",
        [value],
        {"perm": [1, 0]},
        before=before,
        name=f"{value.name}_transposed",
        like=value,
        shape=swapped,
    )


def fold_transposes(editor: Editor) -> None:
    """Transpose(weight) → an initializer that is stored transposed.

    A large weight that something else reads as it is (an embedding table that is also the head) keeps its Transpose
    node: folding would put the table in the file twice, and one initializer has one set of bytes to be proved. The
    runtime transposes it when the session loads.
    """
    for node in list(editor.graph):
        if not is_operator(node, "Transpose"):
            continue
        value, output = node.inputs[0], node.outputs[0]
        tensor = constant_of(value)
        if value is None or tensor is None or not tensor.dtype.is_floating_point() or output.is_graph_output():
            continue
        if tensor.size > FOLDABLE_ELEMENTS and not all(is_operator(use.node, "Transpose") for use in value.uses()):
            continue
        rank = len(tensor.shape)
        permutation = tuple(attribute_of(node, "perm", tuple(reversed(range(rank)))))
        weight: Weight = Transpose(weight_of(tensor), permutation)
        folded = editor.derived(("transpose", id(value), permutation), f"{value.name}_transposed", weight, tensor.dtype)
        editor.redirect(output, folded)
        editor.graph.remove(node, safe=True)


_ROWWISE = {"Relu", "Gelu", "Tanh", "Sigmoid", "Erf", "Identity", "Neg", "Cast"}
"""Unary operators, for which it does not matter how the rows are laid out."""


def undo_flattening(editor: Editor) -> None:
    """Reshape to rows, a linear map, Reshape back → the linear map on the tensor as it was.

        x (…, k) → (n, k) → ·W + b → (n, m) → (…, m)        all but the last axis of x and the result equal by name

    Both reshapes keep the last axis, so the rows are the same rows in the same order.
    """
    for node in list(editor.graph):
        if not is_operator(node, "Reshape"):
            continue
        path = _rows_path(node)
        if path is None:
            continue
        first, *middle = path
        value = first.inputs[0]
        assert value is not None, "a Reshape has its operand"
        leading = (shape_of(value) or ())[:-1]
        for step in middle:
            old = step.outputs[0]
            operands = [value if _is_rows(step, i) else operand for i, operand in enumerate(step.inputs)]
            last = (shape_of(old) or (None,))[-1]
            attributes = {name: attribute.value for name, attribute in step.attributes.items()}
            value = editor.node(
                step.op_type, operands, attributes, before=node, name=f"{old.name}_rows", dtype=old.dtype,
                shape=(*leading, last),
            )  # fmt: skip
        editor.take_over(node.outputs[0], value)
        editor.graph.remove(node, safe=True)
        for step in reversed(middle):
            if not step.outputs[0].uses():
                editor.graph.remove(step, safe=True)


def _rows_path(node: ir.Node) -> list[ir.Node] | None:
    """From the Reshape to rows to the last row-wise operator before `node`, the Reshape back; None where it is not."""
    restored = shape_of(node.outputs[0])
    path: list[ir.Node] = []
    value = node.inputs[0]
    while value is not None and value.producer() is not None:
        step = value.producer()
        assert step is not None, "asked just above"
        path.append(step)
        if is_operator(step, "Reshape"):
            break
        rows = next((i for i in range(len(step.inputs)) if _is_rows(step, i)), None)
        if rows is None or only_use(value) is None:
            return None
        value = step.inputs[rows]
    if len(path) < 2 or not is_operator(path[-1], "Reshape"):
        return None
    path.reverse()
    original, rows_shape = shape_of(path[0].inputs[0]), shape_of(path[0].outputs[0])
    flat = shape_of(node.inputs[0])
    if original is None or rows_shape is None or restored is None or flat is None:
        return None
    keeps_last = isinstance(original[-1], int) and original[-1] == rows_shape[-1] and isinstance(flat[-1], int)
    same_rows = original[:-1] == restored[:-1] and None not in original[:-1] and flat[-1] == restored[-1]
    return path if keeps_last and same_rows and len(rows_shape) == 2 else None


def _is_rows(step: ir.Node, index: int) -> bool:
    """Whether `step` treats every row of its operand `index` alike."""
    if step.domain != "":
        return False
    if step.op_type in _ROWWISE:
        return index == 0
    other = step.inputs[1 - index] if len(step.inputs) == 2 else None
    shape = shape_of(other)
    if shape is None:
        return False
    if step.op_type == "MatMul":
        return index == 0 and len(shape) == 2 and constant_of_or_transposed(other)
    if step.op_type in ("Add", "Mul", "Sub"):
        return constant_of(other) is not None and (len(shape) <= 1 or (array_of(other) is not None and shape == (1, 1)))
    return False


def constant_of_or_transposed(value: ir.Value | None) -> bool:
    """Whether a value is a constant, or the transpose of one (a tied head)."""
    node = value.producer() if value is not None else None
    return constant_of(value) is not None or (
        is_operator(node, "Transpose") and constant_of(node.inputs[0]) is not None
    )
