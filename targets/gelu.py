"""GELU written out becomes one operator.

    ½·x·(1 + tanh(a·x + a·k·x³))      a = √(2/π), k = 0.044715      → Gelu(x, approximate="tanh")
    ½·x·(1 + erf(a·x))                a = 1/√2                      → Gelu(x)

The source's a and k are rounded to its dtype where Gelu's definition has the real numbers, so this is equal for
constants perturbed within an ulp of that dtype, which the proof accounts for. It is part of lowering, not of canonical
form: up to here a rewritten network with unrounded constants is the captured one to the last digit of float64. Any
other constant is left alone: the argument is read as a polynomial in x with exact rational coefficients, so it does not
matter how it was bracketed.

Written out and unfused, it is nine times slower in ONNX Runtime than the operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import onnx_ir as ir

from rewrite.ir.edit import Editor, array_of, constant_of, is_operator, scalar_of, shape_of

GELU_OPSET = 20
MAXIMUM_DEGREE = 3

Polynomial = tuple[Fraction, ...]
"""Coefficients of x⁰, x¹, …, without trailing zeros."""


def raise_gelu(editor: Editor) -> None:
    """Every hand-written GELU of the main graph."""
    for node in list(editor.graph):
        if editor.opset >= GELU_OPSET and is_operator(node, "Mul", "Div"):
            _raise(editor, node)


def _raise(editor: Editor, node: ir.Node) -> None:
    output = node.outputs[0]
    found = match_gelu(node)
    if found is None:
        return
    operand, approximate = found
    if shape_of(operand) != shape_of(output):
        return
    attributes = {"approximate": approximate}
    made = editor.node("Gelu", [operand], attributes, before=node, name=f"{output.name}_gelu", like=output)
    editor.take_over(output, made)


def match_gelu(node: ir.Node) -> tuple[ir.Value, str] | None:
    """x and the kind of approximation where `node` is a Gelu of x."""
    constant, factors = Fraction(1), []
    for factor in _factors(node.outputs[0]):
        number = factor if isinstance(factor, Fraction) else _number(factor)
        if number is not None:
            constant *= number
        elif isinstance(factor, ir.Value):
            factors.append(factor)
    if constant != Fraction(1, 2) or len(factors) != 2:
        return None
    for operand, gate in (factors, factors[::-1]):
        sigmoidal = _one_plus(gate)
        if sigmoidal is None or operand.dtype is None:
            continue
        argument = _polynomial(sigmoidal.inputs[0], operand)
        if argument is not None and argument in _standard(sigmoidal.op_type, operand.dtype):
            return operand, "tanh" if sigmoidal.op_type == "Tanh" else "none"
    return None


def _standard(op_type: str, dtype: ir.DataType) -> tuple[Polynomial, ...]:
    """The arguments that are a Gelu's, its constants rounded to `dtype`."""

    def stored(number: float) -> Fraction:
        return Fraction(float(dtype.numpy().type(number)))

    if op_type == "Erf":
        return (Fraction(0), stored(math.sqrt(0.5))), (Fraction(0), 1 / stored(math.sqrt(2.0)))
    slope, cubic = stored(math.sqrt(2.0 / math.pi)), stored(0.044715)
    return ((Fraction(0), slope, Fraction(0), slope * cubic),)


def _factors(value: ir.Value) -> Iterator[ir.Value | Fraction]:
    """The factors of a product, however it is bracketed; a constant divisor comes inverted."""
    node = value.producer()
    if is_operator(node, "Mul"):
        for operand in node.inputs:
            if operand is not None:
                yield from _factors(operand)
    elif is_operator(node, "Div") and _number(node.inputs[1]) and node.inputs[0] is not None:
        yield from _factors(node.inputs[0])
        yield 1 / _number(node.inputs[1])  # type: ignore[operator]
    else:
        yield value


def _one_plus(value: ir.Value) -> ir.Node | None:
    """The Tanh or Erf node where `value` is 1 + it."""
    node = value.producer()
    if not is_operator(node, "Add"):
        return None
    for one, other in (node.inputs, node.inputs[::-1]):
        inner = other.producer() if other is not None else None
        if _number(one) == 1 and is_operator(inner, "Tanh", "Erf"):
            return inner
    return None


def _number(value: ir.Value | None) -> Fraction | None:
    """The exact value of a floating-point constant of one element."""
    array = array_of(value)
    if array is None or array.size != 1 or (not _is_float(value) and constant_of(value) is None):
        return None
    number = float(array.reshape(()))
    return Fraction(number) if math.isfinite(number) else None


def _polynomial(value: ir.Value | None, x: ir.Value) -> Polynomial | None:
    """`value` as a polynomial in `x` of degree at most 3, or None."""
    if value is None:
        return None
    if value is x:
        return (Fraction(0), Fraction(1))
    number = _number(value)
    if number is not None:
        return (number,) if number else ()
    node = value.producer()
    if not is_operator(node, "Add", "Sub", "Mul", "Div", "Pow", "Neg"):
        return None
    if node.op_type == "Pow":
        exponent = scalar_of(node.inputs[1])
        base = _polynomial(node.inputs[0], x)
        if exponent not in (1, 2, 3) or exponent is None:
            return None
        result: Polynomial | None = (Fraction(1),)
        for _ in range(int(exponent)):
            result = _product(result, base)
        return result
    left = _polynomial(node.inputs[0], x)
    if node.op_type == "Neg":
        return _product(left, (Fraction(-1),))
    right = _polynomial(node.inputs[1], x)
    match node.op_type:
        case "Add":
            return _sum(left, right)
        case "Sub":
            return _sum(left, _product(right, (Fraction(-1),)))
        case "Mul":
            return _product(left, right)
        case _:
            return _product(left, (1 / right[0],)) if right is not None and len(right) == 1 else None


def _sum(left: Polynomial | None, right: Polynomial | None) -> Polynomial | None:
    if left is None or right is None:
        return None
    size = max(len(left), len(right))
    return _trimmed([sum((p[i] for p in (left, right) if i < len(p)), Fraction(0)) for i in range(size)])


def _product(left: Polynomial | None, right: Polynomial | None) -> Polynomial | None:
    if left is None or right is None or len(left) + len(right) - 2 > MAXIMUM_DEGREE:
        return None
    result = [Fraction(0)] * max(0, len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            result[i + j] += a * b
    return _trimmed(result)


def _trimmed(coefficients: list[Fraction]) -> Polynomial:
    while coefficients and not coefficients[-1]:
        coefficients.pop()
    return tuple(coefficients)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()
