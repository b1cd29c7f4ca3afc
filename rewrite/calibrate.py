"""Calibration: a pass says which values it wants measured, and gets their ranges as an option.

Passes see the graph only. So what they need to know of data is measured here, in front of them, and given to them as
numbers: a pass has a field `statistics`, and a method `calibrates(program)` that yields names of values whose channels'
ranges it wants, or `observes(program)` that gives the observer of each value by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np

from rewrite.ir.program import Program
from rewrite.rule import Pass


def calibrated(
    rule: Pass[Any],
    program: Program,
    inputs: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[str], None] | None = None,
) -> Pass[Any]:
    """`rule` with what it asks for measured on `program` as it is now; `rule` itself where it asks for nothing or has
    its numbers already.

    `inputs` are sets of graph inputs, each evaluated once in float64; `progress` is told how many are done. A pass with
    a budget then chooses by what each of its sites does to the outputs. Raises what `channel_statistics`, `observe` and
    `with_chosen_bits` raise.
    """
    found = _measured(rule, program, inputs, progress) if getattr(rule, "statistics", None) is None else rule
    if getattr(found, "budget", "") and not getattr(found, "effects", None):
        from rewrite.mixed_precision import with_chosen_bits

        return with_chosen_bits(found, program, inputs, progress)  # type: ignore[arg-type]
    return found


def _measured(
    rule: Pass[Any],
    program: Program,
    inputs: Iterable[Mapping[str, np.ndarray]],
    progress: Callable[[str], None] | None,
) -> Pass[Any]:
    from rewrite.check.statistics import channel_statistics, observe

    measured: Any = rule  # every pass is a dataclass, which its base class cannot say
    told = _counted(inputs, f"calibration of {rule.name}", progress)
    if (observes := getattr(rule, "observes", None)) is not None:
        observers = observes(program)
        return dataclasses.replace(measured, statistics=observe(program.model, told, observers)) if observers else rule
    if (names := getattr(rule, "calibrates", None)) is not None and (wanted := tuple(names(program))):
        return dataclasses.replace(measured, statistics=channel_statistics(program.model, told, wanted))
    return rule


def _counted(
    inputs: Iterable[Mapping[str, np.ndarray]], what: str, progress: Callable[[str], None] | None
) -> Iterator[Mapping[str, np.ndarray]]:
    total = f"/{len(inputs)}" if isinstance(inputs, Sized) else ""
    for index, one in enumerate(inputs):
        if progress is not None:
            progress(f"{what}: {index + 1}{total}")
        yield one
