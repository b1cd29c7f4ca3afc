"""What uses of a shipped constant ask of its exact value, and whether one value meets all of them.

One initializer has one Ŵ. Two uses that ask for different expressions of the original are refused, unless they read
different entries, or the one reads some columns of what the other reads whole:

    k·cos  asks  W′ = diag(γ)·W        rotate(k)·sin  asks  W′[:, :n] = diag(γ)·W[:, :n]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewrite.proof.constants import Constant, Permuted, Reshaped, Sliced

SHIPPED = ("shipped",)
"""The demand that a constant is exactly what was shipped."""


@dataclass(frozen=True, eq=False)
class Columns:
    """Column by column what is asked: column `ours[i]` of `base` solves `value` with columns `theirs[:, i]`."""

    base: tuple[Any, ...]
    ours: np.ndarray
    value: tuple[Any, ...]
    theirs: np.ndarray

    def agrees(self, other: Columns) -> bool:
        """Whether no column is asked to be two things."""
        if self.base != other.base:
            return False
        mine = {int(column): index for index, column in enumerate(self.ours)}
        for index, column in enumerate(other.ours):
            known = mine.get(int(column))
            if known is not None and (
                self.value != other.value or not np.array_equal(self.theirs[:, known], other.theirs[:, index])
            ):
                return False
        return True


@dataclass(frozen=True)
class Demand:
    """What a use asks of entries of a shipped constant: `layout` says which entries, `value` which exact expression."""

    name: str
    layout: tuple[Any, ...]
    value: tuple[Any, ...]
    columns: Columns | None = field(default=None, compare=False)

    def agrees(self, other: Demand) -> bool:
        """Whether one exact value of the constant can meet both."""
        if self.value == other.value and (self.layout == other.layout or self.value == SHIPPED):
            return True
        if self.columns is not None and other.columns is not None and self.columns.agrees(other.columns):
            return True
        return _disjoint(self.layout, other.layout)


def as_shipped(name: str, constant: Constant) -> Demand:
    """That the shipped tensor `name` is what it is, in the entries that `constant` takes of it if these are known."""
    columns = columns_of(constant)
    if columns is None:
        return Demand(name, constant.key if _slice_of(constant.key) is not None else (), SHIPPED)
    base, ours = columns
    return Demand(name, constant.key, SHIPPED, Columns(base, ours, SHIPPED, ours.reshape(1, -1)))


def conflict(demands: Iterable[tuple[Demand, str]]) -> tuple[str, str] | None:
    """A shipped constant of which two uses demand different values: its name, and the second use's node."""
    asked: dict[str, list[Demand]] = {}
    for demand, node in demands:
        for other in asked.setdefault(demand.name, []):
            if not demand.agrees(other):
                return demand.name, node
        asked[demand.name].append(demand)
    return None


def columns_of(constant: Constant) -> tuple[tuple[Any, ...], np.ndarray] | None:
    """The constant that `constant` takes columns of, by its key, and which; None where rows are cut or mixed up."""
    steps: list[Reshaped | Sliced] = []
    base = constant
    while isinstance(base, Reshaped | Sliced):
        steps.append(base)
        base = base.inner
    if len(base.shape) not in (1, 2):
        return None
    key, height = base.key, base.shape[0] if len(base.shape) == 2 else 1
    index = np.arange(base.shape[-1]).reshape(1, -1)
    if isinstance(base, Permuted) and isinstance(cut := base.inner, Sliced):
        rows, columns = cut.region
        if base.permutation != (1, 0) or (columns.start, columns.stop) != (0, cut.inner.shape[1]):
            return None
        key, index = ("permuted", (1, 0), cut.inner.key), index + rows.start
    for step in reversed(steps):
        shape = step.shape if isinstance(step, Reshaped) else step.inner.shape
        if height == 1:
            index = index.reshape(shape) if isinstance(step, Reshaped) else index.reshape(shape)[step.region]
            continue
        if shape[0] != height:
            return None
        if isinstance(step, Sliced):
            if (step.region[0].start, step.region[0].stop) != (0, height):
                return None
            index = index[(slice(0, 1), *step.region[1:])]
        else:
            index = index.reshape(1, *shape[1:])
    return key, index.reshape(-1)


def _disjoint(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two layouts of one tensor hold different entries: slices of one arrangement of it that do not meet."""
    mine, theirs = _slice_of(a), _slice_of(b)
    return (
        mine is not None
        and theirs is not None
        and mine[0] == theirs[0]
        and any(x1 <= y0 or y1 <= x0 for (x0, x1), (y0, y1) in zip(mine[1], theirs[1]))
    )


def _slice_of(layout: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[tuple[int, int], ...]] | None:
    """What a layout's entries are a slice of, all of the stored tensor in some order, and which slice.

    What is around the slice loses none of them.
    """
    while layout and layout[0] in ("permuted", "reshaped", "grouped"):
        layout = layout[2]
    if not layout or layout[0] != "sliced":
        return None
    inner = whole = layout[2]
    while inner[0] in ("permuted", "reshaped"):
        inner = inner[2]
    return (whole, layout[1]) if inner[0] == "stored" else None
