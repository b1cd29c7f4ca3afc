"""Products of constants as matrices of float64, with a bound on its error, compared entry by entry.

One shipped constant W′ may be adjusted: |A|·ulp(W′)·|B| is what one ulp of it is worth in A·W′·B. All is computed in
blocks of rows, or of columns where a row rests on all rows, so that memory does not grow with the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from rewrite.proof.chains import (
    UNIT,
    Centre,
    Chain,
    Diagonal,
    Exact,
    Factor,
    Matrix,
    Mean,
    Scalar,
    Spread,
    constants_of,
    diagonal_of,
)
from rewrite.proof.constants import (
    Arranged,
    Constant,
    Region,
    Stored,
    spacing,
)
from rewrite.proof.demands import Demand
from rewrite.proof.rational import computed_in, cost, entry
from rewrite.proof.sites import Dequantized, Measure
from rewrite.proof.transforms import Selection, Transform

READ_ELEMENTS, CACHED_ELEMENTS = 1 << 20, 1 << 15
"""Entries read from a file at a time, and entries computed with at a time (256 KiB of float64)."""


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
        # A row of ones, of which a diagonal is made, rounds nothing.
        ones = magnitude is None and self.roundings == 0 and len(self.value) == 1 and bool((self.value == 1.0).all())
        return Block(
            self.value * factor,
            self.roundings + (not ones),
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
        block = rows(rest, taken, size).scaled(head.constant.read((taken,))[:, None])
        return replace(block, roundings=block.roundings + head.constant.roundings)
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
        values = head.constant.read((taken, slice(0, head.constant.shape[1])))
        block = Block(values, roundings=head.constant.roundings)
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
        mean = magnitude / math.sqrt(transform.summed)
    else:
        terms = transform.terms if taken is None else transform.terms_left
        mean = terms(np.abs(block.value)) / transform.summed
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
        block = block.scaled(factor.constant.whole()[None, :])
        return replace(block, roundings=block.roundings + factor.constant.roundings)
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
    return Block(value, 0, error + (inner + 1 + factor.constant.roundings) * magnitude, magnitude / inner)


@dataclass(frozen=True)
class Match:
    """Two maps are the same: within `ulps`, if the `demands` on shipped constants are met."""

    ulps: float = 0.0
    demands: frozenset[Demand] = frozenset()
    solutions: tuple[tuple[tuple[Any, ...], tuple[Chain, ...]], ...] = ()
    """Matrices, by their key, and the sums of the original's products that the demands make them."""
    measures: tuple[Measure, ...] = ()
    """How far dequantized constants are from what the demands make them."""

    @property
    def exact(self) -> bool:
        return self.ulps == 0.0 and not any(each.steps for each in self.measures)

    def __add__(self, other: Match) -> Match:
        return Match(
            max(self.ulps, other.ulps),
            self.demands | other.demands,
            self.solutions + other.solutions,
            self.measures + other.measures,
        )


@dataclass(frozen=True)
class Mismatch:
    """Two maps are not shown to be the same, and why; `ulps` is how far the nearest constant is off (0: no number)."""

    reason: str
    ulps: float = 0.0


Outcome = Match | Mismatch


WHOLE_ELEMENTS = 1 << 22
"""Entries of a product whose rows are mixed that are held at a time (32 MiB of float64, a few times over)."""


@dataclass(frozen=True)
class _Part:
    """Some rows of two sums of chains, to be compared in steps of `step` rows."""

    rewritten: Sequence[Chain]
    original: Sequence[Chain]
    taken: slice
    step: int


def windows(rewritten: Sequence[Chain], original: Sequence[Chain], size: int) -> list[_Part]:
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


def compare_window(part: _Part, place: Adjustable | None, size: int) -> float | Measure | Mismatch:
    rewritten, original = _resident(part.rewritten, part.taken), _resident(part.original, part.taken)
    if place is not None:
        factor = rewritten[place.chain].factors[place.factor]
        if isinstance(factor, Matrix | Diagonal):
            place = replace(place, constant=factor.constant)
    try:
        with np.errstate(under="raise"):
            if place is not None and place.site is not None:
                return _measure_rows(rewritten, original, place, part.taken, size, part.step)
            return _compare_rows(rewritten, original, place, part.taken, size, part.step)
    except FloatingPointError:
        return Mismatch("a product of constants is smaller than float64 holds")


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
    # Computed numbers, if they are a factor of all of the original, are off by a share of what they multiply.
    computed = {computed_in(chain) for chain in original} or {()}
    together = len(computed) == 1 and not any(computed_in(chain) for chain in rewritten)
    roundings = sum(count for _, count in next(iter(computed)))
    bare = place is not None and place.constant.plain and len(rewritten) == len(rewritten[0].factors) == 1
    # A transform that was fitted to rounded weights is off by their rounding, cancelling entries first; so is a
    # constant that is declared to be computed in its own type.
    lenient = any(isinstance(f, Exact) and f.fitted for chain in original for f in chain.factors)
    lenient = lenient or (place is not None and place.ulps > 1.0)
    costs = [cost(chain) if together and not lenient else None for chain in (*rewritten, *original)]
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
        doubtful = np.argwhere(distance + bound > place.ulps * unit) if None not in costs else np.zeros((0, 2), int)
        if len(doubtful) * sum(cost or 0 for cost in costs) > EXACT_STEPS:
            return Mismatch(f"float64 cannot decide: {len(doubtful)} entries cancel by more than it holds", math.inf)
        # What cancels by more than float64 holds is computed exactly.
        for row, column in doubtful:
            at = (start + int(row), int(column))
            wanted = entry(original, *at)
            apart = abs(entry(rewritten, *at) - wanted) + abs(wanted) * roundings * Fraction(UNIT)
            if apart > Fraction(float(unit[row, column])) * Fraction(place.ulps):
                off = float(apart) / max(float(unit[row, column]), 1e-300)
                return Mismatch(f"{_name(place)} is {off:.3g} ulp off at {at}", off)
            distance[row, column], bound[row, column] = float(apart), 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            wide = np.maximum(unit, largest_unit(target.largest, place.epsilon))
            excess = np.where(distance <= bound, 0.0, (distance - bound) / (wide if lenient else unit))
            unit = wide
            ratio = np.where(distance + bound == 0.0, 0.0, (distance + bound) / unit)
        at = np.unravel_index(int(np.argmax(excess)), excess.shape)
        if excess[at] > place.ulps:
            where = (start + int(at[0]), int(at[1]))
            return Mismatch(f"{_name(place)} is {excess[at]:.3g} ulp off at {where}", float(excess[at]))
        reported = max(reported, float(ratio.max(initial=0.0)))
    return reported


UNDECIDED = 0.5
"""Of a step: what float64 may at most have lost of a distance that is measured in steps, of which half is rounding."""


def _measure_rows(
    rewritten: Sequence[Chain], original: Sequence[Chain], place: Adjustable, taken: slice, size: int, step: int
) -> Measure | Mismatch:
    """How far a dequantized constant is from what the original asks, over the rows `taken`, or why the maps differ.

    With the constant's own factors a·W_q·b in the product, an entry that differs by Δ is Δ/|a·b| off.
    """
    chain = rewritten[place.chain]
    worth, gains = sensitivity(chain, place), sensitivity(chain, place, _Ones)
    apart = beside(rewritten, place)
    beyond = None if apart is None else sensitivity(rewritten[apart.chain], apart)
    total = Measure(place.constant)
    for start in range(taken.start, taken.stop, step):
        part = slice(start, min(start + step, taken.stop))
        # Where the constant has no part in the product, as where a mask is 0, all else has to be equal exactly.
        actual, target = (_sum_rows(chains, part, size, sparse=True) for chains in (rewritten, original))
        assert actual is not None
        if target is None:
            target = exact(np.zeros_like(actual.value))
        if target.value.shape != actual.value.shape:
            return Mismatch(f"maps of shapes {actual.value.shape} and {target.value.shape}")
        difference = actual.value - target.value
        bound = UNIT * (target.error + actual.error)
        if not (np.isfinite(difference).all() and np.isfinite(bound).all()):
            return Mismatch("a constant is not finite")
        unit, gain = rows(worth, part, size).value, np.broadcast_to(rows(gains, part, size).value, difference.shape)
        ulps = 0.0
        if beyond is not None and not gain.all():
            # Where a mask leaves the codes out, numbers stand in for them, and are within an ulp.
            single, elsewhere = np.broadcast_to(rows(beyond, part, size).value, gain.shape), gain == 0
            if np.any((single > 0) & ~elsewhere):
                return Mismatch("codes and numbers hold the same entries")
            with np.errstate(divide="ignore", invalid="ignore"):
                ulps = float(np.nan_to_num((np.abs(difference) + bound) / single, posinf=np.inf)[elsewhere].max())
            if not ulps <= 1.0:
                return Mismatch(f"numbers beside the codes {_name(place)} are {ulps:.3g} ulp off")
            difference, bound = np.where(elsewhere, 0.0, difference), np.where(elsewhere, 0.0, bound)
        own = actual.value if len(rewritten) == 1 else rows(chain.factors, part, size).value
        with np.errstate(divide="ignore", invalid="ignore", under="ignore"):
            # 0/0 is an entry that is zero on both sides.
            distance = np.nan_to_num(np.abs(difference) / unit, posinf=np.inf)
            lost = np.nan_to_num(bound / unit, posinf=np.inf)
            off, wanted, slack = (
                np.where(gain > 0, np.abs(each) / gain, 0.0) for each in (difference, own - difference, bound)
            )
            measure = Measure(
                place.constant,
                float(distance.max(initial=0.0)),
                float((off**2).sum()),
                float((wanted**2).sum()),
                float(lost.max(initial=0.0)),
                float(np.sqrt((slack**2).sum())),
                ulps,
            )
        if not measure.slack < UNDECIDED:
            return Mismatch(f"float64 cannot decide how many steps {_name(place)} is off")
        if not measure.steps <= place.ulps + 2 * measure.slack:
            at = np.unravel_index(int(np.argmax(distance)), distance.shape)
            where = (start + int(at[0]), int(at[1]))
            relative = f"{measure.relative:.2g} of their size in these rows"
            return Mismatch(f"codes {_name(place)} are {distance[at]:.3g} steps off at {where}, {relative}")
        total = total + measure
    return total


def _name(place: Adjustable) -> str:
    return place.constant.stored.name if place.constant.stored else "a constant"


EXACT_STEPS = 1 << 21
"""Multiplications of rational numbers that are spent on entries of one step."""


@dataclass(frozen=True, eq=False)
class _Window(Arranged):
    """Rows of a constant held in memory while they are compared; asked for nothing but those rows."""

    start: int
    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.inner.shape

    @property
    def key(self) -> tuple[Any, ...]:
        return self.inner.key

    def raw(self, region: Region) -> np.ndarray:
        rows, *columns = region
        return self.values[(slice(rows.start - self.start, rows.stop - self.start), *columns)]

    def ulp(self, region: Region) -> np.ndarray:
        return spacing(self.raw(region)) if self.plain else self.inner.ulp(region)

    @property
    def roundings(self) -> int:  # type: ignore[override]
        return self.inner.roundings


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

    @property
    def site(self) -> Dequantized | None:
        """The codes that the constant is made of, if it is; `ulps` are steps then."""
        stored = self.constant.stored
        return stored if isinstance(stored, Dequantized) else None


def beside(chains: Sequence[Chain], place: Adjustable) -> Adjustable | None:
    """Of two products the constant of the one that holds no codes: it may be adjusted where the codes have no part."""
    if len(chains) != 2:
        return None
    index = 1 - place.chain
    for j, factor in enumerate(chains[index].factors):
        if isinstance(factor, Matrix):
            constant, front = factor.constant, chains[index].factors[:j]
            origin = constant.stored
            known = origin is not None and origin.side == "rewritten" and not isinstance(origin, Dequantized)
            selected = all(
                isinstance(f, Scalar | Diagonal) or (isinstance(f, Exact) and isinstance(f.transform, Selection))
                for f in front
            )
            if not known or not selected or len(chains[index].factors) > j + 1 or constant.kind != "f":
                return None
            return Adjustable(index, j, constant, 0.0)
    return None


def adjustable(
    chains: Sequence[Chain], ulps: float = 1.0, steps: Callable[[str], float] | None = None
) -> Adjustable | None:
    """The largest shipped constant that only diagonal factors surround; codes before all others.

    `steps` says of codes by how many steps they may be off.
    """
    best: Adjustable | None = None
    rank: tuple[bool, int] = (False, -1)
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
            origin = constant.stored
            if isinstance(origin, Dequantized) and rank < (True, constant.size):
                best = Adjustable(i, j, constant, 0.0, 1.0 if steps is None else steps(origin.name))
                rank = (True, constant.size)
            elif not isinstance(origin, Dequantized) and rank < (False, constant.size):
                rank = (False, constant.size)
                sample = origin.raw(tuple(slice(0, min(n, 1)) for n in origin.shape))
                best = Adjustable(i, j, constant, float(spacing_of_one(sample)), ulps)
    return best


def spacing_of_one(sample: np.ndarray) -> float:
    return float(spacing(np.ones(1, sample.dtype))[0])


@dataclass(frozen=True, eq=False)
class _Ulps(Arranged):
    """The ulps of a constant's entries, as a constant of its own."""

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


@dataclass(frozen=True, eq=False)
class _Ones(_Ulps):
    """A one for every entry of a constant."""

    def raw(self, region: Region) -> np.ndarray:
        return np.ones(tuple(taken.stop - taken.start for taken in region))


def sensitivity(chain: Chain, place: Adjustable, of: type[_Ulps] = _Ulps) -> list[Factor]:
    """Factors of the matrix that says what one ulp (`of`) of the adjustable constant is worth at each entry of the
    product."""
    factors: list[Factor] = []
    for index, factor in enumerate(chain.factors):
        if index == place.factor:
            factors.append(replace(factor, constant=of(factor.constant)))  # type: ignore[type-var]
        elif isinstance(factor, Scalar):
            factors.append(Scalar(abs(factor.value)))
        elif isinstance(factor, Diagonal):
            factors.append(Diagonal(_Magnitudes(factor.constant)))
        else:
            factors.append(factor)
    return factors


def _sum_rows(chains: Sequence[Chain], taken: slice, size: int, *, sparse: bool = False) -> Block | None:
    """The sum of some chains' rows; `sparse`: where only one of them is not 0, as exact as that."""
    total: Block | None = None
    for chain in chains:
        block = rows(chain.factors, taken, size)
        if total is None:
            total = block
        elif sparse:
            both, whole = (total.value != 0) & (block.value != 0), total + block
            error = total.error + block.error + np.where(both, np.abs(whole.value), 0.0)
            total = Block(whole.value, 0, error, whole.terms)
        else:
            total = total + block
    return total


def is_zero(chain: Chain) -> bool:
    return any(not constant.whole().any() for constant in constants_of(chain.factors) if constant.size < 1 << 16)
