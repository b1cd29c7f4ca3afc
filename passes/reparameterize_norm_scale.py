"""Let one scale and one zero point quantize a norm's result as well as one of each for every channel would.

      y = core(x)⊙γ + β      all readers of y are x·W with constants W, b      no W is read by anyone else
    ──────────────────────────────────────────────────────────────────────────────────────────────────────  r₁ = s⊘s̃
      y′ = (y + s⊙r₂)⊘r₁  =  core(x)⊙(γ⊘r₁) + (β + s⊙r₂)⊘r₁                                             r₂ = z − z̃
      yW + b  =  y′·(diag(r₁)W) + (b − (s⊙r₂)W)

s and z are the scale and zero point of every channel, s̃ the mean of s, z̃ the mean of z rounded. z̃ and z are integers,
so round(y′⊘s̃) + z̃ = round(y⊘s) + z: the integer codes are the same, except at exact ties where r₂ is odd. A norm
without β is quantized symmetrically, where r₂ = 0. It stands where smooth would: of the two the later one decides the
ranges.

Shapes    x, y (..., d)   γ, β, s, z, r₁, r₂ (d,)   s̃, z̃ ()   W (d, n)   b (n,)
Relation  equal over the reals; y, and y under other layouts, is the original's plus s⊙r₂, times diag(1/r₁)
Source    Li et al. 2022, arXiv:2212.08254, §3.2 (RepQ-ViT); Li et al. 2024, arXiv:2402.05628, §IV-A (RepQuant)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange, Statistics
from rewrite.passes.smooth import REQUIREMENTS, NormOutput, expected_range, move, norm_outputs, storable
from rewrite.proof.transforms import Scaling
from rewrite.rule import Change, Pass, Requirement


@dataclass(frozen=True)
class Grid:
    """Scales s (d,) and integer zero points z (d,) of the channels, and the scale s̃ and zero point z̃ of the tensor.

    A channel that is always 0 takes the tensor's.
    """

    scales: np.ndarray
    zero_points: np.ndarray
    scale: float
    zero_point: int


def grid(seen: ChannelRange, bits: int, symmetric: bool) -> Grid:
    """The asymmetric grid of 2^bits codes over every channel's range and 0, or the symmetric one.

    >>> grid(ChannelRange(np.array([-1.0, 0.0]), np.array([2.0, 6.0])), 2, False).zero_points.tolist()
    [1.0, 0.0]
    """
    low, high = np.minimum(seen.low, 0.0), np.maximum(seen.high, 0.0)
    if symmetric:
        low, high = -np.maximum(-low, high), np.maximum(-low, high)
    scales = (high - low) / (2**bits - 1)
    alive = scales > 0
    zero_points = np.zeros_like(scales)
    zero_points[alive] = 2 ** (bits - 1) if symmetric else np.rint((0.0 - low[alive]) / scales[alive])
    scale = float(scales[alive].mean()) if alive.any() else 1.0
    zero_point = int(np.rint(zero_points[alive].mean())) if alive.any() else 0
    return Grid(np.where(alive, scales, scale), np.where(alive, zero_points, zero_point), scale, zero_point)


@dataclass(frozen=True)
class ReparameterizeNormScale(Pass[NormOutput]):
    """Scales and zero points a channel become γ, β and W, and one scale and zero point remain.

    `bits`: of the codes that y will be quantized to. `max_bias_growth`: as in fold-norm. `statistics`: the ranges
    measured of the norms' results; without them γ and β say what to expect.
    """

    bits: int = 8
    max_bias_growth: float = 8.0
    statistics: Statistics | None = None

    name: ClassVar[str] = "reparameterize-norm-scale"
    requires: ClassVar[tuple[Requirement, ...]] = REQUIREMENTS

    def sites(self, program: Program) -> Iterator[NormOutput]:
        yield from norm_outputs(program, self.name, lambda shift: shift is not None)

    def calibrates(self, program: Program) -> Iterator[str]:
        """The norms' results."""
        yield from (site.name for site in self.sites(program))

    def rewrite(self, site: NormOutput, change: Change) -> None:
        measured = (self.statistics or {}).get(site.name)
        if measured is None:
            change.notes.append("chosen from γ and β, without data")
        chosen = grid(measured or expected_range(site), self.bits, symmetric=not site.shifts)
        ratios = storable(site, chosen.scales / chosen.scale)
        offset = -chosen.scale * ratios * (chosen.zero_points - chosen.zero_point) if site.shifts else None
        move(site, change, Scaling(ratios), offset)
        change.notes.append(
            f"one scale {chosen.scale:.9g} and zero point {chosen.zero_point} serve {site.region.size} channels"
        )
