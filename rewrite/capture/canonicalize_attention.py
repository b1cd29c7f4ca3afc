"""Attention over repeated keys and values becomes grouped attention.

    k (B, G, S, h) → (B, G, 1, S, h) → (B, G, n, S, h) → (B, G·n, S, h)   → Attention reads k itself

Attention of opset 23 repeats each of its G key-value heads n times in place (h₀h₀h₁h₁…), which is what this
Expand and Reshape wrote out. Keys and values must both be repeated, by the same n, and queries have G·n heads. The
guard that zeroes rows where everything is masked stays: it is part of what was captured.
"""

from __future__ import annotations

import onnx_ir as ir

from rewrite.ir.edit import Editor, is_operator, shape_of

ATTENTION_OPSET = 23


def group_repeated_heads(editor: Editor) -> None:
    """Every Attention whose keys and values are both written out head by head."""
    for node in list(editor.graph):
        if editor.opset < ATTENTION_OPSET or not is_operator(node, "Attention") or len(node.outputs) > 1:
            continue
        # A cache is concatenated to the repeated keys; grouping it would change the cache's own shape.
        if any(value is not None for value in node.inputs[4:6]):
            continue
        query, key, value = (shape_of(operand) for operand in node.inputs[:3])
        sources = [unrepeated(operand) for operand in node.inputs[1:3]]
        if query is None or key is None or value is None or None in sources or len(query) != 4:
            continue
        if not key[1] == value[1] == query[1] or shape_of(sources[0])[1] != shape_of(sources[1])[1]:  # type: ignore[index]
            continue
        node.replace_input_with(1, sources[0])
        node.replace_input_with(2, sources[1])


def unrepeated(value: ir.Value | None) -> ir.Value | None:
    """k where `value` is k with each of its heads repeated in place; None otherwise.

    Every shape on the way must be known, dynamic axes by name: an Expand may also widen an axis of size 1.
    """
    reshape = _producer(value)
    expand = _producer(reshape.inputs[0]) if is_operator(reshape, "Reshape") else None
    if not is_operator(expand, "Expand"):
        return None
    insert = _producer(expand.inputs[0])
    if not is_operator(insert, "Unsqueeze", "Reshape"):
        return None
    source = insert.inputs[0]
    shapes = [shape_of(v) for v in (source, insert.outputs[0], expand.outputs[0], value)]
    if any(shape is None or None in shape for shape in shapes) or len(shapes[0]) != 4 or len(shapes[2]) != 5:  # type: ignore[arg-type]
        return None
    batch, groups, length, size = shapes[0]  # type: ignore[misc]
    times = shapes[2][2]  # type: ignore[index]
    if not isinstance(groups, int) or not isinstance(times, int):
        return None
    expected = [
        (batch, groups, length, size),
        (batch, groups, 1, length, size),
        (batch, groups, times, length, size),
        (batch, groups * times, length, size),
    ]
    return source if shapes == expected else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
