"""Change the basis of every head's values to the one in which both projections are equally large in each direction.

      v = xW_v + b_v      o = P·v, head by head      y = oW_o
    ───────────────────────────────────────────────────────────  MᵀG_vM = M⁻¹G_oM⁻ᵀ = Σ diagonal
      (xW_v·M + b_v·M)  gives  o·M,    and  y = (o·M)·(M⁻¹W_o)

G_v = W_vᵀW_v and G_o = W_oW_oᵀ are the Gram matrices of a head; G_o is summed over the query heads that share it. With
G_v = LLᵀ and LᵀG_oL = UΣ²Uᵀ, M = L⁻ᵀUΣ^½ is the balanced basis: the channels of W_v·M are orthogonal and as long as
those of M⁻¹W_o. Singular values of M outside the allowed condition number are then drawn in, which costs balance and
not equality.

Shapes    x (..., d)   W_v (d, G·n)   b_v (G·n,)   M (n, n) for each of G key-value heads   W_o (H·n, d)
Relation  equal over the reals; values and results are the original's times M
Source    Ma et al. 2024, arXiv:2403.12544, §3.2; the balanced basis is that of Moore 1981, IEEE TAC 26(1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rewrite.basis.heads import HeadRegion
from rewrite.head_rule import Blocks, HeadMap, HeadPass, Heads, gram, repeated, requirements, value_sites
from rewrite.ir.program import Program
from rewrite.proof.transforms import Invertible, Transform
from rewrite.rule import Requirement


@dataclass(frozen=True)
class AffineHeads(HeadPass):
    """W_v → W_v·M, W_o → M⁻¹W_o, M the balanced basis of each key-value head.

    `condition`: the largest condition number that M may have. `per_head`: every key-value head has its own M; else all
    heads of a layer have the same, from their summed Gram matrices.
    """

    condition: float = 100.0
    per_head: bool = True

    name: ClassVar[str] = "affine-heads"
    suffix: ClassVar[str] = "mapped"
    requires: ClassVar[tuple[Requirement, ...]] = requirements(
        norm="no norm stands between the value projection and the output projection",
        between="everything else between is linear along a head's channels and keeps heads whole",
    )

    def sites(self, program: Program) -> Iterator[Heads]:
        yield from value_sites(program, self.name, mixing=True, shared=not self.per_head)

    def map_of(self, region: HeadRegion) -> HeadMap:
        written, read = gram(region, right=False), gram(region, right=True)
        maps = {block: _balanced(written[block], read[block], self.condition) for block in written}

        def of(blocks: tuple[int, ...]) -> Transform:
            if len(set(blocks)) == 1:
                return repeated(Invertible(maps[blocks[0]]), len(blocks))
            return Invertible(np.stack([maps[block] for block in blocks]))

        return Blocks(of)


def _balanced(written: NDArray[np.float64], read: NDArray[np.float64], condition: float) -> NDArray[np.float64]:
    """M (n, n) with MᵀG_vM = M⁻¹G_oM⁻ᵀ, its singular values within √condition of their geometric mean, which is 1."""
    root = _root(written, condition)
    values, turned = np.linalg.eigh(root.T @ _root(read, condition) @ _root(read, condition).T @ root)
    basis = np.linalg.inv(root).T @ (turned * np.maximum(values, np.finfo(np.float64).tiny) ** 0.25)
    left, lengths, right = np.linalg.svd(basis)
    lengths = lengths / np.exp(np.log(lengths).mean())
    reach = np.sqrt(condition)
    return (left * np.clip(lengths, 1.0 / reach, reach)) @ right


def _root(gram: NDArray[np.float64], condition: float) -> NDArray[np.float64]:
    """L (n, n) with LLᵀ = G; directions that G hardly has get as much as the condition number allows to tell."""
    values, vectors = np.linalg.eigh(gram)
    floor = max(float(values.max(initial=0.0)) / condition**2, np.finfo(np.float64).tiny)
    return vectors * np.sqrt(np.maximum(values, floor))
