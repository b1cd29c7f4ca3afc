"""Quantize, dequantize and integer products of the standard.

What a kernel *decides* (a code, and the scale and zero point of a dynamic one) is decided here in float32, as ONNX
Runtime decides it: x/s divided in float32, rounded half to even. Everything else is exact in float64. So the codes are
the kernel's for the same float32 input, and elsewhere they differ only where x/s lies within rounding of a tie.

Source: ONNX operator definitions; ONNX Runtime's kernels where they leave the order of roundings open.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.check.operators.convolution import conv
from rewrite.check.operators.registry import Call, operator

_FLOAT32 = (0, int(ir.DataType.FLOAT))


def single(x: Any) -> np.ndarray:
    """`x` rounded to float32."""
    return np.asarray(x, np.float32)


def double(x: Any) -> np.ndarray:
    """`x` in float64."""
    return np.asarray(x, np.float64)


def spread(call: Call, parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point brought to the data's shape: per tensor, per axis or per block along the axis."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis, block = call.attribute("axis", 1) % len(shape), call.attribute("block_size", 0)
    if block:
        index = np.arange(shape[axis]) // block
        return np.take(parameter, index, axis=axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(call: Call, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None):
    """(x − z)·s."""
    values = x.astype(call.precision)
    if zero_point is not None:
        values = values - spread(call, zero_point.astype(call.precision), x.shape)
    return values * spread(call, scale, x.shape)


@operator("QuantizeLinear")
@operator("QuantizeLinear", domain="com.microsoft")
def quantize_linear(call: Call, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None):
    """saturate(round_half_to_even(x/s) + z), or x/s in the nearest number of an 8-bit float type."""
    if call.attribute("precision", 0) not in _FLOAT32:
        raise call.unsupported("with a division in less than float32")
    dtype = _quantized_type(call, zero_point)
    quotient = single(x) / spread(call, single(scale), x.shape)
    zero = None if zero_point is None else spread(call, single(zero_point), x.shape)
    if dtype.is_integer():
        return saturated(quotient, 0 if zero is None else zero, dtype)
    if zero is not None and np.any(zero):
        raise call.unsupported(f"to {dtype.name.lower()} with a zero point")
    limit = np.float32(np.asarray(_largest(dtype)))
    if call.attribute("saturate", 1):
        quotient = np.clip(quotient, -limit, limit)  # NaN stays
    return quotient.astype(dtype.numpy())


def _quantized_type(call: Call, zero_point: np.ndarray | None) -> ir.DataType:
    """The type of the codes: the zero point's, else the attribute's, else uint8."""
    if zero_point is None:
        return ir.DataType(call.attribute("output_dtype", 0) or ir.DataType.UINT8)
    if zero_point.dtype.kind != "f":
        return ir.DataType.from_numpy(zero_point.dtype)
    value = call.node.inputs[2]  # evaluated, an 8-bit float is float64: its type is what the graph says
    declared = None if value is None else value.dtype if value.const_value is None else value.const_value.dtype
    if declared is None:
        raise call.unsupported("to a float type that the graph does not name")
    return declared


def _largest(dtype: ir.DataType) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).max)


def integer_range(dtype: ir.DataType) -> tuple[int, int]:
    """The least and the largest code.

    >>> integer_range(ir.DataType.INT4), integer_range(ir.DataType.UINT8)
    ((-8, 7), (0, 255))
    """
    bits = dtype.bitwidth
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


def saturated(steps: np.ndarray, zero: np.ndarray | int, dtype: ir.DataType) -> np.ndarray:
    """round_half_to_even(steps) + zero, clipped to the range of `dtype`."""
    low, high = integer_range(dtype)
    codes = np.rint(double(steps)) + double(zero)
    return np.clip(codes, low, high).astype(np.int64).astype(dtype.numpy())


def dynamic_parameters(x: np.ndarray) -> tuple[np.float32, np.uint8]:
    """The scale and zero point that DynamicQuantizeLinear chooses for x: uint8 over its range, 0 in it; in float32."""
    x = single(x)
    low, high = min(np.float32(x.min(initial=0)), np.float32(0)), max(np.float32(x.max(initial=0)), np.float32(0))
    scale = np.float32(1) if low == high else np.float32((high - low) / np.float32(255))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (y uint8, scale, zero point): y = saturate(round_half_to_even(x/scale) + zero point)."""
    scale, zero = dynamic_parameters(x)
    return saturated(single(x) / scale, int(zero), ir.DataType.UINT8), np.array(scale), np.array(zero)


def per_row(parameter: np.ndarray | None) -> np.ndarray | float:
    """A zero point or scale of a left operand (..., m, k) in float64: one number, (m,), or (..., m, 1)."""
    if parameter is None:
        return 0.0
    wide = np.asarray(parameter, np.float64)
    return wide.reshape(()) if wide.size == 1 else wide[:, None] if wide.ndim == 1 else wide


def per_column(parameter: np.ndarray | None) -> np.ndarray | float:
    """A zero point or scale of a right operand (..., k, n) in float64: one number, (n,), or (..., 1, n)."""
    if parameter is None:
        return 0.0
    wide = np.asarray(parameter, np.float64)
    return wide.reshape(()) if wide.size == 1 else wide


def accumulated(a: np.ndarray, b: np.ndarray, a_zero: np.ndarray | None, b_zero: np.ndarray | None) -> np.ndarray:
    """(A − z_A)(B − z_B) as float64 integers: below 2⁵³ every sum of products of bytes is exact."""
    return np.matmul(double(a) - per_row(a_zero), double(b) - per_column(b_zero))


@operator("MatMulInteger")
def matmul_integer(call: Call, a: np.ndarray, b: np.ndarray, a_zero=None, b_zero=None) -> np.ndarray:
    """(A − z_A)(B − z_B) in int32; z_A per row, z_B per column where they are vectors."""
    return _int32(accumulated(a, b, a_zero, b_zero))


def _int32(sums: np.ndarray) -> np.ndarray:
    return sums.astype(np.int64).astype(np.int32)


def _convolved(call: Call, x, w, x_zero, w_zero) -> np.ndarray:
    """(x − z_x) ∗ (w − z_w) as float64 integers, z_w one number or one an output channel; padding is z_x."""
    centred = double(w)
    if w_zero is not None:
        zero = double(w_zero)
        centred = centred - (zero.reshape(()) if zero.size == 1 else zero.reshape(-1, *[1] * (w.ndim - 1)))
    return np.asarray(conv(call, double(x) - (0 if x_zero is None else double(x_zero).reshape(())), centred))


@operator("ConvInteger")
def conv_integer(call: Call, x: np.ndarray, w: np.ndarray, x_zero=None, w_zero=None) -> np.ndarray:
    """A Conv of codes minus their zero points, in int32."""
    return _int32(_convolved(call, x, w, x_zero, w_zero))


def requantized(sums: np.ndarray, factor: np.ndarray, zero: np.ndarray | None, dtype: ir.DataType) -> np.ndarray:
    """saturate(round_half_to_even(sum·factor) + zero), the product in float32 as the kernels take it."""
    steps = _int32(sums).astype(np.float32) * single(factor)
    return saturated(steps, 0 if zero is None else double(zero).reshape(()), dtype)


def _codes_type(call: Call, zero: np.ndarray) -> ir.DataType:
    if zero.dtype.kind == "f":
        raise call.unsupported("in a float type")
    return ir.DataType.from_numpy(zero.dtype)


@operator("QLinearMatMul")
def qlinear_matmul(call: Call, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero) -> np.ndarray:
    """A MatMul of codes, its int32 sums brought to the result's scale by s_A·s_B/s_y in float32."""
    columns = per_column(single(b_scale))
    factor = np.float32(per_row(single(a_scale))) * np.float32(columns) / single(y_scale).reshape(())
    return requantized(accumulated(a, b, a_zero, b_zero), factor, y_zero, _codes_type(call, y_zero))


@operator("QLinearConv")
def qlinear_conv(call: Call, x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias=None) -> np.ndarray:
    """A Conv of codes plus an int32 bias, brought to the result's scale by s_x·s_w/s_y in float32."""
    sums = _convolved(call, x, w, x_zero, w_zero)
    across = (1, -1, *[1] * (x.ndim - 2))
    if bias is not None:
        sums = sums + double(bias).reshape(across)
    factor = single(x_scale).reshape(()) * single(w_scale) / single(y_scale).reshape(())
    return requantized(sums, factor.reshape(across) if factor.size > 1 else factor, y_zero, _codes_type(call, y_zero))


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The `bits`-bit integers of each byte, lowest bits first, along the last axis.

    >>> unpacked(np.array([0x21], np.uint8), 4).tolist()
    [1, 2]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)
