"""Regions of heads: which channels of which values change basis with the channels of an attention's heads.

A head is a factor of a channel axis. A projection writes (…, heads·n) channels, layout operators divide them into
(…, heads, …, n), attention works head by head, and the result is joined again. So a region here is not a whole axis but
a labelling (`rewrite.basis.labels`): label h·n + j is channel j of head h, in whichever element of a value it stands.
Fused projections are written in part, heads that several query heads share are tied, and rotary positions tie the two
channels of a pair, by nothing but following labels through the graph.

    x′ = x·T, T block diagonal: one n × n block a head

`mixing` blocks may be any invertible matrix: heads stay whole, and everything between must be linear along their
channels. Blocks that are not mixing are diagonal: then any factor may multiply a channel, and channels may be tied.

The region has two sides. The left one holds x·T; where it is contracted, Σ x·y, the other operand is on the right side
and holds y·T⁻ᵀ: constants of readers, or keys where queries are on the left. On the right side labels are larger by
the number of all channels, so that one fused value can hold both.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewrite.basis.labels import (
    OUTSIDE,
    Blocked,
    Labels,
    Tie,
    backward,
    combine,
    compress,
    forward,
    is_layout,
    pull,
    push,
    reduce,
    sizes,
    spread,
    varying,
)
from rewrite.basis.regions import Cause, Obstruction
from rewrite.ir.axes import Role, Shape, follow, operand
from rewrite.ir.constants import is_constant, is_overridable, uniform
from rewrite.ir.edit import is_operator


@dataclass
class HeadRegion:
    """All channels tied to an attention's heads.

    `size` is n, `heads` how many heads the seed has; `values` and `constants` (operands) hold the labels; `partner`
    maps a label of the left side to the one that stands for all it is tied to.
    """

    size: int
    heads: int
    mixing: bool
    values: dict[ir.Value, Labels] = field(default_factory=dict[ir.Value, Labels])
    constants: dict[tuple[ir.Node, int], Labels] = field(default_factory=dict[tuple[ir.Node, int], Labels])
    obstructions: list[Obstruction] = field(default_factory=list[Obstruction])
    partner: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def channels(self) -> int:
        """How many channels the seed's heads have together."""
        return self.heads * self.size

    def met(self, *causes: Cause) -> Obstruction | None:
        """The first obstruction of one of these causes."""
        return next((met for met in self.obstructions if met.cause in causes), None)

    def share(self) -> None:
        """Let all heads have one map: channel j of every head is tied to channel j of the first."""
        for channel in range(self.size):
            group = self.partner[channel :: self.size]
            self.partner[np.isin(self.partner, group)] = group.min()

    def across(self, labels: Labels) -> Labels:
        """The same channels on the other side."""
        return np.where(labels == OUTSIDE, OUTSIDE, (labels + self.channels) % (2 * self.channels))

    def resolved(self, labels: Labels) -> Labels:
        """Tied channels under one number, each on its side."""
        right = labels // self.channels * self.channels
        return np.where(labels == OUTSIDE, OUTSIDE, self.partner[labels % self.channels] + right)

    def lies(self, labels: Labels, shape: Shape) -> tuple[int, NDArray[np.int64]] | None:
        """The one axis of a value along which its channels lie, and their labels in order, tied ones under one number.

        None where heads that have different maps stand along several axes, or along one that is not static.
        """
        changing = varying(compress(self.resolved(labels))) or varying(labels)[-1:]
        if len(changing) != 1 or not isinstance(size := shape[changing[0]], int):
            return None
        rows = np.moveaxis(spread(labels, changing[0], size), changing[0], -1).reshape(-1, size)[0]
        return changing[0], self.resolved(rows)

    def blocks(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Whole heads and what stands between along an axis, in order: (block, channels); block −1 is outside."""
        found: list[tuple[int, int]] = []
        start = 0
        while start < len(rows):
            inside = np.flatnonzero(rows[start:] != OUTSIDE)
            between = int(inside[0]) if len(inside) else len(rows) - start
            found.append((OUTSIDE, between) if between else (int(rows[start]) // self.size, self.size))
            start += found[-1][1]
        return found


def grow_heads(seed: ir.Value, labels: Labels, size: int, *, mixing: bool) -> HeadRegion:
    """The region of the channels that `labels` names in `seed`."""
    region = HeadRegion(size, int(labels.max()) // size + 1, mixing)
    region.partner = np.arange(region.channels, dtype=np.int64)
    _Growth(region, seed.graph).run(seed, labels)
    return region


class _Growth:
    """One growth: nodes whose labels are still to be carried through."""

    def __init__(self, region: HeadRegion, graph: ir.Graph | ir.Function | None) -> None:
        self.region, self.graph = region, graph
        self.queue: deque[ir.Node] = deque()
        self.touched: dict[ir.Node, None] = {}

    def run(self, seed: ir.Value, labels: Labels) -> None:
        self.include(seed, labels)
        reasons: list[tuple[ir.Node, str | None]] = []
        while self.queue:
            while self.queue:
                # Labels may still be incomplete here; what blocks in the end is found below.
                self.blocked(self.queue.popleft())
            reasons = [(node, self.blocked(node)) for node in list(self.touched)]
        for node, reason in reasons:
            if reason is not None:
                self.obstruct(Cause.OPERATOR, node.outputs[0], node, reason)
        for value, labels in self.region.values.items():
            self.look_at_border(value)
            self.look_at_heads(value, labels)

    def blocked(self, node: ir.Node) -> str | None:
        """Carry labels through one node; why it cannot be done."""
        try:
            self.visit(node)
        except Blocked as blocked:
            return str(blocked)
        return None

    # ------------------------------------------------------------------------------------------------- what is labelled

    def labels(self, value: ir.Value | None) -> Labels | None:
        return None if value is None else self.region.values.get(value)

    def include(self, value: ir.Value, labels: Labels) -> None:
        labels = compress(labels)
        if bool((labels == OUTSIDE).all()):
            return
        known = self.region.values.get(value)
        if known is not None:
            labels = combine(known, labels, self.tie)
            if np.array_equal(labels, known):
                return
        self.region.values[value] = labels
        producer = value.producer()
        for node in (*((producer,) if producer is not None else ()), *(use.node for use in value.uses())):
            self.touched.setdefault(node)
            self.queue.append(node)

    def give(self, node: ir.Node, position: int, labels: Labels) -> None:
        """Label an operand: a value of the region, or a constant that absorbs. Zero is zero in every basis."""
        value = operand(node, position)
        if value is None or bool((labels == OUTSIDE).all()) or uniform(value) == 0.0:
            return
        if not is_constant(value):
            self.include(value, labels)
            return
        if not varying(compress(labels)):
            raise Blocked(f"{value.name} is one number for all channels")
        known = self.region.constants.get((node, position))
        self.region.constants[node, position] = compress(labels) if known is None else combine(known, labels, self.tie)

    def tie(self, some: Labels, others: Labels) -> None:
        """Make channels one. Tied heads keep their channels apart where blocks may mix them."""
        partner, size = self.region.partner, self.region.size
        some, others = some.reshape(-1), others.reshape(-1)
        inside = (some != OUTSIDE) & (others != OUTSIDE)
        some, others = some[inside], others[inside]
        if bool((some // self.region.channels != others // self.region.channels).any()):
            raise Blocked("it would need T and its inverse at once")
        some, others = some % self.region.channels, others % self.region.channels
        if self.region.mixing and bool((apart := some % size != others % size).any()):
            one, other = (int(labels[apart][0]) % size for labels in (some, others))
            raise Blocked(f"it makes channels {one} and {other} of a head one")
        new = partner[some] != partner[others]
        for a, b in sorted(set(zip(some[new].tolist(), others[new].tolist()))):
            pairs = [(a, b)]
            if self.region.mixing:
                pairs = [(a - a % size + channel, b - b % size + channel) for channel in range(size)]
            for one, other in pairs:
                low, high = sorted((int(partner[one]), int(partner[other])))
                partner[partner == high] = low

    def obstruct(self, cause: Cause, value: ir.Value, node: ir.Node | None, reason: str) -> None:
        self.region.obstructions.append(Obstruction(cause, value, node, reason))

    def look_at_border(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self.obstruct(Cause.INTERFACE, value, value.producer(), f"{value.name} is an output of the graph")
        if is_overridable(value):
            self.obstruct(Cause.OVERRIDABLE, value, None, f"{value.name} is an initializer that is also a graph input")
        elif value.is_graph_input():
            self.obstruct(Cause.INTERFACE, value, None, f"{value.name} is an input of the graph")

    def look_at_heads(self, value: ir.Value, labels: Labels) -> None:
        """Where blocks mix channels, every head stands somewhere as a whole, in order."""
        if self.region.mixing and not _whole_heads(labels, self.region.size):
            reader = next((use.node for use in value.uses()), None)
            self.obstruct(Cause.OPERATOR, value, value.producer() or reader, f"{value.name} holds a part of a head")

    # ---------------------------------------------------------------------------------------------------- operators

    def visit(self, node: ir.Node) -> None:
        """Carry labels through one node, in every direction in which they are known."""
        if node.graph is not self.graph:
            raise Blocked(f"{node.op_type} stands in a subgraph")
        if is_operator(node, "Shape", "Size"):
            return
        if is_operator(node, "Gather", "GatherND") and self.labels(operand(node, 1)) is not None:
            raise Blocked(f"{node.op_type} chooses by it")
        if is_layout(node):
            self.visit_layout(node)
        elif is_operator(node, "Concat"):
            self.visit_concat(node)
        elif is_operator(node, "Add", "Sub", "Sum", "Where"):
            self.visit_sum(node, range(1, 3) if node.op_type == "Where" else range(len(node.inputs)))
        elif is_operator(node, "Mul", "Div"):
            self.visit_product(node)
        elif is_operator(node, "MatMul"):
            self.visit_matmul(node)
        elif is_operator(node, "Attention"):
            self.visit_attention(node)
        elif is_operator(node, "RotaryEmbedding") and not self.region.mixing:
            self.visit_rotary(node)
        elif is_operator(node, "Conv"):
            self.visit_convolution(node)
        else:
            self.refuse(node)

    def refuse(self, node: ir.Node) -> None:
        for values, result in ((node.inputs, False), (node.outputs, True)):
            for position, value in enumerate(values):
                if (labels := self.labels(value)) is not None:
                    raise Blocked(_reason(node, position, labels, result))

    def visit_layout(self, node: ir.Node) -> None:
        if (labels := self.labels(node.inputs[0])) is not None:
            for position, moved in forward(node, labels):
                self.include(node.outputs[position], moved)
        for position, result in enumerate(node.outputs):
            if (labels := self.labels(result)) is not None:
                self.give(node, 0, backward(node, position, labels, self.tie))

    def visit_concat(self, node: ir.Node) -> None:
        """Along the joined axis labels keep their places; values labelled alike all along it are rows, all of them."""
        result = node.outputs[0]
        after = sizes(result)
        axis = node.attributes.get_int("axis", 0) % len(after)
        lengths = [sizes(value)[axis] for value in node.inputs]
        static = [length for length in lengths if isinstance(length, int)]
        stops = [int(stop) for stop in np.cumsum(static)]
        parts = [(slice(None),) * axis + (slice(stop - size, stop),) for stop, size in zip(stops, static)]
        for place, value in enumerate(node.inputs):
            labels = self.labels(value)
            if labels is None:
                continue
            if labels.shape[axis] > 1 or all(length == 1 for length in lengths):
                if len(static) != len(lengths):
                    raise Blocked("Concat joins channels and an axis that is not static")
                joined = np.full((*labels.shape[:axis], stops[-1], *labels.shape[axis + 1 :]), OUTSIDE, np.int64)
                joined[parts[place]] = spread(labels, axis, lengths[place])
                labels = joined
            self.include(result, labels)
        labels = self.labels(result)
        if labels is None:
            return
        if labels.shape[axis] > 1:
            if len(static) != len(lengths):
                raise Blocked("Concat joins channels and an axis that is not static")
            labels = spread(labels, axis, stops[-1])
        for place in range(len(node.inputs)):
            self.give(node, place, labels[parts[place]] if labels.shape[axis] > 1 else labels)

    def visit_sum(self, node: ir.Node, positions: range) -> None:
        result = node.outputs[0]
        after = sizes(result)
        if 0 not in positions and self.labels(operand(node, 0)) is not None:
            raise Blocked(f"{node.op_type} chooses by it")
        for position in positions:
            if (labels := self.labels(operand(node, position))) is not None:
                self.include(result, push(labels, len(after)))
        labels = self.labels(result)
        if labels is None:
            return
        if 0 not in positions:
            self.same_along_heads(node, 0, labels)
        for position in positions:
            if uniform(operand(node, position)) != 0.0:
                self.give(node, position, pull(labels, after, sizes(operand(node, position)), self.tie))

    def visit_product(self, node: ir.Node) -> None:
        """(x·T) ⊙ y = (x ⊙ y)·T: y is one number for the channels of a head, or T is diagonal."""
        result = node.outputs[0]
        after = sizes(result)
        carriers = [place for place in range(2) if self.labels(operand(node, place)) is not None]
        if not carriers:
            changing = [place for place in range(2) if not is_constant(operand(node, place))]
            carriers = [place for place in changing if len(changing) == 1 or _is_affine(operand(node, place))]
        if not carriers:
            raise Blocked(f"{node.op_type} multiplies two values, and neither is linear in a projection")
        if len(carriers) > 1:
            raise Blocked(f"{node.op_type} multiplies two values that may both carry the transform")
        carrier = carriers[0]
        if node.op_type == "Div" and carrier == 1:
            raise Blocked("Div divides by it")
        if (labels := self.labels(operand(node, carrier))) is not None:
            self.include(result, push(labels, len(after)))
        if (labels := self.labels(result)) is not None:
            self.same_along_heads(node, 1 - carrier, labels)
            self.give(node, carrier, pull(labels, after, sizes(operand(node, carrier)), self.tie))

    def same_along_heads(self, node: ir.Node, position: int, labels: Labels) -> None:
        """Where blocks mix channels, operand `position` is one number for all channels of a head."""
        wanted = sizes(operand(node, position))
        if not self.region.mixing or uniform(operand(node, position)) is not None:
            return
        place = _channel_axis(labels, self.region.size) - (labels.ndim - len(wanted))
        if place >= 0 and wanted[place] != 1:
            raise Blocked(f"{node.op_type} {Role.CHANNELWISE.value}")

    def visit_matmul(self, node: ir.Node) -> None:
        """(…, m, k) @ (…, k, n): rows and columns go through, what is contracted goes to the other side."""
        shapes = [sizes(value) for value in node.inputs]
        after = sizes(node.outputs[0])
        if min(len(shape) for shape in shapes) < 2:
            raise Blocked("MatMul takes a vector")
        for place, summed, free in ((0, -1, -2), (1, -2, -1)):
            labels = self.labels(node.inputs[place])
            if labels is None:
                continue
            if (labels.shape[summed] > 1) == (labels.shape[free] > 1):
                raise Blocked("MatMul sums over a part of the channels of heads")
            if labels.shape[free] > 1:
                self.include(node.outputs[0], push(labels, len(after)))
            else:
                self.give_operand(node, 1 - place, push(self.region.across(np.swapaxes(labels, -1, -2)), len(after)))
        labels = self.labels(node.outputs[0])
        if labels is None:
            return
        if (labels.shape[-2] > 1) == (labels.shape[-1] > 1):
            raise Blocked("MatMul writes the channels of heads along several axes")
        self.give_operand(node, 1 if labels.shape[-1] > 1 else 0, labels)

    def give_operand(self, node: ir.Node, position: int, labels: Labels) -> None:
        """Label an operand of a MatMul; in front of its two last axes it broadcasts to the result."""
        batch, wanted = sizes(node.outputs[0])[:-2], sizes(node.inputs[position])[:-2]
        ends = labels.shape[-2:]
        self.give(node, position, pull(labels, (*batch, *ends), (*wanted, *ends), self.tie))

    def visit_attention(self, node: ir.Node) -> None:
        """Query head h reads key and value head h // (query heads / heads); its result is in the basis of V."""
        if any(operand(node, place) is not None for place in (4, 5)) or any(one.uses() for one in node.outputs[1:3]):
            raise Blocked("Attention keeps keys and values in a cache")
        if self.labels(operand(node, 3)) is not None:
            raise Blocked("Attention is masked by it")
        heads = attention_heads(node)
        if heads is None:
            raise Blocked("the numbers of heads are unknown")
        values = (*node.inputs[:3], node.outputs[0])
        counts = (heads[0], heads[1], heads[1], heads[0])
        wide = len(sizes(node.inputs[0])) == 3
        for source, target in ((0, 1), (1, 0), (2, 3), (3, 2)):
            labels = self.labels(values[source])
            if labels is None:
                continue
            labels = _heads_first(labels, sizes(values[source]), counts[source], wide)
            labels = _for_heads(labels, counts[target], self.tie)
            labels = labels.reshape(1, 1, -1) if wide else labels[None, :, None, :]
            if target == 3:
                self.include(node.outputs[0], labels)
            else:
                self.give(node, target, labels if target == 2 else self.region.across(labels))

    def visit_rotary(self, node: ir.Node) -> None:
        """RotaryEmbedding turns pairs of channels: both have one factor. Channels behind the rotated ones are free."""
        shape = sizes(node.inputs[0])
        count = node.attributes.get_int("num_heads", 0)
        if len(shape) == 3 and not count:
            raise Blocked("the number of heads is unknown")
        for value in (node.inputs[0], node.outputs[0]):
            labels = self.labels(value)
            if labels is None:
                continue
            by_head = labels
            if len(shape) == 3:
                by_head = spread(labels, 2, shape[2]).reshape(*labels.shape[:2], count, -1)
            turned = node.attributes.get_int("rotary_embedding_dim", 0) or by_head.shape[-1]
            channels = np.arange(turned)
            pairs = channels.reshape(-1, 2).T if node.attributes.get_int("interleaved", 0) else channels.reshape(2, -1)
            self.tie(by_head[..., pairs[0]], by_head[..., pairs[1]])
            self.include(node.outputs[0], labels)
            self.give(node, 0, labels)

    def visit_convolution(self, node: ir.Node) -> None:
        """Channels are columns of the kernel where written and rows where read; over positions it is linear."""
        if node.attributes.get_int("group", 1) != 1:
            self.refuse(node)
        for value, kernel_axis in ((node.outputs[0], 0), (node.inputs[0], 1)):
            labels = self.labels(value)
            if labels is None:
                continue
            if any(axis != 1 for axis in varying(labels)):
                raise Blocked("Conv sums over a part of the channels of heads")
            channels = labels.reshape(-1)
            kernel = channels.reshape([-1 if axis == kernel_axis else 1 for axis in range(len(sizes(node.inputs[1])))])
            if kernel_axis == 0:
                self.give(node, 1, kernel)
                self.give(node, 2, channels)
            else:
                self.give(node, 1, self.region.across(kernel))


def attention_heads(node: ir.Node) -> tuple[int, int] | None:
    """Query heads, and heads of keys and values, of an Attention; None where they are not static."""
    shapes = [sizes(value) for value in node.inputs[:3]]
    if len(shapes[0]) == 3:
        found = (node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0))
    else:
        found = (shapes[0][1], shapes[1][1])
    query, shared = found
    if not isinstance(query, int) or not isinstance(shared, int) or not query or not shared or query % shared:
        return None
    return query, shared


def _heads_first(labels: Labels, shape: Shape, count: int, wide: bool) -> Labels:
    """Labels (heads, channels) of an operand of Attention. Raises Blocked where positions differ."""
    axes = (0, 1) if wide else (0, 2)
    if any(labels.shape[axis] > 1 for axis in axes):
        raise Blocked("Attention sums over some of its axes")
    if wide:
        return spread(labels, 2, shape[2]).reshape(count, -1)
    return np.broadcast_to(labels, (1, count, 1, labels.shape[3])).reshape(count, -1)


def _for_heads(labels: Labels, count: int, tie: Tie) -> Labels:
    """Labels for `count` heads: repeated in place, or tied where several become one."""
    if count >= len(labels):
        return np.repeat(labels, count // len(labels), axis=0)
    return reduce(labels.reshape(count, -1, labels.shape[1]), 1, tie)[:, 0]


def _channel_axis(labels: Labels, size: int) -> int:
    """The axis along which channels of a head lie; the last one where no axis does."""
    channels = compress(np.where(labels == OUTSIDE, OUTSIDE, labels % size))
    return next(iter(reversed(varying(channels))), labels.ndim - 1)


def _whole_heads(labels: Labels, size: int) -> bool:
    """Whether channels lie along one axis, each head complete and in order."""
    rows = np.moveaxis(labels, _channel_axis(labels, size), -1)
    rows = np.concatenate([np.full((*rows.shape[:-1], 1), OUTSIDE), rows, np.full((*rows.shape[:-1], 1), OUTSIDE)], -1)
    here, before, behind = rows[..., 1:-1], rows[..., :-2], rows[..., 2:]
    inside = here != OUTSIDE
    starts = inside & (here % size > 0) & (before != here - 1)
    stops = inside & (here % size < size - 1) & (behind != here + 1)
    return not bool(starts.any() or stops.any())


def _is_affine(value: ir.Value | None) -> bool:
    """Whether `value` comes from a product with weights by layout, sums and factors alone (or by a norm of that).

    A product's other factor does not: rotary angles go through a cosine, gates through a sigmoid.
    """
    seen: set[ir.Value] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        node = None if value is None or value in seen else value.producer()
        if value is None or node is None:
            continue
        seen.add(value)
        if is_operator(node, "MatMul", "Conv", "Attention", "LayerNormalization", "RMSNormalization"):
            return True
        if is_layout(node):
            queue.append(node.inputs[0])
        elif is_operator(node, "Concat", "Add", "Sub", "Sum", "Mul", "Div", "Where", "RotaryEmbedding"):
            queue.extend(node.inputs)
    return False


def _reason(node: ir.Node, position: int, labels: Labels, result: bool) -> str:
    for axis in varying(labels)[::-1]:
        thread = follow(node, position, axis, result=result)
        return thread.reason or f"{node.op_type} {thread.role.value}"
    return f"{node.op_type} does not keep the channels of a head"
