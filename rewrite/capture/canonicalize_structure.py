"""Structure that computes nothing: constants, copies, sequences of one tensor's pieces, and missing shapes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import (
    Editor,
    array_of,
    attribute_of,
    constant_of,
    describe,
    is_inference_dropout,
    is_operator,
    same_shape,
    scalar_of,
    shape_of,
)
from rewrite.ir.weights import Add, Constant, Scale, Weight, weight_of


def constants_to_initializers(editor: Editor) -> None:
    """`Constant` nodes of the main graph become initializers of the same name."""
    for node in list(editor.graph):
        output = node.outputs[0] if node.outputs else None
        if not is_operator(node, "Constant") or output is None or output.is_graph_output():
            continue
        tensor = constant_of(output)
        if tensor is None:
            continue
        name, output.name = output.name, None
        editor.redirect(output, editor.register(name or "constant", tensor))
        editor.graph.remove(node, safe=True)


def replace_sequences(editor: Editor) -> None:
    """`SplitToSequence` whose pieces are all taken by constant position becomes `Split`."""
    for node in list(editor.graph):
        if not is_operator(node, "SplitToSequence") or attribute_of(node, "keepdims", 1) != 1:
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        axis, sizes = attribute_of(node, "axis", 0), _piece_sizes(node)
        if sizes is None or node.outputs[0].is_graph_output():
            continue
        positions = [scalar_of(reader.inputs[1]) if is_operator(reader, "SequenceAt") else None for reader in readers]
        if any(position is None or not -len(sizes) <= position < len(sizes) for position in positions):
            continue
        lengths = editor.initializer(f"{node.outputs[0].name}_sizes", np.asarray(sizes, np.int64))
        source = node.inputs[0]
        names = [f"{node.outputs[0].name}_{i}" for i in range(len(sizes))]
        pieces = editor.nodes("Split", [source, lengths], {"axis": axis}, before=node, names=names)
        for piece, size in zip(pieces, sizes):
            whole = shape_of(source)
            if whole is not None and source is not None:
                before, after = whole[: axis % len(whole)], whole[axis % len(whole) + 1 :]
                describe(piece, dtype=source.dtype, shape=(*before, size, *after))
        taken: set[int] = set()
        for reader, position in zip(readers, positions):
            place = int(position) % len(sizes)  # type: ignore[arg-type]
            if place in taken:
                editor.redirect(reader.outputs[0], pieces[place])
            else:
                editor.take_over(reader.outputs[0], pieces[place])
            taken.add(place)
            editor.graph.remove(reader, safe=True)
        editor.graph.remove(node, safe=True)


def _piece_sizes(node: ir.Node) -> list[int] | None:
    """The sizes of the pieces a SplitToSequence makes, where they are static."""
    split = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    shape = shape_of(node.inputs[0])
    if split is None or shape is None:
        return None
    total = shape[attribute_of(node, "axis", 0)]
    if split.ndim == 1:
        return [int(size) for size in split]
    if not isinstance(total, int) or split.item() <= 0:
        return None
    size = int(split.item())
    return [min(size, total - start) for start in range(0, total, size)]


def remove_no_ops(editor: Editor) -> None:
    """Nodes whose output is their input: readers then read the input."""
    for node in list(editor.graph):
        source = unchanged_input(node) if node.outputs else None
        if source is None:
            continue
        if any(extra.uses() or extra.is_graph_output() for extra in node.outputs[1:]):
            continue
        output = node.outputs[0]
        if output.is_graph_output() and (source.producer() is None or source.is_graph_output()):
            continue
        describe(source, like=output)
        editor.redirect(output, source)
        editor.graph.remove(node, safe=True)


_NEUTRAL = {"Add": 0, "Sub": 0, "Or": False, "Mul": 1, "Div": 1, "Pow": 1, "And": True}
"""The second operand that changes nothing; for those that commute, the first as well."""


def unchanged_input(node: ir.Node) -> ir.Value | None:
    """The input that the first output equals in value, shape and dtype, or None.

    A Reshape, Expand or Slice says so by its shapes, dynamic axes compared by name; a size-preserving Slice must also
    go forward (a step of −1 keeps the shape and reverses the data).
    """
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    source, output = node.inputs[0], node.outputs[0]
    match node.op_type:
        case "Identity":
            same = True
        case "Dropout":
            same = is_inference_dropout(node)
        case "Cast":
            same = source.dtype is not None and source.dtype == attribute_of(node, "to", None)
        case "CastLike":
            other = node.inputs[1]
            same = source.dtype is not None and other is not None and source.dtype == other.dtype
        case "Transpose":
            permutation = attribute_of(node, "perm", None)
            same = permutation is not None and tuple(permutation) == tuple(range(len(permutation)))
        case "Reshape" | "Expand":
            same = same_shape(source, output)
        case "Slice":
            same = same_shape(source, output) and _steps_forward(node)
        case operator if operator in _NEUTRAL:
            return _beside_neutral(node)
        case _:
            return None
    return source if same else None


def _beside_neutral(node: ir.Node) -> ir.Value | None:
    """The other operand, where one is a constant that changes nothing and does not widen the result."""
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type in ("Add", "Mul", "Or", "And"):
        pairs.append((node.inputs[1], node.inputs[0]))
    for value, neutral in pairs:
        held = scalar_of(neutral)
        if held is not None and held == _NEUTRAL[node.op_type] and same_shape(value, node.outputs[0]):
            return value
    return None


def _steps_forward(node: ir.Node) -> bool:
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = array_of(node.inputs[4])
    return steps is not None and bool((steps == 1).all())


def fold_vectors(editor: Editor) -> None:
    """Arithmetic between constant vectors (Gemma's `1 + w`) becomes a weight expression, rounded once.

    Only vectors: folding a matrix would duplicate it, or store a bfloat16 table as float32.
    """
    for node in list(editor.graph):
        folded = _vector(node)
        output = node.outputs[0] if node.outputs else None
        if folded is None or output is None or output.is_graph_output() or output.dtype is None:
            continue
        editor.redirect(output, editor.initializer(f"{output.name}_folded", folded, output.dtype))
        editor.graph.remove(node, safe=True)


def _vector(node: ir.Node) -> Weight | None:
    if not is_operator(node, "Add", "Mul", "Cast"):
        return None
    tensors = [constant_of(value) for value in node.inputs]
    if any(tensor is None or not tensor.dtype.is_floating_point() for tensor in tensors):
        return None
    weights = [weight_of(tensor) for tensor in tensors if tensor is not None]
    vector = next((weight for weight in weights if len(weight.shape) == 1), None)
    if vector is None or any(weight.shape not in ((), (1,), vector.shape) for weight in weights):
        return None
    if node.op_type == "Cast":
        # Narrowing rounds, and a rounding in the middle of an expression is more than a constant's last ulp.
        to, held = ir.DataType(attribute_of(node, "to", 0)), tensors[0]
        exact = held is not None and to.is_floating_point() and to.bitwidth >= 2 * held.dtype.bitwidth
        return vector if exact else None
    vector = max(weights, key=lambda weight: (len(weight.shape), weight.shape))
    others = [weight for weight in weights if weight is not vector]
    if node.op_type == "Add":
        return Add((vector, *(_spread(other, vector.shape) for other in others)))
    factor = others[0] if others else vector
    return Scale(vector, _spread(factor, vector.shape), axis=0)


def _spread(weight: Weight, shape: tuple[int, ...]) -> Weight:
    return weight if weight.shape == shape else Constant(np.broadcast_to(weight.numpy(), shape).copy())


_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"}
_MOVES = {"Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Gather", "Split", "Concat", "Dropout"}
_UNARY = {
    "Sqrt", "Reciprocal", "Neg", "Tanh", "Erf", "Sigmoid", "Exp", "Log", "Sin", "Cos", "Relu", "Gelu", "Softmax",
    "LayerNormalization", "RMSNormalization", "Identity", "Abs",
}  # fmt: skip


def complete_shapes(editor: Editor) -> None:
    """Shapes and dtypes the exporter left out, where they follow from the inputs' by elementwise or matrix rules."""
    for value in editor.graph.initializers.values():
        if value.const_value is not None:
            missing = value.const_value.shape.numpy() if value.shape is None else None
            describe(value, dtype=value.const_value.dtype, shape=missing)
    for node in editor.graph:
        if node.domain != "" or not node.outputs:
            continue
        output, operands = node.outputs[0], [value for value in node.inputs if value is not None]
        if output.dtype is None:
            describe(output, dtype=_dtype(node, operands))
        if output.shape is not None:
            continue
        shapes = [shape_of(value) for value in operands]
        if any(shape is None for shape in shapes):
            continue
        shape = _inferred(node, [shape for shape in shapes if shape is not None])
        if shape is not None:
            describe(output, shape=shape)


def _dtype(node: ir.Node, operands: list[ir.Value]) -> ir.DataType | None:
    """The dtype of the output where it is that of the operands, or of the first."""
    if node.op_type in _ELEMENTWISE - {"Pow", "Where"}:
        return next((value.dtype for value in operands if value.dtype is not None), None)
    if node.op_type in _UNARY | _REDUCTIONS | _MOVES or node.op_type in ("Pow", "MatMul", "Gemm"):
        return operands[0].dtype
    return operands[-1].dtype if node.op_type == "Where" else None


def _inferred(node: ir.Node, shapes: list[tuple]) -> tuple | None:
    if node.op_type in _UNARY:
        return shapes[0]
    if node.op_type in _ELEMENTWISE:
        return _broadcast(shapes)
    if node.op_type == "MatMul" and len(shapes[0]) >= 2 and len(shapes[1]) == 2:
        return (*shapes[0][:-1], shapes[1][1])
    if node.op_type in _REDUCTIONS:
        axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else attribute_of(node, "axes", None)
        if axes is None or attribute_of(node, "keepdims", 1) != 1:
            return None
        reduced = {int(axis) % len(shapes[0]) for axis in axes}
        return tuple(1 if axis in reduced else size for axis, size in enumerate(shapes[0]))
    if node.op_type == "Transpose":
        permutation = attribute_of(node, "perm", tuple(reversed(range(len(shapes[0])))))
        return tuple(shapes[0][axis] for axis in permutation)
    return None


def _broadcast(shapes: list[tuple]) -> tuple | None:
    """The broadcast of shapes, or None where two axes are neither equal by name nor one of them 1."""
    result: list[int | str | None] = []
    rank = max(map(len, shapes))
    for axis in range(rank):
        sizes = {shape[axis - rank] for shape in shapes if axis - rank >= -len(shape)}
        sizes = {size for size in sizes if size != 1} or {1}
        if len(sizes) > 1 or None in sizes:
            return None
        result.append(sizes.pop())
    return tuple(result)
