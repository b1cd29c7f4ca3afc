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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.chains import Chain, Exact, diagonal_of
from rewrite.proof.dimensions import ONE, Dim, Shape
from rewrite.proof.dimensions import product as product_of
from rewrite.proof.forms import Form, Padded, Piece, Repeat, Term, View
from rewrite.proof.transforms import Invertible, Reciprocal, Repeated, Scaling, Selection, Signs, Transform
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


def peel(walk: Walk, form: Form, axis: int) -> tuple[Form, Transform] | None:
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
    return unclosed(walk, forms.collect(shape, [*terms, *constant], form.kind)), found


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
        size, stride = piece.size.constant, piece.stride.constant
        within = None if size is None or stride is None else transform.within(size, stride)
        if within is None:
            return None
        transform = within
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
        peeled = peel(walk, form, axis)
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
    if node.op_type in POOLED and form.rank > 2 and (peeled := peel(walk, form, 1)) is not None:
        values = diagonal_of(peeled[1])
        positive = values is not None and bool((values > 0).all())
        if peeled[1].width == peeled[1].size and (positive or "Average" in node.op_type or _permutes(peeled[1])):
            return peeled[0], 1, peeled[1]
    return None


def _permutes(transform: Transform) -> bool:
    if isinstance(transform, Repeated):
        return _permutes(transform.inner)
    return isinstance(transform, Selection) and transform.permutation


def scaled_heads(walk: Walk, a: Form, b: Form) -> tuple[Form, Form, int, Transform] | None:
    """F, G, the axis of heads and a diagonal D of heads and channels with a ⊙ b = (F ⊙ G)·D."""
    for form, other in ((a, b), (b, a)):
        cut = heads(walk, form) if other.rank <= form.rank else None
        if cut is not None and diagonal_of(cut[2]) is not None:
            return cut[0], other, cut[1], cut[2]
    return None


def product(walk: Walk, a: Form, b: Form) -> tuple[Form, Form, int, list[Transform]] | None:
    """F, G, an axis counted from the end and transforms with a ⊙ b = (F ⊙ G)·T₁·T₂ on it."""
    a, b = (walk.aligned(form) if form.rank > 1 else form for form in (a, b))
    if not (ends_exactly(a) or ends_exactly(b)):
        return None
    for axis in range(-1, -max(a.rank, b.rank) - 1, -1):
        mine, theirs = (peel(walk, form, axis) if form.rank >= -axis else None for form in (a, b))
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
        sizes = (ONE, peeled[0].shape[axis]) if peeled[1].width == peeled[1].size else (ONE,)
        along = other.rank < -axis or other.shape[axis] in sizes
        if along and (per_row or diagonal_of(peeled[1]) is not None):
            left, right = (peeled[0], other) if mine is not None else (other, peeled[0])
            return left, right, axis, [peeled[1]]
    return None


# ── Contractions ────────────────────────────────────────────────────────────────────────────────────────────────────


def pairing(walk: Walk, a: Form, b: Form) -> tuple[Form, Form, float] | None:
    """F, G and a number n with A·B = n·F·G, where A = F·M on the contracted axis and Bᵀ = n·Gᵀ·M⁻ᵀ."""
    a, b = walk.aligned(a), walk.aligned(b, -2)
    if not (ends_exactly(a) and ends_exactly(b)):
        return None
    left, right = peel(walk, a, -1), peel(walk, b, -2)
    if left is not None and right is not None:
        number = _pair(left[1], right[1])
        return None if number is None else (left[0], right[0], number)
    turned = (*range(b.rank - 2), b.rank - 1, b.rank - 2)
    mine, theirs = heads(walk, a), heads(walk, forms.transpose(b, turned))
    # Axes are counted from the left: in values of two ranks they would be two axes.
    if mine is None or a.rank != b.rank or a.shape[mine[1]] != b.shape[mine[1]]:
        return None
    queries, axis, transform = mine
    if theirs is not None and theirs[1] == axis and (number := _pair(transform, theirs[2])) is not None:
        return queries, forms.transpose(theirs[0], turned), number
    count = a.shape[axis].constant
    if right is not None and count is not None and (number := _pair(transform, tiled(right[1], count))) is not None:
        # One key for all heads.
        return queries, right[0], number
    return None


def _pair(mine: Transform, theirs: Transform) -> float | None:
    """The number n with M·Nᵀ = n·I; None where the product is no number."""
    if isinstance(mine, Repeated) and isinstance(theirs, Repeated):
        alike = (mine.left, mine.right) == (theirs.left, theirs.right)
        return _pair(mine.inner, theirs.inner) if alike else None
    if isinstance(mine, Signs) and isinstance(theirs, Signs) and mine.scale is not None and theirs.scale is not None:
        return mine.scale * theirs.scale * mine.size if np.array_equal(mine.values, theirs.values) else None
    # Only what has an inverse on all vectors is undone by its dual: a selection or an isometry is not.
    if mine.size != theirs.size or mine.width != mine.size or theirs.width != theirs.size:
        return None
    try:
        invertible = mine.inverse.size == theirs.inverse.size
        return 1.0 if invertible and (mine.dual == theirs or theirs.dual == mine) else None
    except ValueError:
        return None


def heads(walk: Walk, form: Form) -> tuple[Form, int, Transform] | None:
    """F, the axis of heads and a block-diagonal T with `form` = F·T on the channels of every head (the last axis).

    T acts on the joined axis of heads and channels; heads that are repeated repeat their block, and a diagonal is put
    together of what the parts of the last axis end in.
    """
    if form.rank < 3 or not ends_exactly(form):
        return None
    size = form.shape[-1].constant
    cuts = [_head_term(term, form.rank) for term in form.terms]
    known = [cut for cut in cuts if cut is not None]
    if size is None or len(known) != len(cuts) or not known or len({cut.axis for cut in known}) != 1:
        return None
    axis = known[0].axis
    count = form.shape[axis].constant
    if all(cut.size == size and cut.transform == known[0].transform for cut in known):
        transform = known[0].transform
    else:
        diagonal = None if count is None else _put_together(known, count, size)
        if diagonal is None:
            return None
        transform = diagonal
    # A map of more channels than those of these heads acts on another axis of the value as well.
    if count is None or transform.size != count * size:
        return None
    return unclosed(walk, forms.collect(form.shape, [cut.term for cut in known], form.kind)), axis, transform


@dataclass(frozen=True)
class _Cut:
    """A term less its transform; the heads' axis; what it ends in, which acts on `size` channels a head at `offset`."""

    term: Term
    axis: int
    transform: Transform
    offset: int
    size: int


def _put_together(cuts: Sequence[_Cut], count: int, size: int) -> Transform | None:
    """One diagonal of all channels of which every cut ends in a part; channels that are zero everywhere have 1.

    All parts are diagonals, or all are reciprocals of diagonals: what is exact stays so.
    """
    reciprocal = isinstance(cuts[0].transform, Reciprocal)
    values, set_ = np.ones((count, size)), np.zeros(size, bool)
    for cut in cuts:
        scaling = cut.transform.scaling if reciprocal and isinstance(cut.transform, Reciprocal) else cut.transform
        if not isinstance(scaling, Scaling) or scaling.size != count * cut.size:
            return None
        part, where = scaling.values.reshape(count, cut.size), slice(cut.offset, cut.offset + cut.size)
        if (set_[where] & (values[:, where] != part).any(0)).any():
            return None
        values[:, where], set_[where] = part, True
    scaling = Scaling(values.reshape(-1))
    return scaling.inverse if reciprocal else scaling


def _head_term(term: Term, rank: int) -> _Cut | None:
    last, offset = term.view.axes[-1], 0
    if len(last) == 1 and isinstance(padded := last[0], Padded):
        if padded.offset.constant is None:
            return None
        last, offset = padded.inner, padded.offset.constant
    piece = last[0] if len(last) == 1 else None
    if term.axis is None or not isinstance(piece, Piece) or piece.axis != term.axis or piece.stride != ONE:
        return None
    ends = {chain.body[-1].key: chain.body[-1] for chain in term.chains if chain.body}
    exact = next(iter(ends.values()), None)
    size = piece.size.constant
    if len(ends) != 1 or not isinstance(exact, Exact) or any(not chain.body for chain in term.chains) or size is None:
        return None
    for axis in range(rank - 1):
        elements = term.view.axes[axis]
        if not elements or not isinstance(head := elements[0], Piece) or head.axis != term.axis:
            continue
        if head.stride != piece.size or not all(isinstance(e, Repeat) for e in elements[1:]):
            return None
        groups = 1
        for repeat in elements[1:]:
            if repeat.size.constant is None:
                return None
            groups *= repeat.size.constant
        repeated = repeat_blocks(exact.transform, size, groups)
        if repeated is None:
            return None
        chains = tuple(Chain(chain.factors[:-1]) for chain in term.chains)
        inner = term.axis if any(chain.body for chain in chains) else None
        return _Cut(replace(term, axis=inner, chains=chains), axis, repeated, offset, size)
    return None


def with_heads_mapped(walk: Walk, form: Form, transform: Transform) -> Form | None:
    """`form` with T on the joined axis of heads and channels behind its maps; None where it maps no heads."""
    terms: list[Term] = []
    for term in form.terms:
        if term.axis is None or any(chain.sizes()[1] != transform.size for chain in term.chains):
            return None
        chains = tuple(new for chain in term.chains if (new := chain.then(Exact(transform))) is not None)
        if len(chains) != len(term.chains):
            return None
        terms.append(replace(term, chains=chains))
    mapped = forms.collect(form.shape, terms, form.kind)
    last = (*range(form.rank - 2), form.rank - 1, form.rank - 2)
    found = heads(walk, mapped) or (heads(walk, forms.transpose(mapped, last)) if form.rank > 2 else None)
    return mapped if found is not None else None


def map_heads(walk: Walk, form: Form, axis: int, transform: Transform) -> Form | None:
    """`form`·T for a T that maps the channels (the last axis) of every head by themselves; `axis` is that of heads.

    Heads and channels are joined into one axis, mapped, and taken apart again.
    """
    outer = [i for i in range(form.rank - 1) if i != axis]
    order = (*outer, axis, form.rank - 1)
    ordered = forms.transpose(form, order)
    joined = forms.reshape(ordered, (*ordered.shape[:-2], ordered.shape[-2] * ordered.shape[-1]))
    if joined is None or joined.shape[-1] != Dim.of(transform.size):
        return None
    parted = forms.reshape(walk.mapped(joined, -1, Exact(transform)), ordered.shape)
    return None if parted is None else forms.transpose(parted, tuple(order.index(i) for i in range(form.rank)))


def behind_heads(walk: Walk, form: Form) -> tuple[Form, Transform] | None:
    """F and T with `form` = F·T on the last axis, which joins heads and channels, where every head ends in one map.

    For a value that is closed off: the map comes out of it.
    """
    if not ends_exactly(form) or not form.terms or not (last := form.terms[0].view.axes[-1]):
        return None
    piece, size = last[-1], form.shape[-1].constant
    inner = piece.size.constant if isinstance(piece, Piece) else None
    if len(last) < 2 or inner is None or size is None or size % inner:
        return None
    split = forms.reshape(form, (*form.shape[:-1], Dim.of(size // inner), Dim.of(inner)))
    peeled = None if split is None else peel(walk, split, -1)
    if peeled is None or peeled[1].width != peeled[1].size:
        return None
    joined = forms.reshape(peeled[0], form.shape)
    return None if joined is None else (joined, tiled(peeled[1], size // inner))


def unclosed(walk: Walk, form: Form) -> Form:
    """`form` with values that were closed off for a map, and have none any more, as what they are."""
    terms: list[Term] = []
    for term in form.terms:
        inner = _unpadded(walk, term, form) if term.atom.key[0] == "value" and term.axis is None else None
        terms += [term] if inner is None else inner
    return forms.collect(form.shape, terms, form.kind)


def _unpadded(walk: Walk, term: Term, form: Form) -> Sequence[Term] | None:
    """The terms of the value behind a closed-off atom, as a part of a join where `term` is one."""
    pads = {axis: e[0] for axis, e in enumerate(term.view.axes) if len(e) == 1 and isinstance(e[0], Padded)}
    bare = [pads[axis].inner if axis in pads else e for axis, e in enumerate(term.view.axes)]
    sizes = [product_of(e.size for e in bare[axis]) if axis in pads else n for axis, n in enumerate(form.shape)]
    opened = _opened(walk, replace(term, view=View(tuple(bare), term.view.fixed)), tuple(sizes))
    if opened is None or not pads:
        return None if opened is None else opened.terms
    terms: list[Term] = []
    for each in opened.terms:
        axes = list(each.view.axes)
        for axis, pad in pads.items():
            axes[axis] = (Padded(axes[axis] or (Repeat(sizes[axis]),), pad.offset, pad.size),)
        terms.append(replace(each, view=View(tuple(axes), each.view.fixed)))
    return terms


def _opened(walk: Walk, term: Term, shape: Shape) -> Form | None:
    """The value behind a closed-off atom, laid out as `term` lays out the atom; None where it is cut."""
    inside = walk.table.forms[term.atom.key[1]]
    elements: list[Piece | Repeat] = []
    for size, axis in zip(shape, term.view.axes):
        if not all(isinstance(element, Piece | Repeat) for element in axis):
            return None
        elements += axis or ([Repeat(size)] if size != ONE else [])  # type: ignore[arg-type]
    pieces = [element for element in elements if isinstance(element, Piece)]
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].axis, -_inside(pieces, i)))
    split = forms.reshape(inside, tuple(pieces[i].size for i in order))
    if split is None or term.view.fixed:
        return None
    turned = forms.transpose(split, tuple(order.index(i) for i in range(len(pieces))))
    single = forms.reshape(turned, tuple(e.size if isinstance(e, Piece) else ONE for e in elements))
    wide = None if single is None else forms.widened(single, tuple(element.size for element in elements))
    laid = None if wide is None else forms.reshape(wide, shape)
    if laid is None:
        return None
    for chain in term.chains:
        laid = forms.scaled(laid, chain.scalar)
    return laid


def _inside(pieces: Sequence[Piece], index: int) -> int:
    """How many pieces of the same axis lie inside this one."""
    own = pieces[index]
    return sum(
        1
        for other in pieces
        if other.axis == own.axis and other is not own and own.stride.quotient(other.stride * other.size) is not None
    )


def tiled(transform: Transform, count: int) -> Transform:
    """The same map for each of `count` heads."""
    if isinstance(transform, Scaling):
        return Scaling(np.tile(transform.values, count))
    if isinstance(transform, Reciprocal):
        return tiled(transform.scaling, count).inverse
    return Repeated(transform, count) if count > 1 else transform


def repeat_blocks(transform: Transform, size: int, groups: int) -> Transform | None:
    """A map of each group of `size` channels, every group's `groups` times in a row; None where T mixes groups."""
    if isinstance(transform, Repeated):
        if transform.within(size) is not None:
            return Repeated(transform.inner, transform.left * groups, transform.right)
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
