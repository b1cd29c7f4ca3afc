"""Channels that depend on others: constant ones, and ones in proportion to another.

      h_j = c_j for all inputs,  or  h_j = p·h_i           columns of the constants that write h, compared exactly
    ─────────────────────────────────────────────────
      h  =  (h·S)·R + c                                    S takes the other channels, R copies them back
      f(h)  =  f(h·S)·R + f(c)                             f elementwise; p ≠ 1 takes a positively homogeneous one

A certificate says which channels of a value are left out; whether they depend on the rest is seen here, on the
original's constants alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from rewrite.proof import forms, symmetry
from rewrite.proof.chains import Chain, Exact, Matrix
from rewrite.proof.constants import Array
from rewrite.proof.dimensions import ONE, Dim
from rewrite.proof.forms import Form, Piece, Term, View
from rewrite.proof.transforms import Copied, Selection

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

Numbers = Callable[[np.ndarray], np.ndarray]

CHANNELWISE = symmetry.ELEMENTWISE | {"Mul", "Div", "Pow", "Gelu", "Swish", "QuickGelu", "FastGelu", "BiasGelu"}
"""Operators at which a value is written as what its independent channels make it: before them, sums go on."""

LARGEST = 1 << 24
"""Entries of a constant that is read to compare its columns."""


def reduced(walk: Walk, form: Form, axis: int, selection: Selection) -> Form | None:
    """`form` as (form·S)·R + c along `axis`; None where a channel that S leaves out does not depend on the others."""
    axis %= form.rank
    columns = _columns(form, axis)
    if columns is None or columns[0].shape[1] != selection.size:
        return None
    live, still = columns
    together = np.concatenate(columns)
    kept = {channel: place for place, channel in enumerate(selection.indices)}
    sources, factors, rest = [], [], np.zeros(selection.size)
    for channel in range(selection.size):
        if channel in kept:
            sources.append(kept[channel])
            factors.append(1.0)
        elif not live[:, channel].any():
            sources.append(0)
            factors.append(0.0)
            rest[channel] = still[:, channel].sum()
        else:
            found = _proportional(together, channel, selection.indices)
            if found is None:
                return None
            sources.append(kept[found[0]])
            factors.append(found[1])
    taken = forms.mapped(form, axis, Exact(selection))
    copied = Copied(selection.width, tuple(sources), np.array(factors))
    result = None if taken is None else forms.mapped(taken, axis, Exact(copied))
    return None if result is None else _shifted(walk, result, axis, rest)


def _columns(form: Form, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Columns of the last matrix of every chain, and of the constants that are added: equal columns, equal channels."""
    empty = np.zeros((0, form.shape[axis].constant or 0))
    live, still = [empty], [empty]
    for term in form.terms:
        if term.axis is None or term.whole(axis) != term.axis:
            return None
        for chain in term.chains:
            last = chain.body[-1] if chain.body else None
            if not isinstance(last, Matrix) or last.constant.size > LARGEST:
                return None
            added = term.atom.key == ("one",) and len(chain.body) == 1
            (still if added else live).append(last.constant.whole() * (chain.scalar.value if added else 1.0))
    return np.concatenate(live), np.concatenate(still)


def _proportional(columns: np.ndarray, channel: int, kept: Sequence[int]) -> tuple[int, float] | None:
    """A kept channel, and p, with `channel` = p times it in every entry, exactly."""
    own = columns[:, channel]
    lead = int(np.flatnonzero(own)[0])
    for other in kept:
        theirs = columns[:, other]
        if not theirs[lead]:
            continue
        ratio = Fraction(float(own[lead])) / Fraction(float(theirs[lead]))
        if Fraction(float(ratio)) != ratio or not np.allclose(own, float(ratio) * theirs, rtol=1e-6, atol=0.0):
            continue
        if all(Fraction(float(a)) == ratio * Fraction(float(b)) for a, b in zip(own, theirs)):
            return other, float(ratio)
    return None


def _shifted(walk: Walk, form: Form, axis: int, values: np.ndarray) -> Form:
    """`form` plus a vector along `axis`."""
    if not values.any():
        return form
    after = form.rank - 1 - axis % form.rank
    return forms.add(form, walk.form(Array(values.reshape(-1, *[1] * after))))


def through(
    walk: Walk, form: Form, function: Callable[[Form], Form], numbers: Numbers, homogeneous: bool
) -> Form | None:
    """f(F·R + c) as f(F)·R + f(c) for an elementwise f; `numbers` is f of float64 numbers."""
    if not any(_ends_copied(chain) for term in form.terms for chain in term.chains):
        return None
    for axis in range(form.rank):
        parts = split(form, axis)
        if parts is None:
            continue
        inner, copied, rest = parts
        plain = np.isin(copied.factors, (0.0, 1.0)).all()
        if not plain and not (homogeneous and (copied.factors >= 0).all()):
            return None
        constant = np.where(copied.factors == 0, numbers(rest), 0.0)
        return _shifted(walk, walk.mapped(function(inner), axis, Exact(copied)), axis, constant)
    return None


def product(walk: Walk, a: Form, b: Form, function: Callable[[Form, Form], Form]) -> Form | None:
    """(F·R + c) ⊙ (G·R + d) as (F ⊙ G)·R + c ⊙ d."""
    if a.shape != b.shape or not any(_ends_copied(chain) for term in a.terms for chain in term.chains):
        return None
    for axis in range(a.rank):
        mine, theirs = split(a, axis), split(b, axis)
        if mine is None or theirs is None or mine[1].sources != theirs[1].sources:
            continue
        factors = mine[1].factors * theirs[1].factors
        if not np.isin(factors, (0.0, 1.0)).all() or ((mine[1].factors == 0) != (theirs[1].factors == 0)).any():
            return None
        copied = Copied(mine[1].size, mine[1].sources, factors)
        result = walk.mapped(function(mine[0], theirs[0]), axis, Exact(copied))
        return _shifted(walk, result, axis, mine[2] * theirs[2])
    return None


def _ends_copied(chain: Chain) -> bool:
    last = chain.factors[-1] if chain.factors else None
    return isinstance(last, Exact) and isinstance(last.transform, Copied)


def split(form: Form, axis: int) -> tuple[Form, Copied, np.ndarray] | None:
    """F, R and c with `form` = F·R + c, c zero wherever R copies; None where the form is no such sum."""
    axis %= form.rank
    size = form.shape[axis].constant
    found: Copied | None = None
    terms: list[Term] = []
    rest = np.zeros(size or 0)
    even: list[Term] = []
    for term in form.terms:
        if not term.view.axes[axis]:
            even.append(term)
            continue
        if term.axis is None or term.whole(axis) != term.axis:
            return None
        kept: list[Chain] = []
        for chain in term.chains:
            last = chain.body[-1] if chain.body else None
            if isinstance(last, Exact) and isinstance(last.transform, Copied):
                if found is not None and found != last.transform:
                    return None
                found = last.transform
                kept.append(Chain(chain.factors[:-1]))
            elif term.atom.key == ("one",) and isinstance(last, Matrix) and len(chain.body) == 1:
                rest = rest + last.constant.whole().reshape(-1) * chain.scalar.value
            else:
                return None
        if kept:
            axes = list(term.view.axes)
            assert found is not None
            axes[axis] = (Piece(term.axis, ONE, Dim.of(found.size)),)
            bare = term.axis if any(chain.body for chain in kept) else None
            terms.append(Term(term.atom, View(tuple(axes), term.view.fixed), bare, tuple(kept)))
    if found is None or (rest[found.factors != 0] != 0).any():
        return None
    for term in even:
        # The same for all channels: copied with them, where copies are equal, and a part of what the others are.
        number = term.chains[0].scalar.value if term.atom.key == ("one",) and term.axis is None else None
        if not np.isin(found.factors, (0.0, 1.0)).all() or (number is None and (found.factors == 0).any()):
            return None
        rest = rest + np.where(found.factors == 0, number or 0.0, 0.0)
    terms += even
    shape = (*form.shape[:axis], Dim.of(found.size), *form.shape[axis + 1 :])
    return forms.collect(shape, terms, form.kind), found, rest
