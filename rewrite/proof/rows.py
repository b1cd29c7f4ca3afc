"""Elementwise operators on flattened rows: computed on the rows as they were before they were flattened.

    f(reshape(x)) = reshape(f(x))        f elementwise

A tool may drop the reshape around a product or put one there. The same function of (batch·length, d) and of
(batch, length, d) is then one atom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from rewrite.proof import forms
from rewrite.proof.dimensions import ONE, Dim, Shape
from rewrite.proof.forms import Form, Piece
from rewrite.proof.symmetry import ELEMENTWISE
from rewrite.proof.values import Value

if TYPE_CHECKING:
    from rewrite.proof.walk import Walk

ROWWISE = {
    "": ELEMENTWISE | frozenset(("Mul", "Div", "Pow", "Reciprocal", "Gelu", "Swish")),
    "com.microsoft": frozenset(("Gelu", "BiasGelu", "FastGelu", "QuickGelu")),
}


@dataclass(frozen=True)
class TakenApart:
    """Operands on rows that are not flattened, and the shape that the result has."""

    operands: tuple[Value | None, ...]
    shape: Shape

    def joined(self, result: Value) -> Value:
        whole = forms.reshape(result, self.shape) if isinstance(result, Form) else None
        if whole is None:
            raise ValueError("rows cannot be flattened again")
        return whole


def taken_apart(walk: Walk, node: ir.Node, operands: Sequence[Value | None]) -> TakenApart | None:
    """None where no operand has flattened rows, or another does not fit them."""
    if node.op_type not in ROWWISE.get("" if node.domain == "ai.onnx" else node.domain, ()):
        return None
    lead = next((o for o in operands if isinstance(o, Form) and (_digits(o) or ())), None)
    digits = None if lead is None else _digits(lead)
    if lead is None or digits is None:
        return None
    fitted: list[Value | None] = []
    for operand in operands:
        shape = walk.shape(operand)
        if len(shape) <= 1 and all(size in (ONE, lead.shape[-1]) for size in shape):
            fitted.append(operand)
            continue
        if not isinstance(operand, Form) or operand.rank > lead.rank:
            return None
        fine: list[Dim] = []
        missing = lead.rank - operand.rank
        for axis, size in enumerate(operand.shape):
            parts = digits[axis + missing]
            if size != ONE and size != lead.shape[axis + missing]:
                return None
            fine += [ONE] * len(parts) if size == ONE else parts
        apart = forms.reshape(operand, tuple(fine))
        if apart is None:
            return None
        fitted.append(apart)
    return TakenApart(tuple(fitted), lead.shape)


def _digits(form: Form) -> list[Shape] | None:
    """For every axis of `form` the sizes that it is flattened of; None where no axis but the last is."""
    term = next((term for term in form.terms if term.atom.key != ("one",)), None)
    if term is None or form.rank < 2 or form.kind != "f":
        return None
    digits: list[Shape] = []
    for size, elements in zip(form.shape[:-1], term.view.axes):
        whole = all(isinstance(element, Piece) for element in elements) and len(elements) > 1
        digits.append(tuple(element.size for element in elements) if whole else (size,))
    return [*digits, (form.shape[-1],)] if any(len(sizes) > 1 for sizes in digits) else None
