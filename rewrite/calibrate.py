"""Calibration: a pass says which values it wants measured, and gets their ranges as an option.

Passes see the graph only. So what they need to know of data is measured here, in front of them, and given to them as
numbers: a pass has a field `statistics` and a method `calibrates(program)` that yields names of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rewrite.ir.program import Program
from rewrite.rule import Pass


def calibrated(rule: Pass[Any], program: Program, inputs: Iterable[Mapping[str, np.ndarray]]) -> Pass[Any]:
    """`rule` with the ranges of what it calibrates, measured on `program` as it is now; `rule` itself where it asks
    for nothing or has its numbers already.

    `inputs` are sets of graph inputs, each evaluated once in float64. Raises what `channel_statistics` raises.
    """
    names = getattr(rule, "calibrates", None)
    if names is None or getattr(rule, "statistics", None) is not None:
        return rule
    from rewrite.check.statistics import channel_statistics

    wanted = tuple(names(program))
    if not wanted:
        return rule
    measured: Any = rule  # every pass is a dataclass, which its base class cannot say
    return dataclasses.replace(measured, statistics=channel_statistics(program.model, inputs, wanted))
