"""Elementwise operators before and after rows are flattened: the same function, as long as the rows stay in order."""

from __future__ import annotations

import numpy as np
import pytest
from pairs import accepted, model, refused

ROWS = {
    "rows": np.array([-1, 4]),
    "two": np.float32(2),
    "v": np.float32([1, 2, 3, 4]),
    "swap": np.array([1, 0, 2]),
    "w": np.eye(4, dtype=np.float32) + 1,
}
TEXT = "(float[B,S,4] x, float[B,S,4] u) => (y) {{ n = Shape(x) {} }}"
FLAT = "f = Reshape(x, rows) g = Reshape(u, rows) {} y = Reshape(r, n)"


@pytest.mark.parametrize(
    ("on_rows", "as_it_was"),
    [
        ("r = Tanh(f)", "y = Tanh(x)"),
        ("r = Pow(f, two)", "y = Mul(x, x)"),
        ("a = Sigmoid(f) r = Mul(a, g)", "a = Sigmoid(x) y = Mul(u, a)"),
        ("m = Mul(f, v) r = Relu(m)", "m = Mul(x, v) y = Relu(m)"),
        ("r = Div(f, g)", "y = Div(x, u)"),
        ("r = com.microsoft.FastGelu(f, v)", "b = Add(x, v) y = com.microsoft.FastGelu(b)"),
        ('r = com.microsoft.FusedGemm<activation="Tanh">(f, w)', "m = MatMul(x, w) y = Tanh(m)"),
    ],
)
def test_flattened_rows_are_the_same_function(on_rows: str, as_it_was: str) -> None:
    flat, whole = (model(TEXT.format(body), ROWS) for body in (FLAT.format(on_rows), as_it_was))
    accepted(flat, whole)
    accepted(whole, flat)


def test_rows_in_another_order_are_not() -> None:
    """A reshape to (length, batch, d) and a transpose back: the shape is right, the order is not."""
    turned = "f = Reshape(x, rows) t = Tanh(f) m = Gather(n, swap) z = Reshape(t, m) y = Transpose<perm=[1,0,2]>(z)"
    refused(model(TEXT.format("y = Tanh(x)"), ROWS), model(TEXT.format(turned), ROWS))


def test_a_row_that_is_repeated_for_another_operand_is_left_alone() -> None:
    """(rows, 1) ⊙ (d,) has more columns than the rows have."""
    text = "(float[B,S,1] x) => (y) { f = Reshape(x, flat) e = Exp(f) y = Mul(e, v) }"
    wide = "(float[B,S,1] x) => (y) { e = Exp(x) p = Mul(e, v) y = Reshape(p, rows) }"
    given = {**ROWS, "flat": np.array([-1, 1])}
    accepted(model(text, given), model(text, given))
    refused(model(text, given), model(wide.replace("Exp", "Tanh"), given))
