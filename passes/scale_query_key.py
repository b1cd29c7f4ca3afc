"""Scale queries and keys against each other, so that both projections are equally large in each channel.

      q = ρ(xW_q + b_q)      k = ρ(zW_k + b_k)      logits q·kᵀ      D commutes with ρ
    ────────────────────────────────────────────────────────────────────────────────────  s = √(max|W_k| / max|W_q|)
      (q·D)·(k·D⁻¹)ᵀ = q·kᵀ,    q·D = ρ(xW_q·D + b_q·D),    k·D⁻¹ = ρ(zW_k·D⁻¹ + b_k·D⁻¹)

ρ is the rotary embedding, if there is one: D has one factor for the two channels that it turns into each other,
(i, i + r/2) or (2i, 2i + 1) of the r rotated ones, found by following both channels to the place where they are added.
Channels that are not rotated are free. Query heads that share a key head share its factors.

Shapes    x, z (..., d)   W_q (d, H·n)   W_k (d, G·n)   s (G·n,)   for G key heads, H query heads
Relation  equal over the reals; queries are the original's times D, keys the original's times D⁻¹
Source    Xiao et al. 2023, arXiv:2211.10438, Eq. 4, on the pair of query and key projection
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewrite.basis.heads import HeadRegion
from rewrite.head_rule import Diagonal, HeadMap, HeadPass, Heads, balance, logit_sites, requirements
from rewrite.ir.program import Program
from rewrite.rule import Requirement


@dataclass(frozen=True)
class ScaleQueryKey(HeadPass):
    """W_q → W_q·D, W_k → W_k·D⁻¹, D positive and chosen so that both have the same largest number in each channel.

    `per_head`: every key head has its own factors; else all heads of a layer have the same.
    `power_of_two`: factors are rounded to powers of two, with which no constant is rounded again.
    `limit`: no factor is larger than this, or smaller than its inverse.
    """

    per_head: bool = True
    power_of_two: bool = False
    limit: float = 1024.0

    name: ClassVar[str] = "scale-query-key"
    suffix: ClassVar[str] = "scaled"
    requires: ClassVar[tuple[Requirement, ...]] = requirements(
        norm="no norm of queries or keys stands between their projections and the logits",
        between="everything else between only adds, moves, turns or multiplies channels",
    )

    def sites(self, program: Program) -> Iterator[Heads]:
        yield from logit_sites(program, self.name, shared=not self.per_head)

    def map_of(self, region: HeadRegion) -> HeadMap:
        return Diagonal(balance(region, self.limit, self.power_of_two))
