"""What commutes with nonlinear operators: an exact transform in front of one comes out behind it.

    rms(x·Q)         =  rms(x)·Q               Q orthogonal
    rms(x·a·U)       =  rms(x·P)·a·U           a·U the scaled isometry of P = I − 11ᵀ/d
    rms_ε(s·x)       =  rms_{ε/s²}(x)          s > 0
    f(x·Π)           =  f(x)·Π                 f elementwise, Π a selection of channels
    f(x·D)           =  f(x)·D                 f positively homogeneous, D > 0
    (x·D) ⊙ y        =  (x ⊙ y)·D              D diagonal; any T where y is one number a row
    (q·M)(k·M⁻ᵀ)ᵀ    =  q·kᵀ
    p·(v·M)          =  (p·v)·M                M one map for all heads, or one for each

A transform is taken off a form only where every term ends in it, as an `Exact` factor: nothing is recognized here that
a relation has not put there, or a constant of the graph is not exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.dimensions import ONE, Dim
from rewrite.proof.forms import Form, Piece, Repeat, Term, View
from rewrite.proof.linear import Chain, Exact, diagonal_of
from rewrite.proof.transforms import Invertible, Repeated, Scaling, Selection, Transform
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk


def ends_exactly(form: Form) -> bool:
    """Whether any term of `form` ends in an exact transform: without one there is nothing to take off."""
    return any(isinstance(chain.factors[-1], Exact) for t in form.terms for chain in t.chains if chain.factors)


def holds_exact(value: Value | None) -> bool:
    """Whether an exact transform stands anywhere in a value."""
    return isinstance(value, Form) and any(
        isinstance(factor, Exact) for term in value.terms for chain in term.chains for factor in chain.factors
    )


def peel(form: Form, axis: int) -> tuple[Form, Transform] | None:
    """F and T with `form` = F·T on `axis`; None where the terms do not all end in one transform there."""
    axis %= form.rank
    if not ends_exactly(form):
        return None
    found: Transform | None = None
    constant: list[Term] = []
    terms: list[Term] = []
    for term in form.terms:
        if not term.view.axes[axis]:
            constant.append(term)
            continue
        ended = _ended(term, axis)
        if ended is None or (found is not None and found != ended[1]):
            return None
        terms.append(ended[0])
        found = ended[1]
    # What is constant along the axis is not moved by a selection, but by everything else.
    if found is None or (constant and not isinstance(found, Selection)):
        return None
    shape = (*form.shape[:axis], Dim.of(found.size), *form.shape[axis + 1 :])
    return forms.collect(shape, [*terms, *constant], form.kind), found


def _ended(term: Term, axis: int) -> tuple[Term, Transform] | None:
    """`term` without the transform that all its chains end in, and the transform as it acts on the value's `axis`."""
    if term.axis is None or any(not chain.body or not isinstance(chain.body[-1], Exact) for chain in term.chains):
        return None
    last = {chain.body[-1].key: chain.body[-1] for chain in term.chains}
    if len(last) != 1:
        return None
    exact = next(iter(last.values()))
    assert isinstance(exact, Exact)
    transform, axes = exact.transform, list(term.view.axes)
    if term.whole(axis) == term.axis:
        axes[axis] = (Piece(term.axis, ONE, Dim.of(transform.size)),)
    else:
        piece = axes[axis][0] if len(axes[axis]) == 1 else None
        if not (isinstance(transform, Repeated) and isinstance(piece, Piece) and piece.axis == term.axis):
            return None
        if piece.stride != Dim.of(transform.right) or piece.size != Dim.of(transform.inner.size):
            return None
        transform = transform.inner
    chains = tuple(Chain(chain.factors[:-1]) for chain in term.chains)
    inner = term.axis if any(chain.body for chain in chains) else None
    return Term(term.atom, View(tuple(axes), term.view.fixed), inner, chains), transform


# ── Elementwise operators ───────────────────────────────────────────────────────────────────────────────────────────

ELEMENTWISE = frozenset(
    "Abs Celu Clip Cos Elu Erf Exp HardSigmoid HardSwish LeakyRelu Log Mish Relu Selu Sigmoid Sin Softplus Softsign"
    " Sqrt Tanh ThresholdedRelu".split()
)
"""Functions of one operand, number by number (Clip's bounds are the same for all)."""

HOMOGENEOUS = frozenset(("Relu", "LeakyRelu"))
"""f(a·x) = a·f(x) for a > 0. Clip, and with it ReLU6, is not."""


def through_elementwise(walk: Walk, name: str, form: Form) -> tuple[Form, int, Transform] | None:
    """F, the axis and T with f(`form`) = f(F)·T."""
    for axis in {-1, 1 - form.rank} if form.rank > 1 else ():
        form = walk.aligned(form, axis)
    if not ends_exactly(form):
        return None
    for axis in range(form.rank):
        peeled = peel(form, axis)
        if peeled is None:
            continue
        transform = peeled[1]
        positive = (values := diagonal_of(transform)) is not None and bool((values > 0).all())
        if _permutes(transform) or (positive and name in HOMOGENEOUS):
            return peeled[0], axis, transform
    return None


POOLED = frozenset(("MaxPool", "GlobalMaxPool", "AveragePool", "GlobalAveragePool"))
"""Pooling keeps channels apart (axis 1): an average passes any map of them, a maximum a positive diagonal."""


def through(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> tuple[Form, int, Transform] | None:
    """F, the axis and T, where a node's first operand is F·T and its only result comes out times T."""
    form = operands[0] if operands else None
    if not isinstance(form, Form) or form.kind != "f" or len(node.outputs) != 1:
        return None
    if node.op_type in ELEMENTWISE and not any(isinstance(operand, Form) for operand in operands[1:]):
        return through_elementwise(walk, node.op_type, form)
    if node.op_type in POOLED and form.rank > 2 and (peeled := peel(form, 1)) is not None:
        values = diagonal_of(peeled[1])
        positive = values is not None and bool((values > 0).all())
        if peeled[1].width == peeled[1].size and (positive or "Average" in node.op_type or _permutes(peeled[1])):
            return peeled[0], 1, peeled[1]
    return None


def _permutes(transform: Transform) -> bool:
    if isinstance(transform, Repeated):
        return _permutes(transform.inner)
    return isinstance(transform, Selection) and transform.permutation


def product(walk: Walk, a: Form, b: Form) -> tuple[Form, Form, int, list[Transform]] | None:
    """F, G, an axis counted from the end and transforms with a ⊙ b = (F ⊙ G)·T₁·T₂ on it."""
    a, b = (walk.aligned(form) if form.rank > 1 else form for form in (a, b))
    if not (ends_exactly(a) or ends_exactly(b)):
        return None
    for axis in range(-1, -max(a.rank, b.rank) - 1, -1):
        mine, theirs = (peel(form, axis) if form.rank >= -axis else None for form in (a, b))
        if mine is None and theirs is None:
            continue
        if mine is not None and theirs is not None:
            diagonal = diagonal_of(mine[1]) is not None and diagonal_of(theirs[1]) is not None
            if diagonal:
                return mine[0], theirs[0], axis, [mine[1], theirs[1]]
            if mine[1] == theirs[1] and _permutes(mine[1]):
                return mine[0], theirs[0], axis, [mine[1]]
            continue
        peeled, other = (mine, b) if mine is not None else (theirs, a)
        assert peeled is not None
        per_row = other.rank < -axis or other.shape[axis] == ONE or not any(t.view.axes[axis] for t in other.terms)
        along = other.rank < -axis or other.shape[axis] in (ONE, peeled[0].shape[axis])
        if along and (per_row or diagonal_of(peeled[1]) is not None):
            left, right = (peeled[0], other) if mine is not None else (other, peeled[0])
            return left, right, axis, [peeled[1]]
    return None


# ── Contractions ────────────────────────────────────────────────────────────────────────────────────────────────────


def pairing(walk: Walk, a: Form, b: Form) -> tuple[Form, Form] | None:
    """F and G with A·B = F·G, where A = F·M on the contracted axis and Bᵀ = Gᵀ·M⁻ᵀ."""
    left, right = peel(walk.aligned(a), -1), peel(walk.aligned(b, -2), -2)
    if left is None or right is None:
        return None
    try:
        return (left[0], right[0]) if left[1].dual == right[1] or right[1].dual == left[1] else None
    except ValueError:
        return None


def heads(form: Form) -> tuple[Form, int, Transform] | None:
    """F, the axis of heads and a block-diagonal T with `form` = F·T on the channels of every head (the last axis).

    T acts on the joined axis of heads and channels; heads that are repeated repeat their block.
    """
    if form.rank < 3 or not ends_exactly(form):
        return None
    found: tuple[int, Transform] | None = None
    terms: list[Term] = []
    for term in form.terms:
        cut = _head_term(term, form.rank)
        if cut is None or (found is not None and found != cut[1:]):
            return None
        terms.append(cut[0])
        found = cut[1:]
    return None if found is None else (forms.collect(form.shape, terms, form.kind), *found)


def _head_term(term: Term, rank: int) -> tuple[Term, int, Transform] | None:
    last = term.view.axes[-1]
    piece = last[0] if len(last) == 1 else None
    if term.axis is None or not isinstance(piece, Piece) or piece.axis != term.axis or piece.stride != ONE:
        return None
    ends = {chain.body[-1].key: chain.body[-1] for chain in term.chains if chain.body}
    exact = next(iter(ends.values()), None)
    if len(ends) != 1 or not isinstance(exact, Exact) or any(not chain.body for chain in term.chains):
        return None
    size = piece.size.constant
    for axis in range(rank - 2):
        elements = term.view.axes[axis]
        if not elements or not isinstance(head := elements[0], Piece) or head.axis != term.axis:
            continue
        if head.stride != piece.size or not all(isinstance(e, Repeat) for e in elements[1:]):
            return None
        groups = 1
        for repeat in elements[1:]:
            assert isinstance(repeat, Repeat)
            if repeat.size.constant is None:
                return None
            groups *= repeat.size.constant
        repeated = None if size is None else repeat_blocks(exact.transform, size, groups)
        if repeated is None:
            return None
        chains = tuple(Chain(chain.factors[:-1]) for chain in term.chains)
        inner = term.axis if any(chain.body for chain in chains) else None
        return replace(term, axis=inner, chains=chains), axis, repeated
    return None


def repeat_blocks(transform: Transform, size: int, groups: int) -> Transform | None:
    """A map of each group of `size` channels, every group's `groups` times in a row; None where T mixes groups."""
    if isinstance(transform, Repeated):
        if transform.right == 1 and transform.inner.size == size:
            return Repeated(transform.inner, transform.left * groups)
        if transform.right != 1 or transform.left != 1:
            return None
    values = diagonal_of(transform)
    if isinstance(transform, Scaling) and values is not None:
        return Scaling(np.repeat(values.reshape(-1, size), groups, axis=0).reshape(-1))
    if isinstance(transform, Invertible) and transform.stack.shape[-1] == size:
        return Invertible(np.repeat(transform.stack, groups, axis=0))
    inverted = _inverse_of(transform)
    if inverted is not None:
        repeated = repeat_blocks(inverted, size, groups)
        return None if repeated is None else repeated.inverse
    return None


def _inverse_of(transform: Transform) -> Transform | None:
    """The transform that `transform` is written as the inverse of."""
    try:
        inverse = transform.inverse
    except ValueError:
        return None
    return inverse if isinstance(inverse, Scaling | Invertible) else None
