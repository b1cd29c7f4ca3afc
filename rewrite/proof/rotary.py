"""Rotary position embedding: the fused operator by its definition, and cosines of joined angles.

    RotaryEmbedding(x; c, s) = x ⊙ [c c] + [−x₂ x₁] ⊙ [s s]        x = [x₁ x₂] on the last axis, half and half

Source: ONNX operator RotaryEmbedding-23, interleaved = 0; RoFormer, arXiv:2104.09864, §3.4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.chains import Scalar
from rewrite.proof.dimensions import ONE, Dim, product
from rewrite.proof.forms import Form, Padded, Repeat, Term, View
from rewrite.proof.rules import attribute, rule, times, unary
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk


@rule("Cos", "Sin")
def trigonometric(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Form:
    """An elementwise function of values joined along an axis is the join of its results."""
    wide = walk.form(operands[0])
    # What only repeats along an axis has one angle there.
    form = forms.narrowed(wide)
    joined = parts(form)
    if joined is None:
        result = unary(walk, node.op_type, form)
    else:
        axis, blocks = joined
        result = forms.concatenate([unary(walk, node.op_type, block) for block in blocks], axis)
    return forms.widened(result, wide.shape)


def parts(form: Form) -> tuple[int, list[Form]] | None:
    """The values that `form` is the concatenation of, and the axis; None where it is none, or has a gap."""
    for axis in range(form.rank):
        elements = [term.view.axes[axis] for term in form.terms]
        if not elements or not all(len(e) == 1 and isinstance(e[0], Padded) for e in elements):
            continue
        blocks: dict[int, tuple[Dim, list[Term]]] = {}
        for term in form.terms:
            padded = term.view.axes[axis][0]
            if not isinstance(padded, Padded) or padded.offset.constant is None:
                return None
            inner = () if all(isinstance(e, Repeat) for e in padded.inner) else padded.inner
            axes = (*term.view.axes[:axis], inner, *term.view.axes[axis + 1 :])
            inside = product(e.size for e in padded.inner)
            size, terms = blocks.setdefault(padded.offset.constant, (inside, []))
            if inside != size:
                return None
            terms.append(Term(term.atom, View(axes, term.view.fixed), term.axis, term.chains))
        end, result = Dim.of(0), []
        for offset, (size, terms) in sorted(blocks.items()):
            if end != Dim.of(offset):
                return None
            end = end + size
            shape = (*form.shape[:axis], size, *form.shape[axis + 1 :])
            result.append(forms.collect(shape, terms, form.kind))
        return (axis, result) if end == form.shape[axis] else None
    return None


@rule("RotaryEmbedding")
def rotary_embedding(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> Form | None:
    """Half and half, over the whole head, with caches for every position in order; other forms stay opaque."""
    if attribute(node, "interleaved", 0) or attribute(node, "rotary_embedding_dim", 0):
        return None
    if len(operands) > 3 and operands[3] is not None:
        return None
    x, cosine, sine = (walk.form(operand) for operand in operands[:3])
    heads = attribute(node, "num_heads", 0)
    packed = x.rank == 3
    if packed:
        size = x.shape[2].quotient(Dim.of(heads)) if heads else None
        split = None if size is None else forms.reshape(x, (*x.shape[:2], Dim.of(heads), size))
        if split is None:
            return None
        x = forms.transpose(split, (0, 2, 1, 3))
    result = turned(walk, x, cosine, sine)
    if result is None or not packed:
        return result
    batch, count, length, size_ = result.shape
    return forms.reshape(forms.transpose(result, (0, 2, 1, 3)), (batch, length, count * size_))


def turned(walk: Walk, x: Form, cosine: Form, sine: Form) -> Form | None:
    """x (batch, heads, length, size) turned half and half, by caches of (batch or 1, length, size / 2)."""
    size = x.shape[-1].constant
    if x.rank != 4 or cosine.rank != 3 or size is None or size % 2 or cosine.shape[2] != Dim.of(size // 2):
        return None
    half = Dim.of(size // 2)
    caches = []
    for cache in (cosine, sine):
        twice = forms.concatenate([cache, cache], 2)
        caches.append(forms.reshape(twice, (twice.shape[0], ONE, *twice.shape[1:])))
    if any(cache is None for cache in caches):
        return None
    first, second = forms.take(x, 3, Dim.of(0), half), forms.take(x, 3, half, half)
    across = forms.concatenate([forms.scaled(second, Scalar(-1.0)), first], 3)
    return forms.add(times(walk, x, caches[0]), times(walk, across, caches[1]))
