"""Entries of products of constants, exactly, in rational numbers.

Where the constants of a sum cancel, float64 may hold no digit of what is left. Stored numbers are rational, and so are
their sums, products and means, the reciprocals of a scaling and the choice of channels. An entry is computed from one
row of what stands before the last matrix and one column of what stands behind it, so that few numbers are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from rewrite.proof.chains import Centre, Chain, Diagonal, Exact, Factor, Matrix, Mean, Spread, constants_of
from rewrite.proof.transforms import Reciprocal, Scaling, Selection

Numbers = tuple[int, list[Fraction]]
"""Some entries of a vector, and where they begin; the others are 0."""


def cost(chain: Chain) -> int | None:
    """How many multiplications one entry takes in rational numbers; None where a map is irrational."""
    rational = Matrix | Diagonal | Centre | Mean | Spread
    exact = Scaling | Reciprocal | Selection
    if not all(isinstance(f.transform if isinstance(f, Exact) else f, rational | exact) for f in chain.body):
        return None
    last = max((index for index, factor in enumerate(chain.body) if isinstance(factor, Matrix)), default=0)
    steps, length, behind = len(chain.body) + 1, 1, 1
    for factor in chain.body[:last]:
        size = 1 if _is_diagonal(factor) else Chain((factor,)).sizes()[1] or 1
        steps += length * size
        length = length if _is_diagonal(factor) else size
    for factor in chain.body[last + 1 :]:
        behind = max(behind, 1 if _is_diagonal(factor) else max(n or 1 for n in Chain((factor,)).sizes()))
    return steps + length * behind


def computed_in(chain: Chain) -> tuple[tuple[str, int], ...]:
    """The constants in a product that were computed, and how often their numbers were rounded."""
    return tuple(sorted((repr(c.key), c.roundings) for c in constants_of(chain.body) if c.roundings))


def _is_diagonal(factor: Factor) -> bool:
    return isinstance(factor, Diagonal) or (isinstance(factor, Exact) and not isinstance(factor.transform, Selection))


def entry(chains: Sequence[Chain], row: int, column: int) -> Fraction:
    """One entry of a sum of products, exactly: a row of what is before the last matrix, a column of what is behind."""
    total = Fraction(0)
    for chain in chains:
        last = max(
            (index for index, factor in enumerate(chain.body) if isinstance(factor, Matrix)), default=len(chain.body)
        )
        front: Numbers = (row, [Fraction(chain.scalar.value)])
        behind: Numbers = (column, [Fraction(1)])
        for factor in chain.body[:last]:
            front = _row_times(front, factor)
        for factor in reversed(chain.body[last + 1 :]):
            behind = _times_column(factor, behind)
        if last < len(chain.body):
            front = _row_times(front, chain.body[last], slice(behind[0], behind[0] + len(behind[1])))
        (start, numbers), (other, known) = front, behind
        inside = range(max(start, other), min(start + len(numbers), other + len(known)))
        total += sum((numbers[i - start] * known[i - other] for i in inside), Fraction(0))
    return total


def _row_times(numbers: Numbers, factor: Factor, taken: slice | None = None) -> Numbers:
    """A row vector times `factor`; of a matrix only the columns `taken`."""
    start, row = numbers
    stop = start + len(row)
    if isinstance(factor, Diagonal):
        own = factor.constant.read((slice(start, stop),))
        return start, [number * Fraction(float(each)) for number, each in zip(row, own)]
    if isinstance(factor, Matrix):
        taken = taken or slice(0, factor.constant.shape[1])
        columns = factor.constant.read((slice(start, stop), taken)).T
        return taken.start, [_dot(row, column) for column in columns]
    if isinstance(factor, Spread):
        return 0, row * factor.size
    if isinstance(factor, Exact):
        transform = factor.transform
        if isinstance(transform, Selection):
            return 0, [row[i - start] if start <= i < stop else Fraction(0) for i in transform.indices]
        if isinstance(transform, Scaling):
            return start, [n * Fraction(float(each)) for n, each in zip(row, transform.values[start:stop])]
        if isinstance(transform, Reciprocal):
            return start, [n / Fraction(float(each)) for n, each in zip(row, transform.scaling.values[start:stop])]
    if not isinstance(factor, Mean | Centre):
        raise ValueError("a map that is not rational")
    mean = sum(row, Fraction(0)) / factor.size
    return (0, [mean]) if isinstance(factor, Mean) else (0, _centred(numbers, factor.size, mean))


def _times_column(factor: Factor, numbers: Numbers) -> Numbers:
    """`factor` times a column vector."""
    start, column = numbers
    if isinstance(factor, Centre) or _is_diagonal(factor):
        return _row_times(numbers, factor)
    if isinstance(factor, Exact) and isinstance(factor.transform, Selection):
        spread = [Fraction(0)] * factor.transform.size
        for number, place in zip(column, factor.transform.indices[start : start + len(column)]):
            spread[place] += number
        return 0, spread
    if isinstance(factor, Spread):
        return 0, [sum(column, Fraction(0))]
    if not isinstance(factor, Mean):
        raise ValueError("a map that is not rational")
    return 0, [column[0] / factor.size] * factor.size


def _centred(numbers: Numbers, size: int, mean: Fraction) -> list[Fraction]:
    start, known = numbers
    return [(known[i - start] if 0 <= i - start < len(known) else Fraction(0)) - mean for i in range(size)]


def _dot(numbers: Sequence[Fraction], others: np.ndarray) -> Fraction:
    return sum((number * Fraction(float(other)) for number, other in zip(numbers, others)), Fraction(0))
