"""Rotary position embedding as it is written out, read as one operation.

    x ⊙ cos + [−x₂ x₁] ⊙ sin,   x = [x₁ x₂]  (B, H, S, h),  cos = cos′ of [f f], sin likewise
    ────────────────────────────────────────────────────────────────────────────────────────────
    RotaryEmbedding(x, cos of f, sin of f)                     half-split pairs (i, i + h/2)

Both halves of the caches must be one value: they are followed back to the concatenation of f with itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import Editor, array_of, attribute_of, is_operator, scalar_of, shape_of


@dataclass(frozen=True)
class Rotation:
    """x (B, H, S, h) and its caches (b, S, h) with b = 1 or B."""

    operand: ir.Value
    cos: ir.Value
    sin: ir.Value


def match_rotation(value: ir.Value | None) -> Rotation | None:
    """The rotation that `value` is, or None."""
    node = value.producer() if value is not None else None
    if not is_operator(node, "Add"):
        return None
    products = [_operands(operand) for operand in node.inputs]
    if None in products:
        return None
    for plain, turned in (products, products[::-1]):
        for operand, cos in (plain, plain[::-1]):  # type: ignore[index,misc]
            for rotated, sin in (turned, turned[::-1]):  # type: ignore[index,misc]
                if rotated_half_of(rotated) is operand:
                    caches = [_cache(cos), _cache(sin)]
                    if all(cache is not None and _has_halves(cache) for cache in caches):
                        return Rotation(operand, *caches)  # type: ignore[arg-type]
    return None


def _operands(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = value.producer() if value is not None else None
    return tuple(node.inputs) if is_operator(node, "Mul") else None  # type: ignore[return-value]


def rotated_half_of(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is [−x₂ x₁] along the last axis of x."""
    node = value.producer() if value is not None else None
    if not is_operator(node, "Concat") or len(node.inputs) != 2:
        return None
    shape = shape_of(value)
    if shape is None or attribute_of(node, "axis", 0) not in (-1, len(shape) - 1):
        return None
    negated = node.inputs[0].producer()
    if not is_operator(negated, "Neg"):
        return None
    second, first = _piece(negated.inputs[0]), _piece(node.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    source = first[0]
    width = (shape_of(source) or (None,))[-1]
    if not isinstance(width, int) or width % 2 or first[1:] != (0, width // 2) or second[1:] != (width // 2, width):
        return None
    return source


def _piece(value: ir.Value | None) -> tuple[ir.Value, int, int] | None:
    """x, start and stop where `value` is x[..., start:stop]."""
    node = value.producer() if value is not None else None
    shape = shape_of(node.inputs[0]) if node is not None and node.inputs else None
    if shape is None or not isinstance(shape[-1], int):
        return None
    if is_operator(node, "Split") and attribute_of(node, "axis", 0) in (-1, len(shape) - 1):
        sizes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if sizes is None:
            return None
        index = list(node.outputs).index(value)
        return node.inputs[0], int(sizes[:index].sum()), int(sizes[: index + 1].sum())
    if not is_operator(node, "Slice") or len(node.inputs) < 4:
        return None
    starts, ends, axes = (array_of(operand) for operand in node.inputs[1:4])
    steps = array_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if any(array is None or array.size != 1 for array in (starts, ends, axes, steps)):
        return None
    if int(axes[0]) not in (-1, len(shape) - 1) or steps[0] != 1:  # type: ignore[index]
        return None
    start, stop, _ = slice(int(starts[0]), int(ends[0])).indices(shape[-1])  # type: ignore[index]
    return node.inputs[0], start, stop


def _cache(value: ir.Value | None) -> ir.Value | None:
    """The cache (b, S, h) where `value` is it with an axis of heads put in."""
    node = value.producer() if value is not None else None
    if not is_operator(node, "Unsqueeze"):
        return None
    axes, shape = array_of(node.inputs[1]), shape_of(node.inputs[0])
    return node.inputs[0] if axes is not None and axes.tolist() in ([1], [-3]) and shape and len(shape) == 3 else None


def _has_halves(value: ir.Value) -> bool:
    """Whether both halves of the last axis are known to be equal."""
    node = value.producer()
    if is_operator(node, "Concat"):
        axis = attribute_of(node, "axis", 0)
        last = axis == -1 or axis == len(shape_of(value) or ()) - 1
        return last and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if is_operator(node, "Cos", "Sin", "Cast"):
        return _has_halves(node.inputs[0])
    return is_operator(node, "Mul") and scalar_of(node.inputs[1]) is not None and _has_halves(node.inputs[0])


def half_caches(editor: Editor, rotation: Rotation, tokens: ir.Value, before: ir.Node) -> list[ir.Value]:
    """cos and sin (B, S, h/2) for `tokens` (B, S, …), made once for all layers that share them."""
    return [_over_batch(editor, _half(editor, cache, before), tokens, before) for cache in (rotation.cos, rotation.sin)]


def _made(editor: Editor, name: str) -> ir.Value | None:
    """The value of a name this target gave, if it was made before."""
    return editor.made.get(name)


def _half(editor: Editor, value: ir.Value, before: ir.Node) -> ir.Value:
    node = value.producer()
    assert node is not None, "a cache is computed"
    if node.op_type == "Concat":
        return node.inputs[0]  # type: ignore[return-value]
    name = f"{value.name}_half"
    found = _made(editor, name)
    if found is not None:
        return found
    inner = _half(editor, node.inputs[0], before)  # type: ignore[arg-type]
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    made = editor.node(
        node.op_type,
        [inner, *node.inputs[1:]],
        attributes,
        before=before,
        name=name,
        dtype=value.dtype,
        shape=inner.shape,
    )
    editor.made[name] = made
    return made


def _over_batch(editor: Editor, half: ir.Value, tokens: ir.Value, before: ir.Node) -> ir.Value:
    """`half` (1, S, h/2) repeated for every row of the batch; the runtime's kernel does not broadcast it."""
    batch, (held, length, size) = shape_of(tokens)[0], shape_of(half)  # type: ignore[index,misc]
    if held == batch:
        return half
    name = f"{half.name}_batch"
    found = _made(editor, name)
    if found is not None:
        return found
    if isinstance(batch, int):
        target = editor.initializer(f"{half.name}_target", np.asarray([batch, 1, 1], np.int64))
    else:
        rows = editor.node(
            "Shape", [tokens], {"start": 0, "end": 1}, before=before, name=f"{half.name}_rows", dtype=ir.DataType.INT64,
            shape=(1,),
        )  # fmt: skip
        ones = editor.initializer(f"{half.name}_ones", np.ones(2, np.int64))
        target = editor.node(
            "Concat", [rows, ones], {"axis": 0}, before=before, name=f"{half.name}_target", dtype=ir.DataType.INT64,
            shape=(3,),
        )  # fmt: skip
    made = editor.node(
        "Expand", [half, target], before=before, name=name, dtype=half.dtype, shape=(batch, length, size)
    )
    editor.made[name] = made
    return made
