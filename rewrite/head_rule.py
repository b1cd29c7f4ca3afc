"""What the passes over an attention's heads share: where they apply, what must hold there, how a map is absorbed.

    values     v′ = v·T      written by the value projection, read by the output projection
    logits     q′ = q·T, k′ = k·T⁻ᵀ      written by the query and key projections, read by each other

T is block diagonal, one block a head. A pass says which blocks (`HeadMap`); this module finds the heads, absorbs T and
T⁻ᵀ into constants, whole or in part, and records what became of every value between.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rewrite.basis.heads import HeadRegion, attention_heads, grow_heads
from rewrite.basis.labels import OUTSIDE, Blocked, Labels, sizes
from rewrite.basis.operators import NORMS
from rewrite.basis.regions import Cause, Obstruction, Use
from rewrite.ir.axes import volume
from rewrite.ir.constants import is_constant, weight_behind
from rewrite.ir.edit import is_operator, shape_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Concat, Slice, Transformed, Weight, cut_blocks, whole
from rewrite.proof.transforms import Repeated, Scaling, Transform
from rewrite.rule import Breach, Change, Pass, Requirement, Site, read_elsewhere


@dataclass(frozen=True)
class Heads(Site):
    """The heads of one attention. `core` is the node that contracts or averages them; `region` is None where `unknown`
    says what of their sizes is not known.
    """

    core: ir.Node
    region: HeadRegion | None
    unknown: str = ""

    @property
    def channels(self) -> HeadRegion:
        """The region. Raises ValueError where there is none; R1 is tested first."""
        if self.region is None:
            raise ValueError(self.unknown)
        return self.region


@dataclass(frozen=True)
class Placement:
    """A constant of the region: its use, and the tied labels along the use's axis."""

    use: Use
    rows: NDArray[np.int64]


Run = tuple[int, int, int]
"""Channels from start to stop along an axis, all outside (−1), on the left (0) or on the right (1)."""


class HeadMap:
    """The blocks of T, by the labels of an axis."""

    fills: ClassVar[bool]
    """Whether one transform may leave channels outside as they are."""

    @abstractmethod
    def of(self, region: HeadRegion, rows: NDArray[np.int64]) -> Transform:
        """T on channels with these labels of the left side."""

    def runs(self, region: HeadRegion, rows: NDArray[np.int64]) -> list[Run]:
        """The parts of an axis that one transform serves, in order."""
        sides = np.where(rows == OUTSIDE, OUTSIDE, rows // region.channels)
        inside = set(sides[sides != OUTSIDE].tolist())
        if self.fills and len(inside) == 1:
            return [(0, len(rows), inside.pop())]
        starts = [0, *(int(place) + 1 for place in np.flatnonzero(np.diff(sides))), len(rows)]
        return [(start, stop, int(sides[start])) for start, stop in pairwise(starts)]

    def part(self, region: HeadRegion, rows: NDArray[np.int64], run: Run) -> Transform:
        """T or T⁻ᵀ on a run."""
        start, stop, side = run
        taken = rows[start:stop]
        transform = self.of(region, np.where(taken == OUTSIDE, OUTSIDE, taken % region.channels))
        return transform.dual if side else transform

    def whole(self, region: HeadRegion, rows: NDArray[np.int64]) -> Transform | None:
        """What a value with these labels along an axis is multiplied by; None where it is not one transform."""
        runs = self.runs(region, rows)
        return self.part(region, rows, runs[0]) if len(runs) == 1 and runs[0][2] != OUTSIDE else None

    def weight(self, region: HeadRegion, placed: Placement) -> tuple[Weight, tuple[object, ...]]:
        """The constant with T and T⁻ᵀ absorbed where they belong, and a key that says which computation that was."""
        weight, axis = weight_behind(placed.use.value), placed.use.axis
        parts: list[Weight] = []
        key: list[object] = [axis]
        runs = self.runs(region, placed.rows)
        for start, stop, side in runs:
            taken = (*whole(weight.shape[:axis]), slice(start, stop), *whole(weight.shape[axis + 1 :]))
            part = weight if len(runs) == 1 else Slice(weight, taken)
            if side != OUTSIDE:
                transform = self.part(region, placed.rows, (start, stop, side))
                part = Transformed(part, transform, axis)
                key.append((start, transform))
            parts.append(part)
        return parts[0] if len(parts) == 1 else Concat(tuple(parts), axis), tuple(key)


@dataclass(frozen=True)
class Diagonal(HeadMap):
    """One factor a channel: `factors` by label."""

    fills: ClassVar[bool] = True
    factors: NDArray[np.float64]

    def of(self, region: HeadRegion, rows: NDArray[np.int64]) -> Transform:
        factors = np.where(rows == OUTSIDE, 1.0, self.factors[rows])
        heads = factors.reshape(-1, region.size) if len(rows) % region.size == 0 else factors[None]
        alike = len(heads) > 1 and bool((heads == heads[0]).all())
        return repeated(Scaling(heads[0]), len(heads)) if alike else Scaling(factors)


@dataclass(frozen=True)
class Blocks(HeadMap):
    """One matrix a head: `transform` is that of some heads in a row."""

    fills: ClassVar[bool] = False
    transform: Callable[[tuple[int, ...]], Transform]

    def of(self, region: HeadRegion, rows: NDArray[np.int64]) -> Transform:
        return self.transform(tuple(int(label) // region.size for label in rows[:: region.size]))


def repeated(transform: Transform, heads: int) -> Transform:
    """The same map of each of `heads` heads."""
    return transform if heads == 1 else Repeated(transform, heads)


# ------------------------------------------------------------------------------------------------------------- where


def value_sites(program: Program, name: str, *, mixing: bool, shared: bool) -> Iterator[Heads]:
    """Every attention whose values have not been changed by pass `name`; `shared` ties all its heads."""
    for node in _attentions(program, name, _averages):
        yield _site(node, 2 if node.op_type == "Attention" else 1, mixing, shared)


def logit_sites(program: Program, name: str, *, shared: bool) -> Iterator[Heads]:
    """Every attention whose queries and keys have not been changed by pass `name`; `shared` ties all its heads."""
    for node in _attentions(program, name, _compares):
        yield _site(node, 0, False, shared)


def _attentions(program: Program, name: str, product: Callable[[ir.Node], bool]) -> Iterator[ir.Node]:
    for node in list(program.model.graph):
        if node.graph is None or _done(name) in node.metadata_props:
            continue
        if is_operator(node, "Attention") or (is_operator(node, "MatMul") and product(node)):
            yield node


def _done(name: str) -> str:
    return f"rewrite.done.{name}"


_KEEPING = ("Add", "Sub", "Mul", "Div", "Where", "Cast", "Dropout", "Identity", "Reshape", "Transpose", "Slice", "Tanh")
"""What may stand between logits and their softmax, or between probabilities and the values they average."""


def _averages(node: ir.Node) -> bool:
    """Whether a MatMul of two computed values takes probabilities from the left."""
    return _computed(node) and _reaches(node.inputs[0], forwards=False)


def _compares(node: ir.Node) -> bool:
    """Whether a MatMul of two computed values gives logits."""
    return _computed(node) and _reaches(node.outputs[0], forwards=True)


def _computed(node: ir.Node) -> bool:
    return not any(is_constant(value) for value in node.inputs)


def _reaches(value: ir.Value | None, *, forwards: bool) -> bool:
    """Whether a Softmax stands before or behind a value, with nothing but `_KEEPING` between."""
    seen: set[ir.Value] = set()
    queue = [value]
    while queue:
        value = queue.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        nodes = [use.node for use in value.uses()] if forwards else [producer] if producer is not None else []
        for node in nodes:
            if is_operator(node, "Softmax"):
                return True
            if is_operator(node, *_KEEPING):
                queue.extend(node.outputs if forwards else node.inputs)
    return False


def _site(core: ir.Node, position: int, mixing: bool, shared: bool) -> Heads:
    seed = core.inputs[position]
    name, nodes = core.outputs[0].name or "", (core,)
    if seed is None:
        return Heads(name, nodes, core, None, "an operand is left out")
    try:
        labels, size = _seeded(core, position, seed)
    except Blocked as blocked:
        return Heads(name, nodes, core, None, str(blocked))
    region = grow_heads(seed, labels, size, mixing=mixing)
    if shared:
        region.share()
    changed = dict.fromkeys((*(node for node, _ in region.constants), core))
    return Heads(name, tuple(changed), core, region)


def _seeded(core: ir.Node, position: int, seed: ir.Value) -> tuple[Labels, int]:
    """Labels of the operand that an attention reads, every head's channels for themselves, and a head's size."""
    shape = sizes(seed)
    if core.op_type == "Attention":
        heads = attention_heads(core)
        if heads is None:
            raise Blocked("the numbers of heads are unknown")
        count = heads[0] if position == 0 else heads[1]
        wide = len(shape) == 3
        size = _channels(shape[-1], count if wide else 1)
        return np.arange(count * size).reshape((1, 1, -1) if wide else (1, count, 1, size)), size
    size = _channels(shape[-1])
    lengths = [known[0] if (known := volume((length,))) is not None else 1 for length in shape[:-2]]
    return np.arange(int(np.prod(lengths)) * size).reshape(*lengths, 1, size), size


def _channels(size: object, heads: int = 1) -> int:
    if not isinstance(size, int) or size % heads:
        raise Blocked("the size of a head is not static")
    if size // heads < 2:
        raise Blocked("a head has one channel")
    return size // heads


# ---------------------------------------------------------------------------------------------------- what must hold


def _known(rule: HeadPass, site: Heads) -> Breach | None:
    return Breach(site.core, site.unknown) if site.region is None else None


def _met(holds: Callable[[Obstruction], bool]) -> Callable[[HeadPass, Heads], Breach | None]:
    """The first obstruction of a kind."""

    def check(rule: HeadPass, site: Heads) -> Breach | None:
        found = site.region.obstructions if site.region is not None else ()
        return Breach.at(next((met for met in found if holds(met)), None))

    return check


_hidden_from_outside = _met(lambda met: met.cause is Cause.INTERFACE)
_own_constants = _met(lambda met: met.cause is Cause.OVERRIDABLE)
_no_norm = _met(lambda met: is_operator(met.node, *NORMS))
_passes = _met(lambda met: met.cause is Cause.OPERATOR and not is_operator(met.node, *NORMS))


def _along_one_axis(rule: HeadPass, site: Heads) -> Breach | None:
    region = site.region
    for (node, position), labels in region.constants.items() if region is not None else ():
        value = node.inputs[position]
        if value is None or region is None or region.lies(labels, sizes(value)) is None:
            return Breach(node, f"{'' if value is None else value.name} holds heads along several axes")
    return None


def _unshared(rule: HeadPass, site: Heads) -> Breach | None:
    uses = [Use(node, position, 0) for node, position in site.region.constants] if site.region is not None else []
    for use in uses:
        if (node := read_elsewhere(use, uses)) is not None:
            return Breach(node, f"{use.value.name} is also read here, and would have to be copied")
    return None


def requirements(norm: str, between: str) -> tuple[Requirement, ...]:
    """What must hold wherever a map of heads is absorbed; two of the sentences depend on the pass."""
    return (
        Requirement("R1", "the heads and their sizes are known", _known),
        Requirement("R2", "no input or output of the graph (a cache) holds their channels", _hidden_from_outside),
        Requirement("R3", "the constants cannot be overridden", _own_constants),
        Requirement("R4", norm, _no_norm),
        Requirement("R5", between, _passes),
        Requirement("R6", "every constant holds heads along one axis", _along_one_axis),
        Requirement("R7", "nothing else reads these constants", _unshared),
    )


# -------------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class HeadPass(Pass[Heads]):
    """A map of an attention's heads, merged into the constants on both sides."""

    suffix: ClassVar[str]
    """What is added to the names of changed constants and of values that have another meaning."""

    @abstractmethod
    def map_of(self, region: HeadRegion) -> HeadMap:
        """The blocks of T, chosen from the region's constants."""

    def rewrite(self, site: Heads, change: Change) -> None:
        region = site.channels
        blocks = self.map_of(region)
        for placed in placements(region):
            weight, key = blocks.weight(region, placed)
            change.absorb(placed.use, weight, self.suffix, key=key)
        named = {value.name for node in change.program.original.graph for value in node.outputs}
        for value, labels in region.values.items():
            if value.name in named:
                self._follow(change, region, blocks, value, labels)
        site.core.metadata_props[_done(self.name)] = "1"
        change.notes.append(f"heads of {region.size} channels")

    def _follow(self, change: Change, region: HeadRegion, blocks: HeadMap, value: ir.Value, labels: Labels) -> None:
        """Record what a value is now, or give it a new name where no transform of one axis says it."""
        lies = region.lies(labels, sizes(value))
        transform = None if lies is None else blocks.whole(region, lies[1])
        if lies is None or transform is None:
            change.program.relations.pop(value.name or "", None)
            change.rename(value, self.suffix)
        else:
            change.relate(value, transform, lies[0])


def placements(region: HeadRegion) -> Iterator[Placement]:
    """The region's constants, each with the axis its heads lie along."""
    for (node, position), labels in region.constants.items():
        value = node.inputs[position]
        lies = None if value is None else region.lies(labels, sizes(value))
        if lies is None:
            raise ValueError(f"{node.name}: heads lie along several axes")
        yield Placement(Use(node, position, lies[0]), lies[1])


def matrices(region: HeadRegion, *, right: bool) -> Iterator[Placement]:
    """The matrices on one side (vectors where it has none), their labels as on the left, outside on the other side."""
    found: list[Placement] = []
    for placed in placements(region):
        here = (placed.rows != OUTSIDE) & (placed.rows // region.channels == int(right))
        if here.any():
            found.append(Placement(placed.use, np.where(here, placed.rows % region.channels, OUTSIDE)))
    yield from [placed for placed in found if len(shape_of(placed.use.value) or ()) > 1] or found


def largest(region: HeadRegion, *, right: bool) -> NDArray[np.float64]:
    """max|W| of every channel over the matrices of one side, by label; tied channels under the label for all."""
    found = np.zeros(region.channels)
    for placed in matrices(region, right=right):
        weight, axis = weight_behind(placed.use.value), placed.use.axis
        inside = placed.rows != OUTSIDE
        for part in cut_blocks(weight.shape, weight.mixed | {axis}):
            values = np.abs(np.moveaxis(weight.read(part), axis, -1))
            most = values.reshape(-1, len(inside)).max(axis=0, initial=0.0)
            np.maximum.at(found, placed.rows[inside], most[inside])
    return found[region.partner]


def balance(region: HeadRegion, limit: float, power_of_two: bool) -> NDArray[np.float64]:
    """The factors s by label for which max|W|·s on the left is max|W|/s on the right; 1 for dead channels."""
    left, right = largest(region, right=False), largest(region, right=True)
    alive = (left > 0) & (right > 0)
    exponents = np.where(alive, 0.5 * np.log2(np.where(alive, right, 1.0) / np.where(alive, left, 1.0)), 0.0)
    exponents = np.clip(exponents, -np.log2(limit), np.log2(limit))
    return np.exp2(np.trunc(exponents + np.copysign(0.5, exponents)) if power_of_two else exponents)


def gram(region: HeadRegion, *, right: bool) -> dict[int, NDArray[np.float64]]:
    """Σ WᵀW (n, n) of every block over the matrices of one side, W (…, n) its part of a matrix."""
    found: dict[int, NDArray[np.float64]] = {}
    for placed in matrices(region, right=right):
        weight, axis = weight_behind(placed.use.value), placed.use.axis
        blocks = region.blocks(placed.rows)
        stops = np.cumsum([length for _, length in blocks]).tolist()
        places = [(block, stop - length, stop) for (block, length), stop in zip(blocks, stops) if block != OUTSIDE]
        for part in cut_blocks(weight.shape, weight.mixed | {axis}):
            values = np.moveaxis(weight.read(part), axis, -1)
            for block, start, stop in places:
                _accumulate(found, block, values[..., start:stop])
    return found


def _accumulate(found: dict[int, NDArray[np.float64]], block: int, values: NDArray[np.float64]) -> None:
    part = values.reshape(-1, values.shape[-1])
    product = part.T @ part
    found[block] = found[block] + product if block in found else product
