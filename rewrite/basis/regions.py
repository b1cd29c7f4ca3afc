"""Regions: the values that must change basis together, grown from one of them by graph analysis alone.

From a seed value and one of its axes, growth follows the axis through every producer and every consumer. An operator
that commutes with the class of transform extends the region. A constant ends it: it absorbs T. A contraction or a norm
ends it: it reads. Whatever else is met is an `Obstruction`, with its place and its reason; growth never guesses.

    constants ── write ──▶ ┌──────────────────┐ ── read ──▶ norms
                           │ values, one axis │ ── read ──▶ contractions
    norms ───── write ──▶  └──────────────────┘ ── ✗ ─────▶ obstructions
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import onnx_ir as ir

from rewrite.basis.transforms import TransformClass
from rewrite.ir.axes import Role, Thread, follow, operand
from rewrite.ir.constants import is_constant, is_overridable, uniform
from rewrite.ir.edit import shape_of


@dataclass(frozen=True)
class Use:
    """Operand `position` of `node`, and the axis of that operand which lies in the region."""

    node: ir.Node
    position: int
    axis: int

    @property
    def value(self) -> ir.Value:
        """What the operand holds now."""
        value = self.node.inputs[self.position]
        if value is None:
            raise ValueError(f"operand {self.position} of {self.node.name} is left out")
        return value


class Cause(Enum):
    """Why a value cannot change basis."""

    INTERFACE = "it is an input or an output of the graph"
    OVERRIDABLE = "it is a constant that a caller may override"
    OPERATOR = "an operator does not commute with the transform"


@dataclass(frozen=True)
class Obstruction:
    """Where growth met something that is neither inside, nor a writer, nor a reader. `node` is None at an input."""

    cause: Cause
    value: ir.Value
    node: ir.Node | None
    reason: str


@dataclass
class Region:
    """All values tied to the seed, and everything at their border.

    `axes` gives for each value the axis that changes basis; `size` is its length. `constants` are operands that absorb
    the transform, `norms` and `readers` are operands through which the region is read, `writing_norms` the norms whose
    result lies in the region.
    """

    transform: TransformClass
    seed: ir.Value
    size: int
    axes: dict[ir.Value, int] = field(default_factory=dict[ir.Value, int])
    constants: list[Use] = field(default_factory=list[Use])
    norms: list[Use] = field(default_factory=list[Use])
    readers: list[Use] = field(default_factory=list[Use])
    writing_norms: list[ir.Node] = field(default_factory=list[ir.Node])
    obstructions: list[Obstruction] = field(default_factory=list[Obstruction])

    def met(self, *causes: Cause) -> Obstruction | None:
        """The first obstruction of one of these causes."""
        return next((met for met in self.obstructions if met.cause in causes), None)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The operators that produce the region's values, in the order in which they were met."""
        return tuple(dict.fromkeys(node for value in self.axes if (node := value.producer()) is not None))


def grow(
    seed: ir.Value,
    axis: int,
    transform: TransformClass,
    origin: ir.Node | None = None,
    through: Callable[..., Thread] = follow,
) -> Region:
    """The region of `seed` along `axis` for a class of transforms.

    `origin` is a node at the border that the caller accounts for itself: it is neither followed nor listed. `through`
    is `follow`, or what a pass knows better of some operators.
    """
    shape = shape_of(seed)
    size = shape[axis] if shape is not None else None
    region = Region(transform, seed, size if isinstance(size, int) else 0)
    if not isinstance(size, int):
        reason = f"the size of axis {axis} is not static"
        region.obstructions.append(Obstruction(Cause.OPERATOR, seed, seed.producer(), reason))
        return region
    _Growth(region, origin, through).run(axis)
    return region


class _Growth:
    """One growth: a queue of values whose producer and consumers are still to be looked at."""

    def __init__(self, region: Region, origin: ir.Node | None, through: Callable[..., Thread]) -> None:
        self.region, self.origin, self.through = region, origin, through
        self.graph = region.seed.graph
        self.queue: deque[ir.Value] = deque()
        self.tied: set[tuple[ir.Node, Thread]] = set()

    def run(self, axis: int) -> None:
        self.include(self.region.seed, axis, self.origin)
        while self.queue:
            value = self.queue.popleft()
            axis = self.region.axes[value]
            self.look_at_border(value)
            for node, position, result in self.neighbours(value):
                if node is not self.origin:
                    self.cross(value, node, position, self.through(node, position, axis, result=result), result)

    def neighbours(self, value: ir.Value) -> Iterator[tuple[ir.Node, int, bool]]:
        producer = value.producer()
        if producer is not None:
            yield producer, producer.outputs.index(value), True
        for use in value.uses():
            yield use.node, use.idx, False

    def look_at_border(self, value: ir.Value) -> None:
        if value.is_graph_output():
            self.obstruct(Cause.INTERFACE, value, value.producer(), f"{value.name} is an output of the graph")
        if is_overridable(value):
            self.obstruct(Cause.OVERRIDABLE, value, None, f"{value.name} is an initializer that is also a graph input")
        elif value.is_graph_input():
            self.obstruct(Cause.INTERFACE, value, None, f"{value.name} is an input of the graph")

    def cross(self, value: ir.Value, node: ir.Node, position: int, thread: Thread, result: bool) -> None:
        """Go through `node` along `thread`, or say why not."""
        region, transform = self.region, self.region.transform
        if node.graph is not self.graph:
            self.obstruct(Cause.OPERATOR, value, node, f"{node.op_type} stands in a subgraph")
        elif thread.role in transform.commutes:
            self.tie(node, thread)
        elif thread.role is Role.CONTRACT:
            region.readers.append(Use(node, position, region.axes[value]))
        elif thread.role is Role.NORM and (result or position == 0):
            self.cross_norm(node, thread, result)
        else:
            reason = thread.reason or f"{node.op_type} {thread.role.value}"
            self.obstruct(Cause.OPERATOR, value, node, reason)

    def cross_norm(self, node: ir.Node, thread: Thread, result: bool) -> None:
        plain = uniform(operand(node, 1)) is not None and operand(node, 2) is None
        if node.op_type in self.region.transform.cores and plain:
            self.tie(node, Thread(thread.role, thread.inputs[:1], thread.outputs))
        elif result:
            self.region.writing_norms.append(node)
        else:
            self.region.norms.append(Use(node, 0, thread.inputs[0][1]))

    def tie(self, node: ir.Node, thread: Thread) -> None:
        if (node, thread) in self.tied:
            return
        self.tied.add((node, thread))
        for position, axis in thread.inputs:
            value = operand(node, position)
            if value is None:
                continue
            if is_constant(value):
                self.region.constants.append(Use(node, position, axis))
            else:
                self.include(value, axis, node)
        for position, axis in thread.outputs:
            self.include(node.outputs[position], axis, node)

    def include(self, value: ir.Value, axis: int, node: ir.Node | None) -> None:
        if value not in self.region.axes:
            self.region.axes[value] = axis
            self.queue.append(value)
        elif self.region.axes[value] != axis:
            reason = f"{value.name} is reached along axis {self.region.axes[value]} and along axis {axis}"
            self.obstruct(Cause.OPERATOR, value, node, reason)

    def obstruct(self, cause: Cause, value: ir.Value, node: ir.Node | None, reason: str) -> None:
        if not any(met.node is node and met.reason == reason for met in self.region.obstructions):
            self.region.obstructions.append(Obstruction(cause, value, node, reason))
