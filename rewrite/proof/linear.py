"""Whether two products of constants are one map, and which exact value of a shipped constant makes them so.

Two chains, one of each graph, are the same linear map when, after equal factors are cancelled at both ends, one shipped
constant remains that can be given an exact value: the product of what remains of the original. `compare` finds that
value and the demand that it makes of the constant; `products.py` measures how far the shipped constant is from it.

    x ↦ x·A·(diag(γ)·W·P)·B    against    x ↦ x·A·W′·B          Ŵ = diag(γ)·W·P
    ─────────────────────────────────────────────────────
                equal if |W′ − Ŵ| ≤ 1 ulp everywhere
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain as chain_iterables
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
    Scalar,
    Spread,
    constants_of,
    joined,
    shipped,
)
from rewrite.proof.constants import (
    Constant,
    Sliced,
    permuted,
    same_values,
)
from rewrite.proof.demands import Columns, Demand, columns_of
from rewrite.proof.products import (
    Match,
    Mismatch,
    Outcome,
    adjustable,
    beside,
    compare_window,
    is_zero,
    windows,
)
from rewrite.proof.sites import Dequantized, Measure
from rewrite.proof.transforms import (
    Copied,
    Embedded,
    Isometry,
    LeftInverse,
    Selection,
    Transform,
)


class Comparer:
    """Compares linear maps of the rewritten graph with the original's; remembers every answer.

    `ulps` is how far a shipped constant may be from its exact value: 1, unless more was declared. `steps` says it of
    codes, by the name of the tensor that holds them.
    """

    def __init__(self, ulps: float = 1.0, steps: Callable[[str], float] | None = None) -> None:
        self.ulps, self.steps = ulps, steps
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
        sum with one shipped constant to adjust. Codes may equal by a step what they only equal together with a
        correction: if they do not by themselves, they do as a part of the sum, or of the channels that they read.
        """
        outcome = self._compare(rewritten, original, size)
        if isinstance(outcome, Match) or len(rewritten) < 2 or not any(map(_has_codes, rewritten)):
            return outcome
        outcome = self._compare(rewritten, original, size, whole=True)
        return outcome if isinstance(outcome, Match) else self._by_channels(rewritten, original) or outcome

    def _compare(
        self, rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None, whole: bool = False
    ) -> Outcome:
        """As `compare`; with `whole`, products that hold codes are not paired but left to the sum."""
        total, left, used = Match(), [], set()
        for chain in rewritten:
            if whole and _has_codes(chain):
                left.append(chain)
                continue
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
            left, rest, behind = self._by_ends(left, rest, size)
            total = total + behind
            for place in (-1, 0):
                left, rest, shared = self._without_shared(left, rest, place)
                total = total + shared
            if not left and not rest:
                return total
            outcome = self._sums(left, rest, size)
        return total + outcome if isinstance(outcome, Match) else outcome

    def _by_channels(self, rewritten: Sequence[Chain], original: Sequence[Chain]) -> Outcome | None:
        """x_R·A + x_O·B against x·W, for channels R and O that x falls apart into: A is the rows R of W, and B the O.

        None where the sum is none of this kind.
        """
        rewritten, original, total = self._without_shared(rewritten, original, 0)
        taken = [chain.body[0].transform if chain.body and isinstance(chain.body[0], Exact) else None
                 for chain in rewritten]  # fmt: skip
        selections = [each for each in taken if isinstance(each, Selection)]
        if len(selections) < len(rewritten):
            return None
        size, indices = selections[0].size, sorted(index for each in selections for index in each.indices)
        if indices != list(range(size)) or any(each.size != size for each in selections):
            return None
        for chain, selection in zip(rewritten, selections):
            rows = Exact(Embedded.of(selection))
            parts = [joined(each.scalar, (rows, *each.body)) for each in original]
            outcome = self._compare([joined(chain.scalar, chain.body[1:])], parts, selection.width)
            if isinstance(outcome, Mismatch):
                return outcome
            total = total + outcome
        return total

    def _by_ends(
        self, rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None
    ) -> tuple[Sequence[Chain], Sequence[Chain], Match]:
        """A·K + B·L against C·K + D·K + E·L: what ends in one constant is compared by itself, and left out if equal."""
        total = Match()
        for end in {chain.body[-1].key: chain.body[-1] for chain in rewritten if len(chain.body) > 1}.values():
            mine, known = (
                [chain for chain in side if len(chain.body) > 1 and self.same_factor(chain.body[-1], end)]
                for side in (rewritten, original)
            )
            if not known or len(mine) == len(rewritten):
                continue
            outcome = self.compare(mine, known, size)
            if isinstance(outcome, Match):
                total = total + outcome
                rewritten, original = ([c for c in side if c not in part] for side, part in
                                       ((rewritten, mine), (original, known)))  # fmt: skip
        return rewritten, original, total

    def _without_shared(
        self, rewritten: Sequence[Chain], original: Sequence[Chain], place: int
    ) -> tuple[Sequence[Chain], Sequence[Chain], Match]:
        """(A + B)·V against C·V is A + B against C: what all chains end in is left out, and is as it was shipped.

        So is what all begin with; `place` is −1 for the end and 0 for the front.
        """
        used: list[Factor] = []
        while all(len(chain.body) > 1 for chain in (*rewritten, *original)) and rewritten and original:
            ends = [chain.body[place] for chain in (*rewritten, *original)]
            if not all(self.same_factor(ends[0], end) for end in ends[1:]):
                break
            used += [chain.body[place] for chain in rewritten]
            kept = slice(1, None) if place == 0 else slice(0, -1)
            rewritten, original = ([joined(c.scalar, c.body[kept]) for c in side] for side in (rewritten, original))
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
            outcome = numeric([Chain(tuple(ours))], [Chain(tuple(theirs))], inner, self.ulps, self.steps)
        return outcome + cancelling if isinstance(outcome, Match) else outcome

    def _sums(self, rewritten: Sequence[Chain], original: Sequence[Chain], size: int | None) -> Outcome:
        index = tuple(tuple((c.key, c.scalar) for c in chains) for chains in (rewritten, original))
        if index not in self._chains:
            inner = next((n for c in (*rewritten, *original) if (n := c.sizes()[0]) is not None), size)
            self._chains[index] = numeric(rewritten, original, inner, self.ulps, self.steps)
        return self._chains[index]


def _has_codes(chain: Chain) -> bool:
    return any(isinstance(constant.stored, Dequantized) for constant in constants_of(chain.factors))


LOST = 2.0**-27
"""In ulps of float32: what a number that was computed in float64 may have lost."""


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
    # What the arithmetic on both numbers in float64 may have lost; it is nobody's to adjust, and no equality.
    if distance <= 4 * UNIT * abs(theirs.value) and not ours.origins:
        return Match(LOST)
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


def numeric(
    rewritten: Sequence[Chain],
    original: Sequence[Chain],
    size: int | None,
    ulps: float = 1.0,
    steps: Callable[[str], float] | None = None,
) -> Outcome:
    """Compare two sums of chains as matrices, block by block, adjusting one shipped constant.

    The adjustable constant W′ is the largest rewritten one that only diagonal factors surround; for it
    |A|·ulp(W′)·|B| is what one ulp of it is worth in the product, and `ulps` of them are allowed; of codes, `steps`.
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
    place = adjustable(rewritten, ulps, steps)
    if place is None and rewritten and not all(is_zero(chain) for chain in rewritten):
        return Mismatch("no shipped constant can be adjusted to make the maps equal")
    reported, measure = 0.0, None if place is None or place.site is None else Measure(place.constant)
    # The first window alone: most maps that differ do so at once, and are not worth a second thread.
    with ThreadPoolExecutor(2) as pool:
        first, *others = windows(rewritten, original, size)
        for found in chain_iterables(
            (compare_window(first, place, size),), pool.map(lambda each: compare_window(each, place, size), others)
        ):
            if isinstance(found, Mismatch):
                pool.shutdown(wait=True, cancel_futures=True)
                return found
            if isinstance(found, Measure):
                measure = found if measure is None else measure + found
            else:
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
    alone = len(rewritten) == 1 and len(rewritten[0].factors) == 1
    solutions = ((rewritten[0].factors[0].key, tuple(original)),) if alone else ()
    measures = () if measure is None else (measure,)
    further: frozenset[Demand] = frozenset()
    if measure is not None and measure.ulps > 0.0 and (apart := beside(rewritten, place)) is not None:
        # Numbers that stand where the codes have no part are adjusted there.
        origin, reported = apart.constant.stored, measure.ulps
        further = frozenset({Demand(origin.name if origin else "", apart.constant.key, (*value, "beside"))})
        others = [f for f in others if f is not rewritten[apart.chain].factors[apart.factor]]
    if reported == 0.0 and (measure is None or measure.steps == measure.slack == 0.0):
        # Nothing is to be adjusted: what was shipped is what is asked for.
        return Match(0.0, frozenset(d for chain in rewritten for d in shipped(chain.factors)), solutions, measures)
    return Match(reported, shipped(others) | {demand} | further, solutions, measures)


def substituted(chains: Sequence[Chain], solutions: Mapping[tuple[Any, ...], Sequence[Chain]]) -> list[Chain]:
    """`chains` with every matrix that is solved as the sum of products that it is."""
    result: list[Chain] = []
    for chain in chains:
        sums = [Chain()]
        for factor in chain.factors:
            parts = [part.factors for part in solutions.get(factor.key, (Chain((factor,)),))]
            sums = [whole for each in sums for part in parts if (whole := _followed(each, part)) is not None]
        result += sums
    return result


def _followed(chain: Chain, factors: Sequence[Factor]) -> Chain | None:
    """`chain`, then each of `factors`; None is the zero map."""
    whole: Chain | None = chain
    for factor in factors:
        whole = None if whole is None else whole.then(factor)
    return whole


def _moved(rewritten: Sequence[Chain], original: Sequence[Chain]) -> tuple[Sequence[Chain], Sequence[Chain]] | Mismatch:
    """Exact transforms around what may be adjusted go to the other side: T·W′·S = M is W′ = T⁻¹·M·S⁻¹."""
    fronts = {chain.body[0].key if chain.body else None for chain in (*rewritten, *original)}
    if len(fronts) == 1 and rewritten and rewritten[0].body and isinstance(rewritten[0].body[0], Centre):
        # What is equal on all vectors is equal on centred ones.
        rewritten, original = ([joined(c.scalar, c.body[1:]) for c in side] for side in (rewritten, original))
    while rewritten:
        heads = {chain.body[0].key if chain.body else None for chain in rewritten}
        head = rewritten[0].body[0] if rewritten[0].body else None
        if len(heads) != 1 or not isinstance(head, Exact) or any(len(chain.body) < 2 for chain in rewritten):
            break
        undone = _undone_in_front(head.transform, original)
        if undone is None:
            return Mismatch("a transform that has no inverse stands in front")
        rewritten = [joined(chain.scalar, chain.body[1:]) for chain in rewritten]
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
        rewritten = [joined(chain.scalar, chain.body[:-1]) for chain in rewritten]
        original = [ended for chain in original if (ended := chain.then(inverse)) is not None]
    return rewritten, original


def _undone_in_front(transform: Transform, original: Sequence[Chain]) -> list[Chain] | None:
    """T⁻¹·M for every M of the original; an isometry is undone where M reads centred vectors only."""
    if isinstance(transform, Isometry):
        centre = Centre(transform.size)
        if not all(chain.body and chain.body[0] == centre for chain in original):
            return None
        inverse: Transform = LeftInverse(transform)
        return [joined(chain.scalar, (Exact(inverse), *chain.body[1:])) for chain in original]
    try:
        undo = Exact(transform.inverse)
    except ValueError:
        return None
    result = []
    for chain in original:
        rest = chain.body[1:] if chain.body and isinstance(f := chain.body[0], Exact) and f.undoes(undo) else None
        result.append(joined(chain.scalar, (undo, *chain.body) if rest is None else rest))
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
    return joined(chain.scalar, body).key


def transposed(constant: Constant) -> Constant:
    return permuted(constant, (1, 0))
