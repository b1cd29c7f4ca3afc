"""Stencils: what a convolution, a matrix, an average pool, a frozen BatchNorm or a number does, in one form.

    y[o, q]  =  Σ_{i, j} K[o, i, j] · x[i, q·stride + offset + j·dilation]  +  b[o]          x is zero outside

q runs over (n + slack − 1)/stride + 1 positions on an axis of n. A matrix is a stencil without spatial axes, what acts
on each channel by itself one of as many groups as there are channels. Two in a row are one (`behind`), and so are
several on one value (`total`). Kernels stay weight expressions; nothing is computed here but vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewrite.ir.weights import (
    Add,
    BlockDiagonal,
    Composed,
    Constant,
    Placed,
    Reshape,
    Response,
    Scale,
    Transpose,
    Weight,
)

PASS = 16
"""What it costs to write one number, in multiply–adds.

Measured with ONNX Runtime on one x86-64 core with AVX-512, activations of 25,000 to 50,000 numbers: an Add takes 0.35
to 0.6 ns a number, a dense convolution 0.02 to 0.03 ns a multiply–add.
"""

Ints = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stencil:
    """A linear map with constants, on channel axis `axis`.

    `kernel` is (out, in / groups, *taps), `bias` (out,) or None; the others have one integer a spatial axis.
    """

    axis: int
    kernel: Weight
    groups: int
    strides: Ints = ()
    offsets: Ints = ()
    dilations: Ints = ()
    slack: Ints = ()
    bias: Weight | None = None

    @property
    def taps(self) -> Ints:
        """The kernel's size on each spatial axis."""
        return self.kernel.shape[2:]

    @property
    def width(self) -> int:
        """How many channels come out."""
        return self.kernel.shape[0]

    @property
    def size(self) -> int:
        """How many channels go in."""
        return self.kernel.shape[1] * self.groups

    @property
    def ends(self) -> Ints:
        """The offset of the last tap."""
        return tuple(o + (k - 1) * d for o, k, d in zip(self.offsets, self.taps, self.dilations))

    @property
    def padded(self) -> bool:
        """Whether it may read outside of x."""
        return any(offset < 0 for offset in self.offsets) or any(p + end > 0 for p, end in zip(self.slack, self.ends))

    @property
    def pointwise(self) -> bool:
        """Whether it is zero outside where x is, but for a bias: one tap, in place."""
        return all(k == 1 for k in self.taps) and not any(self.offsets) and not any(self.slack)

    @property
    def channelwise(self) -> bool:
        """Whether it only multiplies every channel by a number and adds one."""
        plain = self.kernel.shape[1] == 1 and self.groups == self.width
        return plain and self.pointwise and all(stride == 1 for stride in self.strides)

    @property
    def multiplications(self) -> int:
        """Multiply–adds for each number that comes out."""
        return math.prod(self.kernel.shape[1:])

    def shifted(self, shift: np.ndarray) -> Stencil:
        """It, and a number more for every channel that comes out."""
        return replace(self, bias=_sum([self.bias, Constant(shift)])) if shift.any() else self

    def negative(self) -> Stencil:
        """−1 times it."""
        minus = Constant(np.array(-1.0))
        bias = None if self.bias is None else Scale(self.bias, minus)
        return replace(self, kernel=Scale(self.kernel, minus), bias=bias)


def diagonal(axis: int, spatial: int, factor: np.ndarray, shift: np.ndarray | None = None) -> Stencil:
    """Every channel times its own number, plus its own number; both (channels,)."""
    kernel = Constant(factor.reshape(-1, 1, *(1,) * spatial))
    ones, zeros = (1,) * spatial, (0,) * spatial
    bias = None if shift is None or not shift.any() else Constant(shift)
    return Stencil(axis, kernel, len(factor), ones, zeros, ones, zeros, bias)


def transposed(matrix: Weight) -> Weight:
    """The transpose of a matrix; twice is not at all."""
    if isinstance(matrix, Transpose) and matrix.permutation == (1, 0):
        return matrix.inner
    return Transpose(matrix, (1, 0))


# ---------------------------------------------------------------------------------------------------------- composition


def lost_outside(second: Stencil, first: Stencil) -> str | None:
    """Why `second` behind `first` is no stencil; None where it is one.

    Outside of y = first(x) `second` reads zeros, not what `first` would make of the zeros around x.
    """
    if not second.padded:
        return None
    if first.bias is not None:
        return "zero padding lies behind a shift, which the padding does not have"
    if not first.pointwise:
        return "zero padding lies behind a kernel, whose result is not zero there"
    return None


def behind(second: Stencil, first: Stencil) -> Stencil:
    """`second` of what `first` makes, as one stencil; `lost_outside` says where there is none."""
    groups = math.gcd(second.groups, first.groups)
    kernel: Weight
    dilations = second.dilations
    if second.channelwise:
        groups, dilations = first.groups, first.dilations
        kernel = Scale(first.kernel, Reshape(second.kernel, (second.width,)), 0)
    elif first.channelwise and second.groups == 1:
        groups = 1
        kernel = Scale(second.kernel, Reshape(first.kernel, (first.width,)), 1)
    else:
        later = tuple(d * s if k > 1 else 0 for d, s, k in zip(second.dilations, first.strides, second.taps))
        earlier = tuple(d if k > 1 else 0 for d, k in zip(first.dilations, first.taps))
        dilations = tuple(math.gcd(a, b) or 1 for a, b in zip(later, earlier))
        steps = tuple(tuple(step // d or 1 for step, d in zip(each, dilations)) for each in (later, earlier))
        kernel = Composed(_in_groups(second, groups), _in_groups(first, groups), steps[0], steps[1], groups)
    return Stencil(
        first.axis,
        kernel,
        groups,
        tuple(a * b for a, b in zip(second.strides, first.strides)),
        tuple(a * s + b for a, s, b in zip(second.offsets, first.strides, first.offsets)),
        dilations,
        tuple(b + a * s for a, s, b in zip(second.slack, first.strides, first.slack)),
        _sum([second.bias, _passed(second, first.bias)]),
    )


def _in_groups(stencil: Stencil, groups: int) -> Weight:
    return stencil.kernel if stencil.groups == groups else BlockDiagonal(stencil.kernel, stencil.groups, groups)


def _passed(second: Stencil, shift: Weight | None) -> Weight | None:
    """What `second` makes of a shift, where it reads no padding."""
    if shift is None or second.channelwise:
        return None if shift is None else Scale(shift, Reshape(second.kernel, (second.width,)))
    return Response(second.kernel, shift, second.groups)


def _sum(parts: Sequence[Weight | None]) -> Weight | None:
    present = tuple(part for part in parts if part is not None)
    return Add(present) if len(present) > 1 else (present[0] if present else None)


# ----------------------------------------------------------------------------------------------------------------- sums


def total(stencils: Sequence[Stencil], slack: Ints | None = None) -> Stencil:
    """The sum of stencils on one value, of the same strides and channels, with pads that are not negative.

    Taps are aligned by their offsets; kernels of other groups become kernels of the groups all have in common. `slack`
    is the result's where theirs differ (and their sizes do not).
    """
    head = stencils[0]
    groups = math.gcd(*(one.groups for one in stencils))
    slack = head.slack if slack is None else slack
    first: list[int] = []
    steps: list[int] = []
    taps: list[int] = []
    for place, room in enumerate(slack):
        low = min(0, *(one.offsets[place] for one in stencils))
        gaps = [one.offsets[place] - low for one in stencils]
        gaps += [one.dilations[place] for one in stencils if one.taps[place] > 1]
        step = math.gcd(*gaps) or 1
        high = max(-room, *(one.ends[place] for one in stencils))
        first.append(low)
        steps.append(step)
        taps.append(-(-(high - low) // step) + 1)
    shape = (head.width, head.size // groups, *taps)
    kernels: list[Weight] = []
    for one in stencils:
        kernel = _in_groups(one, groups)
        start = tuple((offset - low) // step for offset, low, step in zip(one.offsets, first, steps))
        spread = tuple(d // step if k > 1 else 1 for d, step, k in zip(one.dilations, steps, one.taps))
        kernels.append(kernel if kernel.shape == shape else Placed(kernel, shape, (0, 0, *start), (1, 1, *spread)))
    kernel = Add(tuple(kernels)) if len(kernels) > 1 else kernels[0]
    bias = _sum([one.bias for one in stencils])
    return Stencil(head.axis, kernel, groups, head.strides, tuple(first), tuple(steps), slack, bias)


def pads(stencil: Stencil) -> Ints:
    """The `pads` of the convolution it is: in front of every spatial axis, then behind."""
    return (*(-offset for offset in stencil.offsets), *(p + end for p, end in zip(stencil.slack, stencil.ends)))
