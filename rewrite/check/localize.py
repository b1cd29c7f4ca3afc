"""Find the first value at which a rewritten network departs from the original.

A rewritten value is compared with the original value of the same name, carried through its relation: v′ against
v·T + c. So every layer stays comparable after a change of basis. Both graphs and a float32 run of the original are
evaluated in step, and a value is dropped once it has been compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from rewrite.check.noise import BUG_FACTOR, NOISE_LIMIT, Noise, norm, unit_roundoff
from rewrite.check.operators import operator_name
from rewrite.check.reference import storage_dtype, values_of
from rewrite.ir.weights import centred_mean

PASS_KEY = "rewrite.pass"
"""Where a node says which pass made it."""


class Step(Protocol):
    """A change of basis or a shift of `rewrite.proof.transforms`, as far as a comparison needs it."""

    def apply(self, x: np.ndarray, axis: int = -1) -> np.ndarray: ...


def carried(value: np.ndarray, relation: Mapping, transforms: Mapping[str, Step]) -> np.ndarray:
    """v·T + c in float64: `value` through the steps of its relation, first to last.

    Raises KeyError for a transform that is neither "identity" nor "centre" nor one of `transforms`, and ValueError or
    IndexError where one does not fit the value.
    """
    for step in steps_of(relation):
        name, axis = step["transform"], step.get("axis", -1)
        if name == "centre":
            value = value - centred_mean(value, axis)
        elif name != "identity":
            value = transforms[name].apply(value, axis)
    return value


def steps_of(relation: Mapping) -> Sequence[Mapping]:
    """The steps that a relation is composed of, first to last; none for the identity."""
    if relation.get("transform", "identity") == "identity":
        return ()
    return relation["steps"] if relation["transform"] == "composition" else (relation,)


@dataclass(frozen=True)
class ValueRow:
    """One compared value: where it is, how it relates, and its error over norms.

    `noise` is the relative rounding error of the original's run at this value; `ratio` the error over what is
    accepted as 1: over the noise, or over the noise scaled to float64 where constants are unrounded. `departs` says
    that it is above the limit.
    """

    name: str
    node: str
    operator: str
    made_by: str
    relation: str
    relative: float
    noise: float
    ratio: float
    departs: bool


@dataclass(frozen=True)
class Localization:
    """Every compared value in the rewritten graph's order, the first that departs, and what could not be compared."""

    rows: tuple[ValueRow, ...]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> ValueRow | None:
        """The first value whose error is above the noise."""
        return next((row for row in self.rows if row.departs), None)

    def __str__(self) -> str:
        first, count = self.first, len(self.rows)
        skipped = ", ".join(f"{number} {reason}" for reason, number in sorted(self.skipped.items()))
        tail = f" (not compared: {skipped})" if skipped else ""
        if first is None:
            return f"all {count} comparable values agree{tail}"
        made = f", made by {first.made_by}" if first.made_by else ""
        return (
            f"{first.name} departs first: relative error {first.relative:.1e}, noise {first.noise:.1e}, "
            f"at {first.operator} node {first.node}{made}{tail}"
        )


def localize(
    original: ir.Model,
    rewritten: ir.Model,
    inputs: Mapping[str, np.ndarray],
    *,
    relations: Mapping[str, Mapping] | None = None,
    transforms: Mapping[str, Step] | None = None,
    unrounded: bool = False,
    dtype: np.dtype | type | None = None,
) -> Localization:
    """Compare all values of two graphs on one set of inputs.

    `relations[name]` is {"transform": "centre" or a key of `transforms`, "axis": int}, or {"transform": "composition",
    "steps": several of those}, the identity where absent. `dtype` is the storage type, that of most weights unless
    given: the noise is measured in float32 and scaled by the ratio of roundoffs.
    With `unrounded`, rewritten weights keep float64 and the limit is that of `two_precisions`.
    """
    relations, dtype = relations or {}, np.dtype(storage_dtype(original) if dtype is None else dtype)
    producers = {value.name: node for node in rewritten.graph for value in node.outputs}
    partners = _Partners(original, inputs, set(producers), unrounded)
    rows: list[ValueRow] = []
    skipped: Counter[str] = Counter()
    good: set[str] = set()
    for name, value in values_of(rewritten, inputs, unrounded=unrounded):
        node = producers.get(name)
        if node is None:
            continue
        row = _compare(name, node, value, partners, relations.get(name, {}), transforms or {}, unrounded, dtype)
        if isinstance(row, str):
            skipped[row] += 1
            continue
        if not row.departs:
            good.add(name)
        elif not row.made_by:
            row = ValueRow(**{**row.__dict__, "made_by": _nearest_pass(node, good)})
        rows.append(row)
    return Localization(tuple(rows), dict(skipped))


class _Partners:
    """Original values by name, in float64 and float32, computed no further than asked and dropped when taken."""

    def __init__(self, original: ir.Model, inputs: Mapping, wanted: set, unrounded: bool) -> None:
        self._wanted = wanted & {value.name for node in original.graph for value in node.outputs}
        self._pairs = self._walk(original, inputs, unrounded)
        self._held: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def _walk(original: ir.Model, inputs: Mapping, unrounded: bool) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        wide = values_of(original, inputs, unrounded=unrounded)
        narrow = values_of(original, inputs, precision=np.float32)
        for (name, exact), (_, run) in zip(wide, narrow):
            yield name, exact, run

    def take(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The pair (float64, float32) of `name`, or None where the original has no such value."""
        if name not in self._wanted:
            return None
        while name not in self._held:
            found = next(self._pairs, None)
            if found is None:
                return None
            if found[0] in self._wanted:
                self._held[found[0]] = found[1:]
        return self._held.pop(name)


def _compare(
    name: str,
    node: ir.Node,
    value: np.ndarray,
    partners: _Partners,
    relation: Mapping,
    transforms: Mapping[str, Step],
    unrounded: bool,
    dtype: np.dtype,
) -> ValueRow | str:
    """The row of a value, or why there is none."""
    pair = partners.take(name)
    if pair is None:
        return "new"
    if value.dtype.kind != "f":
        return "of integers"
    try:
        exact, run = (carried(np.asarray(x, np.float64) if relation else x, relation, transforms) for x in pair)
    except KeyError as error:
        return f"with unknown relation {error.args[0]}"
    except (ValueError, IndexError):
        return "of another shape"
    if exact.shape != value.shape:
        return "of another shape"
    noise = Noise.of(np.asarray(run, np.float32), exact)
    where = np.ones(exact.shape, bool) if noise.where is None else noise.where
    size = norm(exact[where])
    error = norm(value[where] - exact[where]) if np.isfinite(value[where]).all() else math.inf
    scale = unit_roundoff(dtype) / unit_roundoff(np.float32)
    accepted = noise.norm * scale
    if unrounded:
        accepted, limit = accepted * unit_roundoff(np.float64) / unit_roundoff(dtype), BUG_FACTOR
    else:
        limit = NOISE_LIMIT
    ratio = error / accepted if error else 0.0
    return ValueRow(
        name=name,
        node=node.name or name,
        operator=operator_name(node),
        made_by=node.metadata_props.get(PASS_KEY, ""),
        relation=" · ".join(step["transform"] for step in steps_of(relation)) or "identity",
        relative=error / size if size else (math.inf if error else 0.0),
        noise=noise.norm * scale / size if size else 0.0,
        ratio=ratio,
        departs=not ratio <= limit,
    )


def _nearest_pass(node: ir.Node, good: set[str]) -> str:
    """The pass behind a departing node without a mark: that of a constant it reads, or of a new node before it."""
    queue, seen = [node], set()
    while queue:
        here = queue.pop(0)
        for value in here.inputs:
            if value is None or value in seen or value.name in good:
                continue
            seen.add(value)
            if found := value.metadata_props.get(PASS_KEY, ""):
                return found
            producer = value.producer()
            if producer is not None:
                if found := producer.metadata_props.get(PASS_KEY, ""):
                    return found
                queue.append(producer)
    return ""
