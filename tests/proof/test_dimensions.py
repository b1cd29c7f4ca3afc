"""Sizes as polynomials: every law is checked by putting numbers in for the symbols."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.proof.dimensions import ONE, Dim, broadcast, minimum, opaque, parse, product

SYMBOLS = ("a", "b", "c")


def dims() -> st.SearchStrategy[Dim]:
    leaves = st.one_of(st.integers(-6, 6).map(Dim.of), st.sampled_from(SYMBOLS).map(Dim.symbol))
    return st.recursive(
        leaves,
        lambda inner: st.tuples(inner, inner, st.sampled_from("+-*")).map(
            lambda t: {"+": t[0] + t[1], "-": t[0] - t[1], "*": t[0] * t[1]}[t[2]]
        ),
        max_leaves=6,
    )


def value(dim: Dim, numbers: tuple[int, ...]) -> int:
    known = dict(zip(SYMBOLS, numbers))
    total = 0
    for monomial, coefficient in dim.terms:
        for name in monomial:
            coefficient *= known[name]
        total += coefficient
    return total


NUMBERS = st.tuples(*[st.integers(1, 9)] * 3)


@given(dims(), dims(), NUMBERS)
def test_arithmetic_is_that_of_numbers(x: Dim, y: Dim, numbers: tuple[int, ...]) -> None:
    a, b = value(x, numbers), value(y, numbers)
    assert value(x + y, numbers) == a + b
    assert value(x - y, numbers) == a - b
    assert value(x * y, numbers) == a * b
    assert value(-x, numbers) == -a


@given(dims(), dims(), dims())
def test_equal_polynomials_have_one_form(x: Dim, y: Dim, z: Dim) -> None:
    assert x * (y + z) == x * y + z * x
    assert (x + y) - y == x
    assert x * y == y * x
    assert hash(x + y) == hash(y + x)


@given(dims(), dims())
def test_a_quotient_is_exact(x: Dim, y: Dim) -> None:
    if not y.terms:
        return
    found = x.quotient(y)
    if found is not None:
        assert found * y == x


@given(dims())
def test_what_was_multiplied_can_be_divided(x: Dim) -> None:
    for divisor in (Dim.symbol("a"), Dim.of(3), Dim.symbol("a") * Dim.symbol("b") * 2):
        assert (x * divisor).quotient(divisor) == x


@given(dims(), NUMBERS)
def test_the_least_value_is_a_bound(x: Dim, numbers: tuple[int, ...]) -> None:
    if x.least is not None:
        assert value(x, numbers) >= x.least


def test_the_least_value_of_a_size_that_is_no_input_is_zero() -> None:
    assert opaque("floor", Dim.symbol("a"), 2).least == 0
    assert (opaque("floor", Dim.symbol("a"), 2) - 1).least == -1
    assert Dim.symbol("signed divided(a,2)").least is None


@given(dims(), NUMBERS)
def test_text_is_read_as_it_is_written(x: Dim, numbers: tuple[int, ...]) -> None:
    if x.constant is None and all(coefficient > 0 for _, coefficient in x.terms):
        assert parse(str(x)) == x


@pytest.mark.parametrize("text", ["floor(s0/2)", "s0 - 1", "2**s0", "(a+b)", "4", "min(8,b)"])
def test_what_cannot_be_read_is_one_symbol(text: str) -> None:
    assert parse(text) == Dim.symbol(f"named({text})")


def test_symbols_are_different_sizes() -> None:
    a, b = Dim.symbol("a"), Dim.symbol("b")
    assert a * b != a * a
    assert (a * a).quotient(b) is None
    assert (a + 1).quotient(a) is None
    assert product([]) == ONE


def test_broadcasting_of_symbols_is_a_size_of_its_own() -> None:
    a, b, four = Dim.symbol("a"), Dim.symbol("b"), Dim.of(4)
    assert broadcast((a,), (a,)) == (a,)
    assert broadcast((a,), (ONE,)) == (a,)
    assert broadcast((a, four), (four,)) == (a, four)
    assert broadcast((a,), (b,)) not in ((a,), (b,))
    assert broadcast((a,), (b,)) == broadcast((b,), (a,))
    with pytest.raises(ValueError, match="do not broadcast"):
        broadcast((four,), (Dim.of(3),))


def test_a_size_and_its_minimum_with_a_number_broadcast_to_the_size() -> None:
    """They are equal, or the minimum is 1, and then so is the size; with the number 1 that does not follow."""
    a = Dim.symbol("a")
    assert broadcast((a,), (minimum(a, Dim.of(7)),)) == (a,)
    assert broadcast((a,), (minimum(a, Dim.symbol("b")),)) != (a,)
