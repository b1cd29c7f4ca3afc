"""Where a transform that cannot be undone is worth inserting: a minimum cut over a region's values.

Every value is kept as it is (raw) or transformed; a value that is kept raw may have a transformed copy beside it, which
an explicit operator computes from it. With s on the raw side and t on the transformed side:

    s ──∞──▶ v                v must stay raw: an input, an output, something that cannot absorb T writes or reads it
    v ──cost──▶ v̂             v is raw, and somebody wants v̂ = v·T: inserted once, for all readers of v
    v̂ ──∞──▶ f, f ──∞──▶ v    f commutes with T: transformed results need every operand transformed,
                              and raw results need every operand raw, since T has no inverse
    v̂ ──∞──▶ n ──gain──▶ t    a norm is cheaper on v̂; where it reads v its gain is what the cut pays
    k ──cost──▶ k̂             a constant that is wanted both as it is and transformed is copied

The cheapest cut is the best placement. Of several the one that transforms least is taken, so nothing is inserted that
only breaks even. Costs are integers, and the cut is exact.

Source    Ford and Fulkerson 1956; Picard 1976, "Maximal closure of a graph", for the closure form
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import networkx as nx
import onnx_ir as ir

from rewrite.basis.regions import Region, Use
from rewrite.ir.axes import Role, Thread, follow, operand
from rewrite.ir.constants import is_constant
from rewrite.ir.edit import shape_of

NOMINAL = 8
"""What a dimension without a static size counts as: batch × sequence is 64 rows."""

PICOSECONDS = 1000
"""A nanosecond, in the unit of costs."""


@dataclass(frozen=True)
class Costs:
    """What a target's kernels take, in nanoseconds for each number of the value they work on.

    `norm` is what RMSNormalization saves against LayerNormalization, `shift` an Add of a constant vector, `centring`
    an explicit x − mean(x). Only their ratios decide. The defaults were measured on one x86-64 core.
    """

    norm: float = 0.38
    shift: float = 0.26
    centring: float = 0.47

    def of(self, nanoseconds: float, value: ir.Value) -> int:
        """The cost, in picoseconds, of a kernel that takes so long for each number of `value`."""
        return round(PICOSECONDS * nanoseconds * _elements(value))


def _elements(value: ir.Value) -> int:
    count = 1
    for size in shape_of(value) or ():
        for factor in str(size).split("*"):
            count *= int(factor) if factor.strip().isdigit() else NOMINAL
    return count


V = TypeVar("V", bound=Hashable)
N = TypeVar("N", bound=Hashable)


@dataclass(frozen=True)
class Tie(Generic[V, N]):
    """An operator that commutes with the transform: its values, and what names it. Constants are not listed."""

    inputs: tuple[V, ...]
    outputs: tuple[V, ...]
    name: N


@dataclass(frozen=True)
class Copy(Generic[V]):
    """A constant that costs something when it is wanted both ways.

    `users` has one result of each operator in the problem that reads it; `kept` says that others read it too, as it is.
    """

    users: tuple[V, ...]
    cost: int
    kept: bool


@dataclass
class Problem(Generic[V, N]):
    """Which values may be transformed, and what that costs and gains.

    `insertion` has every value, with the cost of an explicit transform behind it; `raw` are values that stay as they
    are, those that no tie produces among them; `gains` says what a reader saves on the transformed value it names.
    """

    insertion: dict[V, int]
    raw: set[V] = field(default_factory=set[V])
    ties: list[Tie[V, N]] = field(default_factory=list[Tie[V, N]])
    gains: dict[N, tuple[V, int]] = field(default_factory=dict[N, tuple[V, int]])
    copies: list[Copy[V]] = field(default_factory=list[Copy[V]])


@dataclass(frozen=True)
class Placement(Generic[V, N]):
    """The best placement: what is transformed, where it is inserted, and who works on transformed values.

    `cost` is of insertions and copies together, `gain` of all readers that are served.
    """

    transformed: frozenset[V] = frozenset()
    inserted: tuple[V, ...] = ()
    ties: tuple[Tie[V, N], ...] = ()
    readers: Mapping[N, tuple[V, int]] = field(default_factory=dict[N, tuple[V, int]])
    cost: int = 0
    gain: int = 0

    def served_by(self, value: V) -> tuple[N, ...]:
        """The readers that an insertion behind `value` serves, directly or through what is computed from it."""
        reached = {value}
        grew = True
        while grew:
            new = {out for tie in self.ties if reached.intersection(tie.inputs) for out in tie.outputs} - reached
            reached |= new
            grew = bool(new)
        return tuple(name for name, (read, _) in self.readers.items() if read in reached)


def place(problem: Problem[V, N]) -> Placement[V, N]:
    """The placement of least cost minus gain; empty where nothing pays."""
    if not any(gain > 0 for _, gain in problem.gains.values()):
        return Placement()
    source, sink = "raw", "transformed"
    minimum_cut: Any = nx.minimum_cut  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    _, (_, wanted) = minimum_cut(_flow(problem, source, sink), source, sink)
    transformed = frozenset(value for value in problem.insertion if ("is", value) in wanted)
    inserted = tuple(v for v in problem.insertion if ("has", v) in wanted and v not in transformed)
    ties = tuple(tie for tie in problem.ties if transformed.issuperset(tie.outputs))
    available = transformed.union(inserted)
    readers = {name: read for name, read in problem.gains.items() if read[0] in available and read[1] > 0}
    copied = sum(copy.cost for copy in problem.copies if _is_copied(copy, transformed))
    cost = copied + sum(problem.insertion[value] for value in inserted)
    return Placement(transformed, inserted, ties, readers, cost, sum(gain for _, gain in readers.values()))


def _is_copied(copy: Copy[V], transformed: Collection[V]) -> bool:
    inside = [user in transformed for user in copy.users]
    return any(inside) and (copy.kept or not all(inside))


def _flow(problem: Problem[V, N], source: str, sink: str) -> Any:
    """The network whose minimum cut is the placement.

    An edge u → v is cut, and paid, where u is raw and v is not; without a capacity it says "if u is raw, so is v".
    """
    flow: Any = nx.DiGraph()  # pyright: ignore[reportUnknownVariableType]
    flow.add_nodes_from((source, sink))
    for value, cost in problem.insertion.items():
        flow.add_edge(("is", value), ("has", value), capacity=cost)
    for value in problem.raw:
        flow.add_edge(source, ("is", value))
    for tie in problem.ties:
        first = tie.outputs[0]
        for other in tie.outputs[1:]:
            flow.add_edge(("is", first), ("is", other))
            flow.add_edge(("is", other), ("is", first))
        for value in tie.inputs:
            flow.add_edge(("has", value), ("is", first))
            flow.add_edge(("is", first), ("is", value))
    for name, (value, gain) in problem.gains.items():
        if gain > 0:
            flow.add_edge(("has", value), ("reader", name))
            flow.add_edge(("reader", name), sink, capacity=gain)
    for index, copy in enumerate(problem.copies):
        some, every = ("some", index), ("every", index)
        flow.add_edge(every, some, capacity=copy.cost)
        for user in copy.users:
            flow.add_edge(some, ("is", user))
            flow.add_edge(("is", user), every)
        if copy.kept:
            flow.add_edge(source, every)
    return flow


# ------------------------------------------------------------------------------------------------ of a network's region

Operator = tuple[ir.Node, Thread]
"""A node, and the axis of it that lies in the region."""


@dataclass(frozen=True)
class Prices:
    """What a pass knows of a region: who could do with less, and what it would take.

    `readers` are norms that may read transformed values, with what they save then; a norm that is not among them keeps
    its input raw. `writers` are nodes at the border that absorb the transform into constants of their own.
    """

    readers: Mapping[ir.Node, int]
    writers: Collection[ir.Node]
    insertion: Callable[[ir.Value], int]
    copy: Callable[[Use], int]


def problem_of(region: Region, prices: Prices) -> Problem[ir.Value, Operator | ir.Node]:
    """The placement problem of a region: everything that is not known to let the transform pass holds values raw."""
    problem: Problem[ir.Value, Operator | ir.Node] = Problem({value: prices.insertion(value) for value in region.axes})
    written: set[ir.Value] = set()
    operators: dict[Operator, Tie[ir.Value, Operator | ir.Node]] = {}
    for value, axis in region.axes.items():
        if _at_the_border(value):
            problem.raw.add(value)
        for node, position, result in _neighbours(value):
            thread = follow(node, position, axis, result=result)
            commutes = thread.role in region.transform.commutes and bool(thread.outputs)
            if node.graph is value.graph and commutes:
                operators.setdefault((node, thread), _tie(node, thread))
            elif result and node in prices.writers:
                problem.ties.append(Tie((), (value,), node))
                written.add(value)
            elif not result and position == 0 and thread.role is Role.NORM and node in prices.readers:
                problem.gains[node] = (value, prices.readers[node])
            else:
                problem.raw.add(value)
    for (node, thread), tie in operators.items():
        problem.ties.append(tie)
        written.update(tie.outputs)
        if not all(region.axes.get(value) == axis for value, axis in _reached(node, thread)):
            # a value that is reached along two axes is transformed along neither
            problem.raw.update(tie.inputs, tie.outputs)
    problem.raw.update(region.axes.keys() - written)
    problem.copies.extend(_copies(operators, prices))
    return problem


def _neighbours(value: ir.Value) -> Iterator[tuple[ir.Node, int, bool]]:
    producer = value.producer()
    if producer is not None:
        yield producer, producer.outputs.index(value), True
    for use in value.uses():
        yield use.node, use.idx, False


def _at_the_border(value: ir.Value) -> bool:
    return value.producer() is None or value.is_graph_output()


def _reached(node: ir.Node, thread: Thread) -> Iterator[tuple[ir.Value, int]]:
    """The values of an operator that are not constants, with the axis along which it ties them."""
    for position, axis in thread.inputs:
        value = operand(node, position)
        if value is not None and not is_constant(value):
            yield value, axis
    for position, axis in thread.outputs:
        yield node.outputs[position], axis


def _tie(node: ir.Node, thread: Thread) -> Tie[ir.Value, Operator | ir.Node]:
    results = tuple(node.outputs[position] for position, _ in thread.outputs)
    operands = tuple(value for value, _ in _reached(node, thread))
    return Tie(operands[: len(operands) - len(results)], results, (node, thread))


def _copies(
    operators: Mapping[Operator, Tie[ir.Value, Operator | ir.Node]], prices: Prices
) -> Iterator[Copy[ir.Value]]:
    """Constants that more than one operator reads, where a copy costs something."""
    users: dict[tuple[ir.Value, int], list[tuple[Use, ir.Value]]] = {}
    for (node, thread), tie in operators.items():
        for position, axis in thread.inputs:
            value = operand(node, position)
            if value is not None and is_constant(value):
                users.setdefault((value, axis), []).append((Use(node, position, axis), tie.outputs[0]))
    for (value, _), found in users.items():
        inside = {(use.node, use.position) for use, _ in found}
        kept = value.is_graph_output() or any((use.node, use.idx) not in inside for use in value.uses())
        if (kept or len(found) > 1) and (cost := prices.copy(found[0][0])) > 0:
            yield Copy(tuple(dict.fromkeys(result for _, result in found)), cost, kept)
