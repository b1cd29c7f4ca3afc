"""ONNX Runtime's contributed quantized operators, with the roundings that its CPU kernels take.

Source: ONNX Runtime, docs/ContribOperators.md. The rule of `accuracy_level` 4 is read off the kernels of ONNX Runtime
1.31 on x86 with AVX-512 (`tests/check/test_quantized_operators.py` holds it to them).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.check.operators.quantization import (
    accumulated,
    double,
    dynamic_parameters,
    per_column,
    per_row,
    requantized,
    saturated,
    single,
    unpacked,
)
from rewrite.check.operators.registry import Call, operator
from rewrite.ir import weights

DOMAIN = "com.microsoft"

INTEGER_ACTIVATIONS = 4
"""The `accuracy_level` of MatMulNBits at which activations are rounded to int8."""

INTEGER_KERNELS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
"""Block sizes by bits for which accuracy level 4 has a kernel; elsewhere the product is in float32 all the same."""


def codes_by_block(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """x (..., k) as MatMulNBits at accuracy level 4 takes it: int8, symmetric, a scale for every row and block.

    s = max|x|/127 over the block, q = round_half_to_even(x·(127/max|x|)), both in float32; a last block is filled up
    with zeros. Returns q (..., blocks, block) and s (..., blocks, 1), float32.
    """
    size = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-size // block) * block), np.float32)
    padded[..., :size] = x
    blocks = padded.reshape(*x.shape[:-1], -1, block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, np.float32(1)), np.float32(0))
    return np.rint(blocks * inverse), largest / np.float32(127)


def rounded_by_block(x: np.ndarray, block: int) -> np.ndarray:
    """What the codes of `codes_by_block` stand for, q·s in float64, with the shape of x."""
    codes, scale = codes_by_block(x, block)
    return (double(codes) * double(scale)).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def rounds_activations(node: ir.Node) -> bool:
    """Whether ONNX Runtime's CPU kernel of a MatMulNBits node rounds activations to int8 (`rounded_by_block`)."""
    given: dict[str, Any] = {name: attribute.value for name, attribute in node.attributes.items()}
    packed, zero = (node.inputs[i] if i < len(node.inputs) else None for i in (1, 3))
    order = node.inputs[4] if len(node.inputs) > 4 else None
    return (
        given.get("accuracy_level", 0) == INTEGER_ACTIVATIONS
        and given.get("block_size") in INTEGER_KERNELS.get(given.get("bits", 4), ())
        and packed is not None
        and packed.const_value is not None
        and order is None
        and (zero is None or (zero.const_value is not None and zero.const_value.dtype == ir.DataType.UINT8))
    )


@operator("MatMulNBits", domain=DOMAIN)
def matmul_n_bits(call: Call, a: np.ndarray, b: np.ndarray, scales, zero_points=None, g_idx=None, bias=None):
    """A·Wᵀ + bias with W (N, K) held as blocks of `bits`-bit integers along K, (q − z)·s each.

    B (N, blocks, block_size·bits/8) uint8, low bits first; scales (N·blocks,); zero points packed alike, or floats;
    without them z = 2^(bits − 1). `g_idx` (K,) names the block whose s and z a row of W has. At accuracy level 4 A is
    `rounded_by_block` where there is a kernel for it.
    """
    n, k, bits = call.attribute("N"), call.attribute("K"), call.attribute("bits", 4)
    size = call.attribute("block_size")
    blocks = -(-k // size)
    packed, scales = b.reshape(n, blocks, -1), scales.reshape(n, blocks)
    group = np.arange(k) // size if g_idx is None or not g_idx.size else g_idx[:k].astype(np.int64)
    zero = np.full((n, blocks), float(1 << (bits - 1)))
    if zero_points is not None and zero_points.dtype == np.uint8:
        zero = unpacked(zero_points.reshape(n, -1), bits)[:, :blocks]
    elif zero_points is not None:
        zero = zero_points.reshape(n, blocks)
    if rounds_activations(call.node):
        a = rounded_by_block(a, size).astype(call.precision)
    product = np.empty((*a.shape[:-1], n), call.precision)
    step = max(1, weights.BLOCK_ELEMENTS // (blocks * size))
    for rows in (slice(first, first + step) for first in range(0, n, step)):
        codes = unpacked(packed[rows], bits)[..., :size].reshape(-1, blocks * size)[:, :k]
        weight = (codes.astype(call.precision) - zero[rows][:, group]) * scales[rows][:, group]
        product[..., rows] = np.matmul(a, weight.T.astype(call.precision, copy=False))
    return product if bias is None else product + bias


@operator("DynamicQuantizeMatMul", domain=DOMAIN)
def dynamic_quantize_matmul(call: Call, a: np.ndarray, b: np.ndarray, b_scale, b_zero=None, bias=None) -> np.ndarray:
    """Q(A)·((B − z_B)·s_B) + bias: A (..., k) rounded as by DynamicQuantizeLinear, B (k, n) codes, s_B (n,) or (1,)."""
    scale, zero = dynamic_parameters(a)
    codes = saturated(single(a) / scale, int(zero), ir.DataType.UINT8)
    product = accumulated(codes, b, np.asarray(zero), b_zero) * (double(scale) * per_column(b_scale))
    return product if bias is None else product + bias


@operator("MatMulIntegerToFloat", domain=DOMAIN)
def matmul_integer_to_float(
    call: Call, a: np.ndarray, b: np.ndarray, a_scale, b_scale, a_zero=None, b_zero=None, bias=None
) -> np.ndarray:
    """(A − z_A)·s_A · (B − z_B)·s_B + bias."""
    product = accumulated(a, b, a_zero, b_zero) * (per_row(a_scale) * per_column(b_scale))
    return product if bias is None else product + bias


@operator("QGemm", domain=DOMAIN)
def q_gemm(call: Call, a, a_scale, a_zero, b, b_scale, b_zero, c=None, y_scale=None, y_zero=None) -> np.ndarray:
    """α·s_A·s_B·(op(A − z_A)·op(B − z_B) + C), C int32 codes; a float where there is no s_y, else quantized by it."""
    left = double(a) - per_row(a_zero)
    right, scale = double(b), per_column(b_scale)
    zero = per_column(b_zero)
    left = left.T if call.attribute("transA", 0) else left
    right = (right.T if call.attribute("transB", 0) else right) - zero
    sums = left @ right
    if c is not None:
        sums = sums + double(c)
    alpha = call.real("alpha", 1.0)
    if y_scale is None:
        return sums * (alpha * per_row(a_scale) * scale)
    factor = np.float32(alpha) * single(a_scale).reshape(()) * single(scale) / single(y_scale).reshape(())
    dtype = ir.DataType.from_numpy(y_zero.dtype) if y_zero is not None else ir.DataType.from_numpy(a.dtype)
    return requantized(sums, factor, y_zero, dtype)


@operator("GatherBlockQuantized", domain=DOMAIN)
def gather_block_quantized(call: Call, data: np.ndarray, indices: np.ndarray, scales, zero_points=None) -> np.ndarray:
    """Rows `indices` of (data − z)·s along `gather_axis`, s and z one a block along `quantize_axis`.

    uint8 data hold 8/bits numbers a byte along the last axis, low bits first, and without zero points z = 2^(bits−1);
    (u)int4 data are not packed here and z = 0.
    """
    bits, size = call.attribute("bits", 4), call.attribute("block_size", 128)
    zero: np.ndarray | float = 0.0
    if data.dtype == np.uint8:
        data = unpacked(data, bits)
        zero = float(1 << (bits - 1))
        if zero_points is not None:
            zero_points = unpacked(zero_points, bits)[..., : scales.shape[-1]]
    gather, quantized = (call.attribute(f"{name}_axis", default) for name, default in (("gather", 0), ("quantize", 1)))
    gather, quantized = gather % data.ndim, quantized % data.ndim
    block = np.arange(data.shape[quantized]) // size

    def taken(array: np.ndarray) -> np.ndarray:
        spread_out = array if array is data else np.take(array, block, axis=quantized)
        return np.take(spread_out, indices, axis=gather).astype(call.precision)

    codes = taken(data)
    return (codes - (zero if zero_points is None else taken(zero_points))) * taken(scales)
