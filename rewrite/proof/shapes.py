"""Shapes of results of opaque operators, by their ONNX definitions.

Where this table is silent, the shape that the *original* model declares is believed: it is part of what the original
is. The rewritten model's declarations are never evidence, since an atom's shape is the one it was first seen with.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewrite.proof.dimensions import ONE, Dim, Shape, broadcast, product
from rewrite.proof.values import Value

ELEMENTWISE = frozenset(
    "Abs Acos Acosh And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Celu Clip Cos Cosh Elu "
    "Equal Erf Exp Floor Greater GreaterOrEqual HardSigmoid HardSwish IsInf IsNaN LeakyRelu Less LessOrEqual Log Max "
    "Min Mish Mod Neg Not Or PRelu Pow Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh "
    "ThresholdedRelu Where Xor Add Sub Mul Div Cast CastLike Identity".split()
)
"""Operators whose result has the broadcast shape of their operands."""

LIKE_FIRST = frozenset(
    "Softmax LogSoftmax CumSum Trilu LayerNormalization RMSNormalization InstanceNormalization GroupNormalization "
    "BatchNormalization ScatterND ScatterElements Hardmax LpNormalization RotaryEmbedding QuantizeLinear "
    "DequantizeLinear DynamicQuantizeLinear".split()
)
"""Operators whose (first) result has the shape of their first operand."""

REDUCTIONS = frozenset(
    "ReduceMax ReduceMin ReduceMean ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum "
    "ReduceLogSumExp ArgMax ArgMin".split()
)


def result_shape(
    node: ir.Node,
    operands: Sequence[Value | None],
    shapes: Sequence[Shape | None],
    constants: Sequence[list[int] | None],
) -> Shape | None:
    """The shape of the first result; None where no rule here gives it.

    `shapes` and `constants` are the operands' shapes and, for constant integer operands, their entries.
    """
    name = node.op_type
    known = [shape for shape in shapes if shape is not None]
    if name in ELEMENTWISE:
        return broadcast(*known)
    if not known:
        return None
    first = known[0]
    if name in LIKE_FIRST:
        return first
    if name in REDUCTIONS:
        return _reduced(node, first, constants)
    if name == "MatMul" and len(first) >= 2 and len(known[1]) >= 2:
        return (*broadcast(first[:-2], known[1][:-2]), first[-2], known[1][-1])
    if name == "Attention" and len(first) == 4 and len(known) > 2:
        return (*first[:-1], known[2][-1])
    if name == "GatherElements":
        return known[1]
    if name == "Gather":
        axis = _attribute(node, "axis", 0) % len(first)
        return (*first[:axis], *known[1], *first[axis + 1 :])
    if name == "GatherND":
        batch = _attribute(node, "batch_dims", 0)
        *outer, last = list(known[1])
        depth = last.constant
        return None if depth is None else (*outer, *first[batch + depth :])
    if name == "OneHot":
        return None
    if name == "Tile" and constants[1] is not None:
        return tuple(size * times for size, times in zip(first, constants[1]))
    if name == "TopK" and constants[1] is not None:
        axis = _attribute(node, "axis", -1) % len(first)
        return (*first[:axis], Dim.of(constants[1][0]), *first[axis + 1 :])
    if name in ("GlobalAveragePool", "GlobalMaxPool"):
        return (*first[:2], *[ONE] * (len(first) - 2))
    if name == "Flatten":
        axis = _attribute(node, "axis", 1) % len(first)
        return (product(first[:axis]), product(first[axis:]))
    return None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.value)


def _reduced(node: ir.Node, shape: Shape, constants: Sequence[list[int] | None]) -> Shape | None:
    keep = bool(_attribute(node, "keepdims", 1))
    if node.op_type in ("ArgMax", "ArgMin"):
        axes: list[int] | None = [_attribute(node, "axis", 0)]
    elif len(constants) > 1:
        axes = constants[1]
        if axes is None:
            return None
    else:
        found = node.attributes.get("axes")
        axes = list(found.value) if found is not None else []
    if not axes:
        if _attribute(node, "noop_with_empty_axes", 0):
            return shape
        axes = list(range(len(shape)))
    gone = {axis % len(shape) for axis in axes}
    return tuple(ONE if i in gone else n for i, n in enumerate(shape) if keep or i not in gone)
