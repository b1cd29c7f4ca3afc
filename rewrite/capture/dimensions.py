"""What small integer tensors hold, symbolically: the shape arithmetic of a graph without running it.

An element is an int, a monomial in named dimensions (`batch`, `16*sequence`), or None where it is unknown. Monomials
are enough to prove that a Reshape keeps an axis; sums stay unknown, and their nodes stay in the graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

LIMIT = 64
"""The longest tensor whose elements are followed."""

FACTORS = re.compile(r"\w+(\s*\*\s*\w+)*")


@dataclass(frozen=True)
class Monomial:
    """`coefficient` times the dimensions in `names` (sorted, repeated for powers; never empty)."""

    coefficient: int
    names: tuple[str, ...]


Element = int | Monomial | None


def dimension(dim: int | ir.SymbolicDim) -> Element:
    """The element that `Shape` gives for an axis.

    >>> dimension(ir.SymbolicDim("batch*sequence"))
    Monomial(coefficient=1, names=('batch', 'sequence'))
    >>> dimension(ir.SymbolicDim("sequence - 1"))
    Monomial(coefficient=1, names=('(sequence - 1)',))
    """
    if isinstance(dim, int):
        return dim
    if not dim.value:
        return None
    if not FACTORS.fullmatch(dim.value):
        return Monomial(1, (f"({dim.value})",))
    return product([int(f) if f.isdigit() else Monomial(1, (f,)) for f in re.split(r"\s*\*\s*", dim.value)])


def product(elements: Sequence[Element]) -> Element:
    """The product, unknown if a factor is (unless another is zero).

    >>> product([2, Monomial(3, ("batch",))])
    Monomial(coefficient=6, names=('batch',))
    """
    if any(element == 0 for element in elements):
        return 0
    coefficient, names = 1, []
    for element in elements:
        if element is None:
            return None
        if isinstance(element, int):
            coefficient *= element
        else:
            coefficient *= element.coefficient
            names += element.names
    return Monomial(coefficient, tuple(sorted(names))) if names else coefficient


class Contents:
    """The elements of integer values of rank 0 or 1, worked out on demand and remembered."""

    def __init__(self) -> None:
        self.known: dict[ir.Value, tuple[Element, ...] | None] = {}

    def of(self, value: ir.Value | None) -> tuple[Element, ...] | None:
        """The elements of `value` in order, or None where it is no small integer vector or scalar."""
        if value is None:
            return None
        if value not in self.known:
            self.known[value] = None
            self.known[value] = self._of(value)
        return self.known[value]

    def _of(self, value: ir.Value) -> tuple[Element, ...] | None:
        if value.const_value is not None and not value.is_graph_input():
            tensor = value.const_value
            if tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > LIMIT:
                return None
            if len(tensor.shape) > 1:
                return None
            return tuple(int(element) for element in np.ravel(tensor.numpy()))
        node = value.producer()
        rule = RULES.get(node.op_type) if node is not None and node.domain == "" else None
        return rule(node, self) if rule is not None else None


def _shape(node: ir.Node, _: Contents) -> tuple[Element, ...] | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    start = node.attributes.get_int("start", 0)
    end = node.attributes.get_int("end", len(shape))
    return tuple(dimension(dim) for dim in list(shape)[start:end])


def _size(node: ir.Node, _: Contents) -> tuple[Element, ...] | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return None if shape is None else (product([dimension(dim) for dim in shape]),)


def _unchanged(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    """Reshape, Squeeze and Unsqueeze keep the order; their results matter only where they are scalars or vectors."""
    rank = len(node.outputs[0].shape) if node.outputs[0].shape is not None else None
    if rank is not None and rank > 1:
        return None
    return contents.of(node.inputs[0])


def _cast(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    wide = node.attributes.get_int("to") in (ir.DataType.INT64, ir.DataType.INT32)
    return contents.of(node.inputs[0]) if wide else None


def _concat(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    parts = [contents.of(value) for value in node.inputs]
    if any(part is None for part in parts):
        return None
    return tuple(element for part in parts if part is not None for element in part)


def _gather(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    data, indices = contents.of(node.inputs[0]), contents.of(node.inputs[1])
    if data is None or indices is None or not all(isinstance(i, int) for i in indices):
        return None
    return tuple(data[i] for i in indices if isinstance(i, int) and -len(data) <= i < len(data))


def _slice(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    data = contents.of(node.inputs[0])
    bounds = [contents.of(value) for value in node.inputs[1:]]
    if data is None or len(bounds) < 2:
        return None
    step = bounds[3] if len(bounds) > 3 else (1,)
    start, stop = bounds[0], bounds[1]
    if start is None or stop is None or step is None or len(start) != 1:
        return None
    if not (isinstance(start[0], int) and isinstance(stop[0], int) and isinstance(step[0], int)):
        return None
    return tuple(data[start[0] : stop[0] : step[0]]) if step[0] > 0 else None


def _arithmetic(node: ir.Node, contents: Contents) -> tuple[Element, ...] | None:
    left, right = contents.of(node.inputs[0]), contents.of(node.inputs[1])
    if left is None or right is None:
        return None
    length = max(len(left), len(right))
    if len(left) not in (1, length) or len(right) not in (1, length):
        return None
    left, right = left * (length // len(left) or 1), right * (length // len(right) or 1)
    return tuple(_element(node.op_type, a, b) for a, b in zip(left, right))


def _element(operator: str, a: Element, b: Element) -> Element:
    if operator == "Mul":
        return product([a, b])
    if operator == "Div" and isinstance(b, int) and b > 0:
        if isinstance(a, int) and a >= 0:
            return a // b
        if isinstance(a, Monomial) and a.coefficient % b == 0:
            return product([a.coefficient // b, Monomial(1, a.names)])
    if operator == "Div" and isinstance(a, Monomial) and isinstance(b, Monomial):
        return _quotient(a, b)
    if isinstance(a, int) and isinstance(b, int) and operator in ("Add", "Sub"):
        return a + b if operator == "Add" else a - b
    if b == 0 and operator in ("Add", "Sub"):
        return a
    return b if a == 0 and operator == "Add" else None


def _quotient(a: Monomial, b: Monomial) -> Element:
    """`a / b` where it comes out even: a dimension divided by itself is one, as no dimension is zero."""
    names = list(a.names)
    for name in b.names:
        if name not in names:
            return None
        names.remove(name)
    if a.coefficient % b.coefficient:
        return None
    quotient = a.coefficient // b.coefficient
    return Monomial(quotient, tuple(names)) if names else quotient


RULES = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _unchanged,
    "Reshape": _unchanged,
    "Squeeze": _unchanged,
    "Unsqueeze": _unchanged,
    "Cast": _cast,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Add": _arithmetic,
    "Sub": _arithmetic,
    "Mul": _arithmetic,
    "Div": _arithmetic,
}
