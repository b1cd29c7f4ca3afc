"""Packed projections taken apart: the runtime multiplies three weights faster than it multiplies one and copies it out.

    Split(x·[W₁ W₂ W₃] + [b₁ b₂ b₃])  →  x·W₁ + b₁,  x·W₂ + b₂,  x·W₃ + b₃

Each part is a slice of the stored weight, bit for bit.
"""

from __future__ import annotations

import onnx_ir as ir

from rewrite.ir.edit import Editor, array_of, attribute_of, constant_of, is_operator, only_use, shape_of
from rewrite.ir.weights import Slice, weight_of


def unpack_projections(editor: Editor) -> None:
    """Every Split of a projection that nothing else reads, whose weight nothing else reads."""
    for node in list(editor.graph):
        sizes = _sizes(node)
        if sizes is None:
            continue
        split = node.inputs[0]
        add = split.producer() if split is not None else None
        bias = None
        if is_operator(add, "Add"):
            summand = next((i for i in (0, 1) if constant_of(add.inputs[1 - i]) is not None), None)
            if summand is None or only_use(split) is None:
                continue
            split, bias = add.inputs[summand], add.inputs[1 - summand]
        product = split.producer() if split is not None else None
        if not is_operator(product, "MatMul") or only_use(split) is None:
            continue
        operand, weight = product.inputs
        total = sum(sizes)
        if not _is_private(weight, 2, total) or (bias is not None and not _is_private(bias, 1, total)):
            continue
        _unpack(editor, node, operand, weight, bias, sizes)


def _sizes(node: ir.Node) -> list[int] | None:
    """The sizes of the parts, where `node` splits the last axis at constant places."""
    if not is_operator(node, "Split"):
        return None
    shape = shape_of(node.inputs[0])
    if shape is None or attribute_of(node, "axis", 0) not in (-1, len(shape) - 1) or not isinstance(shape[-1], int):
        return None
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        given = array_of(node.inputs[1])
        return None if given is None else [int(size) for size in given]
    parts = len(node.outputs)
    return [shape[-1] // parts] * parts if shape[-1] % parts == 0 else None


def _is_private(value: ir.Value | None, rank: int, total: int) -> bool:
    tensor = constant_of(value)
    if value is None or tensor is None or len(tensor.shape) != rank or tensor.shape.numpy()[-1] != total:
        return False
    return only_use(value) is not None


def _unpack(editor: Editor, node: ir.Node, operand, weight: ir.Value, bias: ir.Value | None, sizes: list[int]) -> None:
    start = 0
    for output, size in zip(list(node.outputs), sizes):
        taken = slice(start, start + size)
        start += size
        part = _part(editor, weight, taken)
        shape = output.shape or (*(shape_of(operand) or ())[:-1], size)
        value = editor.node(
            "MatMul", [operand, part], before=node, name=f"{output.name}_product", dtype=operand.dtype, shape=shape
        )
        if bias is not None:
            value = editor.node(
                "Add", [value, _part(editor, bias, taken)], before=node, name=f"{output.name}_sum", like=value
            )
        editor.take_over(output, value)
    editor.graph.remove(node, safe=True)


def _part(editor: Editor, value: ir.Value, taken: slice) -> ir.Value:
    tensor = constant_of(value)
    assert tensor is not None, "callers slice constants only"
    leading = tuple(slice(0, int(size)) for size in tensor.shape.numpy()[:-1])
    name = f"{value.name}_{taken.start}_{taken.stop}"
    return editor.derived(
        ("part", id(value), taken.start, taken.stop), name, Slice(weight_of(tensor), (*leading, taken)), tensor.dtype
    )
