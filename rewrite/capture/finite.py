"""Are all weights finite numbers? Streamed by blocks, so that the answer costs one reading and no memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from rewrite.errors import CheckpointError
from rewrite.ir.program import Program
from rewrite.ir.weights import row_blocks, weight_of

MASKS = frozenset({"Add", "Where", "Max", "Min", "Slice", "Expand", "Unsqueeze", "Cast", "Reshape", "Concat"})
"""Operators that may read −∞: it is an additive mask there."""

BOUNDS = frozenset({"Clip", "Max", "Min"})
"""Operators that may read +∞, as a scalar: it is no bound there."""


def check_finite(program: Program, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Raise if a weight of `program` is NaN or infinite.

    −∞ passes in a tensor that only mask arithmetic reads, and in a scalar literal; +∞ in a scalar that only bounds.

    Raises:
        CheckpointError: with the name of the tensor, the place and the value found there.
    """
    values = [value for value in program.original.graph.initializers.values() if _is_weight(value)]
    for done, value in enumerate(values):
        if progress is not None:
            progress(value.name or "", done, len(values))
        _check(value)


def _is_weight(value: ir.Value) -> bool:
    return value.const_value is not None and value.dtype is not None and value.dtype.is_floating_point()


def _check(value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None:
        return
    mask = tensor.size == 1 or all(use.node.op_type in MASKS for use in value.uses())
    bound = tensor.size == 1 and all(use.node.op_type in BOUNDS for use in value.uses())
    weight = weight_of(tensor)
    for region in row_blocks(weight.shape):
        block = weight.read(region)
        finite = np.isfinite(block)
        if mask:
            finite |= np.isneginf(block)
        if bound:
            finite |= np.isposinf(block)
        if finite.all():
            continue
        place = [int(i) for i in np.argwhere(~finite)[0]]
        start = [taken.start for taken in region]
        raise CheckpointError(
            f"tensor {value.name} is {block[tuple(place)]} at {[a + b for a, b in zip(start, place)]}",
            where=str(getattr(tensor, "path", "")),
            remedy="a network with such a weight computes nothing that could be compared; repair the checkpoint",
        )
