"""How a matrix is stored in few bits: codes, scales, zero points, and the layout of MatMulNBits.

    W[k, n] ≈ (codes[k, n] − zero_points[g, n]) · scales[g, n]        g = ⌊k / block⌋

*Steps* are codes less the zero point. Symmetric formats have their zero point in the middle of the codes, at 0 or
2^(bits−1), so that their steps are −2^(bits−1) … 2^(bits−1) − 1, one more below than above; signed 8-bit codes leave
out −128, so that their steps are −127 … 127. A scale may be negative: it turns the longer side of the steps to where
the weights need it (`rounding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rewrite.errors import RequestError

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32 number, 2⁻¹²⁶: runtimes may flush anything smaller to zero."""

LARGEST_WEIGHT = float(np.finfo(np.float32).max) / 2
"""Half the largest float32 number: up to here no rounding of a weight or scale overflows."""


@dataclass(frozen=True)
class Format:
    """How a matrix (K, N) is stored.

    bits        2, 4 or 8 a code
    signed      codes are int8 in −2^(bits−1) … 2^(bits−1) − 1, else uint8 in 0 … 2^bits − 1
    symmetric   the zero point is 0 where signed and 2^(bits−1) where not; else any code
    block       rows along K that share a scale, the last group may be short; 0: all of them
    per_tensor  one scale for the columns too; then `block` is 0

    >>> Format(4, signed=False, symmetric=True, block=32).steps
    (-8, 7)
    >>> Format(8, signed=True, symmetric=True).codes
    (-127, 127)

    Raises RequestError where no such format exists.
    """

    bits: int
    signed: bool
    symmetric: bool
    block: int = 0
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise RequestError(f"{self.bits} bits a code", remedy="2, 4 or 8")
        if self.block < 0 or (self.block and self.per_tensor):
            raise RequestError(f"blocks of {self.block} rows per tensor {self.per_tensor}", remedy="one of the two")

    @property
    def dtype(self) -> np.dtype:
        """Of the codes and the zero points."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code."""
        half = 1 << (self.bits - 1)
        if not self.signed:
            return 0, 2 * half - 1
        return (1 - half if self.symmetric and self.bits == 8 else -half), half - 1

    @property
    def middle(self) -> int:
        """The zero point where symmetric."""
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def steps(self) -> tuple[int, int]:
        """Smallest and largest code less the zero point, where symmetric."""
        low, high = self.codes
        return low - self.middle, high - self.middle

    def groups(self, rows: int) -> int:
        """Groups of rows that have a scale of their own, in a matrix of `rows` rows."""
        return -(-rows // self.block) if self.block else 1

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(groups, N), or (1, 1) per tensor, for a matrix of `shape` (K, N)."""
        return (1, 1) if self.per_tensor else (self.groups(shape[0]), shape[1])


@dataclass(frozen=True, eq=False)
class Quantized:
    """A stored matrix: codes (K, N) of the format's dtype, scales (groups, N) float32 and not zero, zero points
    (groups, N) of the codes' dtype; (1, 1) for both per tensor.

    Raises RequestError where shapes, dtypes or ranges are not those of the format.
    """

    format: Format
    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def __post_init__(self) -> None:
        low, high = self.format.codes
        if self.codes.ndim != 2 or not self.codes.size:
            raise RequestError(f"codes of shape {self.codes.shape}", remedy="two axes, not empty")
        rows, columns = self.codes.shape
        for what, array, shape, dtype in (
            ("codes", self.codes, (rows, columns), self.format.dtype),
            ("scales", self.scales, self.format.scale_shape((rows, columns)), np.dtype(np.float32)),
            ("zero points", self.zero_points, self.format.scale_shape((rows, columns)), self.format.dtype),
        ):
            if array.shape != shape or array.dtype != dtype:
                raise RequestError(f"{what}: {array.dtype}{array.shape}, not {dtype}{shape}", where=str(self.format))
        for what, array in (("code", self.codes), ("zero point", self.zero_points)):
            if array.min() < low or array.max() > high:
                raise RequestError(f"a {what} outside {low} … {high}", where=str(self.format))
        if self.format.symmetric and np.any(self.zero_points != self.format.middle):
            raise RequestError(f"a zero point that is not {self.format.middle}", where=str(self.format))
        if not np.all(np.isfinite(self.scales)) or not np.all(self.scales):
            raise RequestError("a scale that is zero or not finite", where=str(self.format))

    def values(self) -> np.ndarray:
        """What the codes stand for, (codes − zero points)·scales, float64 (K, N)."""
        rows = len(self.codes)
        steps = self.codes - each_row(self.zero_points.astype(np.float64), self.format, rows)
        return steps * each_row(self.scales.astype(np.float64), self.format, rows)


def each_row(per_group: np.ndarray, format: Format, rows: int) -> np.ndarray:
    """An array (groups, N) as it holds for each of `rows` rows, (rows, N), or (1, N) where all rows share it."""
    return np.repeat(per_group, format.block, axis=0)[:rows] if format.block else per_group


def grouped(matrix: np.ndarray, format: Format) -> np.ndarray:
    """A matrix (K, N) as (groups, rows of a group, N): the last group filled up with zeros; (1, K·N, 1) per tensor."""
    rows, columns = matrix.shape
    if format.per_tensor:
        return matrix.reshape(1, rows * columns, 1)
    if not format.block:
        return matrix[None]
    groups = format.groups(rows)
    if missing := groups * format.block - rows:
        matrix = np.concatenate([matrix, np.zeros((missing, columns), matrix.dtype)])
    return matrix.reshape(groups, format.block, columns)


def ungrouped(groups: np.ndarray, format: Format, shape: tuple[int, int]) -> np.ndarray:
    """Undo `grouped`: an array of its result's shape as a matrix of `shape` (K, N)."""
    if format.per_tensor:
        return groups.reshape(shape)
    return groups.reshape(-1, shape[1])[: shape[0]]


def checked(weight: np.ndarray) -> np.ndarray:
    """`weight` in float64. Raises RequestError unless it is a matrix, not empty, of numbers that fit in float32."""
    weight = np.asarray(weight, np.float64)
    if weight.ndim != 2 or not weight.size:
        raise RequestError(f"a weight of shape {weight.shape}", remedy="a matrix (K, N), not empty")
    largest = float(np.max(np.abs(weight)))
    if not largest <= LARGEST_WEIGHT:
        raise RequestError(f"a weight of {largest}", remedy=f"finite weights of at most {LARGEST_WEIGHT:.3g}")
    return weight


def stored_scale(scale: np.ndarray) -> np.ndarray:
    """Scales rounded up in magnitude to float32 numbers, so that they cover what they did; zero to 1, none subnormal.

    Arrays of any shape, float64 in, float64 that holds float32 numbers out.
    """
    magnitude = np.abs(scale)
    rounded = magnitude.astype(np.float32)
    rounded = np.where(rounded < magnitude, np.nextafter(rounded, np.float32(np.inf)), rounded).astype(np.float64)
    return np.where(magnitude == 0, 1.0, np.copysign(np.maximum(rounded, SMALLEST_SCALE), scale))


def packed(quantized: Quantized) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The operands of `com.microsoft.MatMulNBits`: B, scales and zero points, low bits of a byte first.

    B uint8 (N, groups, block·bits/8), a short last group filled up with its zero point; scales float32 (N, groups);
    zero points uint8 (N, ⌈groups·bits/8⌉), or None where symmetric, which the operator reads as 2^(bits−1).

    Raises RequestError for codes that are signed, and for blocks that are not a power of two of at least 16.
    Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    form = quantized.format
    if form.signed or form.block < 16 or form.block & (form.block - 1):
        raise RequestError(f"{form} in MatMulNBits", remedy="unsigned codes in blocks of a power of two, at least 16")
    rows, columns = quantized.codes.shape
    groups = form.groups(rows)
    filled = np.repeat(quantized.zero_points, form.block, axis=0)
    filled[:rows] = quantized.codes
    codes = _bytes(np.ascontiguousarray(filled.T), form.bits).reshape(columns, groups, form.block * form.bits // 8)
    scales = np.ascontiguousarray(quantized.scales.T)
    return codes, scales, None if form.symmetric else _bytes(np.ascontiguousarray(quantized.zero_points.T), form.bits)


def unpacked(
    codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, format: Format, rows: int
) -> Quantized:
    """Undo `packed`, for a matrix of `rows` rows; zero points None are 2^(bits−1), whether symmetric or not.

    Raises RequestError where the operands' shapes are not those of the format.
    """
    columns, groups = len(codes), format.groups(rows)
    shapes = (
        (columns, groups, format.block * format.bits // 8),
        (columns, groups),
        (columns, -(-groups * format.bits // 8)),
    )
    given = codes.shape, scales.shape, shapes[2] if zero_points is None else zero_points.shape
    if given != shapes:
        raise RequestError(f"operands of MatMulNBits of shapes {given}, not {shapes}", where=str(format))
    unfilled = _codes(codes.reshape(columns, -1), format.bits)[:, :rows].T
    if zero_points is None:
        points = np.full((groups, columns), 1 << (format.bits - 1), np.uint8)
    else:
        points = _codes(zero_points, format.bits)[:, :groups].T
    return Quantized(
        format, np.ascontiguousarray(unfilled), np.ascontiguousarray(scales.T), np.ascontiguousarray(points)
    )


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes uint8 (N, C) as bytes (N, ⌈C·bits/8⌉), the first code in the lowest bits, filled up with zeros."""
    each = 8 // bits
    if missing := -codes.shape[1] % each:
        codes = np.pad(codes, ((0, 0), (0, missing)))
    parts = codes.reshape(len(codes), -1, each) << (np.arange(each, dtype=np.uint8) * np.uint8(bits))
    return np.bitwise_or.reduce(parts, axis=2).astype(np.uint8)


def _codes(packed_bytes: np.ndarray, bits: int) -> np.ndarray:
    """Undo `_bytes`: bytes (N, B) as codes (N, B·8/bits)."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    parts = (packed_bytes[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(len(packed_bytes), -1)
