"""Attention on three axes, where heads stay inside the last one and nothing is transposed.

    (B, S, H·h) → Reshape → Transpose → [RotaryEmbedding] → Attention → [guard] → Transpose → Reshape → (B, S, H·v)
    ────────────────────────────────────────────────────────────────────────────────────────────────────────────────
    (B, S, H·h) → [RotaryEmbedding] → Attention → [guard] → (B, S, H·v)

Attention and RotaryEmbedding of opset 23 read heads out of the last axis themselves, in the same order. Any shape that
is not known, dynamic axes by name, leaves the attention as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import Editor, array_of, attribute_of, is_operator, only_use, scalar_of, shape_of
from rewrite.targets.rotary import Rotation, half_caches, match_rotation

OPSET = 23
HEADS_FIRST = (0, 2, 1, 3)


def lay_out_attention(editor: Editor) -> None:
    """Every Attention on four axes between the reshapes that make and unmake its heads."""
    if editor.opset < OPSET:
        return
    for node in list(editor.graph):
        if is_operator(node, "Attention"):
            _lay_out(editor, node)


def _lay_out(editor: Editor, node: ir.Node) -> None:
    shapes = [shape_of(value) for value in node.inputs[:3]]
    tail = _tail(node)
    if tail is None or any(shape is None or len(shape) != 4 or not isinstance(shape[1], int) for shape in shapes):
        return
    if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        return
    if not all(_can_merge(value) for value in node.inputs[:3]):
        return
    guard, output = tail
    query, key, value = (merged(editor, operand, node) for operand in node.inputs[:3])
    (batch, heads, length, _), (_, groups, *_), (*_, value_size) = shapes  # type: ignore[misc]
    # Without a scale the operator takes 1/√h itself; written as an attribute it would be rounded to float32.
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": heads, "kv_num_heads": groups}
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    name = node.outputs[0].name
    last = guard if guard is not None else node
    made = editor.node(
        "Attention", [query, key, value, *([mask] if mask is not None else [])], attributes, before=last,
        name=f"{name}_tokens", dtype=node.outputs[0].dtype, shape=(batch, length, heads * value_size),
    )  # fmt: skip
    if guard is not None:
        condition = _without_heads(editor, guard.inputs[0], guard)
        made = editor.node(
            "Where", [condition, guard.inputs[1], made], before=guard, name=f"{guard.outputs[0].name}_tokens", like=made
        )
    editor.take_over(output, made)


def _tail(node: ir.Node) -> tuple[ir.Node | None, ir.Value] | None:
    """The guard after an attention, if there is one, and the value in which its heads are merged again."""
    output, guard = node.outputs[0], None
    reader = only_use(output)
    if is_operator(reader, "Where") and reader.inputs[2] is output:
        condition, zero = shape_of(reader.inputs[0]), shape_of(reader.inputs[1])
        if condition is None or len(condition) != 4 or condition[1] != 1 or condition[3] != 1:
            return None
        if zero is None or zero not in ((), (1,)) or scalar_of(reader.inputs[1]) is None:
            return None
        if shape_of(reader.outputs[0]) != shape_of(output):
            return None
        guard, reader = reader, only_use(reader.outputs[0])
    if not is_operator(reader, "Transpose") or tuple(attribute_of(reader, "perm", ())) != HEADS_FIRST:
        return None
    reshape = only_use(reader.outputs[0])
    if not is_operator(reshape, "Reshape"):
        return None
    before, after = shape_of(reader.outputs[0]), shape_of(reshape.outputs[0])
    return (guard, reshape.outputs[0]) if _merges(before, after) else None


def _merges(apart: tuple | None, together: tuple | None) -> bool:
    """Whether (B, S, H, h) and (B, S, H·h) are the two shapes."""
    if apart is None or together is None or len(apart) != 4 or len(together) != 3 or None in apart:
        return False
    sizes = apart[2:]
    return apart[:2] == together[:2] and all(isinstance(s, int) for s in sizes) and sizes[0] * sizes[1] == together[2]


def _can_merge(value: ir.Value | None) -> bool:
    """Whether `merged` has a form for a value (B, H, S, h)."""
    rotation = match_rotation(value)
    if rotation is not None:
        return _can_merge(rotation.operand)
    node = value.producer() if value is not None else None
    shape = shape_of(node.inputs[0]) if is_operator(node, "Transpose") else None
    return (
        node is not None and shape is not None and tuple(attribute_of(node, "perm", ())) == HEADS_FIRST
        and len(shape) == 4 and all(isinstance(size, int) for size in shape[2:]) and None not in shape
    )  # fmt: skip


def merged(editor: Editor, value: ir.Value, before: ir.Node) -> ir.Value:
    """`value` (B, H, S, h) as (B, S, H·h)."""
    rotation = match_rotation(value)
    if rotation is not None:
        return _rotated(editor, value, rotation, before)
    apart = value.producer().inputs[0]  # type: ignore[union-attr]
    batch, length, heads, size = shape_of(apart)  # type: ignore[misc]
    reshape = apart.producer()
    if is_operator(reshape, "Reshape") and _merges(shape_of(apart), shape_of(reshape.inputs[0])):
        return reshape.inputs[0]
    target = _integers(editor, "merge_heads", [0, 0, heads * size])
    return editor.node(
        "Reshape", [apart, target], before=before, name=f"{apart.name}_tokens", dtype=apart.dtype,
        shape=(batch, length, heads * size),
    )  # fmt: skip


def _rotated(editor: Editor, value: ir.Value, rotation: Rotation, before: ir.Node) -> ir.Value:
    batch, heads, length, size = shape_of(value)  # type: ignore[misc]
    tokens = merged(editor, rotation.operand, before)
    cos, sin = half_caches(editor, rotation, tokens, before)
    return editor.node(
        "RotaryEmbedding", [tokens, cos, sin], {"num_heads": heads, "interleaved": 0, "rotary_embedding_dim": 0},
        before=before, name=f"{value.name}_tokens", dtype=value.dtype, shape=(batch, length, heads * size),
    )  # fmt: skip


def _without_heads(editor: Editor, condition: ir.Value, before: ir.Node) -> ir.Value:
    """A condition (B, 1, S, 1) as (B, S, 1); made once for all layers that share it."""
    for use in condition.uses():
        made = use.node
        if is_operator(made, "Squeeze") and made.metadata_props.get("rewrite.pass") == editor.origin:
            return made.outputs[0]
    batch, _, length, last = shape_of(condition)  # type: ignore[misc]
    axes = _integers(editor, "heads_axis", [1])
    return editor.node(
        "Squeeze", [condition, axes], before=before, name=f"{condition.name}_tokens", dtype=condition.dtype,
        shape=(batch, length, last),
    )  # fmt: skip


def _integers(editor: Editor, name: str, numbers: list[int]) -> ir.Value:
    for value in editor.graph.initializers.values():
        held = array_of(value) if value.dtype == ir.DataType.INT64 else None
        if held is not None and held.ndim == 1 and held.tolist() == numbers:
            return value
    return editor.initializer(name, np.asarray(numbers, np.int64))
