"""Per-channel ranges of values, measured by the float64 reference over sets of inputs.

Sets are streamed: one evaluation is held at a time, and of it only what its operators still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir

from rewrite.check.reference import evaluate
from rewrite.ir.statistics import ChannelRange


def channel_statistics(
    model: ir.Model, inputs: Iterable[Mapping[str, np.ndarray]], names: Iterable[str]
) -> dict[str, ChannelRange]:
    """The range of every channel (the last axis) of the values `names`, over all rows of all `inputs`.

    A value that has no rows, no last axis or no floating-point numbers in it has no range and is left out. Weights are
    what they are before rounding. Raises what `evaluate` raises, and ValueError where a value is not finite.
    """
    wanted, found = frozenset(names), dict[str, ChannelRange]()

    def observe(name: str, array: np.ndarray) -> None:
        if name not in wanted or array.ndim == 0 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
            return
        rows = array.reshape(-1, array.shape[-1]).astype(np.float64, copy=False)
        seen = ChannelRange(rows.min(0), rows.max(0))
        if not (np.isfinite(seen.low).all() and np.isfinite(seen.high).all()):
            raise ValueError(f"{name} is not finite on the calibration inputs")
        found[name] = found[name].joined(seen) if name in found else seen

    for one in inputs if wanted else ():
        evaluate(model, one, on_value=observe, unrounded=True)
    return found


class Observer(Protocol):
    """What gathers numbers of one value."""

    def observe(self, rows: np.ndarray) -> None:
        """Take in the rows (n, C), float64, of one evaluation."""


SomeObserver = TypeVar("SomeObserver", bound=Observer)


def observe(
    model: ir.Model, inputs: Iterable[Mapping[str, np.ndarray]], observers: Mapping[str, SomeObserver]
) -> dict[str, SomeObserver]:
    """`observers`, by the names of their values, after all `inputs`; those whose values had no rows are left out.

    Rows are what the last axis runs along; an image's channels do not matter to what observes it. Weights are what they
    are before rounding. Raises what `evaluate` raises, and ValueError where a value is not finite.
    """
    found: set[str] = set()

    def take(name: str, array: np.ndarray) -> None:
        observer = observers.get(name)
        if observer is None or array.ndim == 0 or array.size == 0 or not np.issubdtype(array.dtype, np.floating):
            return
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite on the calibration inputs")
        observer.observe(array.reshape(-1, array.shape[-1]).astype(np.float64, copy=False))
        found.add(name)

    for one in inputs if observers else ():
        evaluate(model, one, on_value=take, unrounded=True)
    return {name: observer for name, observer in observers.items() if name in found}
