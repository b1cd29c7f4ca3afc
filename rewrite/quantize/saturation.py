"""What integer kernels can add without error: 16 bits for pairs of products, 32 bits for their sum.

    vpmaddubsw      t_j = saturate₁₆(x_{2j}·w_{2j} + x_{2j+1}·w_{2j+1})      x in 0 … 255, w in −128 … 127
    vpmaddwd        Σ_j t_j in 32 bits

Processors of x86 without VNNI multiply u8 by s8 so, and ONNX Runtime's kernels on them too (int8 activations are made
u8 by adding 128). A pair is exact for all x just when its codes of one sign add up to at most 128 in magnitude, as
255·128 = 32640 ≤ 32767 < 255·129; codes of opposite signs never saturate. `unsaturated` gives up as little of a
column's accuracy as that takes.

Source    Intel, Software Developer's Manual, volume 2, PMADDUBSW; onnxruntime, MLAS, the U8S8 kernels for AVX2;
          microsoft/onnxruntime, docs on quantization, "reduce_range"
"""

from __future__ import annotations

import numpy as np

from rewrite.errors import RequestError
from rewrite.quantize.clipping import CHUNK_ELEMENTS
from rewrite.quantize.format import Format, Quantized, checked, stored_scale
from rewrite.quantize.rounding import covering

SAFE_PAIR = 128
"""The largest sum of magnitudes of two codes of one sign that no two activations saturate."""

CANDIDATES = 16
"""Scales tried from the one that makes a column safe by itself down to the one that it starts with."""


def multiply_add_pairs(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """`vpmaddubsw`: x uint8 (…, K) times codes int8 (K, N), pairs along K summed and saturated; int16 (…, ⌈K/2⌉, N).

    >>> multiply_add_pairs(np.array([255, 255], np.uint8), np.array([[127], [127]], np.int8))
    array([[32767]], dtype=int16)
    """
    if x.dtype != np.uint8 or codes.dtype != np.int8:
        raise RequestError(f"pairs of {x.dtype} and {codes.dtype}", remedy="uint8 activations and int8 codes")
    products = x[..., :, None].astype(np.int32) * codes.astype(np.int32)
    if products.shape[-2] % 2:
        products = np.concatenate([products, np.zeros_like(products[..., :1, :])], axis=-2)
    sums = products[..., ::2, :] + products[..., 1::2, :]
    return np.clip(sums, -(1 << 15), (1 << 15) - 1).astype(np.int16)


def saturating_product(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """x uint8 (..., K) times codes int8 (K, N) as processors without VNNI compute it, int32 (..., N)."""
    return multiply_add_pairs(x, codes).sum(axis=-2, dtype=np.int32)


def pair_excess(codes: np.ndarray) -> np.ndarray:
    """The largest |w₀| + |w₁| of the pairs (0, 1), (2, 3), … of one sign in each column of int8 codes (K, N); int (N,).

    Where signs differ the larger magnitude counts alone, which is at most 128. No pair saturates where this is at most
    `SAFE_PAIR`.

    >>> pair_excess(np.array([[100, 100], [30, -30]], np.int8))
    array([130, 100])
    """
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise RequestError(f"pairs of codes {codes.dtype}{codes.shape}", remedy="int8 codes (K, N)")
    wide = codes.astype(np.int64)
    if len(wide) % 2:
        wide = np.concatenate([wide, np.zeros_like(wide[:1])])
    above, below = np.maximum(wide, 0), np.maximum(-wide, 0)
    return np.maximum(above[::2] + above[1::2], below[::2] + below[1::2]).max(axis=0, initial=0)


def accumulator_bound(
    codes: np.ndarray, zero_points: np.ndarray | int = 0, activation: int = 255, bias: np.ndarray | int = 0
) -> np.ndarray:
    """A bound of all partial sums in a column, |x|·Σ|w| + |bias|, exact in int64 (N,); a kernel needs it below 2³¹.

    codes        (K, N) as the kernel holds them, less `zero_points` (broadcast) where it subtracts them first
    activation   the largest magnitude of the activations' codes, as the kernel holds them
    bias         in steps of the accumulator (N,)
    """
    steps = codes.astype(np.int64) - np.asarray(zero_points, np.int64)
    return np.abs(steps).sum(axis=0) * int(activation) + np.abs(np.asarray(bias, np.int64))


def unsaturated(weight: np.ndarray, format: Format, start: Quantized | None = None) -> Quantized:
    """A matrix (K, N) as int8 codes of which no pair saturates: `pair_excess` is at most `SAFE_PAIR`.

    start   chosen scales, of the same format; those that cover all weights if None. Columns whose nearest codes are
            safe with them keep them

    Each other column (or all of them, per tensor) gets, of scales between its own and the smallest with which its
    nearest codes are safe, the one of least squared error, its pairs that still are not safe moved to the nearest codes
    that are. So no column is worse than by growing its scale alone, or by changing codes alone.

    Raises RequestError for a format that is not signed, symmetric, of eight bits and without blocks.
    """
    if (format.bits, format.signed, format.symmetric, format.block) != (8, True, True, 0):
        raise RequestError(f"pairs of {format}", remedy="signed symmetric int8 codes with a scale for each column")
    if start is not None and start.format != format:
        raise RequestError(f"a start of {start.format}", remedy=f"the same format, {format}")
    weight = checked(weight)
    if start is None:
        scales = covering(weight.reshape(1, -1, 1) if format.per_tensor else weight[None], format)[0]
    else:
        scales = np.abs(start.scales.astype(np.float64))
    codes = _nearest(weight, scales)
    unsafe = pair_excess(codes.astype(np.int8)) > SAFE_PAIR
    if format.per_tensor:
        if unsafe.any():
            scales, codes = _best(weight, scales, shared=True)
    else:
        columns, step = np.flatnonzero(unsafe), max(1, CHUNK_ELEMENTS // len(weight))
        for first in range(0, len(columns), step):
            some = columns[first : first + step]
            scales[:, some], codes[:, some] = _best(weight[:, some], scales[:, some], shared=False)
    return Quantized(format, codes.astype(np.int8), scales.astype(np.float32), np.zeros(scales.shape, np.int8))


def _nearest(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(weight / scales), -127, 127)


def _best(weight: np.ndarray, scales: np.ndarray, *, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales and safe codes of least squared error, between `scales` (1, N), or (1, 1) shared, and the safe ones."""
    safe = _safe_scales(weight, scales, shared=shared)
    best_scales, best_codes, least = safe, _nearest(weight, safe), np.full(scales.shape, np.inf)
    for share in np.linspace(1.0, 0.0, CANDIDATES):
        candidate = np.minimum(stored_scale(scales + share * (safe - scales)), safe)
        codes = _safe_codes(weight, candidate)
        squares = np.square(codes * candidate - weight)
        errors = squares.sum().reshape(1, 1) if shared else squares.sum(axis=0, keepdims=True)
        better = errors < least
        best_scales, best_codes = np.where(better, candidate, best_scales), np.where(better, codes, best_codes)
        least = np.where(better, errors, least)
    return best_scales, best_codes


def _safe_scales(weight: np.ndarray, scales: np.ndarray, *, shared: bool) -> np.ndarray:
    """The smallest float32 scales, not below `scales`, whose nearest codes are safe: codes fall as scales grow, so that
    halving an interval of float32 numbers finds them."""
    low = scales.astype(np.float32)
    # Twice the scale that covers all: codes of at most 64, and 64 + 64 is safe.
    largest = np.abs(weight).max(axis=None if shared else 0, keepdims=True).reshape(scales.shape)
    high = np.maximum(low, stored_scale(largest / 63.5).astype(np.float32))
    floor, ceiling = low.view(np.int32).astype(np.int64), high.view(np.int32).astype(np.int64)
    while np.any(floor < ceiling):
        middle = (floor + ceiling) // 2
        excess = pair_excess(
            _nearest(weight, middle.astype(np.int32).view(np.float32).astype(np.float64)).astype(np.int8)
        )
        unsafe = (excess.max(initial=0).reshape(1, 1) if shared else excess[None]) > SAFE_PAIR
        floor, ceiling = np.where(unsafe, middle + 1, floor), np.where(unsafe, ceiling, middle)
    return ceiling.astype(np.int32).view(np.float32).astype(np.float64)


def _safe_codes(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The safe codes nearest to the weights (K, N).

    Of a pair with targets a + b ≥ 128 in steps, minimize (a − p)² + (b − q)²: then p + q = 128, p = ⌊(a − b + 128)/2⌉.
    """
    odd = len(weight) % 2
    targets = np.abs(weight) / scales
    signs = np.sign(weight)
    if odd:
        targets, signs = (np.concatenate([part, np.zeros_like(part[:1])]) for part in (targets, signs))
    codes = np.minimum(np.rint(targets), 127)
    first, second = codes[::2], codes[1::2]
    unsafe = (first + second > SAFE_PAIR) & (signs[::2] * signs[1::2] > 0)
    moved = np.clip(np.rint((targets[::2] - targets[1::2] + SAFE_PAIR) / 2), 1, SAFE_PAIR - 1)
    codes[::2], codes[1::2] = np.where(unsafe, moved, first), np.where(unsafe, SAFE_PAIR - moved, second)
    codes *= signs
    return codes[:-1] if odd else codes
