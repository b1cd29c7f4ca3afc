"""Values that are zero where a condition holds.

    Where(c, 0, x) = x ⊙ [not c]          with 0 · anything = 0, as Where has it

Attention's guard for rows that attend to nothing is written so. It is the same function whether heads are an axis of
their own or part of the last one, so it is read in the layout that the guarded value was computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rewrite.proof import forms, symmetry
from rewrite.proof.chains import Exact
from rewrite.proof.dimensions import ONE, Dim, Shape, broadcast
from rewrite.proof.forms import Form, Piece, form_of

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk


def guarded(walk: Walk, condition: Form, x: Form) -> Form:
    """`x` where `condition` does not hold, zero where it does."""
    shape = broadcast(condition.shape, x.shape)
    plain = forms.narrowed(condition)
    if shape == x.shape and (plain.rank == 0 or plain.shape[-1] == ONE):
        # Zero is zero in every basis, and a row is zero or not as a whole.
        peeled = symmetry.peel(walk, x, -1) or symmetry.behind_heads(walk, x)
        if peeled is not None and peeled[1].width == peeled[1].size:
            return walk.mapped(guarded(walk, condition, peeled[0]), -1, Exact(peeled[1]))
        cut = symmetry.heads(walk, x)
        mapped = symmetry.map_heads(walk, guarded(walk, condition, cut[0]), *cut[1:]) if cut is not None else None
        if mapped is not None:
            return mapped
    if shape == x.shape:
        own = in_own_layout(x, plain)
        if own is not None:
            inner, moved, back = own
            return back(_guard(walk, moved, inner))
    return _guard(walk, plain, forms.widened(x, shape))


def _guard(walk: Walk, condition: Form, x: Form) -> Form:
    key = ("guard", walk.intern(condition), walk.intern(x))
    return form_of(walk.atom(key, broadcast(condition.shape, x.shape)))


def in_own_layout(x: Form, other: Form) -> tuple[Form, Form, Callable[[Form], Form]] | None:
    """`x` laid out as the atom of its first term is, `other` laid out with it, and the way back.

    None where an axis of `x` is cut, repeated or missing, or where `other` changes along a part of an axis only.
    """
    if not x.terms:
        return None
    lead = x.terms[0]
    pieces: list[Piece] = []
    ours: list[Dim] = []
    theirs: list[Dim] = []
    missing = x.rank - other.rank
    for axis, elements in enumerate(lead.view.axes):
        if not all(isinstance(element, Piece) for element in elements) or (not elements and x.shape[axis] != ONE):
            return None
        sizes = [element.size for element in elements]
        pieces += elements  # type: ignore[arg-type]
        ours += sizes
        size = other.shape[axis - missing] if axis >= missing else ONE
        theirs += sizes if size == x.shape[axis] else [ONE] * len(sizes)
        if size not in (ONE, x.shape[axis]):
            return None
    order = sorted(range(len(pieces)), key=lambda i: (pieces[i].axis, -_rank_of(pieces, i)))
    fine, fine_other = forms.reshape(x, tuple(ours)), forms.reshape(other, tuple(theirs))
    if fine is None or fine_other is None or lead.view.fixed:
        return None
    inner, moved = forms.transpose(fine, order), forms.transpose(fine_other, order)
    back_order = sorted(range(len(order)), key=order.__getitem__)
    merged = _merged([pieces[i] for i in order], inner.shape, moved.shape)
    if merged is None:
        return None
    laid, laid_other = forms.reshape(inner, merged[0]), forms.reshape(moved, merged[1])
    if laid is None or laid_other is None:
        return None

    def back(result: Form) -> Form:
        split = forms.reshape(result, inner.shape)
        whole = None if split is None else forms.reshape(forms.transpose(split, back_order), x.shape)
        if whole is None:
            raise ValueError("a layout cannot be undone")
        return whole

    return laid, laid_other, back


def _rank_of(pieces: list[Piece], index: int) -> int:
    """How many pieces of the same axis lie inside this one: a larger stride is further out."""
    own = pieces[index]
    return sum(
        1
        for other in pieces
        if other.axis == own.axis and other is not own and own.stride.quotient(other.stride * other.size) is not None
    )


def _merged(pieces: list[Piece], sizes: Shape, others: Shape) -> tuple[Shape, Shape] | None:
    """The sizes after pieces of one axis are joined, for both values; None where the other changes along some only."""
    ours: list[Dim] = []
    theirs: list[Dim] = []
    last: int | None = None
    whole = False
    for piece, size, other in zip(pieces, sizes, others):
        changes = other != ONE or size == ONE
        if piece.axis == last:
            if changes != whole:
                return None
            ours[-1] = ours[-1] * size
            theirs[-1] = theirs[-1] * other
        else:
            ours.append(size)
            theirs.append(other)
        last, whole = piece.axis, changes
    return tuple(ours), tuple(theirs)
