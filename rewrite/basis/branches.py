"""Branches: summands that are operators in a row, affine in one value, and which of them are better one operator.

    y  =  A₁(x) ± A₂(B₂(x)) ± x + c + z            branches of x, a vector among the summands, and something else

`branches_of` finds them in a sum; `Branches.cheapest` says which of them become one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx_ir as ir

from rewrite.basis.affine_chains import (
    Fault,
    Kind,
    Link,
    axis_of,
    chain_behind,
    elements,
    fault_of,
    kind_of,
    stencil_of,
    vector_axis,
)
from rewrite.basis.regions import Use
from rewrite.basis.stencils import PASS, Stencil, total
from rewrite.ir.constants import is_constant, numbers
from rewrite.ir.edit import is_operator, only_use, shape_of

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


Parts = tuple[tuple[Branch, ...], ...]
"""Branches that become one operator each; a branch alone stays as it is."""


@dataclass(frozen=True, eq=False)
class Branches:
    """What a sum adds up: the branches of one value, the vectors, and what is neither. `nodes` ends with the sum."""

    nodes: tuple[ir.Node, ...]
    root: ir.Value
    kind: Kind
    branches: tuple[Branch, ...]
    vectors: tuple[Summand, ...] = ()
    others: tuple[Summand, ...] = ()

    @property
    def result(self) -> ir.Value:
        """The sum."""
        return self.nodes[-1].outputs[0]

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

    def merged(self, part: Sequence[Branch]) -> Stencil:
        """The sum of some branches as one stencil."""
        stencils = [self.stencils[branch] for branch in part]
        return total(stencils, tuple(max(each) for each in zip(*(one.slack for one in stencils))))

    @property
    def apart(self) -> Parts:
        """Every branch alone, as they are."""
        return tuple((branch,) for branch in self.branches)

    @cached_property
    def cheapest(self) -> Parts:
        """The cheapest division that is found by merging the best pair as long as one pays; or all in one."""
        parts: list[tuple[Branch, ...]] = list(self.apart)
        gains: dict[tuple[tuple[Branch, ...], tuple[Branch, ...]], int] = {}
        while len(parts) > 1:
            for pair in itertools.combinations(parts, 2):
                if pair not in gains:
                    gains[pair] = self._gain(*pair)
            # Of equal gains the first pair counts.
            one, other = max(itertools.combinations(parts, 2), key=lambda pair: gains[pair])
            if gains[one, other] <= 0:
                break
            parts = [*(part for part in parts if part not in (one, other)), one + other]
        found = tuple(parts)
        return (self.branches,) if self.cost((self.branches,)) < self.cost(found) else found

    def cost(self, parts: Parts) -> int:
        """What the branches, their sum and its vectors cost; what else is added costs the same either way."""
        merged = next((part for part in parts if len(part) > 1), None)
        additions = len(parts) - 1
        if merged is None:
            additions += len(self.vectors)
        elif self.kind is Kind.MATRIX and all(self.stencils[branch].bias is None for branch in merged):
            # The first merged operator adds the vectors: a convolution as it is, a matrix if it has an Add.
            additions += bool(self.vectors)
        return sum(self._price(part) for part in parts) + additions * elements(self.result) * PASS

    def _gain(self, one: tuple[Branch, ...], other: tuple[Branch, ...]) -> int:
        """What it saves that two parts become one, and their sum needs no operator; none where no kernel is in them."""
        if not any(branch.weights for branch in (*one, *other)):
            return 0
        addition = elements(self.result) * PASS
        return self._price(one) + self._price(other) + addition - self._price(one + other)

    def _price(self, part: tuple[Branch, ...]) -> int:
        """What the operators of a part cost; a merged matrix needs an Add for its shift."""
        if len(part) == 1:
            return part[0].cost
        merged = self.merged(part)
        passes = 2 if self.kind is Kind.MATRIX and merged.bias is not None else 1
        # Other summands may make the sum larger than the branches are.
        return elements(part[0].summand.value) * (merged.multiplications + PASS * passes)


# -------------------------------------------------------------------------------------------------------- finding them


def branches_of(root: ir.Node) -> Branches | None:
    """The branches that a sum has of one value: of the value with most of them that can be merged, else of any."""
    if not _floating(root.outputs[0]):
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
    found: list[tuple[tuple[bool, int, int], Branches]] = []
    for start, branches in starts.items():
        for kind in Kind:
            for whole in (False, True):
                those = _on(root, nodes, summands, start, kind, branches, whole)
                if those is not None:
                    depth = sum(len(branch.links) for branch in those.branches)
                    found.append(((whole, -len(those.branches), depth), those))
    return min(found, key=lambda each: each[0])[1] if found else None


def _on(
    root: ir.Node,
    nodes: Sequence[ir.Node],
    summands: Sequence[Summand],
    start: ir.Value,
    kind: Kind,
    branches: Sequence[Branch],
    whole: bool,
) -> Branches | None:
    """The branches from `start` with channels as `kind` says: those without fault, or the `whole` of them."""
    shape, result = shape_of(start), root.outputs[0]
    if not shape or len(shape) < (3 if kind is Kind.KERNEL else 2) or len(shape) != len(shape_of(result) or ()):
        return None
    axis = 1 if kind is Kind.KERNEL else len(shape) - 1
    if not isinstance(shape[axis], int):
        return None
    chosen = [one for one in branches if kind_of(one.links) in (None, kind) and axis_of(one.links) in (None, axis)]
    if not whole:
        stencils = Branches((root,), start, kind, tuple(chosen)).stencils
        chosen = [one for one in stencils if fault_of(one.links, one.summand.reader) is None]
    if len(chosen) < 2 or not any(one.weights for one in chosen):
        return None
    changed = dict.fromkeys((*(link.node for one in chosen for link in reversed(one.links)), *nodes))
    found, within = Branches(tuple(changed), start, kind, tuple(chosen)), [one.summand for one in chosen]
    vectors = tuple(one for one in summands if one not in within and _is_shift(one.value, found))
    others = tuple(one for one in summands if one not in within and one not in vectors)
    return replace(found, vectors=vectors, others=others)


def _is_shift(value: ir.Value, found: Branches) -> bool:
    """Whether a summand is one constant number, or one for each channel."""
    shape = shape_of(found.result) or ()
    axis = vector_axis(value, shape) if is_constant(value) else None
    array = numbers(value) if axis in (-1, 1 if found.kind is Kind.KERNEL else len(shape) - 1) else None
    return array is not None and array.size in (1, *{one.width for one in found.stencils.values()})


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
