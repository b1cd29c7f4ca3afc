"""Fold a frozen BatchNormalization, or what else is a constant factor and shift a channel, into its neighbours.

      x = W∗u + b, read only by the cluster      y = a⊙x + t      a, t constants, one number a channel
    ───────────────────────────────────────────────────────────────────────────────────────────────────── before
      y  =  (a⊙W)∗u + (a⊙b + t)

      all readers of y are W∗y + b               y = a⊙x + t      nothing pads y between
    ───────────────────────────────────────────────────────────────────────────────────────────────────── behind
      W∗y + b  =  (W⊙a)∗x + (b + W∗t)

∗ is MatMul, Conv or ConvTranspose, of any rank and with any groups; layout may stand between, an average too. A cluster
(`rewrite.basis.channel_affine`) is BatchNormalization, BN(x) + αx, (x − mean)/std, a frozen norm written out, and what
of this follows each other: a = γ/√(v + ε), t = β − a⊙mean for the first. Before is tried first, since no padding is in
its way. Behind, the diagonal always goes in; where padding stops the shift, x + t/a stays, a ≠ 0.

A bias alone behind its product is no site, nor is a norm's own shift, which fold-norm takes; a factor alone is one:
fold-scale folds backwards only, and what both could do comes out the same.

Shapes    x, y (..., d, ...)   a, t (d,)   W (k, d) or (d, k/groups, ...)   b (d,)
Relation  equal over the reals; y keeps its name before, and is a value the original does not have behind
Source    Jacob et al. 2018, arXiv:1712.05877, §3.2; Guo et al. 2024, arXiv:2405.11582, §3.2 (PRepBN)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from rewrite.basis.affine_neighbours import (
    AFFINE,
    Readers,
    Writer,
    bias_behind,
    contracts,
    diagonal_in,
    readers_of,
    shift_out,
    writer_of,
)
from rewrite.basis.channel_affine import SUMS, Cluster, channel_affine, cluster_ends, degenerate, unfrozen
from rewrite.basis.operators import NORMS
from rewrite.basis.regions import Obstruction, Use
from rewrite.ir.axes import operand
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Add, Constant, Scale, Weight
from rewrite.rule import Breach, Change, Pass, Requirement, Site


@dataclass(frozen=True)
class Normalization(Site):
    """A cluster with what is before and behind it; or a BatchNormalization that is none, and then no more."""

    norm: ir.Node
    cluster: Cluster | None = None
    before: Writer | Obstruction | None = None
    behind: Readers | Obstruction | None = None


def _frozen(rule: FoldBatchnorm, site: Normalization) -> Breach | None:
    if site.cluster is not None:
        return None
    reason = unfrozen(site.norm)
    return None if reason is None else Breach(site.norm, reason)


def _finite(rule: FoldBatchnorm, site: Normalization) -> Breach | None:
    if site.cluster is not None or unfrozen(site.norm) is not None:
        return None
    reason = degenerate(site.norm)
    return None if reason is None else Breach(site.norm, reason)


def _has_a_neighbour(rule: FoldBatchnorm, site: Normalization) -> Breach | None:
    before, behind = site.before, site.behind
    if not isinstance(before, Obstruction) or not isinstance(behind, Obstruction):
        return None
    place = behind.node or before.node or site.norm
    return Breach(place, f"before it, {before.reason}; behind it, {behind.reason}")


@dataclass(frozen=True)
class FoldBatchnorm(Pass[Normalization]):
    """A constant factor and shift a channel go into the weights before, or else into all that read them.

    `max_bias_growth`: matrix products without a bias that take the shift get new ones of at most so many numbers a
    channel; beyond that the shift stays as an addition.
    """

    max_bias_growth: float = 8.0

    name: ClassVar[str] = "fold-batchnorm"
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("R1", "a batch normalization is frozen, and its vectors are constants", _frozen),
        Requirement("R2", "its vectors are finite, and variance + ε is positive", _finite),
        Requirement("R3", "what is affine before it, or all that reads it, can take it", _has_a_neighbour),
    )

    def sites(self, program: Program) -> Iterator[Normalization]:
        ends = _ends(program.model.graph)
        for value in ends:
            if (site := self.site(value)) is not None:
                yield site
        # What was in the way of one may be gone with another.
        while ends:
            left = [value for value in _ends(program.model.graph) if self.applies(value)]
            for value in left:
                if (site := self.site(value)) is not None and _has_a_neighbour(self, site) is None:
                    yield site
            ends = left

    def applies(self, value: ir.Value) -> bool:
        """Whether there is a site at `value` where every requirement holds."""
        site = self.site(value)
        return site is not None and all(one.check(self, site) is None for one in self.requires)

    def site(self, value: ir.Value) -> Normalization | None:
        """The site that ends at `value`, on the graph as it is now."""
        node = value.producer()
        if node is None or node.graph is None:
            return None
        cluster = channel_affine(value)
        if cluster is None:
            alone = is_operator(node, "BatchNormalization")
            return Normalization(value.name or "", (node,), node) if alone else None
        before, behind = writer_of(cluster), readers_of(cluster, self.max_bias_growth)
        if not cluster.norms and (_is_a_bias(cluster) or not (isinstance(before, Writer) or contracts(cluster))):
            return None
        taking: tuple[ir.Node, ...] = ()
        if isinstance(before, Writer):
            taking = (before.node,)
        elif isinstance(behind, Readers):
            taking = tuple(behind.factors)
        norm = (*cluster.norms, *cluster.arithmetic)[0]
        nodes = tuple(dict.fromkeys((*cluster.nodes, *taking)))
        return Normalization(cluster.result.name or "", nodes, norm, cluster, before, behind)

    def rewrite(self, site: Normalization, change: Change) -> None:
        if site.cluster is not None and isinstance(site.before, Writer):
            _into_writer(site.cluster, site.before, change)
        elif site.cluster is not None and isinstance(site.behind, Readers):
            _into_readers(site.cluster, site.behind, change)


def _ends(graph: ir.Graph) -> list[ir.Value]:
    """Where clusters end, first to last, and results of batch normalizations that are none."""
    ends = {value.producer(): value for value in cluster_ends(graph)}
    for node in graph:
        if is_operator(node, "BatchNormalization") and channel_affine(node.outputs[0]) is None:
            ends[node] = node.outputs[0]
    return [ends[node] for node in graph if node in ends]


def _is_a_bias(cluster: Cluster) -> bool:
    """Whether a cluster is one addition behind a product or a norm."""
    lone = len(cluster.arithmetic) == 1 and cluster.arithmetic[0].op_type in SUMS
    return lone and is_operator(cluster.root.producer(), *AFFINE, *NORMS)


# --------------------------------------------------------------------------------------------------------- the rewrites


def _into_writer(cluster: Cluster, writer: Writer, change: Change) -> None:
    factor, shift, edit = cluster.factor, cluster.shift, change.editor
    root, last = cluster.root, cluster.last
    if not (factor == 1.0).all():
        change.absorb(writer.kernel, writer.scaled(factor), "normalized")
    value = root
    if writer.bias is not None:
        scaled = Scale(bias_behind(writer.bias), Constant(factor))
        _set_bias(writer.bias, Add((scaled, Constant(shift))), "normalized", change)
    elif shift.any() and is_operator(writer.node, "MatMul"):
        value = _plus(root, shift, cluster.root_axis, last, change, f"{cluster.result.name}.biased")
    elif shift.any():
        _new_bias(writer.node, Constant(shift), cluster.result.name or "", change)
    for node in cluster.path:
        value = _again(node, value, last, change)
    if value is not root:
        change.rename(root, "normalized")
    edit.take_over(cluster.result, value)


def _into_readers(cluster: Cluster, readers: Readers, change: Change) -> None:
    factor, shift, result = cluster.factor, cluster.shift, cluster.result
    biases: dict[ir.Node, Weight] = {}
    if shift.any() and readers.stopped is None:
        biases = {node: shift_out(node, held, shift) for node, held in readers.factors.items()}
    if not (factor == 1.0).all():
        holding = {use: held for held in readers.factors.values() for use in held.constants}
        for use, held in holding.items():
            weight = diagonal_in(use, held.groups, factor)
            change.absorb(use, weight, "scaled", key=(result, use.axis, held.groups))
        for value in dict.fromkeys(value for held in readers.factors.values() for value in held.values):
            change.rename(value, "scaled")
    for node, addition in biases.items():
        _add_bias(node, addition, change)
    value = cluster.untouched
    for node in cluster.rest:
        value = _again(node, value, cluster.last, change)
    if readers.stopped is not None:
        value = _plus(value, shift / factor, cluster.axis, cluster.last, change, f"{result.name}.shifted")
        change.notes.append(f"the shift stays as an addition: {readers.stopped.reason}")
    for inner in readers.region.axes:
        if inner is not result:
            change.rename(inner, "unscaled")
    result.replace_all_uses_with(value)


def _plus(value: ir.Value, shift: np.ndarray, axis: int, before: ir.Node, change: Change, name: str) -> ir.Value:
    """`value` plus a vector along `axis`, computed in front of `before`."""
    rank = len(shape_of(value) or ())
    if value.dtype is None:
        raise ValueError(f"{value.name} has no dtype")
    column = Constant(shift.reshape(-1, *[1] * (rank - 1 - axis)))
    vector = change.editor.initializer(f"{name}.shift", column, value.dtype)
    return change.editor.node("Add", [value, vector], before=before, name=name, like=value)


def _again(node: ir.Node, value: ir.Value, before: ir.Node, change: Change) -> ir.Value:
    """A node of layout on another value."""
    attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
    operands, result = (value, *node.inputs[1:]), node.outputs[0]
    return change.editor.node(
        node.op_type, operands, attributes, before=before, name=f"{result.name}.again", like=result
    )


def _add_bias(node: ir.Node, addition: Weight, change: Change) -> None:
    """Add a vector to what an operator makes of its channels."""
    if is_operator(node, "MatMul"):
        change.shift(node, addition)
    elif operand(node, 2) is not None:
        bias = Use(node, 2, 0)
        _set_bias(bias, Add((bias_behind(bias), addition)), "shifted", change)
    else:
        _new_bias(node, addition, node.outputs[0].name or "", change)


def _set_bias(bias: Use, weight: Weight, suffix: str, change: Change) -> None:
    """Give a kernel another bias than its own."""
    node, old = bias.node, bias.value
    if is_constant(old):
        change.absorb(bias, weight, suffix)
    elif old.dtype is not None:
        node.replace_input_with(2, change.editor.initializer(f"{old.name}.{suffix}", weight, old.dtype))
        change.stamp(node)


def _new_bias(node: ir.Node, addition: Weight, name: str, change: Change) -> None:
    """Give a kernel without a bias one; `name` is that of its result afterwards."""
    dtype = node.outputs[0].dtype
    if dtype is None:
        raise ValueError(f"{name} has no dtype")
    node.resize_inputs(3)
    node.replace_input_with(2, change.editor.initializer(f"{name}.bias", addition, dtype))
    change.stamp(node)
    change.notes.append(f"{name} has a new bias of {addition.shape[0]} numbers")
