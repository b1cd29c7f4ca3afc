"""Rotate the values of every head, so that no channel of the attention's result stands out.

      v = xW_v + b_v      o = P·v, head by head      y = oW_o
    ─────────────────────────────────────────────────────────────────  M orthogonal, one for all heads
      (xW_v(I⊗M) + b_v(I⊗M))  gives  o(I⊗M),    and  y = o(I⊗M)·(I⊗Mᵀ)W_o

P are the probabilities: whatever they are, they mix rows and not channels. Query heads that share a key-value head
share its M. In a fused projection only the part that holds values is rotated.

Shapes    x (..., d)   W_v (d, G·n)   b_v (G·n,)   M (n, n)   W_o (H·n, d)   for G key-value heads, H query heads
Relation  equal over the reals; values, attention results and joined results are the original's times M or I⊗M
Source    Ashkboos et al. 2024, arXiv:2404.00456, §4; Liu et al. 2024, arXiv:2405.16406, R2
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rewrite.basis.heads import HeadRegion
from rewrite.head_rule import Blocks, HeadMap, HeadPass, Heads, repeated, requirements, value_sites
from rewrite.ir.program import Program
from rewrite.proof.hadamard import parts
from rewrite.proof.transforms import Hadamard, Orthogonal, Transform
from rewrite.rule import Requirement


@dataclass(frozen=True)
class RotateHeads(HeadPass):
    """W_v → W_v(I⊗M), W_o → (I⊗Mᵀ)W_o, M a Hadamard matrix with random signs (a random rotation where none exists).

    `seed`: of the signs; one M serves all layers whose heads have one size.
    """

    seed: int = 0

    name: ClassVar[str] = "rotate-heads"
    suffix: ClassVar[str] = "rotated"
    requires: ClassVar[tuple[Requirement, ...]] = requirements(
        norm="no norm stands between the value projection and the output projection",
        between="everything else between is linear along a head's channels and keeps heads whole",
    )

    def sites(self, program: Program) -> Iterator[Heads]:
        yield from value_sites(program, self.name, mixing=True, shared=True)

    def map_of(self, region: HeadRegion) -> HeadMap:
        rotation = _rotation(region.size, self.seed)
        return Blocks(lambda blocks: repeated(rotation, len(blocks)))


def _rotation(size: int, seed: int) -> Transform:
    if parts(size) is not None:
        return Hadamard(size, seed)
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return Orthogonal(q * np.sign(np.diagonal(r)))
