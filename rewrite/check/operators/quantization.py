"""Quantize, dequantize and integer products, exact in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.check.operators.registry import Call, operator


def _spread(call: Call, parameter: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point brought to the data's shape: per tensor, per axis or per block along the axis."""
    if parameter.size == 1:
        return parameter.reshape(())
    axis, block = call.attribute("axis", 1) % len(shape), call.attribute("block_size", 0)
    if block:
        index = np.arange(shape[axis]) // block
        return np.take(parameter, index, axis=axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])


@operator("DequantizeLinear")
def dequantize_linear(call: Call, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None):
    """(x − z)·s."""
    values = x.astype(call.precision)
    if zero_point is not None:
        values = values - _spread(call, zero_point.astype(call.precision), x.shape)
    return values * _spread(call, scale, x.shape)


@operator("QuantizeLinear")
def quantize_linear(call: Call, x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None = None):
    """saturate(round_half_to_even(x/s) + z)."""
    if zero_point is not None:
        dtype = ir.DataType.from_numpy(zero_point.dtype)
    else:
        dtype = ir.DataType(call.attribute("output_dtype", 0) or ir.DataType.UINT8)
    if not dtype.is_integer():
        raise call.unsupported(f"to {dtype.name.lower()}")
    low, high = _integer_range(dtype)
    steps = np.rint(x / _spread(call, scale, x.shape))
    if zero_point is not None:
        steps = steps + _spread(call, zero_point.astype(call.precision), x.shape)
    return np.clip(steps, low, high).astype(dtype.numpy())


def _integer_range(dtype: ir.DataType) -> tuple[int, int]:
    bits = dtype.bitwidth
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """To uint8 over the range of x with 0 in it; returns (y, scale, zero point)."""
    low, high = min(float(x.min(initial=0)), 0.0), max(float(x.max(initial=0)), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.uint8), np.array(scale), zero.astype(np.uint8)


@operator("MatMulInteger")
def matmul_integer(call: Call, a: np.ndarray, b: np.ndarray, a_zero=None, b_zero=None) -> np.ndarray:
    """(A − z_A)(B − z_B) in int32; z_A per row, z_B per column where they are vectors."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    if a_zero is not None:
        a = a - (a_zero.astype(np.int64)[:, None] if a_zero.ndim == 1 and a_zero.size > 1 else a_zero.astype(np.int64))
    if b_zero is not None:
        b = b - b_zero.astype(np.int64)
    return np.matmul(a, b).astype(np.int32)


@operator("MatMulNBits", domain="com.microsoft")
def matmul_n_bits(call: Call, a: np.ndarray, b: np.ndarray, scales, zero_points=None, g_idx=None, bias=None):
    """A·Wᵀ + bias with W (N, K) held as blocks of `bits`-bit integers along K, (q − z)·s each.

    B (N, blocks, block_size·bits/8) uint8, low bits first; scales (N·blocks,); zero points packed alike, or floats;
    without them z = 2^(bits − 1). Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    if g_idx is not None and g_idx.size:
        raise call.unsupported("with g_idx")
    n, k, bits = call.attribute("N"), call.attribute("K"), call.attribute("bits", 4)
    size = call.attribute("block_size")
    blocks = -(-k // size)
    q = _unpacked(b.reshape(n, blocks, -1), bits)[..., :size].astype(call.precision)
    if zero_points is None:
        zero = np.array(float(1 << (bits - 1)))
    elif zero_points.dtype == np.uint8:
        zero = _unpacked(zero_points.reshape(n, -1), bits)[:, :blocks, None].astype(call.precision)
    else:
        zero = zero_points.reshape(n, blocks, 1)
    weight = ((q - zero) * scales.reshape(n, blocks, 1)).reshape(n, -1)[:, :k]
    product = np.matmul(a, weight.T)
    return product if bias is None else product + bias


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """The `bits`-bit integers of each byte, lowest bits first, along the last axis."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(*packed.shape[:-1], -1)
