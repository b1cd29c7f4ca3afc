"""Merge parallel branches that are linear in one value into one operator.

      y = Σₖ ±(aₖ ⊙ (Kₖ ⋆ x) + tₖ)      every branch of one stride and one output grid, read by nothing but the sum
    ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
      y = (Σₖ ±aₖ·Kₖ) ⋆ x + Σₖ ±tₖ                                taps aligned by their place on the output grid

Kernels of other sizes and dilations are put amid zeros: tap p of a kernel reads x at p·dilation − pad. x itself is a δ,
an average pool that counts its padding 1/k on the diagonal, a frozen BatchNorm or a factor a diagonal a. A kernel of
other groups becomes one of the groups that all have in common, with zeros between. A branch may be several such
operators in a row, without zero padding behind a kernel or a shift. Matrices are kernels without taps:
x·W₁ + x·W₂ = x·(W₁ + W₂), x + x·W = x·(I + W), x·W + s·(x·A)·B = x·(W + s·AB).

What is merged is decided by cost, in multiply–adds: those of kernels and matrices, and 16 for every number that an
operator writes (`rewrite.basis.stencils.PASS`). 3×3 + 1×1 gets cheaper, 1×7 + 7×1 does not. Of several branches those
are merged that make it cheapest, pair by pair.

Shapes    x (N, c, …), y (N, m, …)   Kₖ (m, c/g, …)   aₖ, tₖ (m,);   or x (…, c), y (…, m)   Wₖ (c, m)
Relation  equal over the reals; y keeps its name
Source    Ding et al. 2021, arXiv:2101.03697, §3.3 (RepVGG); Ding et al. 2021, arXiv:2103.13425, §3.2 (DBB)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.affine_chains import Cause, Fault, fault_of, shared
from rewrite.basis.branches import SUMS, Branch, Branches, branches_of
from rewrite.basis.stencils import Stencil
from rewrite.ir.constants import numbers
from rewrite.ir.edit import is_operator, same_shape, shape_of
from rewrite.ir.program import Program
from rewrite.merge_rule import write
from rewrite.rule import Breach, Change, Pass, Requirement, Site


@dataclass(frozen=True)
class Sum(Site):
    """A sum with branches of one value among its summands."""

    found: Branches

    @property
    def complete(self) -> bool:
        """Whether all branches are stencils on one grid, so that their sum is one."""
        return len(self.found.stencils) == len(self.found.branches) and _other_grid(self.found) is None


def _breach(fault: Fault | None) -> Breach | None:
    return None if fault is None else Breach(fault.node, fault.reason)


def _fault(site: Sum, cause: Cause) -> Breach | None:
    """What is wrong with the operators of a branch, or with where they are read."""
    faults = (fault_of(one.links, one.summand.reader) for one in site.found.branches if one.links)
    return _breach(next((fault for fault in faults if fault is not None and fault.cause is cause), None))


def _own_constants(rule: MergeBranches, site: Sum) -> Breach | None:
    return _fault(site, Cause.OVERRIDABLE)


def _affine(rule: MergeBranches, site: Sum) -> Breach | None:
    made = (site.found.stencil(branch) for branch in site.found.branches)
    return _breach(next((one for one in made if isinstance(one, Fault) and one.cause is Cause.NOT_AFFINE), None))


def _read_by_the_sum(rule: MergeBranches, site: Sum) -> Breach | None:
    return _fault(site, Cause.READ)


def _one_grid(rule: MergeBranches, site: Sum) -> Breach | None:
    return _other_grid(site.found)


def _other_grid(found: Branches) -> Breach | None:
    if not (stencils := found.stencils):
        return None
    widest = max(stencils.values(), key=lambda one: one.multiplications)
    # Of one stride and one slack are the sizes of all results, whatever that of the value is.
    differ = len({one.slack for one in stencils.values()}) > 1
    for branch, stencil in stencils.items():
        node = branch.links[0].node if branch.links else branch.summand.reader
        if stencil.strides != widest.strides:
            return Breach(node, f"its strides are {stencil.strides}, another branch's are {widest.strides}")
        if stencil.width != widest.width:
            return Breach(node, f"it has {stencil.width} channels, another branch has {widest.width}")
        sizes = shape_of(branch.summand.value) or (None,)
        static = all(isinstance(size, int) for size in sizes[2:]) and same_shape(branch.summand.value, found.result)
        if differ and not static:
            return Breach(node, "its result and another branch's have other sizes, or sizes that are not static")
    return None


def _unshared(rule: MergeBranches, site: Sum) -> Breach | None:
    if rule.untie:
        return None
    found = site.found
    merged = [one for part in found.cheapest if len(part) > 1 for one in part] if site.complete else []
    gone = {link.node for branch in merged or found.branches for link in branch.links}
    return _breach(next((fault for one in found.branches if (fault := shared(one.links, gone)) is not None), None))


def _cheaper(rule: MergeBranches, site: Sum) -> Breach | None:
    if not site.complete or any(len(part) > 1 for part in site.found.cheapest):
        return None
    found = site.found
    before, merged = found.cost(found.apart), found.cost((found.branches,))
    reader = found.branches[-1].summand.reader
    return Breach(reader, f"one operator costs {merged:,} multiply–adds and passes, its branches {before:,}")


@dataclass(frozen=True)
class MergeBranches(Pass[Sum]):
    """Parallel convolutions, or linear layers, on one value become one.

    `untie`: a kernel or matrix that something else reads too is copied.
    """

    untie: bool = False

    name: ClassVar[str] = "merge-branches"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the branches' constants cannot be overridden", _own_constants),
        Requirement("R2", "every branch is affine in the value", _affine),
        Requirement("R3", "nothing but the sum reads what a branch computes", _read_by_the_sum),
        Requirement("R4", "all branches have one stride, one size and one number of channels", _one_grid),
        Requirement("R5", "no matrix or kernel is read by anyone else, unless `untie`", _unshared),
        Requirement("R6", "one operator is cheaper than its branches", _cheaper),
    )

    def sites(self, program: Program) -> Iterator[Sum]:
        for node in [node for node in program.model.graph if is_operator(node, *SUMS)]:
            name, sum = node.outputs[0].name or "", node if node.graph is not None else None
            # What is left of a sum after one value's branches were merged may have another's.
            while sum is not None and (found := branches_of(sum)) is not None:
                yield Sum(name, found.nodes, found)
                sum = _named(program, name) if sum.graph is None else None

    def rewrite(self, site: Sum, change: Change) -> None:
        found, edit, result, last = site.found, change.editor, site.found.result, site.nodes[-1]
        summands: list[tuple[ir.Value, int]] = []
        for part in sorted(found.cheapest, key=lambda part: len(part) == 1):
            if len(part) == 1:
                summands.append((part[0].summand.value, part[0].summand.sign))
                continue
            merged = found.merged(part)
            uses = [use for branch in part for link in branch.links for use in link.constants]
            for one in found.vectors if not summands else ():
                vector = numbers(one.value)
                if vector is None:
                    raise ValueError(f"{one.value.name} is no constant vector")
                merged = merged.shifted(one.sign * np.broadcast_to(vector.reshape(-1), (merged.width,)))
                uses.append(one.use)
            like = next(branch.summand.value for branch in part if branch.links)
            name = f"{result.name}.merged"
            summands.append((write(change, found.kind, merged, uses, found.root, last, like, name), 1))
            change.notes.append(_note(part, merged))
        (value, _), *rest = (*summands, *((one.value, one.sign) for one in found.others))
        for other, sign in rest:
            like = result if same_shape(value, result) or same_shape(other, result) else None
            operator, name = ("Add" if sign > 0 else "Sub"), f"{result.name}.sum"
            value = edit.node(operator, [value, other], before=last, name=name, like=like, dtype=result.dtype)
        before, after = found.cost(found.apart), found.cost(found.cheapest)
        edit.take_over(result, value)
        change.notes.append(f"{after:,} multiply–adds and passes instead of {before:,}")


def _note(part: tuple[Branch, ...], merged: Stencil) -> str:
    operators = ["·".join(link.node.op_type for link in reversed(one.links)) or "identity" for one in part]
    size = "×".join(map(str, merged.taps)) or "a matrix"
    return f"{' + '.join(operators)} became {size}"


def _named(program: Program, name: str) -> ir.Node | None:
    """The sum that makes the value of that name now."""
    found = (node for node in program.model.graph if is_operator(node, *SUMS) and node.outputs[0].name == name)
    return next(found, None)
