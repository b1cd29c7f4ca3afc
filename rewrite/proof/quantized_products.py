"""Integer products that carry their scales with them: operator-oriented quantized networks.

    QLinearMatMul(a, s_a, z_a, b, s_b, z_b, s_y, z_y)          codes of a·W_q
    QLinearConv(x, s_x, z_x, w, s_w, z_w, s_y, z_y, b)         codes of conv(x, W_q) + b·s_x·s_w
    MatMulIntegerToFloat(a, b, s_a, s_b, z_a, z_b, bias)       a·W_q + bias
    QGemm(a, s_a, z_a, b, s_b, z_b, c, s_y, z_y)               codes of a·W_q + c·s_a·s_b; numbers without s_y
    QLinearAdd(a, s_a, z_a, b, s_b, z_b, s_y, z_y)             codes of a + b; QLinearMul likewise
    QLinearSigmoid(x, s_x, z_x, s_y, z_y)                      codes of σ(x); other functions of one value likewise

The operands' codes have to be of the scale and zero point that the operator is told: it reads them so.

Source: ONNX, QLinearMatMul-21, QLinearConv-10; ONNX Runtime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.constants import Array, Constant, permuted
from rewrite.proof.forms import Form
from rewrite.proof.quantization import (
    CONTRIB,
    Codes,
    Part,
    activation,
    counted_product,
    integer_product,
    linear,
    operator,
    pinned,
    static_scheme,
)
from rewrite.proof.rules import RULES, attribute, matmul
from rewrite.proof.sites import Dequantized, type_name
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk


Operand = tuple[Value | None, Value | None, Value | None]
"""Codes, their scale and their zero point."""


def read(walk: Walk, codes: Value | None, scaling: Value | None, zero: Value | None) -> Form | None:
    """What codes of one scale stand for, if they are of the scale and zero point that is told."""
    if not isinstance(codes, Codes) or codes.scheme.axis is not None:
        return None
    if isinstance(scaling, Part) and isinstance(zero, Part):
        same = scaling.scheme == zero.scheme == codes.scheme and scaling.factor is None
        return codes.of if same and (scaling.name, zero.name) == ("scale", "zero point") else None
    scheme = static_scheme(codes.scheme.type, scaling, zero, None, 0, codes.of.rank)
    if scheme is None or scheme.key != codes.scheme.key:
        return None
    pinned(walk, scaling, zero)
    return codes.of


def written(walk: Walk, node: ir.Node, form: Form | None, scaling: Value | None, zero: Value | None) -> Codes | None:
    """Codes of a result, which is rounded here."""
    if form is None or form.kind != "f":
        return None
    type_ = type_name(zero) if isinstance(zero, Constant) else "uint8"
    scheme = static_scheme(type_, scaling, zero, None, 0, form.rank)
    if scheme is None:
        return None
    pinned(walk, scaling, zero)
    activation(walk, node, scheme, node.outputs[0])
    return Codes(form, scheme)


def _given(operands: Sequence[Value | None], count: int) -> list[Value | None]:
    return [*operands, *[None] * (count - len(operands))][:count]


def _factor(
    walk: Walk, node: ir.Node, codes: Value | None, scaling: Value | None, zero: Value | None, axis: int
) -> Constant | Form | None:
    """The right factor of a product: a weight, or what other codes stand for."""
    if isinstance(codes, Constant):
        return linear(walk, node, codes, scaling, zero, axis)
    return read(walk, codes, scaling, zero)


def _product_of_codes(walk: Walk, node: ir.Node, a: Operand, b: Operand) -> Form | None:
    """A·B of what both stand for; that the sums of their codes fit is entered."""
    left = read(walk, *a)
    right = None if left is None else _factor(walk, node, *b, -1)
    if left is None or right is None:
        return None
    if isinstance(right, Constant):
        integer_product(walk, right)
    else:
        counted_product(walk, left)
    return matmul(walk, left, right)


@operator("QLinearMatMul")
def qlinear_matmul(walk, node, operands):
    a, scale_a, zero_a, b, scale_b, zero_b, scale_y, zero_y = _given(operands, 8)
    product = _product_of_codes(walk, node, (a, scale_a, zero_a), (b, scale_b, zero_b))
    return None if product is None else written(walk, node, product, scale_y, zero_y)


@operator("QLinearConv")
def qlinear_conv(walk, node, operands):
    x, scale_x, zero_x, w, scale_w, zero_w, scale_y, zero_y, bias = _given(operands, 9)
    left = read(walk, x, scale_x, zero_x)
    if left is None or not isinstance(w, Constant):
        return None
    kernel = linear(walk, node, w, scale_w, zero_w, 0)
    added = _bias(walk, node, bias, scale_x, scale_w)
    if not isinstance(kernel, Dequantized) or (added is None and bias is not None):
        return None
    integer_product(walk, kernel, bias=bias if isinstance(bias, Constant) else None)
    return written(walk, node, _form(RULES["", "Conv"](walk, node, [left, kernel, added])), scale_y, zero_y)


def _form(value: object) -> Form | None:
    return value if isinstance(value, Form) else None


def _bias(
    walk: Walk, node: ir.Node, bias: Value | None, scale_a: Value | None, scale_b: Value | None
) -> Constant | None:
    """int32 codes of which a step is a step of both factors."""
    if not isinstance(bias, Constant) or not isinstance(scale_a, Constant) or not isinstance(scale_b, Constant):
        return None
    # Exact: float64 holds the product of two numbers of float32.
    steps = scale_a.whole().reshape(()) * scale_b.whole().reshape(-1)
    return linear(walk, node, bias, Array(steps if steps.size > 1 else steps.reshape(())), None, len(bias.shape) - 1)


@operator("MatMulIntegerToFloat", CONTRIB)
def matmul_integer_to_float(walk, node, operands):
    a, b, scale_a, scale_b, zero_a, zero_b, bias = _given(operands, 7)
    result = _product_of_codes(walk, node, (a, scale_a, zero_a), (b, scale_b, zero_b))
    return result if result is None or bias is None else forms.add(result, walk.form(bias))


@operator("QGemm", CONTRIB)
def qgemm(walk, node, operands):
    a, scale_a, zero_a, b, scale_b, zero_b, c, scale_y, zero_y = _given(operands, 9)
    left, turned = read(walk, a, scale_a, zero_a), bool(attribute(node, "transB", 0))
    # With another α the documentation leaves open which of the scales of C it is in.
    if left is None or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "transA", 0):
        return None
    right = _factor(walk, node, b, scale_b, zero_b, 0 if turned else 1)
    added = _bias(walk, node, c, scale_a, scale_b)
    if not isinstance(right, Constant) or (added is None and c is not None):
        return None
    vector = c if isinstance(c, Constant) and len(c.shape) == 1 else None
    integer_product(walk, right, columns_first=turned, bias=vector)
    result = matmul(walk, left, permuted(right, (1, 0)) if turned else right)
    if result is not None and added is not None:
        result = forms.add(result, walk.form(added))
    return result if scale_y is None else written(walk, node, result, scale_y, zero_y)


@operator("QLinearAdd", CONTRIB)
@operator("QLinearMul", CONTRIB)
def qlinear_of_two(walk, node, operands):
    a, scale_a, zero_a, b, scale_b, zero_b, scale_y, zero_y = _given(operands, 8)
    left, right = _number(walk, node, a, scale_a, zero_a), _number(walk, node, b, scale_b, zero_b)
    if left is None or right is None:
        return None
    made = RULES["", node.op_type.removeprefix("QLinear")](walk, node, [left, right])
    return written(walk, node, _form(made), scale_y, zero_y)


def _number(walk: Walk, node: ir.Node, codes: Value | None, scaling: Value | None, zero: Value | None) -> Value | None:
    if isinstance(codes, Constant):
        return linear(walk, node, codes, scaling, zero, None)
    return read(walk, codes, scaling, zero)


@operator("QLinearSigmoid", CONTRIB)
@operator("QLinearLeakyRelu", CONTRIB)
def qlinear_of_one(walk, node, operands):
    x, scale_x, zero_x, scale_y, zero_y = _given(operands, 5)
    form = read(walk, x, scale_x, zero_x)
    if form is None:
        return None
    # The attributes, of which LeakyRelu has one, are those of the ONNX operator.
    same = ir.Node("", node.op_type.removeprefix("QLinear"), [None], list(node.attributes.values()))
    return written(walk, node, walk.form(walk.applied(same, [form])[0]), scale_y, zero_y)


__all__ = ["read", "written"]
