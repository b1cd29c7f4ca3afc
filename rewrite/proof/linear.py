"""Products of constants: kept as factors, compared as matrices.

A `Chain` is a product of `Factor`s that acts from the right on one axis (row vectors, x ↦ x·F₁·F₂·…). Two chains, one
of each graph, are the same linear map when, after equal factors are cancelled at both ends, one shipped constant
remains that can be given an exact value: the product of what remains of the original. `compare` finds that value,
bounds the float64 error of computing it, and measures how far the shipped constant is from it.

    x ↦ x·A·(diag(γ)·W·P)·B    against    x ↦ x·A·W′·B          Ŵ = diag(γ)·W·P
    ─────────────────────────────────────────────────────
                equal if |W′ − Ŵ| ≤ 1 ulp everywhere
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain as chain_iterables
from typing import Any

import numpy as np

from rewrite.proof.constants import (
    Array,
    Constant,
    Region,
    Sliced,
    Stored,
    permuted,
    reshaped,
    same_values,
    sliced,
    sources,
)
from rewrite.proof.demands import SHIPPED, Columns, Demand, columns_of
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
)  # fmt: skip

UNIT = 2.0**-53
"""Unit roundoff of float64."""

READ_ELEMENTS, CACHED_ELEMENTS = 1 << 20, 1 << 15
"""Entries read from a file at a time, and entries computed with at a time (256 KiB of float64)."""

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
        return Scalar(
            self.value * other.value,
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


@dataclass
class Block:
    """Some rows of a product: `value`, a bound `error` (in units of 2⁻⁵³), and `largest`, the largest term summed.

    As long as nothing was summed the error is a number of `roundings` of the value, and the value is its only term.
    """

    value: np.ndarray
    roundings: int = 0
    summed: np.ndarray | None = None
    terms: np.ndarray | None = None

    @property
    def error(self) -> np.ndarray:
        own = self.roundings * np.abs(self.value)
        return own if self.summed is None else own + self.summed

    @property
    def largest(self) -> np.ndarray:
        return np.abs(self.value) if self.terms is None else self.terms

    def scaled(self, factor: np.ndarray | float) -> Block:
        magnitude = None if self.summed is None and self.terms is None else np.abs(factor)
        return Block(
            self.value * factor,
            self.roundings + 1,
            None if self.summed is None else self.summed * magnitude,
            None if self.terms is None else self.terms * magnitude,
        )

    def __add__(self, other: Block) -> Block:
        return Block(self.value + other.value, 1, self.error + other.error, np.maximum(self.largest, other.largest))


def exact(value: np.ndarray) -> Block:
    return Block(value)


def rows(factors: Sequence[Factor], taken: slice, size: int) -> Block:
    """Rows `taken` of the matrix that the product of `factors` is; `size` is its number of rows."""
    if not factors:
        return exact(np.eye(size)[taken])
    head, rest = factors[0], factors[1:]
    if isinstance(head, Scalar):
        return rows(rest, taken, size).scaled(head.value)
    if isinstance(head, Diagonal):
        return rows(rest, taken, size).scaled(head.constant.read((taken,))[:, None])
    if isinstance(head, Centre):
        return centred(rows(rest, slice(0, size), size), axis=0, taken=taken)
    if isinstance(head, Exact) and (values := diagonal_of(head.transform)) is not None:
        # The reciprocal of a number was rounded before it multiplies.
        block = rows(rest, taken, size).scaled(values[taken, None])
        return replace(block, roundings=block.roundings + 1)
    if isinstance(head, Exact) and rest:
        width = head.transform.width
        return transformed(rows(rest, slice(0, width), width), head.transform, taken)
    if isinstance(head, Exact):
        return followed(exact(np.eye(size)[taken]), head)
    if isinstance(head, Matrix):
        block = exact(head.constant.read((taken, slice(0, head.constant.shape[1]))))
    elif isinstance(head, Mean):
        block = Block(np.full((taken.stop - taken.start, 1), 1.0 / head.size), roundings=1)
    else:
        block = exact(np.ones((1, head.size)))
    for factor in rest:
        block = followed(block, factor)
    return block


def centred(block: Block, axis: int, taken: slice = slice(None)) -> Block:
    """`block` minus its mean along `axis`. Pairwise summation of n terms is off by at most (log₂n + 2)·2⁻⁵³·mean|x|."""
    count = block.value.shape[axis]
    mean = block.value.mean(axis=axis, keepdims=True)
    slack = (np.log2(max(count, 2)) + 2) * np.abs(block.value).mean(axis=axis, keepdims=True)
    slack = slack + block.error.mean(axis=axis, keepdims=True)
    index = (taken, slice(None)) if axis == 0 else (slice(None), taken)
    value = block.value[index] - mean
    return Block(value, 1, block.error[index] + slack, np.maximum(block.largest[index], np.abs(mean)))


def transformed(block: Block, transform: Transform, taken: slice | None = None) -> Block:
    """`block` times an exact transform: from the right, or T·block where `taken` says which rows of that."""
    if taken is None:
        value, absolute = transform.apply(block.value, -1), lambda x: transform.absolute(x, -1)
    else:
        value, absolute = transform.from_left(block.value), transform.absolute_left
    magnitude = absolute(np.abs(block.value))
    # `error` and `largest` of the block broadcast to its value, and an axis of size 1 is not summed over.
    inexact = absolute(np.broadcast_to(block.error, block.value.shape)) if np.any(block.error) else 0.0
    summed = inexact + transform.roundings * magnitude
    # The size of a term: its mean; of a fitted orthogonal map, whose own rounding is in every entry, that of an entry.
    if Exact(transform).fitted:
        mean = magnitude / math.sqrt(transform.size)
    else:
        terms = transform.terms if taken is None else transform.terms_left
        mean = terms(np.abs(block.value)) / transform.size
    if taken is not None:
        value = value[taken]
        summed, mean = (part[taken] if np.shape(part)[0] != 1 else part for part in (summed, mean))
    return Block(value, 0, summed, mean)


def followed(block: Block, factor: Factor) -> Block:
    """`block` times `factor` from the right."""
    if isinstance(factor, Exact):
        return transformed(block, factor.transform)
    if isinstance(factor, Scalar):
        return block.scaled(factor.value)
    if isinstance(factor, Diagonal):
        return block.scaled(factor.constant.whole()[None, :])
    if isinstance(factor, Centre):
        return centred(block, axis=1)
    if isinstance(factor, Mean):
        count = block.value.shape[1]
        magnitude = np.abs(block.value).mean(axis=1, keepdims=True)
        error = block.error.mean(axis=1, keepdims=True) + (np.log2(max(count, 2)) + 2) * magnitude
        return Block(block.value.mean(axis=1, keepdims=True), 0, error, magnitude)
    if isinstance(factor, Spread):
        value, error, largest = (np.repeat(p, factor.size, axis=1) for p in (block.value, block.error, block.largest))
        return Block(value, 0, error, largest)
    inner, outer = factor.constant.shape
    value = np.zeros((block.value.shape[0], outer))
    error, magnitude = np.zeros_like(value), np.zeros_like(value)
    inexact = block.error
    step = max(1, (1 << 22) // max(1, outer))
    for start in range(0, inner, step):
        part = slice(start, min(start + step, inner))
        matrix = factor.constant.read((part, slice(0, outer)))
        value += block.value[:, part] @ matrix
        size = np.abs(matrix)
        magnitude += np.abs(block.value[:, part]) @ size
        error += inexact[:, part] @ size
    # A dot product of n terms in any order is off by at most n·2⁻⁵³·Σ|terms| (Higham 2002, §3.1).
    return Block(value, 0, error + (inner + 1) * magnitude, magnitude / inner)


# ── Comparison ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Match:
    """Two maps are the same: within `ulps`, if the `demands` on shipped constants are met."""

    ulps: float = 0.0
    demands: frozenset[Demand] = frozenset()
    solutions: tuple[tuple[tuple[Any, ...], Chain], ...] = ()
    """Matrices, by their key, and the products of the original that the demands make them."""

    def __add__(self, other: Match) -> Match:
        return Match(max(self.ulps, other.ulps), self.demands | other.demands, self.solutions + other.solutions)


@dataclass(frozen=True)
class Mismatch:
    """Two maps are not shown to be the same, and why; `ulps` is how far the nearest constant is off (0: no number)."""

    reason: str
    ulps: float = 0.0


Outcome = Match | Mismatch


def constants_of(factors: Iterable[Factor]) -> list[Constant]:
    return [factor.constant for factor in factors if isinstance(factor, Matrix | Diagonal)]


def shipped(factors: Sequence[Factor]) -> frozenset[Demand]:
    """The demands of using factors' rewritten constants exactly as they are."""
    names = {
        stored.name for constant in constants_of(factors) for stored in sources(constant) if stored.side == "rewritten"
    }
    names.update(name for factor in factors if isinstance(factor, Scalar) for name in factor.names)
    return frozenset(Demand(name, (), SHIPPED) for name in names)


class Comparer:
    """Compares linear maps of the rewritten graph with the original's; remembers every answer.

    `ulps` is how far a shipped constant may be from its exact value: 1, unless more was declared.
    """

    def __init__(self, ulps: float = 1.0) -> None:
        self.ulps = ulps
        self._same: dict[tuple[Any, Any], bool] = {}
        self._chains: dict[tuple[Any, ...], Outcome] = {}
        self._partner: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def same_constant(self, a: Constant, b: Constant) -> bool:
        if a.shape != b.shape:
            return False
        index = (a.key, b.key)
        if index not in self._same:
            # Equal layouts of equal tensors are equal; comparing the tensors themselves reads each of them once.
            inner_a, inner_b = a, b
            while type(inner_a) is type(inner_b) and hasattr(inner_a, "inner"):
                if inner_a.key[1:-1] != inner_b.key[1:-1] or isinstance(inner_a, Sliced):
                    break
                inner_a, inner_b = inner_a.inner, inner_b.inner  # type: ignore[attr-defined]
            self._same[index] = same_values(inner_a, inner_b)
        return self._same[index]

    def same_factor(self, a: Factor, b: Factor) -> bool:
        if isinstance(a, Matrix) and isinstance(b, Matrix):
            return self.same_constant(a.constant, b.constant)
        if isinstance(a, Diagonal) and isinstance(b, Diagonal):
            return self.same_constant(a.constant, b.constant)
        return type(a) is type(b) and a.key == b.key

    def compare(self, rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None) -> Outcome:
        """Whether two sums of chains are one map on `size` channels (None: unknown, only scalars occur).

        Chains are paired first, each rewritten one with an original one that it equals; what is left must agree as a
        sum with one shipped constant to adjust.
        """
        total, left, used = Match(), [], set()
        for chain in rewritten:
            if chain.scalar.value == 0.0:
                total = total + Match(0.0, shipped(chain.factors))
                continue
            index, outcome = self._pair(chain, original, used, size)
            if index is None:
                left.append(chain)
            else:
                used.add(index)
                total = total + outcome  # type: ignore[operator]
        rest = [c for index, c in enumerate(original) if index not in used and c.scalar.value != 0.0]
        if not left and not rest:
            return total
        if len(left) == 1 and len(rest) == 1:
            outcome = self._chain(left[0], rest[0], size)
        else:
            # A number in front of every chain is taken out, so that a sum asks for the same Ŵ wherever it occurs.
            numbers = {chain.scalar for chain in left}, {chain.scalar for chain in rest}
            cancelled = None
            if all(len(each) == 1 for each in numbers):
                cancelled = _cancel_scalars(*(next(iter(each)) for each in numbers))
            if cancelled is not None:
                total = total + cancelled
                left, rest = ([Chain(chain.body) for chain in chains] for chains in (left, rest))
            left, rest, behind = self._without_common_end(left, rest)
            total = total + behind
            outcome = self._sums(left, rest, size)
        return total + outcome if isinstance(outcome, Match) else outcome

    def _without_common_end(
        self, rewritten: Sequence[Chain], original: Sequence[Chain]
    ) -> tuple[Sequence[Chain], Sequence[Chain], Match]:
        """(A + B)·V against C·V is A + B against C: what all chains end in is left out, and is as it was shipped."""
        used: list[Factor] = []
        while all(len(chain.body) > 1 for chain in (*rewritten, *original)) and rewritten and original:
            ends = [chain.body[-1] for chain in (*rewritten, *original)]
            if not all(self.same_factor(ends[0], end) for end in ends[1:]):
                break
            used += [chain.body[-1] for chain in rewritten]
            rewritten, original = ([_joined(c.scalar, c.body[:-1]) for c in side] for side in (rewritten, original))
        return rewritten, original, Match(0.0, shipped(used))

    def _pair(
        self, chain: Chain, original: Sequence[Chain], used: set[int], size: int | None
    ) -> tuple[int | None, Outcome | None]:
        known = self._partner.get(chain.key)
        order = sorted(
            (index for index in range(len(original)) if index not in used),
            key=lambda index: original[index].key != known,
        )
        for index in order:
            outcome = self._chain(chain, original[index], size)
            if isinstance(outcome, Match):
                self._partner[chain.key] = original[index].key
                return index, outcome
        return None, None

    def _chain(self, rewritten: Chain, original: Chain, size: int | None) -> Outcome:
        index = (rewritten.key, rewritten.scalar, original.key, original.scalar)
        if index not in self._chains:
            self._chains[index] = self._compare_chain(rewritten, original, size)
        return self._chains[index]

    def _compare_chain(self, rewritten: Chain, original: Chain, size: int | None) -> Outcome:
        ends_r, ends_o = rewritten.sizes(), original.sizes()
        for a, b in zip(ends_r, ends_o):
            if a is not None and b is not None and a != b:
                return Mismatch(f"maps have {a} and {b} channels")
        first: Outcome | None = None
        # Cancelling is a guess: a zero bias equals its original before the original is centred. Without it, both
        # products are compared as they are.
        for prefix, suffix in ((True, True), (False, True), (False, False)):
            outcome = self._cancelled(rewritten, original, size, prefix, suffix)
            if isinstance(outcome, Match):
                return outcome
            first = first or outcome
        return first or Mismatch("maps differ")

    def _cancelled(self, rewritten: Chain, original: Chain, size: int | None, prefix: bool, suffix: bool) -> Outcome:
        """Compare after equal factors were cancelled in front (`prefix`) and behind (`suffix`)."""
        ours, theirs = list(rewritten.factors), list(original.factors)
        cancelled: list[Factor] = []
        numbers = _cancel_scalars(rewritten.scalar, original.scalar)
        if numbers is not None:
            ours, theirs = list(rewritten.body), list(original.body)
        while suffix and ours and theirs and self.same_factor(ours[-1], theirs[-1]):
            cancelled.append(ours.pop())
            theirs.pop()
        while prefix and numbers is not None and ours and theirs and self.same_factor(ours[0], theirs[0]):
            cancelled.append(ours.pop(0))
            theirs.pop(0)
        cancelling = (numbers or Match()) + Match(0.0, shipped(cancelled))
        if not ours and not theirs:
            return cancelling
        if all(isinstance(factor, Scalar) for factor in (*ours, *theirs)):
            outcome = compare_scalars(Chain(tuple(ours)).scalar, Chain(tuple(theirs)).scalar)
        else:
            inner = Chain(tuple(ours)).sizes()[0] or Chain(tuple(theirs)).sizes()[0] or size
            outcome = numeric([Chain(tuple(ours))], [Chain(tuple(theirs))], inner, self.ulps)
        return outcome + cancelling if isinstance(outcome, Match) else outcome

    def _sums(self, rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None) -> Outcome:
        index = tuple(tuple((c.key, c.scalar) for c in chains) for chains in (rewritten, original))
        if index not in self._chains:
            inner = next((n for c in (*rewritten, *original) if (n := c.sizes()[0]) is not None), size)
            self._chains[index] = numeric(rewritten, original, inner, self.ulps)
        return self._chains[index]


def _cancel_scalars(ours: Scalar, theirs: Scalar) -> Match | None:
    """Equal numbers in front cancel; so do two that were both written down and agree within an ulp."""
    if ours.value != theirs.value and 1.0 in (ours.value, theirs.value):
        return None
    outcome = compare_scalars(ours, theirs)
    return outcome if isinstance(outcome, Match) else None


def compare_scalars(ours: Scalar, theirs: Scalar) -> Outcome:
    """Numbers that are equal, or within an ulp of what wrote ours down; only one written once can be adjusted."""
    if ours.value == theirs.value:
        return Match(0.0, shipped((ours,)))
    if not (math.isfinite(ours.value) and math.isfinite(theirs.value)):
        return Mismatch(f"{ours.value!r} is no real number")
    distance = abs(ours.value - theirs.value)
    # What the arithmetic on both numbers in float64 may have lost; it is nobody's to adjust.
    if distance <= 4 * UNIT * abs(theirs.value) and not ours.origins:
        return Match()
    if ours.defined and not theirs.defined:
        # An operator's own number against one that was written out.
        ulps = distance / (unit_at(theirs.value, ours.defined) or distance / 2.0**60)
        if ulps <= 1.0:
            return Match(ulps, shipped((ours,)))
    ulps = distance / (unit_at(theirs.value, ours.epsilon) or distance / 2.0**60)
    if len(ours.origins) > 1 and theirs.value and ours.epsilon:
        # One of several numbers is adjusted, by as much relatively: half a spacing is an ulp of it, wherever it lies.
        ulps = 2.0 * distance / (abs(theirs.value) * ours.epsilon)
    if ulps > 1.0 or ours.fixed or not ours.origins or len(set(ours.names)) < len(ours.names):
        return Mismatch(f"scalars {ours.value!r} and {theirs.value!r} differ", ulps)
    name, power = ours.origins[-1]
    held = shipped([Scalar(1.0, ours.origins[:-1])])
    return Match(ulps, held | {Demand(name, (), ("number", theirs.value, ours.value, power))})


def unit_at(value: float, epsilon: float) -> float:
    """One unit in the last place at `value` of a format with relative spacing `epsilon`."""
    return 0.0 if value == 0.0 else 2.0 ** math.floor(math.log2(abs(value))) * epsilon


def numeric(rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None, ulps: float = 1.0) -> Outcome:
    """Compare two sums of chains as matrices, block by block, adjusting one shipped constant.

    The adjustable constant W′ is the largest rewritten one that only diagonal factors surround; for it
    |A|·ulp(W′)·|B| is what one ulp of it is worth in the product, and `ulps` of them are allowed.
    """
    if size is None:
        return Mismatch("maps of unknown size")
    # What a claim or a solved matrix put on our side is made of nothing that was shipped: A + B = C is A = C − B.
    exact_ones = [chain for chain in rewritten if not shipped(chain.factors)]
    if len(exact_ones) < len(rewritten):
        negated = [minus for chain in exact_ones if (minus := chain.scaled(Scalar(-1.0))) is not None]
        rewritten = [chain for chain in rewritten if shipped(chain.factors)]
        original = [*original, *negated]
    moved = _moved(rewritten, original)
    if isinstance(moved, Mismatch):
        return moved
    rewritten, original = moved
    every = [*rewritten, *original]
    size = next((n for chain in every if (n := chain.sizes()[0]) is not None), size)
    if all(chain.diagonal_only for chain in every):
        # A diagonal is its row 1ᵀ·diag(c).
        rewritten = [Chain((Spread(size), *chain.factors)) for chain in rewritten]
        original = [Chain((Spread(size), *chain.factors)) for chain in original]
        size = 1
    place = adjustable(rewritten, ulps)
    if place is None and rewritten and not all(_is_zero(chain) for chain in rewritten):
        return Mismatch("no shipped constant can be adjusted to make the maps equal")
    reported = 0.0
    # The first window alone: most maps that differ do so at once, and are not worth a second thread.
    with ThreadPoolExecutor(2) as pool:
        first, *others = _windows(rewritten, original, size)
        for found in chain_iterables(
            (_compare_window(first, place, size),), pool.map(lambda each: _compare_window(each, place, size), others)
        ):
            if isinstance(found, Mismatch):
                pool.shutdown(wait=True, cancel_futures=True)
                return found
            reported = max(reported, found)
    if reported > ulps:
        return Mismatch(f"float64 cannot decide: the bound is {reported:.3g} ulp", reported)
    if place is None:
        return Match(0.0, frozenset(d for chain in rewritten for d in shipped(chain.factors)))
    others = [
        f for i, c in enumerate(rewritten) for j, f in enumerate(c.factors) if (i, j) != (place.chain, place.factor)
    ]
    value = (
        "solves",
        tuple(chain.key for chain in original),
        tuple(tuple(f.key for f in c.factors) for i, c in enumerate(rewritten) if i != place.chain),
        tuple(f.key for j, f in enumerate(rewritten[place.chain].factors) if j < place.factor),
        tuple(f.key for j, f in enumerate(rewritten[place.chain].factors) if j > place.factor),
    )
    stored, layout = place.constant.stored, place.constant.key
    if layout[:2] == ("permuted", (1, 0)) and not others and all(_transposable(chain) for chain in original):
        # A matrix and its transpose are one tensor: what is asked of the one is said of the other.
        layout, value = layout[2], ("solves", tuple(_transposed_key(chain) for chain in original), (), (), ())
    columns = None
    if len(rewritten) == 1 and not value[4]:
        columns = _columns(place.constant, original, value[3])
    demand = Demand(stored.name if stored else "", layout, value, columns)
    alone = len(rewritten) == len(original) == 1 and len(rewritten[0].factors) == 1
    solutions = ((rewritten[0].factors[0].key, original[0]),) if alone else ()
    return Match(reported, shipped(others) | {demand}, solutions)


def substituted(chains: Sequence[Chain], solutions: Mapping[tuple[Any, ...], Chain]) -> list[Chain]:
    """`chains` with every matrix that is solved as what it is."""
    result: list[Chain] = []
    for chain in chains:
        whole: Chain | None = Chain()
        for factor in chain.factors:
            for each in solutions[factor.key].factors if factor.key in solutions else (factor,):
                whole = None if whole is None else whole.then(each)
        result += [] if whole is None else [whole]
    return result


def _moved(rewritten: Sequence[Chain], original: Sequence[Chain]) -> tuple[Sequence[Chain], Sequence[Chain]] | Mismatch:
    """Exact transforms around what may be adjusted go to the other side: T·W′·S = M is W′ = T⁻¹·M·S⁻¹."""
    fronts = {chain.body[0].key if chain.body else None for chain in (*rewritten, *original)}
    if len(fronts) == 1 and rewritten and rewritten[0].body and isinstance(rewritten[0].body[0], Centre):
        # What is equal on all vectors is equal on centred ones.
        rewritten, original = ([_joined(c.scalar, c.body[1:]) for c in side] for side in (rewritten, original))
    while rewritten:
        heads = {chain.body[0].key if chain.body else None for chain in rewritten}
        head = rewritten[0].body[0] if rewritten[0].body else None
        if len(heads) != 1 or not isinstance(head, Exact) or any(len(chain.body) < 2 for chain in rewritten):
            break
        undone = _undone_in_front(head.transform, original)
        if undone is None:
            return Mismatch("a transform that has no inverse stands in front")
        rewritten = [_joined(chain.scalar, chain.body[1:]) for chain in rewritten]
        original = undone
    while rewritten:
        tails = {chain.body[-1].key if chain.body else None for chain in rewritten}
        tail = rewritten[0].body[-1] if rewritten[0].body else None
        if len(tails) != 1 or not isinstance(tail, Exact) or any(len(chain.body) < 2 for chain in rewritten):
            break
        try:
            inverse = Exact(tail.transform.inverse)
        except ValueError:
            return Mismatch("a transform that has no inverse stands behind")
        rewritten = [_joined(chain.scalar, chain.body[:-1]) for chain in rewritten]
        original = [ended for chain in original if (ended := chain.then(inverse)) is not None]
    return rewritten, original


def _joined(scalar: Scalar, body: Sequence[Factor]) -> Chain:
    return Chain((scalar, *body)) if scalar != Scalar(1.0) else Chain(tuple(body))


def _undone_in_front(transform: Transform, original: Sequence[Chain]) -> list[Chain] | None:
    """T⁻¹·M for every M of the original; an isometry is undone where M reads centred vectors only."""
    if isinstance(transform, Isometry):
        centre = Centre(transform.size)
        if not all(chain.body and chain.body[0] == centre for chain in original):
            return None
        inverse: Transform = LeftInverse(transform)
        return [_joined(chain.scalar, (Exact(inverse), *chain.body[1:])) for chain in original]
    try:
        undo = Exact(transform.inverse)
    except ValueError:
        return None
    result = []
    for chain in original:
        rest = chain.body[1:] if chain.body and isinstance(f := chain.body[0], Exact) and f.undoes(undo) else None
        result.append(_joined(chain.scalar, (undo, *chain.body) if rest is None else rest))
    return result


def _columns(constant: Constant, original: Sequence[Chain], front: tuple[Any, ...]) -> Columns | None:
    """What is asked column by column, behind the factors `front`; None where the columns are not those of constants."""
    mine = columns_of(constant)
    if mine is None:
        return None
    # Summands in an order of their own: that in which they were met depends on which columns they hold.
    found = sorted((_trailing(chain) for chain in original), key=lambda each: repr(each[0]))
    trailing = [columns for _, each in found for columns in each]
    if not trailing or any(len(columns) != len(mine[1]) for columns in trailing):
        return None
    return Columns(mine[0], mine[1], (front, *(key for key, _ in found)), np.stack(trailing))


def _trailing(chain: Chain) -> tuple[tuple[Any, ...], list[np.ndarray]]:
    """A product with its last matrix, and what scales that, read as columns of whole constants: its key, and which.

    Where the columns are mixed the product is all there is to say: its columns are its own.
    """
    key: list[Any] = []
    columns: list[np.ndarray] = []
    behind = True
    for factor in reversed(chain.factors):
        if not behind or isinstance(factor, Scalar):
            key.append(factor.key)
        elif isinstance(factor, Matrix | Diagonal) and (found := columns_of(factor.constant)) is not None:
            behind = isinstance(factor, Diagonal)
            key.append((type(factor).__name__, found[0]))
            columns.append(found[1])
        else:
            return ("own", chain.key), [np.arange(chain.sizes()[1] or 0)]
    return tuple(key), columns


def _transposable(chain: Chain) -> bool:
    return all(isinstance(factor, Matrix | Diagonal | Scalar | Centre | Exact) for factor in chain.factors) and not any(
        isinstance(factor, Exact) and isinstance(factor.transform, Isometry | LeftInverse | Selection | Copied)
        for factor in chain.factors
    )


def _transposed_key(chain: Chain) -> tuple[Any, ...]:
    """The key of Mᵀ for a product M: (A·B)ᵀ = Bᵀ·Aᵀ; Tᵀ is the dual of T⁻¹."""
    body: list[Factor] = []
    for factor in reversed(chain.body):
        if isinstance(factor, Matrix):
            body.append(Matrix(transposed(factor.constant)))
        else:
            body.append(Exact(factor.transform.inverse.dual) if isinstance(factor, Exact) else factor)
    return _joined(chain.scalar, body).key


WHOLE_ELEMENTS = 1 << 22
"""Entries of a product whose rows are mixed that are held at a time (32 MiB of float64, a few times over)."""


@dataclass(frozen=True)
class _Part:
    """Some rows of two sums of chains, to be compared in steps of `step` rows."""

    rewritten: Sequence[Chain]
    original: Sequence[Chain]
    taken: slice
    step: int


def _windows(rewritten: Sequence[Chain], original: Sequence[Chain], size: int) -> list[_Part]:
    """The comparison cut into parts: by rows, or by columns where a row of the product rests on all rows."""
    every = [*rewritten, *original]
    width = max(1, *(chain.sizes()[1] or 1 for chain in every))
    if not any(_mixes_rows(chain) for chain in every):
        step, fine = max(1, READ_ELEMENTS // width), max(1, CACHED_ELEMENTS // width)
        starts = range(0, size, step)
        return [_Part(rewritten, original, slice(start, min(start + step, size)), fine) for start in starts]
    parts, step = [], max(1, WHOLE_ELEMENTS // size)
    for start in range(0, width, step):
        cut = [[chain.select(start, min(start + step, width)) for chain in side] for side in (rewritten, original)]
        if any(chain is None for side in cut for chain in side):
            # Columns are mixed as well: all at once.
            return [_Part(rewritten, original, slice(0, size), size)]
        parts.append(_Part(cut[0], cut[1], slice(0, size), size))  # type: ignore[arg-type]
    return parts


def _mixes_rows(chain: Chain) -> bool:
    """Whether a map of channels among themselves stands in front of the first matrix."""
    for index, factor in enumerate(chain.body):
        if isinstance(factor, Exact) and diagonal_of(factor.transform) is not None:
            continue
        if isinstance(factor, Exact | Centre):
            return any(isinstance(behind, Matrix) for behind in chain.body[index:])
        if not isinstance(factor, Diagonal):
            return False
    return False


def _compare_window(part: _Part, place: Adjustable | None, size: int) -> float | Mismatch:
    rewritten, original = _resident(part.rewritten, part.taken), _resident(part.original, part.taken)
    if place is not None:
        factor = rewritten[place.chain].factors[place.factor]
        if isinstance(factor, Matrix | Diagonal):
            place = replace(place, constant=factor.constant)
    return _compare_rows(rewritten, original, place, part.taken, size, part.step)


def _compare_rows(
    rewritten: Sequence[Chain],
    original: Sequence[Chain],
    place: Adjustable | None,
    taken: slice,
    size: int,
    step: int,
) -> float | Mismatch:
    """The largest distance in ulps over the rows `taken`, or why the maps differ; in steps that stay in the cache."""
    reported = 0.0
    worth = sensitivity(rewritten[place.chain], place) if place is not None else []
    # `largest` is the mean of what a product sums.
    summed = max((f.constant.shape[0] for c in original for f in c.body[1:] if isinstance(f, Matrix)), default=1)
    bare = len(rewritten) == len(rewritten[0].factors) == 1 if rewritten else False
    fitted = any(isinstance(f, Exact) and f.fitted for chain in original for f in chain.factors)
    for start in range(taken.start, taken.stop, step):
        part = slice(start, min(start + step, taken.stop))
        target, actual = _sum_rows(original, part, size), _sum_rows(rewritten, part, size)
        if target is None:
            target = exact(np.zeros_like(actual.value)) if actual is not None else exact(np.zeros((1, 1)))
        if actual is None:
            actual = exact(np.zeros_like(target.value))
        if target.value.shape != actual.value.shape:
            return Mismatch(f"maps of shapes {actual.value.shape} and {target.value.shape}")
        distance = np.abs(actual.value - target.value)
        bound = UNIT * (target.error + actual.error)
        if not (np.isfinite(distance).all() and np.isfinite(bound).all()):
            return Mismatch("a constant is not finite", float("inf"))
        if place is None:
            if np.any(target.error > 0) or np.any(distance > 0):
                return Mismatch("a constant of the original has no counterpart", float("inf"))
            continue
        unit = rows(worth, part, size).value
        if not bare:
            # No more than the map has there: what cancels in a sum of ours, and what a factor makes of the smallest
            # number there is, is not in it.
            most = np.maximum(summed * target.largest, np.abs(target.value))
            unit = np.minimum(unit, place.epsilon * most)
        with np.errstate(divide="ignore", invalid="ignore"):
            # 0/0 is an entry that is zero on both sides.
            farthest = float(np.fmax.reduce((distance + bound) / unit, axis=None, initial=0.0))
        if farthest <= place.ulps:
            reported = max(reported, farthest)
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            wide = np.maximum(unit, largest_unit(target.largest, place.epsilon))
            # A transform that was fitted to rounded weights is off by their rounding, cancelling entries first; so is a
            # constant that is declared to be computed in its own type.
            lenient = fitted or place.ulps > 1.0
            excess = np.where(distance <= bound, 0.0, (distance - bound) / (wide if lenient else unit))
            unit = wide
            ratio = np.where(distance + bound == 0.0, 0.0, (distance + bound) / unit)
        at = np.unravel_index(int(np.argmax(excess)), excess.shape)
        if excess[at] > place.ulps:
            name = place.constant.stored.name if place.constant.stored else "a constant"
            where = (start + int(at[0]), int(at[1]))
            return Mismatch(f"{name} is {excess[at]:.3g} ulp off at {where}", float(excess[at]))
        reported = max(reported, float(ratio.max(initial=0.0)))
    return reported


@dataclass(frozen=True, eq=False)
class _Window(Constant):
    """Rows of a constant held in memory while they are compared; asked for nothing but those rows."""

    inner: Constant
    start: int
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return self.inner.key

    @property
    def stored(self) -> Stored | None:
        return self.inner.stored

    @property
    def kind(self) -> str:
        return self.inner.kind

    def raw(self, region: Region) -> np.ndarray:
        rows, *columns = region
        return self.values[(slice(rows.start - self.start, rows.stop - self.start), *columns)]


def _resident(chains: Sequence[Chain], taken: slice) -> list[Chain]:
    """`chains` with the rows `taken` of their first matrices, and all diagonals, read once for all steps."""
    result = []
    for chain in chains:
        factors: list[Factor] = []
        leading = True
        for factor in chain.factors:
            if isinstance(factor, Diagonal):
                part = taken if leading else slice(0, factor.constant.shape[0])
                factor = Diagonal(_Window(factor.constant, part.start, factor.constant.raw((part,))))
            elif isinstance(factor, Matrix) and leading:
                values = factor.constant.raw((taken, slice(0, factor.constant.shape[1])))
                factor = Matrix(_Window(factor.constant, taken.start, values))
            diagonal = isinstance(factor, Exact) and diagonal_of(factor.transform) is not None
            leading = leading and (diagonal or isinstance(factor, Scalar | Diagonal))
            factors.append(factor)
        result.append(Chain(tuple(factors)))
    return result


def largest_unit(largest: np.ndarray, epsilon: float) -> np.ndarray:
    """At least half an ulp-of-the-binade of the largest term: never more than its true ulp."""
    return largest * epsilon / 2


@dataclass(frozen=True)
class Adjustable:
    """Where the constant that may be adjusted stands, by how much; `epsilon` is its dtype's relative spacing."""

    chain: int
    factor: int
    constant: Constant
    epsilon: float
    ulps: float = 1.0


def adjustable(chains: Sequence[Chain], ulps: float = 1.0) -> Adjustable | None:
    """The largest shipped constant that only diagonal factors surround."""
    best: Adjustable | None = None
    for i, chain in enumerate(chains):
        for j, factor in enumerate(chain.factors):
            if not isinstance(factor, Matrix | Diagonal):
                continue
            constant = factor.constant
            if constant.stored is None or constant.stored.side != "rewritten" or constant.kind != "f":
                continue
            # A repetition behind the constant would hold one entry to several targets.
            before, behind = chain.factors[:j], chain.factors[j + 1 :]
            if not all(isinstance(f, Scalar | Diagonal | Spread) for f in before):
                continue
            if not all(isinstance(f, Scalar | Diagonal) for f in behind):
                continue
            if best is None or constant.size > best.constant.size:
                sample = constant.raw(tuple(slice(0, min(n, 1)) for n in constant.shape))
                best = Adjustable(i, j, constant, float(spacing_of_one(sample)), ulps)
    return best


def spacing_of_one(sample: np.ndarray) -> float:
    from rewrite.proof.constants import spacing

    return float(spacing(np.ones(1, sample.dtype))[0])


@dataclass(frozen=True, eq=False)
class _Ulps(Constant):
    """The ulps of a constant's entries, as a constant of its own."""

    inner: Constant

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return ("ulps", self.inner.key)

    @property
    def stored(self) -> Stored | None:
        return None

    def raw(self, region: Region) -> np.ndarray:
        return self.inner.ulp(region)


@dataclass(frozen=True, eq=False)
class _Magnitudes(_Ulps):
    """The magnitudes of a constant's entries."""

    def raw(self, region: Region) -> np.ndarray:
        return np.abs(self.inner.read(region))


def sensitivity(chain: Chain, place: Adjustable) -> list[Factor]:
    """Factors of the matrix that says what one ulp of the adjustable constant is worth at each entry of the product."""
    factors: list[Factor] = []
    for index, factor in enumerate(chain.factors):
        if index == place.factor:
            factors.append(replace(factor, constant=_Ulps(factor.constant)))  # type: ignore[type-var]
        elif isinstance(factor, Scalar):
            factors.append(Scalar(abs(factor.value)))
        elif isinstance(factor, Diagonal):
            factors.append(Diagonal(_Magnitudes(factor.constant)))
        else:
            factors.append(factor)
    return factors


def _sum_rows(chains: Sequence[Chain], taken: slice, size: int) -> Block | None:
    total: Block | None = None
    for chain in chains:
        block = rows(chain.factors, taken, size)
        total = block if total is None else total + block
    return total


def _is_zero(chain: Chain) -> bool:
    return any(not constant.whole().any() for constant in constants_of(chain.factors) if constant.size < 1 << 16)


def transposed(constant: Constant) -> Constant:
    return permuted(constant, (1, 0))
