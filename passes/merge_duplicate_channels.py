"""Make one hidden unit of two that are always in one proportion.

      h = xW₁ + b     (W₁, b)[:, j] = p·(W₁, b)[:, i]     f(p·t) = p·f(t), or p = 1     all readers of f(h) are f(h)·W₂
    ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
      f(h)·W₂  =  f(h′)·W₂′,      h′, W₁′, b′ without channel j,      W₂′[i, :] = W₂[i, :] + p·W₂[j, :], without row j

p > 0 for a positively homogeneous f (ReLU, LeakyReLU, PReLU of equal slopes, pooling); any p where f is linear; 1 for
every other f that acts on each channel by itself. In a gate g⊙u both factors are compared. The proportion is exact: it
is one of rational numbers, p is a float64 number, and it is the same wherever the channels are read.

Shapes    x (..., k)   W₁ (k, d)   b, h (d,)   W₂ (d, n)
Relation  equal over the reals; every value between W₁ and W₂ is a selection of the original's channels
Source    Srinivas and Babu 2015, arXiv:1507.06149, §3.1 (equal weight sets), with a proportion
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from rewrite.ir.program import Program
from rewrite.passes.eliminate_dead_channels import COMMON, Hidden, hidden_layers, keeping_multiple, leave_out, listed
from rewrite.rule import Change, Pass, Requirement


@dataclass(frozen=True)
class Merge:
    """Rows of W₂ with those that go added to those they are multiples of: row i plus p times row j.

    `kept` are the rows that stay, in order; `added` are (j, place of i among `kept`, p).
    """

    size: int
    kept: tuple[int, ...]
    added: tuple[tuple[int, int, float], ...]

    @property
    def width(self) -> int:
        """How many rows stay."""
        return len(self.kept)

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray:
        """The merged rows of `x`, which stand along `axis`, in float64.

        >>> Merge(3, (0, 1), ((2, 0, 2.0),)).apply(np.array([1.0, 10.0, 100.0])).tolist()
        [201.0, 10.0]
        """
        rows = np.moveaxis(x, axis, 0)
        merged = rows[list(self.kept)]
        for gone, place, proportion in self.added:
            merged[place] += proportion * rows[gone]
        return np.moveaxis(merged, 0, axis)


def proportions(site: Hidden) -> dict[int, tuple[int, float]]:
    """For a channel j that can go: i < j and p such that channel j is p times channel i wherever it is read."""
    roots: dict[Hashable, int] = {}
    found: dict[int, tuple[int, float]] = {}
    for channel in range(site.region.size):
        forms = [read[channel] for read in site.read]
        if any(form.constant is not None for form in forms):
            continue
        root = roots.setdefault(tuple(form.key for form in forms), channel)
        proportion, *others = {form.factor / read[root].factor for form, read in zip(forms, site.read)}
        if root != channel and not others and Fraction(float(proportion)) == proportion:
            found[channel] = (root, float(proportion))
    return found


@dataclass(frozen=True)
class MergeDuplicateChannels(Pass[Hidden]):
    """Hidden units that are always in one proportion become one.

    `multiple`: what is left is a multiple of so many channels, as kernels like it; some duplicates stay to fill it up.
    """

    multiple: int = 1

    name: ClassVar[str] = "merge-duplicate-channels"
    requires: ClassVar[tuple[Requirement, ...]] = COMMON

    def sites(self, program: Program) -> Iterator[Hidden]:
        yield from (site for site in hidden_layers(program) if self._removed(site))

    def _removed(self, site: Hidden) -> tuple[int, ...]:
        return keeping_multiple(tuple(proportions(site)), site.region.size, self.multiple)

    def rewrite(self, site: Hidden, change: Change) -> None:
        found, removed = proportions(site), self._removed(site)
        kept = tuple(j for j in range(site.region.size) if j not in set(removed))
        place = {channel: index for index, channel in enumerate(kept)}
        added = tuple((j, place[found[j][0]], found[j][1]) for j in removed)
        leave_out(site, change, removed, Merge(site.region.size, kept, added))
        pairs, into = listed(removed), listed(tuple(found[j][0] for j in removed))
        change.notes.append(f"{len(removed)} of {site.region.size} channels are multiples of others: {pairs} of {into}")
