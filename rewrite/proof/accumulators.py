"""Whether the sums of an integer kernel are exact: int32 accumulators, and 16-bit sums of pairs on x86 without VNNI.

    Σ_k |q_x||q_w| + |bias|  <  2³¹            q_x ≤ 255, q_w as the kernel holds it: raw, and less the zero point
    |q_w[2i]| + |q_w[2i+1]|  ≤  128            of one sign: 255·128 = 32640 is the last multiple that 16 bits hold

Both are proved from the codes that were shipped. Activations of 8 bits reach 255 whichever way the kernel holds them:
unsigned, signed with 128 added, or less a zero point. Pairs are neighbours along K in the order in which the kernel
packs them: of a convolution the channels of a tap, then the next tap, with or without a gap. (ONNX Runtime 1.31 was
seen to do so on an emulated processor without VNNI, bit for bit: docs/upstream.md.) Kernels for unsigned
weights widen to 16 bits before they multiply, so that no pair of them saturates.

Source: ONNX Runtime, onnxruntime/core/mlas/lib/qgemm_kernel_avx2.cpp and x86_64/QgemmU8X8KernelAvx2.S (vpmaddubsw
then vpmaddwd where there is no VNNI); Intel SDM, PMADDUBSW.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rewrite.proof.constants import Constant
from rewrite.proof.sites import Grid, Linear, Packed, type_name

LARGEST_ACTIVATION = 255
"""|q_x| of 8 bits, as far as any kernel may hold it."""

LARGEST_SUM = 2**31 - 1

LARGEST_PAIR = 128
"""Largest sum of two weights of one sign whose products with 255 fit into 16 bits."""

READ = 1 << 20
"""Codes that are read at a time."""


@dataclass(frozen=True)
class Sums:
    """What a kernel's sums may reach: the largest accumulator, and the largest pair of weights of one sign."""

    accumulator: int
    pair: int

    @property
    def fits(self) -> bool:
        return self.accumulator <= LARGEST_SUM

    @property
    def saturates(self) -> bool:
        return self.pair > LARGEST_PAIR


def sums(grid: Grid, *, columns_first: bool = False, bias: Constant | None = None) -> Sums:
    """Bounds over all outputs of a product with the weight of `grid`.

    The weight is (K, N); (N, K) with `columns_first`, or filters (N, C, kernel…), of which the sums of all taps are
    taken whatever the groups. `bias` (N,) is added to the accumulator as it is.
    """
    signed = isinstance(grid, Linear) and type_name(grid.stored).startswith("int")
    accumulator = pair = 0
    for taken, codes, zeros in _outputs(grid, columns_first):
        raw = np.abs(codes).reshape(len(codes), -1).sum(axis=1)
        less = np.abs(codes - zeros).reshape(len(codes), -1).sum(axis=1)
        total = LARGEST_ACTIVATION * np.maximum(raw, less)
        if bias is not None:
            total = total + np.abs(bias.read((taken,)).astype(np.int64))
        accumulator = max(accumulator, int(total.max(initial=0)))
        if signed:
            pair = max([pair, *(_largest_pair(order) for order in _orders(codes))])
    return Sums(accumulator, pair)


def _outputs(grid: Grid, columns_first: bool) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Some outputs at a time: which, their codes (outputs, K…) and zero points that broadcast to them, as integers."""
    rank = len(grid.shape)
    first = columns_first or rank > 2 or isinstance(grid, Packed)
    count = grid.shape[0] if first else grid.shape[1]
    step = max(1, READ * count // max(1, int(np.prod(grid.shape))))
    for start in range(0, count, step):
        taken = slice(start, min(start + step, count))
        others = tuple(slice(0, n) for n in (grid.shape[1:] if first else grid.shape[:1]))
        region = (taken, *others) if first else (*others, taken)
        codes, zeros = (each.astype(np.int64) for each in (grid.codes(region), grid.zeros(region)))
        if not first:
            codes, zeros = codes.T, zeros.T
        yield taken, codes, zeros


def _orders(codes: np.ndarray) -> Iterator[np.ndarray]:
    """The weights of each output in the orders in which a kernel may sum them: (outputs, K), or (outputs, taps, C)."""
    if codes.ndim == 2:
        yield codes
        return
    count, channels = codes.shape[:2]
    taps_first = np.moveaxis(codes, 1, -1).reshape(count, -1, channels)
    yield taps_first.reshape(count, -1)
    # Channels are filled up to groups of four at each tap.
    yield taps_first


def _largest_pair(codes: np.ndarray) -> int:
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), codes.dtype)], axis=-1)
    largest = 0
    for sign in (1, -1):
        one = np.maximum(sign * codes, 0)
        largest = max(largest, int((one[..., 0::2] + one[..., 1::2]).max(initial=0)))
    return largest


__all__ = ["LARGEST_PAIR", "LARGEST_SUM", "Sums", "sums"]
