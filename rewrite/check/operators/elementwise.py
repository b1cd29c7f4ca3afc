"""Elementwise operators: arithmetic, comparisons, activations and casts.

Source: ONNX operator definitions, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx_ir as ir

from rewrite.check.operators.registry import Call, Operand, StoredIntegers, dense, is_floating, operator
from rewrite.ir.weights import Weight

_CHUNK = 1 << 16


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, by the C library's double-precision `erf` (below one ulp).

    >>> float(erf(np.array(0.5)))
    0.5204998778130465
    """
    flat = np.ravel(x).astype(np.float64)
    result = np.empty_like(flat)
    for start in range(0, flat.size, _CHUNK):  # by chunks, for the lists of Python floats are four times as large
        block = flat[start : start + _CHUNK]
        result[start : start + _CHUNK] = np.fromiter(map(math.erf, block.tolist()), np.float64, block.size)
    return result.reshape(np.shape(x)).astype(np.asarray(x).dtype)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1/(1 + exp(−x)) without overflow and without cancellation for negative x."""
    decay = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, decay) / (1 + decay)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def gelu(x: np.ndarray) -> np.ndarray:
    """x·Φ(x). Source: Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The tanh approximation of `gelu`, same source."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _unary(function):
    return lambda call, x: function(x)


for _name, _function in {
    "Neg": np.negative,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "Exp": np.exp,
    "Log": np.log,
    "Sin": np.sin,
    "Cos": np.cos,
    "Tan": np.tan,
    "Asin": np.arcsin,
    "Acos": np.arccos,
    "Atan": np.arctan,
    "Sinh": np.sinh,
    "Cosh": np.cosh,
    "Tanh": np.tanh,
    "Asinh": np.arcsinh,
    "Acosh": np.arccosh,
    "Atanh": np.arctanh,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.rint,
    "Sign": np.sign,
    "IsNaN": np.isnan,
    "Not": np.logical_not,
    "BitwiseNot": np.invert,
    "Erf": erf,
    "Sigmoid": sigmoid,
    "Softplus": softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Relu": lambda x: np.maximum(x, 0),
    "Mish": lambda x: x * np.tanh(softplus(x)),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}.items():
    operator(_name)(_unary(_function))


def _binary(function):
    return lambda call, a, b: function(a, b)


for _name, _function in {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
}.items():
    operator(_name)(_binary(_function))


def _variadic(function):
    return lambda call, *operands: functools.reduce(function, operands)


for _name, _function in {"Sum": np.add, "Max": np.maximum, "Min": np.minimum}.items():
    operator(_name)(_variadic(_function))


@operator("Mean")
def mean(call: Call, *operands: np.ndarray) -> np.ndarray:
    return functools.reduce(np.add, operands) / len(operands)


@operator("Div")
def div(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Integers truncate towards zero (as C does; numpy floors)."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.floor_divide(a, b)
    inexact = quotient * b != a
    return (quotient + (inexact & ((a < 0) != (b < 0)))).astype(a.dtype)


@operator("Mod")
def mod(call: Call, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, b) if call.attribute("fmod", 0) else np.mod(a, b)


@operator("Pow")
def power(call: Call, x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """The result has the type of the base. Small whole exponents multiply, so that the square is rounded once."""
    if x.dtype.kind == "f" and exponent.size == 1 and float(exponent.flat[0]) in (1.0, 2.0, 3.0):
        shape = np.broadcast_shapes(x.shape, exponent.shape)
        return functools.reduce(np.multiply, [x] * int(exponent.flat[0])).reshape(shape)
    if x.dtype.kind != "f" and exponent.dtype.kind == "f":
        return np.power(x.astype(np.float64), exponent).astype(x.dtype)
    return np.power(x, exponent).astype(x.dtype)


@operator("BitShift")
def bit_shift(call: Call, x: np.ndarray, amount: np.ndarray) -> np.ndarray:
    return np.left_shift(x, amount) if call.attribute("direction") == "LEFT" else np.right_shift(x, amount)


@operator("IsInf")
def is_inf(call: Call, x: np.ndarray) -> np.ndarray:
    positive, negative = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    return (np.isposinf(x) if positive else False) | (np.isneginf(x) if negative else np.zeros(x.shape, bool))


@operator("Clip")
def clip(call: Call, x: np.ndarray, low: np.ndarray | None = None, high: np.ndarray | None = None) -> np.ndarray:
    """Bounds are inputs since opset 11, attributes before. A lower bound above the upper one loses to it."""
    low = call.real("min") if low is None else low
    high = call.real("max") if high is None else high
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


@operator("Where")
def where(call: Call, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(condition, a, b)


@operator("LeakyRelu")
def leaky_relu(call: Call, x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, call.real("alpha", 0.01) * x, x)


@operator("PRelu")
def prelu(call: Call, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    return np.where(x < 0, slope * x, x)


@operator("Elu")
def elu(call: Call, x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, call.real("alpha", 1.0) * np.expm1(np.minimum(x, 0)), x)


@operator("Celu")
def celu(call: Call, x: np.ndarray) -> np.ndarray:
    alpha = call.real("alpha", 1.0)
    return np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha))


@operator("Selu")
def selu(call: Call, x: np.ndarray) -> np.ndarray:
    alpha, gamma = call.real("alpha", 1.67326319217681884765625), call.real("gamma", 1.05070102214813232421875)
    return gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: np.ndarray) -> np.ndarray:
    return np.where(x > call.real("alpha", 1.0), x, 0)


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: np.ndarray) -> np.ndarray:
    return np.clip(call.real("alpha", 0.2) * x + call.real("beta", 0.5), 0, 1)


@operator("Shrink")
def shrink(call: Call, x: np.ndarray) -> np.ndarray:
    bias, threshold = call.real("bias", 0.0), call.real("lambd", 0.5)
    return np.where(x < -threshold, x + bias, np.where(x > threshold, x - bias, 0))


@operator("Gelu")
def gelu_operator(call: Call, x: np.ndarray) -> np.ndarray:
    return gelu_tanh(x) if call.attribute("approximate", "none") == "tanh" else gelu(x)


@operator("Swish")
def swish(call: Call, x: np.ndarray) -> np.ndarray:
    return x * sigmoid(call.real("alpha", 1.0) * x)


@operator("Cast", lazy=True)
def cast(call: Call, x: Operand) -> Operand:
    return _converted(call, x, ir.DataType(call.attribute("to")))


@operator("CastLike", lazy=True)
def cast_like(call: Call, x: Operand, target: Operand) -> Operand:
    if isinstance(target, Weight):
        return _converted(call, x, ir.DataType.DOUBLE)
    target = target.numpy() if isinstance(target, StoredIntegers) else target
    return _converted(call, x, ir.DataType.from_numpy(np.asarray(target).dtype))


def _converted(call: Call, x: Operand, to: ir.DataType) -> Operand:
    """Float to float is the identity, float to integer truncates, to boolean asks for ≠ 0."""
    if to.is_floating_point():
        if isinstance(x, Weight):
            return x
        x = np.asarray(dense(x, call.precision))
        return x if is_floating(x.dtype) else x.astype(call.precision)
    if to == ir.DataType.STRING:
        raise call.unsupported("to a string")
    x = np.asarray(dense(x, call.precision))
    return x.astype(to.numpy())
