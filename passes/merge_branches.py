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

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.affine_chains import (
    Cause,
    Fault,
    Kind,
    Link,
    axis_of,
    chain_behind,
    elements,
    fault_of,
    kind_of,
    shared,
    stencil_of,
    vector_axis,
)
from rewrite.basis.regions import Use
from rewrite.basis.stencils import PASS, Stencil, pads, total, transposed
from rewrite.ir.constants import is_constant, numbers, uniform
from rewrite.ir.edit import is_operator, only_use, same_shape, shape_of
from rewrite.ir.program import Program
from rewrite.rule import Breach, Change, Pass, Requirement, Site

SUMS = ("Add", "Sub", "Sum")


@dataclass(frozen=True, eq=False)
class Summand:
    """A value that a sum adds (`sign` 1) or subtracts (−1), and the node that reads it."""

    value: ir.Value
    sign: int
    reader: ir.Node

    @property
    def use(self) -> Use:
        """Where the sum reads it."""
        return Use(self.reader, list(self.reader.inputs).index(self.value), 0)


@dataclass(frozen=True, eq=False)
class Branch:
    """A summand as operators in a row, last first, on the value that all branches start from (none: that value)."""

    summand: Summand
    links: tuple[Link, ...]

    @property
    def cost(self) -> int:
        """What its operators cost."""
        return sum(link.cost for link in self.links)

    @property
    def weights(self) -> bool:
        """Whether it holds a matrix or a kernel."""
        return any(link.weights for link in self.links)


@dataclass(frozen=True)
class Sum(Site):
    """A sum with the branches of one value among its summands, the vectors among them, and what is neither."""

    result: ir.Value
    root: ir.Value
    kind: Kind
    branches: tuple[Branch, ...]
    vectors: tuple[Summand, ...]
    others: tuple[Summand, ...]

    @property
    def channels(self) -> int:
        """How many channels the root has."""
        axis = 1 if self.kind is Kind.KERNEL else -1
        size = (shape_of(self.root) or ())[axis]
        return size if isinstance(size, int) else 0

    def stencil(self, branch: Branch) -> Stencil | Fault:
        """A branch as one stencil, its sign included."""
        made = stencil_of(branch.links, self.kind, len(shape_of(self.root) or ()), self.channels)
        return made.negative() if branch.summand.sign < 0 and isinstance(made, Stencil) else made

    @cached_property
    def stencils(self) -> dict[Branch, Stencil]:
        """All branches that are stencils."""
        made = {branch: self.stencil(branch) for branch in self.branches}
        return {branch: stencil for branch, stencil in made.items() if isinstance(stencil, Stencil)}


# --------------------------------------------------------------------------------------------------------- requirements


def _breach(fault: Fault | None) -> Breach | None:
    return None if fault is None else Breach(fault.node, fault.reason)


def _faults(site: Sum) -> Iterator[Fault]:
    """What is wrong with the operators of the branches, and with where they are read."""
    for branch in site.branches:
        if branch.links and (fault := fault_of(branch.links, branch.summand.reader)) is not None:
            yield fault


def _own_constants(rule: MergeBranches, site: Sum) -> Breach | None:
    return _breach(next((fault for fault in _faults(site) if fault.cause is Cause.OVERRIDABLE), None))


def _linear(rule: MergeBranches, site: Sum) -> Breach | None:
    made = (site.stencil(branch) for branch in site.branches)
    return _breach(next((one for one in made if isinstance(one, Fault) and one.cause is Cause.NOT_AFFINE), None))


def _read_by_the_sum(rule: MergeBranches, site: Sum) -> Breach | None:
    return _breach(next((fault for fault in _faults(site) if fault.cause is Cause.READ), None))


def _one_grid(rule: MergeBranches, site: Sum) -> Breach | None:
    if not (stencils := site.stencils):
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
        if differ and not _one_size(branch.summand.value, site):
            return Breach(node, "its result and another branch's have other sizes, or sizes that are not static")
    return None


def _one_size(value: ir.Value, site: Sum) -> bool:
    sizes = shape_of(value)
    static = sizes is not None and all(isinstance(size, int) for size in sizes[2:])
    return static and same_shape(value, site.result)


def _unshared(rule: MergeBranches, site: Sum) -> Breach | None:
    if rule.untie:
        return None
    whole = len(site.stencils) == len(site.branches) and _one_grid(rule, site) is None
    merged = [one for part in _parts(site) if len(part) > 1 for one in part] if whole else site.branches
    gone = {link.node for branch in merged or site.branches for link in branch.links}
    return _breach(next((fault for one in site.branches if (fault := shared(one.links, gone)) is not None), None))


def _cheaper(rule: MergeBranches, site: Sum) -> Breach | None:
    if len(site.stencils) < len(site.branches) or _one_grid(rule, site) is not None:
        return None
    before, merged = _cost(site, _apart(site)), _cost(site, (site.branches,))
    if any(len(part) > 1 for part in _parts(site)):
        return None
    reader = site.branches[-1].summand.reader
    return Breach(reader, f"one operator costs {merged:,} multiply–adds and passes, its branches {before:,}")


# -------------------------------------------------------------------------------------------------------- what to merge

Parts = tuple[tuple[Branch, ...], ...]
"""Branches that become one operator each; a branch alone stays as it is."""


def _apart(site: Sum) -> Parts:
    return tuple((branch,) for branch in site.branches)


def _parts(site: Sum) -> Parts:
    """The cheapest division that is found by merging the best pair as long as one pays; or all in one."""
    parts: list[tuple[Branch, ...]] = list(_apart(site))
    gains: dict[tuple[tuple[Branch, ...], tuple[Branch, ...]], int] = {}
    while len(parts) > 1:
        for pair in itertools.combinations(parts, 2):
            if pair not in gains:
                gains[pair] = _gain(site, *pair)
        # Of equal gains the first pair counts.
        one, other = max(itertools.combinations(parts, 2), key=lambda pair: gains[pair])
        if gains[one, other] <= 0:
            break
        parts = [*(part for part in parts if part not in (one, other)), one + other]
    found = tuple(parts)
    return (site.branches,) if _cost(site, (site.branches,)) < _cost(site, found) else found


def _gain(site: Sum, one: tuple[Branch, ...], other: tuple[Branch, ...]) -> int:
    """What it saves that two parts become one, and their sum needs no operator; there is none without a kernel."""
    if not any(branch.weights for branch in (*one, *other)):
        return 0
    addition = elements(site.result) * PASS
    return _price(site, one) + _price(site, other) + addition - _price(site, one + other)


def _price(site: Sum, part: tuple[Branch, ...]) -> int:
    """What the operators of a part cost; a merged matrix needs an Add for its shift."""
    if len(part) == 1:
        return part[0].cost
    merged = _merged([site.stencils[branch] for branch in part])
    passes = 2 if site.kind is Kind.MATRIX and merged.bias is not None else 1
    return elements(site.result) * (merged.multiplications + PASS * passes)


def _cost(site: Sum, parts: Parts) -> int:
    """What the branches, their sum and its vectors cost; what else is added costs the same either way."""
    merged = next((part for part in parts if len(part) > 1), None)
    additions = len(parts) - 1
    if merged is None:
        additions += len(site.vectors)
    elif site.kind is Kind.MATRIX and all(site.stencils[branch].bias is None for branch in merged):
        # The first merged operator adds the vectors: a convolution as it is, a matrix if it has an Add.
        additions += bool(site.vectors)
    return sum(_price(site, part) for part in parts) + additions * elements(site.result) * PASS


def _merged(stencils: Sequence[Stencil]) -> Stencil:
    return total(stencils, tuple(max(each) for each in zip(*(one.slack for one in stencils))))


# ------------------------------------------------------------------------------------------------------------- the pass


@dataclass(frozen=True)
class MergeBranches(Pass[Sum]):
    """Parallel convolutions, or linear layers, on one value become one.

    `untie`: a kernel or matrix that something else reads too is copied.
    """

    untie: bool = False

    name: ClassVar[str] = "merge-branches"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the branches' constants cannot be overridden", _own_constants),
        Requirement("R2", "every branch is affine in the value", _linear),
        Requirement("R3", "nothing but the sum reads what a branch computes", _read_by_the_sum),
        Requirement("R4", "all branches have one stride, one size and one number of channels", _one_grid),
        Requirement("R5", "no matrix or kernel is read by anyone else, unless `untie`", _unshared),
        Requirement("R6", "one operator is cheaper than its branches", _cheaper),
    )

    def sites(self, program: Program) -> Iterator[Sum]:
        names = [node.outputs[0].name or "" for node in program.model.graph if is_operator(node, *SUMS)]
        for name in names:
            while True:
                site = _site(_named(program, name))
                if site is None:
                    break
                yield site
                # What is left of a sum after one value's branches were merged may have another's.
                if site.nodes[-1].graph is not None:
                    break

    def rewrite(self, site: Sum, change: Change) -> None:
        edit, result, stencils, last = change.editor, site.result, site.stencils, site.nodes[-1]
        parts = _parts(site)
        vectors = [(numbers(one.value), one.sign) for one in site.vectors]
        summands: list[tuple[ir.Value, int]] = []
        for part in sorted(parts, key=lambda part: len(part) == 1):
            if len(part) == 1:
                summands.append((part[0].summand.value, part[0].summand.sign))
                continue
            merged = _merged([stencils[branch] for branch in part])
            for array, sign in vectors if not summands else ():
                if array is not None:
                    merged = merged.shifted(sign * np.broadcast_to(array.reshape(-1), (merged.width,)))
            uses = [use for branch in part for link in branch.links for use in link.constants]
            if not summands:
                uses += [one.use for one in site.vectors]
            like = next(branch.summand.value for branch in part if branch.links)
            name = f"{result.name}.merged"
            summands.append((write(change, site.kind, merged, uses, site.root, last, like, name), 1))
            change.notes.append(_note(part, merged))
        (value, _), *rest = (*summands, *((one.value, one.sign) for one in site.others))
        for other, sign in rest:
            like = result if same_shape(value, result) or same_shape(other, result) else None
            operator, name = ("Add" if sign > 0 else "Sub"), f"{result.name}.sum"
            value = edit.node(operator, [value, other], before=last, name=name, like=like, dtype=result.dtype)
        before, after = _cost(site, _apart(site)), _cost(site, parts)
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


def _site(root: ir.Node | None) -> Sum | None:
    """The branches that a sum has of one value: of the value with most of them that can be merged, else of any."""
    if root is None or not _floating(root.outputs[0]):
        return None
    above = only_use(root.outputs[0])
    if is_operator(above, *SUMS) and above.graph is root.graph:
        return None
    nodes, summands = _flattened(root)
    if len([one for one in summands if not is_constant(one.value)]) < 2:
        return None
    starts: dict[ir.Value, list[Branch]] = {}
    for one in summands:
        links = chain_behind(one.value) if not is_constant(one.value) else []
        for count in range(len(links) + 1) if not is_constant(one.value) else ():
            start = links[count - 1].source if count else one.value
            starts.setdefault(start, []).append(Branch(one, tuple(links[:count])))
    found: list[tuple[tuple[bool, int, int], Sum]] = []
    for start, branches in starts.items():
        for kind in Kind:
            for whole in (False, True):
                site = _on(root, nodes, summands, start, kind, branches, whole)
                if site is not None:
                    depth = sum(len(branch.links) for branch in site.branches)
                    found.append(((whole, -len(site.branches), depth), site))
    return min(found, key=lambda each: each[0])[1] if found else None


def _on(
    root: ir.Node,
    nodes: Sequence[ir.Node],
    summands: Sequence[Summand],
    start: ir.Value,
    kind: Kind,
    branches: Sequence[Branch],
    whole: bool,
) -> Sum | None:
    """The site of the branches from `start` with channels as `kind` says: those without fault, or `whole`."""
    shape, result = shape_of(start), root.outputs[0]
    if not shape or len(shape) < (3 if kind is Kind.KERNEL else 2) or len(shape) != len(shape_of(result) or ()):
        return None
    axis = 1 if kind is Kind.KERNEL else len(shape) - 1
    if not isinstance(shape[axis], int):
        return None
    chosen = [one for one in branches if kind_of(one.links) in (None, kind) and axis_of(one.links) in (None, axis)]
    site = Sum(result.name or "", (), result, start, kind, tuple(chosen), (), ())
    if not whole:
        chosen = [one for one in site.stencils if fault_of(one.links, one.summand.reader) is None]
    if len(chosen) < 2 or not any(one.weights for one in chosen):
        return None
    within = [one.summand for one in chosen]
    vectors = tuple(one for one in summands if one not in within and _is_shift(one.value, site))
    others = tuple(one for one in summands if one not in within and one not in vectors)
    changed = dict.fromkeys((*(link.node for one in chosen for link in reversed(one.links)), *nodes))
    return replace(site, nodes=tuple(changed), branches=tuple(chosen), vectors=vectors, others=others)


def _is_shift(value: ir.Value, site: Sum) -> bool:
    """Whether a summand is one constant number, or one for each channel."""
    shape = shape_of(site.result) or ()
    axis = vector_axis(value, shape) if is_constant(value) else None
    array = numbers(value) if axis in (-1, 1 if site.kind is Kind.KERNEL else len(shape) - 1) else None
    return array is not None and array.size in (1, *{one.width for one in site.stencils.values()})


def _flattened(root: ir.Node) -> tuple[list[ir.Node], list[Summand]]:
    """The sums within a sum, the outermost last, and what they add up."""
    nodes: list[ir.Node] = [root]
    summands: list[Summand] = []
    pending = [Summand(value, sign, root) for value, sign in _operands(root)]
    while pending:
        one = pending.pop(0)
        inner = one.value.producer()
        if is_operator(inner, *SUMS) and inner.graph is root.graph and only_use(one.value) is not None:
            nodes.append(inner)
            pending[:0] = [Summand(value, one.sign * sign, inner) for value, sign in _operands(inner)]
        else:
            summands.append(one)
    return nodes[::-1], summands


def _operands(node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
    for position, value in enumerate(node.inputs):
        if value is not None:
            yield value, -1 if position == 1 and node.op_type == "Sub" else 1


def _floating(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


# ---------------------------------------------------------------------------------------------------- writing a stencil


def write(
    change: Change,
    kind: Kind,
    stencil: Stencil,
    uses: Sequence[Use],
    value: ir.Value,
    before: ir.Node,
    like: ir.Value,
    name: str,
) -> ir.Value:
    """Write a stencil as the operator of a kind on `value`: a Conv, or a MatMul and an Add where it shifts.

    Its constants are recorded as made from those in `uses`: the largest kernel or matrix, and its bias or the first.
    `like` has the result's shape and type.
    """
    edit = change.editor
    # Of two of one size the one that is replaced, where the other stays for somebody else.
    main = max((use for use in uses if _is_weight(use)), key=lambda use: (elements(use.value), -len(use.value.uses())))
    shifts = sorted((use for use in uses if _is_bias(use)), key=lambda use: use.node is not main.node)
    old = shifts[0].value if shifts else None
    bias: ir.Value | None = None
    if stencil.bias is not None and like.dtype is not None:
        bias = old if old is not None else edit.initializer(f"{name}.bias", stencil.bias, like.dtype)
    if kind is Kind.KERNEL:
        attributes = {
            **{"kernel_shape": list(stencil.taps), "strides": list(stencil.strides)},
            **{"dilations": list(stencil.dilations), "pads": list(pads(stencil)), "group": stencil.groups},
        }
        operands = [value, main.value] if bias is None else [value, main.value, bias]
        result = edit.node("Conv", operands, attributes, before=before, name=name, like=like)
        change.absorb(Use(_maker(result), 1, 0), stencil.kernel, "merged")
        place = Use(_maker(result), 2, 0)
    else:
        result = edit.node("MatMul", [value, main.value], before=before, name=name, like=like)
        change.absorb(Use(_maker(result), 1, 0), transposed(stencil.kernel), "merged")
        if bias is not None:
            result = edit.node("Add", [result, bias], before=before, name=f"{name}.shifted", like=like)
        place = Use(_maker(result), 1, 0)
    if stencil.bias is not None and old is not None:
        change.absorb(place, stencil.bias, "merged")
    elif bias is not None:
        change.notes.append(f"{name} has a new bias of {stencil.width} numbers")
    return result


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None:
        raise ValueError(f"{value.name} has no producer")
    return node


def _is_weight(use: Use) -> bool:
    """Whether a constant is a matrix or a kernel."""
    return is_operator(use.node, "MatMul", "Conv") and use.position == 1


def _is_bias(use: Use) -> bool:
    """Whether a constant is added, and is not the zeros that an exporter gives to all who have no bias."""
    if uniform(use.value) == 0.0:
        return False
    return is_operator(use.node, *SUMS) or (is_operator(use.node, "Conv", "BatchNormalization") and use.position == 2)
