"""Norms and matrix products as passes see them: their parameters, and where their constants are."""

from __future__ import annotations

import onnx_ir as ir

from rewrite.basis.regions import Region, Use, grow
from rewrite.basis.transforms import TransformClass
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import is_operator, only_use, shape_of

NORMS = ("LayerNormalization", "RMSNormalization")


def norm_attributes(norm: ir.Node) -> dict[str, float | int]:
    """Axis, ε and the type of the statistics, with the operator's defaults written out."""
    return {
        "axis": norm.attributes.get_int("axis", -1),
        "epsilon": norm.attributes.get_float("epsilon", 1e-5),
        "stash_type": norm.attributes.get_int("stash_type", 1),
    }


def used_statistic(norm: ir.Node) -> ir.Value | None:
    """A mean or deviation that the norm gives out beside its result, and that something reads."""
    return next((value for value in norm.outputs[1:] if value.uses() or value.is_graph_output()), None)


def bias_of(node: ir.Node) -> Use | None:
    """The constant vector that alone is added to a node's result, as long as the result's last axis."""
    result = node.outputs[0]
    added = only_use(result)
    if added is None or not is_operator(added, "Add"):
        return None
    position = 1 if added.inputs[0] is result else 0
    value, shape = added.inputs[position], shape_of(result)
    if value is None or not is_constant(value) or not shape or shape_of(value) != shape[-1:]:
        return None
    return Use(added, position, 0)


def right_factor(product: ir.Node, transform: TransformClass) -> Region:
    """The region of W in `MatMul(x, W)` along the contracted axis.

    Of a constant that is its operand alone; else all that is tied to it. The right factors of three products that read
    one stack of matrices through a Split are one region of one constant.
    """
    value = product.inputs[1]
    shape = shape_of(value) or ()
    if value is None:
        raise ValueError(f"{product.name} has no right factor")
    use = Use(product, 1, len(shape) - 2)
    if not is_constant(value):
        return grow(value, use.axis, transform)
    size = shape[use.axis]
    return Region(transform, value, size if isinstance(size, int) else 0, constants=[use], readers=[use])


def width(product: ir.Node) -> int:
    """The size of a matrix product's last axis; 0 where it is not static."""
    shape = shape_of(product.inputs[1]) or (0,)
    return shape[-1] if isinstance(shape[-1], int) else 0
