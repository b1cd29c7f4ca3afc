"""Linear maps of channels: products of constants, kept as factors.

A `Chain` is a product of `Factor`s that acts from the right on one axis (row vectors, x ↦ x·F₁·F₂·…).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rewrite.proof.constants import (
    Array,
    Constant,
    reshaped,
    sliced,
    sources,
)
from rewrite.proof.demands import SHIPPED, Demand, as_shipped
from rewrite.proof.transforms import (
    Copied,
    Isometry,
    LeftInverse,
    Orthogonal,
    Reciprocal,
    Repeated,
    Scaling,
    Selection,
    Transform,
    kronecker,
)

UNIT = 2.0**-53
"""Unit roundoff of float64."""


SMALLEST = 2.0**-1022
"""The smallest number that float64 holds with all its digits."""


SINGLE_ULP = 2.0**-23
"""Relative spacing of float32, in which attributes and an operator's defining constants are written out."""


@dataclass(frozen=True)
class Matrix:
    """x ↦ x·C for a constant C (k, n)."""

    constant: Constant

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return ("matrix", self.constant.key)


@dataclass(frozen=True)
class Diagonal:
    """x ↦ x ⊙ c for a constant c (n,)."""

    constant: Constant

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return ("diagonal", self.constant.key)


@dataclass(frozen=True)
class Scalar:
    """x ↦ value·x.

    `origins` are the rewritten graph's shipped numbers that made the value, each with its power, as often as it did.
    `epsilon` is the relative spacing of what wrote them down, of the finest where there are several; 0 for a number
    that the structure implies (a count, the −1 of Sub). `defined` is that of a number which an operator's definition
    holds, and nobody wrote. What is `fixed` is a sum of shipped numbers, of which none has a share to be adjusted.
    """

    value: float
    origins: tuple[tuple[str, int], ...] = ()
    epsilon: float = 0.0
    defined: float = 0.0
    fixed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.origins)

    def times(self, other: Scalar) -> Scalar:
        """The product of both numbers."""
        written = [each.epsilon for each in (self, other) if each.origins]
        value = self.value * other.value
        if self.value and other.value and not SMALLEST <= abs(value) < math.inf:
            raise ValueError(f"numbers whose product {value} float64 does not hold")
        return Scalar(
            value,
            tuple(sorted((*self.origins, *other.origins))),
            min(written, default=0.0),
            max(self.defined, other.defined),
            self.fixed or other.fixed,
        )

    def summed(self, other: Scalar) -> Scalar:
        """The sum of both numbers."""
        origins = tuple(sorted((*self.origins, *other.origins)))
        return Scalar(self.value + other.value, origins, fixed=True)

    @property
    def key(self) -> tuple[Any, ...]:
        return ("scalar", self.value)


@dataclass(frozen=True)
class Centre:
    """x ↦ x·(I − 11ᵀ/d)."""

    size: int

    @property
    def key(self) -> tuple[Any, ...]:
        return ("centre", self.size)


@dataclass(frozen=True)
class Mean:
    """x ↦ x·1/d, from d channels to one."""

    size: int

    @property
    def key(self) -> tuple[Any, ...]:
        return ("mean", self.size)


@dataclass(frozen=True)
class Spread:
    """x ↦ x·1ᵀ, from one channel to d."""

    size: int

    @property
    def key(self) -> tuple[Any, ...]:
        return ("spread", self.size)


@dataclass(frozen=True)
class Exact:
    """x ↦ x·T for a transform that is exactly what it says, and no constant of either graph."""

    transform: Transform

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return ("exact", self.transform.key)

    @property
    def fitted(self) -> bool:
        """Whether the transform was found from rounded weights."""
        inner = self.transform.inner if isinstance(self.transform, Repeated) else self.transform
        return isinstance(inner, Orthogonal) and inner.fitted

    def undoes(self, other: Factor | None) -> bool:
        """Whether this map after `other` is no map at all."""
        if not isinstance(other, Exact) or isinstance(other.transform, Isometry | LeftInverse):
            return False
        try:
            return other.transform.inverse == self.transform
        except ValueError:
            return False

    def select(self, start: int, stop: int) -> Exact | None:
        """The map of the channels [start, stop) alone; None where it mixes them with others."""
        if isinstance(self.transform, Reciprocal):
            return Exact(Scaling(self.transform.scaling.values[start:stop]).inverse)
        values = diagonal_of(self.transform)
        return None if values is None else Exact(Scaling(values[start:stop]))


def diagonal_of(transform: Transform) -> np.ndarray | None:
    """The vector that a diagonal map multiplies by (in float64: a reciprocal is rounded); None for other maps."""
    if isinstance(transform, Scaling):
        return transform.values
    if isinstance(transform, Reciprocal):
        return 1.0 / transform.scaling.values
    if isinstance(transform, Repeated):
        inner = diagonal_of(transform.inner)
        return None if inner is None else np.tile(np.repeat(inner, transform.right), transform.left)
    return None


def uniform_of(transform: Transform) -> float | None:
    """The power of two by which a map multiplies all channels alike: products of such numbers are exact."""
    if not isinstance(transform, Scaling | Reciprocal):
        return None
    values = transform.values if isinstance(transform, Scaling) else transform.scaling.values
    first = float(values[0])
    if abs(math.frexp(first)[0]) != 0.5 or (values != first).any():
        return None
    return first if isinstance(transform, Scaling) else 1.0 / first


Factor = Matrix | Diagonal | Scalar | Centre | Mean | Spread | Exact


@dataclass(frozen=True)
class Chain:
    """A product of factors, in the order they act. At most one Scalar, in front.

    >>> Chain().then(Centre(4)).then(Centre(4)).factors
    (Centre(size=4),)
    >>> Chain().then(Spread(4)).then(Centre(4)) is None
    True
    """

    factors: tuple[Factor, ...] = ()

    @cached_property
    def key(self) -> tuple[Any, ...]:
        return tuple(factor.key for factor in self.factors)

    @cached_property
    def order(self) -> str:
        return repr(self.key)

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and self.key == other.key

    @property
    def scalar(self) -> Scalar:
        return self.factors[0] if self.factors and isinstance(self.factors[0], Scalar) else Scalar(1.0)

    @property
    def body(self) -> tuple[Factor, ...]:
        """The factors behind the scalar."""
        return self.factors[1:] if self.factors and isinstance(self.factors[0], Scalar) else self.factors

    def scaled(self, scalar: Scalar) -> Chain | None:
        """Times a number; None is the zero map."""
        own = self.scalar
        total = own.times(scalar)
        # A shipped number is kept even where it is 0 or 1 and changes nothing: it is a use, and holds it to its value.
        if total.value == 0.0 and not total.origins:
            return None
        return Chain(self.body) if total.value == 1.0 and not total.origins else Chain((total, *self.body))

    def then(self, factor: Factor) -> Chain | None:
        """This map followed by `factor`; None is the zero map."""
        if isinstance(factor, Scalar):
            return self.scaled(factor)
        last = self.factors[-1] if self.body else None
        if isinstance(factor, Centre):
            if isinstance(last, Spread):
                return None
            if isinstance(last, Centre):
                return self
        if isinstance(factor, Mean):
            if isinstance(last, Centre):
                return None
            if isinstance(last, Spread):
                return Chain(self.factors[:-1])
        if isinstance(last, Exact) and (number := uniform_of(last.transform)) is not None:
            return self._before(number, factor)
        if isinstance(factor, Exact):
            if not _is_map(factor):
                return self
            if factor.undoes(last):
                return Chain(self.factors[:-1])
            if isinstance(last, Exact) and (both := kronecker(last.transform, factor.transform)) is not None:
                return Chain((*self.factors[:-1], Exact(both)))
            if isinstance(factor.transform, Selection) and last is not None:
                selected = self._taken(factor.transform, last)
                if selected is not self:
                    return selected
            if isinstance(factor.transform, Isometry) and isinstance(last, Centre):
                # An isometry onto the centred vectors does not see the mean.
                return Chain((*self.factors[:-1], factor))
        return Chain((*self.factors, factor))

    def _taken(self, selection: Selection, last: Factor) -> Chain | None:
        """The channels that a selection takes of what was copied, or of a small constant; else this map."""
        front, taken = self.factors[:-1], list(selection.indices)
        if isinstance(last, Exact) and isinstance(copied := last.transform, Copied):
            sources = tuple(copied.sources[channel] for channel in taken)
            factors = copied.factors[taken]
            if sources == tuple(range(copied.size)) and (factors == 1.0).all():
                return Chain(front)
            return Chain((*front, Exact(Copied(copied.size, sources, factors))))
        if isinstance(last, Matrix) and last.constant.stored is None and last.constant.shape[0] == 1:
            values = last.constant.whole()[:, taken]
            return Chain((*front, Matrix(Array(values)))) if values.any() else None
        return self

    def _before(self, number: float, factor: Factor) -> Chain | None:
        """This map, which ends in one number for all channels, followed by `factor`: the number stays behind."""
        inner = Chain(self.factors[:-1]).then(factor)
        size = Chain((factor,)).sizes()[1]
        if inner is None or size is None:
            return inner
        last = inner.factors[-1] if inner.body else None
        other = uniform_of(last.transform) if isinstance(last, Exact) else None
        if other is not None:
            inner, number = Chain(inner.factors[:-1]), number * other
        return inner if number == 1.0 else Chain((*inner.factors, Exact(Scaling(np.full(size, number)))))

    def select(self, start: int, stop: int) -> Chain | None:
        """Only the output channels [start, stop): moved into the constants; None where a factor mixes channels."""
        selected: list[Factor] = []
        for index, factor in reversed(list(enumerate(self.factors))):
            if isinstance(factor, Matrix):
                rows = factor.constant.shape[0]
                selected.append(Matrix(sliced(factor.constant, (slice(0, rows), slice(start, stop)))))
                return Chain((*self.factors[:index], *reversed(selected)))
            if isinstance(factor, Diagonal):
                selected.append(Diagonal(sliced(factor.constant, (slice(start, stop),))))
            elif isinstance(factor, Spread):
                selected.append(Spread(stop - start))
                return Chain((*self.factors[:index], *reversed(selected)))
            elif isinstance(factor, Exact) and (part := factor.select(start, stop)) is not None:
                selected += [part] if _is_map(part) else []
            else:
                return None
        return None

    def select_digits(self, left: int, count: int, right: int, start: int, stop: int) -> Chain | None:
        """Of channels (left, count, right), row-major, only those whose middle digit is in [start, stop)."""
        if left == 1:
            return self.select(start * right, stop * right)
        selected: list[Factor] = []
        for index, factor in reversed(list(enumerate(self.factors))):
            if isinstance(factor, Matrix):
                selected.append(Matrix(_digits(factor.constant, left, count, right, start, stop)))
                return Chain((*self.factors[:index], *reversed(selected)))
            if isinstance(factor, Diagonal):
                selected.append(Diagonal(_digits(factor.constant, left, count, right, start, stop)))
            elif isinstance(factor, Exact) and isinstance(scaling := factor.transform, Scaling | Reciprocal):
                values = scaling.values if isinstance(scaling, Scaling) else scaling.scaling.values
                part = Scaling(values.reshape(left, count, right)[:, start:stop].reshape(-1))
                part = Exact(part if isinstance(scaling, Scaling) else part.inverse)
                selected += [part] if _is_map(part) else []
            else:
                return None
        return None

    @property
    def diagonal_only(self) -> bool:
        return all(isinstance(factor, Scalar | Diagonal) for factor in self.factors)

    def sizes(self) -> tuple[int | None, int | None]:
        """Input and output channels as the factors tell them; None where they do not (a scalar)."""
        ends: list[tuple[int, int]] = []
        for factor in self.body:
            if isinstance(factor, Matrix):
                ends.append((factor.constant.shape[0], factor.constant.shape[1]))
            elif isinstance(factor, Diagonal):
                ends.append((factor.constant.shape[0], factor.constant.shape[0]))
            elif isinstance(factor, Centre):
                ends.append((factor.size, factor.size))
            elif isinstance(factor, Mean):
                ends.append((factor.size, 1))
            elif isinstance(factor, Spread):
                ends.append((1, factor.size))
            elif isinstance(factor, Exact):
                ends.append((factor.transform.size, factor.transform.width))
        return (ends[0][0], ends[-1][1]) if ends else (None, None)


def _is_map(factor: Exact) -> bool:
    """Whether a diagonal is more than the identity."""
    values = diagonal_of(factor.transform)
    return values is None or bool((values != 1.0).any())


def _digits(constant: Constant, left: int, count: int, right: int, start: int, stop: int) -> Constant:
    """Columns of a constant by the middle digit of their number."""
    outer = constant.shape[:-1]
    cut = reshaped(constant, (*outer, left, count, right))
    taken = (*(slice(0, n) for n in outer), slice(0, left), slice(start, stop), slice(0, right))
    return reshaped(sliced(cut, taken), (*outer, left * (stop - start) * right))


def constants_of(factors: Iterable[Factor]) -> list[Constant]:
    return [factor.constant for factor in factors if isinstance(factor, Matrix | Diagonal)]


def shipped(factors: Sequence[Factor]) -> frozenset[Demand]:
    """The demands of using factors' rewritten constants, or the slices of them that are used, exactly as they are."""
    demands = {
        as_shipped(stored.name, constant)
        for constant in constants_of(factors)
        for stored in sources(constant)
        if stored.side == "rewritten"
    }
    demands.update(
        Demand(name, (), SHIPPED) for factor in factors if isinstance(factor, Scalar) for name in factor.names
    )
    return frozenset(demands)


def joined(scalar: Scalar, body: Sequence[Factor]) -> Chain:
    return Chain((scalar, *body)) if scalar != Scalar(1.0) else Chain(tuple(body))
