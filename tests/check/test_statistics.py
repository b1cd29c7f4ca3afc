"""Ranges of channels are those of all rows of all sets of inputs, in float64."""

import numpy as np
import pytest
from networks import feed, network

from rewrite.check.reference import evaluate
from rewrite.check.statistics import channel_statistics
from rewrite.passes import FoldNorm
from rewrite.rule import apply_pass

TEXT = """
text (float[B, S, 5] x, float[5] g, float[5, 4] w) => (float[B, S, 4] y, int64[B, S] top)
{ n = RMSNormalization (x, g) y = MatMul (n, w) top = ArgMax <axis = 2, keepdims = 0> (y) }"""


def test_ranges_are_those_of_all_rows_of_all_inputs() -> None:
    program = network(TEXT)
    sets = [feed(program, seed, rows, columns) for seed, (rows, columns) in enumerate([(1, 7), (4, 2), (2, 3)])]
    found = channel_statistics(program.model, sets, ["n", "y", "top", "no such value"])
    assert set(found) == {"n", "y"}
    rows = np.concatenate([evaluate(program.model, one, watch=["n"])["n"].reshape(-1, 5) for one in sets])
    assert np.array_equal(found["n"].low, rows.min(0))
    assert np.array_equal(found["n"].high, rows.max(0))
    assert np.array_equal(found["n"].magnitude, np.abs(rows).max(0))
    assert found["n"].low.dtype == np.float64


def test_nothing_is_evaluated_where_nothing_is_asked_for() -> None:
    assert channel_statistics(network(TEXT).model, [{}], []) == {}


def test_no_rows_have_no_range() -> None:
    program = network(TEXT)
    assert channel_statistics(program.model, [{"x": np.zeros((0, 3, 5), np.float32)}], ["n"]) == {}


def test_weights_are_what_they_are_before_rounding() -> None:
    program = network(TEXT)
    inputs = [feed(program)]
    before = channel_statistics(program.model, inputs, ["y"])["y"]
    apply_pass(program, FoldNorm())
    after = channel_statistics(program.model, inputs, ["y"])["y"]
    assert np.allclose(before.magnitude, after.magnitude, rtol=1e-14)


def test_a_value_that_is_not_finite_is_an_error() -> None:
    program = network(TEXT)
    with pytest.raises(ValueError, match="n is not finite"):
        channel_statistics(program.model, [{"x": np.full((1, 1, 5), np.nan, np.float32)}], ["n"])
