"""Norms written by hand become RMSNormalization and LayerNormalization.

    x · (mean(x²) + ε)^(−1/2) [· w]                  → RMSNormalization(x, w)
    the same of x − mean(x) [+ b]                    → LayerNormalization(x, w, b)

Conditions, each with a negative test: the exponent is exactly 2; the mean is over the last axis alone and keeps it; ε
is one element and a float32, since the operator holds it as such; w has shape (d,), else it stays a product outside; x
is the same value in the square and in the product. Casts between floating types are the identity over the reals and are
looked through; the norm's own type is that of the product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import Editor, array_of, attribute_of, constant_of, is_operator, only_use, scalar_of, shape_of

RMS_OPSET, LAYER_OPSET = 23, 17


@dataclass(frozen=True)
class Norm:
    """x·(mean(x²) + ε)^(−1/2), the output of `node`; `centred` is the value whose centring x is, if it is one."""

    node: ir.Node
    operand: ir.Value
    epsilon: float
    width: int
    centred: ir.Value | None


def raise_norms(editor: Editor) -> None:
    """Every hand-written norm the opset has an operator for."""
    for node in list(editor.graph):
        norm = match_norm(node)
        if norm is not None and editor.opset >= (LAYER_OPSET if norm.centred is not None else RMS_OPSET):
            _raise(editor, norm)


def match_norm(node: ir.Node) -> Norm | None:
    """The norm whose normalized value `node` computes, before any weight; None if it computes none."""
    for operand, root in _quotients(node):
        found = _mean_square(root)
        if found is None:
            continue
        squared, epsilon = found
        width = (shape_of(operand) or (None,))[-1]
        if _uncast(operand) is _uncast(squared) and isinstance(width, int):
            return Norm(node, operand, epsilon, width, _centring(operand))
    return None


def _quotients(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Every reading of `node` as x·m^(−1/2): pairs of x and m."""
    pairs = []
    if is_operator(node, "Mul"):
        for operand, factor in (node.inputs, tuple(reversed(node.inputs))):
            square = _inverse_root(_uncast(factor))
            if square is not None and operand is not None:
                pairs.append((operand, square))
    elif is_operator(node, "Div") and node.inputs[0] is not None:
        square = _root(_uncast(node.inputs[1]))
        if square is not None:
            pairs.append((node.inputs[0], square))
    return pairs


def _root(value: ir.Value | None) -> ir.Value | None:
    """m where `value` is √m."""
    node = value.producer() if value is not None else None
    if is_operator(node, "Sqrt"):
        return node.inputs[0]
    return node.inputs[0] if is_operator(node, "Pow") and scalar_of(node.inputs[1]) == 0.5 else None


def _inverse_root(value: ir.Value | None) -> ir.Value | None:
    """m where `value` is 1/√m."""
    node = value.producer() if value is not None else None
    if is_operator(node, "Reciprocal"):
        return _root(node.inputs[0])
    if is_operator(node, "Div") and scalar_of(node.inputs[0]) == 1.0:
        return _root(node.inputs[1])
    if is_operator(node, "Pow") and scalar_of(node.inputs[1]) == -0.5:
        return node.inputs[0]
    inner = _root(value)
    reciprocal = inner.producer() if inner is not None else None
    return reciprocal.inputs[0] if is_operator(reciprocal, "Reciprocal") else None


def _mean_square(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """x and ε where `value` is mean(x²) + ε over the last axis."""
    node = value.producer() if value is not None else None
    if not is_operator(node, "Add"):
        return None
    for mean, epsilon in (node.inputs, tuple(reversed(node.inputs))):
        number, averaged = scalar_of(epsilon), last_axis_mean(mean)
        if number is None or averaged is None or float(np.float32(number)) != number:
            continue
        # An ε of higher rank than the mean would change the result's rank.
        if len(shape_of(epsilon) or ()) > len(shape_of(mean) or ()):
            continue
        squared = _square_root_of(averaged)
        if squared is not None:
            return squared, float(number)
    return None


def last_axis_mean(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is the mean of x over its last axis, which is kept with size 1."""
    node = value.producer() if value is not None else None
    if not is_operator(node, "ReduceMean") or attribute_of(node, "keepdims", 1) != 1:
        return None
    operand = node.inputs[0]
    axes = attribute_of(node, "axes", None)
    if len(node.inputs) > 1:
        axes = array_of(node.inputs[1])
    shape = shape_of(operand)
    if axes is None or len(axes) != 1 or shape is None:
        return None
    return operand if int(axes[0]) in (-1, len(shape) - 1) else None


def _square_root_of(value: ir.Value) -> ir.Value | None:
    """x where `value` is x²."""
    node = _uncast(value).producer()
    if is_operator(node, "Pow") and scalar_of(node.inputs[1]) == 2:
        exponent_rank = len(shape_of(node.inputs[1]) or ())
        return node.inputs[0] if exponent_rank <= len(shape_of(node.inputs[0]) or ()) else None
    return node.inputs[0] if is_operator(node, "Mul") and node.inputs[0] is node.inputs[1] else None


def _centring(value: ir.Value) -> ir.Value | None:
    """x where `value` is x − mean(x) over the last axis."""
    node = _uncast(value).producer()
    if not is_operator(node, "Sub"):
        return None
    operand, averaged = node.inputs[0], last_axis_mean(_uncast(node.inputs[1]))
    return operand if averaged is not None and _uncast(averaged) is _uncast(operand) else None


def _uncast(value: ir.Value | None) -> ir.Value:
    """`value` before any casts from one floating type to another."""
    while value is not None:
        node = value.producer()
        if not is_operator(node, "Cast") or not _is_float(node.inputs[0]) or not _is_float(value):
            break
        value = node.inputs[0]
    return value  # type: ignore[return-value]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _raise(editor: Editor, norm: Norm) -> None:
    operand, result = norm.operand, norm.node.outputs[0]
    result, operand = _narrowed(norm, result, operand)
    scale, result = _scale(norm, result)
    bias = None
    if norm.centred is not None:
        operand = norm.centred
        bias, result = _bias(norm, result)
    before = result.producer()
    if before is None or result.dtype is None or operand.dtype != result.dtype:
        return
    if scale is None:
        ones = np.ones(norm.width, result.dtype.numpy())
        scale = editor.initializer(f"{result.name}_ones", ones, result.dtype)
    attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    kind = "RMSNormalization" if norm.centred is None else "LayerNormalization"
    inputs = [operand, scale] if bias is None else [operand, scale, bias]
    made = editor.node(kind, inputs, attributes, before=before, name=f"{result.name}_norm", like=result)
    editor.take_over(result, made)


def _narrowed(norm: Norm, result: ir.Value, operand: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The value cast back, and the one cast from, where the norm is only computed in a wider type (half precision).

    The operator widens inside by itself (`stash_type`), and its weight is then applied in the narrow type, as here.
    """
    cast = only_use(result)
    if norm.centred is None and is_operator(cast, "Cast"):
        narrow, before = cast.outputs[0], _uncast(operand)
        if before is not operand and narrow.dtype == before.dtype:
            return narrow, before
    return result, operand


def _scale(norm: Norm, result: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    """The weight the normalized value is multiplied by, if it fits the operator, and the product."""
    product = only_use(result)
    if not is_operator(product, "Mul"):
        return None, result
    weight = product.inputs[1] if product.inputs[0] is result else product.inputs[0]
    return (weight, product.outputs[0]) if _is_vector(weight, norm.width, result) else (None, result)


def _bias(norm: Norm, result: ir.Value) -> tuple[ir.Value | None, ir.Value]:
    total = only_use(result)
    if not is_operator(total, "Add"):
        return None, result
    bias = total.inputs[1] if total.inputs[0] is result else total.inputs[0]
    return (bias, total.outputs[0]) if _is_vector(bias, norm.width, result) else (None, result)


def _is_vector(value: ir.Value | None, width: int, like: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and tuple(tensor.shape.numpy()) == (width,) and tensor.dtype == like.dtype
