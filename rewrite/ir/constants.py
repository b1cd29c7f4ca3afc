"""What a pass may know of a value before the network runs.

An initializer that is also a graph input is not a constant: whoever runs the network may give another.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rewrite.ir.edit import constant_of
from rewrite.ir.weights import Weight, weight_of

VECTOR = 1 << 16
"""Elements up to which a constant is read to decide something about it (γ, β, axes, shapes; no matrix)."""


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` always holds one known tensor."""
    return constant_of(value) is not None


def is_overridable(value: ir.Value) -> bool:
    """Whether `value` has a default that a caller may replace."""
    return value.is_initializer() and value.is_graph_input()


def weight_behind(value: ir.Value) -> Weight:
    """The expression of a constant."""
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is not a constant")
    return weight_of(tensor)


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """The exact float64 numbers of a constant vector (at most `VECTOR` elements), before any rounding; or None."""
    tensor = constant_of(value)
    if tensor is None or tensor.size > VECTOR:
        return None
    return weight_of(tensor).numpy()


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The integers a small constant holds, flattened, or None."""
    tensor = constant_of(value)
    if tensor is None or tensor.size > VECTOR or not tensor.dtype.is_integer():
        return None
    return tuple(int(number) for number in tensor.numpy().reshape(-1))


def uniform(value: ir.Value | None) -> float | None:
    """The number that every element of a constant vector is, or None.

    Equality is exact: γ = (1, 1, 1 + 2⁻²³) is not uniform.
    """
    array = numbers(value)
    if array is None or array.size == 0:
        return None
    first = float(array.flat[0])
    return first if bool((array == first).all()) else None
