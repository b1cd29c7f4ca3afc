"""Scale the values of every head, so that both projections are equally large in each channel.

      v = xW_v + b_v      o = P·v, head by head      y = oW_o
    ───────────────────────────────────────────────────────────  D = diag(s), s_j = √(max|W_o[j, :]| / max|W_v[:, j]|)
      (xW_v·D + b_v·D)  gives  o·D,    and  y = (o·D)·(D⁻¹W_o)

s_j = 1 where a channel is dead on either side. Query heads that share a key-value head share its factors, and max|W_o|
is taken over all of them. A diagonal also passes an output gate: σ(g)⊙(o·D) = (σ(g)⊙o)·D.

Shapes    x (..., d)   W_v (d, G·n)   b_v (G·n,)   s (G·n,)   W_o (H·n, d)   for G key-value heads, H query heads
Relation  equal over the reals; values and results are the original's times D
Source    Nagel et al. 2019, arXiv:1906.04721, §4.1, on the pair of value and output projection
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewrite.basis.heads import HeadRegion
from rewrite.head_rule import Diagonal, HeadMap, HeadPass, Heads, balance, requirements, value_sites
from rewrite.ir.program import Program
from rewrite.rule import Requirement


@dataclass(frozen=True)
class ScaleHeads(HeadPass):
    """W_v → W_v·D, W_o → D⁻¹W_o, D positive and chosen so that max|W_v[:, j]| = max|W_o[j, :]|.

    `per_head`: every key-value head has its own factors; else all heads of a layer have the same.
    `power_of_two`: factors are rounded to powers of two, with which no constant is rounded again.
    `limit`: no factor is larger than this, or smaller than its inverse.
    """

    per_head: bool = True
    power_of_two: bool = False
    limit: float = 1024.0

    name: ClassVar[str] = "scale-heads"
    suffix: ClassVar[str] = "scaled"
    requires: ClassVar[tuple[Requirement, ...]] = requirements(
        norm="no norm stands between the value projection and the output projection",
        between="everything else between only adds, moves or multiplies channels",
    )

    def sites(self, program: Program) -> Iterator[Heads]:
        yield from value_sites(program, self.name, mixing=False, shared=not self.per_head)

    def map_of(self, region: HeadRegion) -> HeadMap:
        return Diagonal(balance(region, self.limit, self.power_of_two))
