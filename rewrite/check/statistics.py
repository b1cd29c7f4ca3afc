"""Per-channel ranges of values, measured by the float64 reference over sets of inputs.

Sets are streamed: one evaluation is held at a time, and of it only what its operators still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
