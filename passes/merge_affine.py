"""Merge two affine operators in a row into one, where that costs less.

      h = K₁ ⋆ x + b₁, read only by the second      the second pads nothing, or b₁ = 0 and K₁ has one tap, in place
    ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
      K₂ ⋆ h + b₂  =  (K₂·K₁) ⋆ x + (ΣK₂·b₁ + b₂)

Two matrices, two convolutions, or a convolution and an average pool; between them factors, shifts, a frozen BatchNorm
or zero padding. Taps of two kernels add up: those of K₂ count strides of K₁. K₂ finds zeros around h as K₁ finds them
around x, but what K₁ makes of the zeros around x is b₁, or reaches into x: a second that pads is refused.

What is merged is decided by cost, in multiply–adds: those of both, and 16 for every number that an operator writes
(`rewrite.basis.stencils.PASS`). A low-rank pair stays factored where d·r + r·n is less than d·n, and 7×1 behind 1×7
stays.

Shapes    x (N, c, …), h (N, k, …)   K₁ (k, c/g, …), K₂ (m, k/g, …)   b₁ (k,), b₂ (m,)
          or x (…, c), h (…, k)   W₁ (c, k), W₂ (k, m)
Relation  equal over the reals; the second's result keeps its name
Source    Ding et al. 2021, arXiv:2103.13425, §3.2 (transforms III and V)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import onnx_ir as ir

from rewrite.basis.affine_chains import (
    Cause,
    Diagonal,
    Fault,
    Kind,
    Link,
    chain_behind,
    elements,
    fault_of,
    kind_of,
    link_of,
    shared,
    stencil_of,
)
from rewrite.basis.stencils import PASS, Stencil, behind, total
from rewrite.ir.edit import is_operator, only_use, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Reshape
from rewrite.merge_rule import write
from rewrite.rule import Breach, Change, Pass, Requirement, Site

AFFINE = ("MatMul", "Conv", "AveragePool")


@dataclass(frozen=True)
class Pair(Site):
    """Two affine operators and what stands between them, as links, last first; a bias that is added at the end too.

    `layout` is the place of a Transpose among the links; the operator before it is the one that both become.
    """

    links: tuple[Link, ...]
    layout: int | None = None

    @property
    def result(self) -> ir.Value:
        """What they make."""
        return self.links[0].result

    @property
    def root(self) -> ir.Value:
        """What they start from."""
        return self.links[-1].source

    @property
    def kind(self) -> Kind:
        """Where the operator that they become has its channels."""
        return kind_of(self.links if self.layout is None else self.links[self.layout + 1 :]) or Kind.MATRIX

    @cached_property
    def stencil(self) -> Stencil | Fault:
        """Both as one."""
        made = self._made()
        # Where rows are cut off, as no padding of a convolution can, zeros of its kernel do.
        return made if isinstance(made, Fault) else total([made])

    def _made(self) -> Stencil | Fault:
        if self.layout is None:
            return _stencil(self.links)
        second, first = _stencil(self.links[: self.layout]), _stencil(self.links[self.layout + 1 :])
        if isinstance(second, Fault) or isinstance(first, Fault):
            return second if isinstance(second, Fault) else first
        if not second.pointwise or any(stride > 1 for stride in second.strides):
            reason = "it moves over axes that are others before the Transpose"
            return Fault(Cause.NOT_AFFINE, self.links[self.layout - 1].node, reason)
        ones, zeros = tuple(1 for _ in first.taps), tuple(0 for _ in first.taps)
        kernel = second.kernel
        if len(ones) != len(second.taps):
            kernel = Reshape(kernel, (*kernel.shape[:2], *ones))
        return behind(Stencil(first.axis, kernel, second.groups, ones, zeros, ones, zeros, second.bias), first)

    @property
    def fault(self) -> Fault | None:
        """What is wrong with the operators, or with what reads the values between them."""
        first, *rest = self.links
        return first.fault or fault_of(rest, first.node)

    @property
    def cost(self) -> int:
        """What they cost."""
        return sum(link.cost for link in self.links)

    @property
    def merged_cost(self) -> int:
        """What one operator costs in their place; a matrix needs an Add for its shift."""
        if isinstance(self.stencil, Fault):
            return 0
        passes = 1 + (self.kind is Kind.MATRIX and self.stencil.bias is not None) + (self.layout is not None)
        return elements(self.result) * (self.stencil.multiplications + PASS * passes)


def _stencil(links: Sequence[Link]) -> Stencil | Fault:
    form = next((link.form for link in reversed(links) if isinstance(link.form, Stencil)), None)
    channels = 0 if form is None else form.size
    return stencil_of(links, kind_of(links) or Kind.MATRIX, len(shape_of(links[-1].source) or ()), channels)


def _breach(fault: Fault | None, cause: Cause) -> Breach | None:
    return Breach(fault.node, fault.reason) if fault is not None and fault.cause is cause else None


def _own_constants(rule: MergeAffine, site: Pair) -> Breach | None:
    return _breach(site.fault, Cause.OVERRIDABLE)


def _affine(rule: MergeAffine, site: Pair) -> Breach | None:
    return _breach(site.stencil if isinstance(site.stencil, Fault) else None, Cause.NOT_AFFINE)


def _read_by_the_second(rule: MergeAffine, site: Pair) -> Breach | None:
    return _breach(site.fault, Cause.READ)


def _unshared(rule: MergeAffine, site: Pair) -> Breach | None:
    gone = {link.node for link in site.links}
    return None if rule.untie else _breach(shared(site.links, gone), Cause.SHARED)


def _cheaper(rule: MergeAffine, site: Pair) -> Breach | None:
    if isinstance(site.stencil, Fault) or site.merged_cost < site.cost:
        return None
    both = f"{site.cost:,} as they are"
    return Breach(site.links[0].node, f"one operator costs {site.merged_cost:,} multiply–adds and passes, {both}")


@dataclass(frozen=True)
class MergeAffine(Pass[Pair]):
    """Two convolutions, or two linear layers, in a row become one.

    `untie`: a kernel or matrix that something else reads too is copied.
    """

    untie: bool = False

    name: ClassVar[str] = "merge-affine"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "the operators' constants cannot be overridden", _own_constants),
        Requirement("R2", "both are affine, and no padding lies behind a shift or a kernel", _affine),
        Requirement("R3", "nothing but the second reads what the first computes", _read_by_the_second),
        Requirement("R4", "no matrix or kernel is read by anyone else, unless `untie`", _unshared),
        Requirement("R5", "one operator is cheaper than two", _cheaper),
    )

    def sites(self, program: Program) -> Iterator[Pair]:
        for node in [node for node in program.model.graph if is_operator(node, *AFFINE)]:
            second: ir.Node | None = node
            # What became one operator may be the second of another pair.
            while second is not None and (site := _site(second)) is not None:
                yield site
                second = _written(program, site) if site.nodes[-1].graph is None else None

    def rewrite(self, site: Pair, change: Change) -> None:
        if isinstance(site.stencil, Fault):
            raise ValueError(f"{site.name}: {site.stencil.reason}")
        uses = [use for link in site.links for use in link.constants]
        name, like, last = f"{site.name}.merged", site.result, site.links[0].node
        if site.layout is not None:
            like = _widened(site.links[site.layout].source, site.stencil)
        value = write(change, site.kind, site.stencil, uses, site.root, last, like, name)
        if site.layout is not None:
            moved = list(_permutation(site.links[site.layout].node) or ())
            name = f"{site.name}.transposed"
            value = change.editor.node("Transpose", [value], {"perm": moved}, before=last, name=name, like=site.result)
        operators = " · ".join(link.node.op_type for link in reversed(site.links))
        costs = f"{site.merged_cost:,} multiply–adds and passes instead of {site.cost:,}"
        change.notes.append(f"{operators} became one: {costs}")
        change.editor.take_over(site.result, value)


def _site(second: ir.Node) -> Pair | None:
    """The pair that ends with an operator, and the bias behind it."""
    if second.graph is None or (last := link_of(second)) is None:
        return None
    links = chain_behind(last.result)
    place, layout = _first(links, 1), None
    if place is None:
        layout = len(links)
        links = _through_transpose(links)
        place = _first(links, layout + 1)
    if place is None or not any(link.weights for link in (last, links[place])):
        return None
    if layout is not None and not links[place].weights:
        return None
    chosen = links[: place + 1]
    bias = link_of(only_use(last.result))
    if bias is not None and bias.constants and is_operator(bias.node, "Add", "Sub") and _fits(bias, last):
        chosen, layout = [bias, *chosen], None if layout is None else layout + 1
    nodes = tuple(link.node for link in reversed(chosen))
    return Pair(chosen[0].result.name or "", nodes, tuple(chosen), layout)


def _first(links: Sequence[Link], start: int) -> int | None:
    """The place of the first operator with its own taps or matrix, from `start` on."""
    return next((place for place in range(start, len(links)) if is_operator(links[place].node, *AFFINE)), None)


def _through_transpose(links: list[Link]) -> list[Link]:
    """`links`, a Transpose behind them that brings the channels where they have them, and the links behind that."""
    if not links:
        return links
    moved = links[-1].source.producer()
    permutation = _permutation(moved)
    if moved is None or permutation is None or moved.inputs[0] is None:
        return links
    before = chain_behind(moved.inputs[0])
    kinds = kind_of(links), kind_of(before)
    if None in kinds:
        return links
    after, axis = (1 if kind is Kind.KERNEL else len(permutation) - 1 for kind in kinds)
    if permutation[after] != axis:
        return links
    return [*links, Link(moved, 0, (), Diagonal()), *before]


def _permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """Which axis of the operand every axis of a Transpose's result is; None where the node is no Transpose."""
    if not is_operator(node, "Transpose") or (shape := shape_of(node.inputs[0])) is None:
        return None
    return tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(shape))))))


def _widened(value: ir.Value, stencil: Stencil) -> ir.Value:
    """A value like another, with the channels that a stencil makes."""
    sizes = list(value.shape or ())
    sizes[stencil.axis] = stencil.width
    return ir.Value(name=value.name, shape=ir.Shape(sizes), type=value.type)


def _fits(bias: Link, product: Link) -> bool:
    """Whether a link shifts the channels of a product."""
    return len(chain_behind(bias.result)) > 1 and bias.source is product.result


def _written(program: Program, site: Pair) -> ir.Node | None:
    """The operator that a pair became."""
    node = next((node for node in program.model.graph if node.outputs[0].name == site.name), None)
    while node is not None and not is_operator(node, *AFFINE):
        link = link_of(node)
        value = node.inputs[0] if link is None else link.source
        node = None if value is None else value.producer()
    return node
