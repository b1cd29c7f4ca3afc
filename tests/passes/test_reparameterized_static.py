"""RepQuant: channels of a norm's result that differ in size share one scale as well as if each had its own."""

from __future__ import annotations

import numpy as np
import pytest
from networks import feed, network

import rewrite
from rewrite.check.reference import evaluate
from rewrite.passes import QuantizeStatic, ReparameterizeNormScale
from rewrite.recipes import passes_of
from rewrite.rule import Applied

BLOCK = """
block (float[B, S, 32] x, float[32] g, float[32] b, float[32, 48] q, float[48] c, float[32, 40] k)
    => (float[B, S, 48] y, float[B, S, 40] z)
{
    n = LayerNormalization (x, g, b)
    p = MatMul (n, q)
    y = Add (p, c)
    z = MatMul (n, k)
}
"""


def decibel(exact: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()))


@pytest.mark.parametrize("calibration", ["min-max", "mse"])
def test_one_scale_serves_channels_of_all_sizes(calibration: str) -> None:
    spread = np.exp2(np.random.default_rng(1).uniform(-5.0, 5.0, 32))
    before = network(BLOCK, g=spread, q=np.random.default_rng(2).normal(size=(32, 48)) / spread[:, None])
    inputs = [feed(before, seed, 4, 16) for seed in range(3)]
    static = QuantizeStatic(calibration=calibration)
    found = []
    for passes in ((static,), (ReparameterizeNormScale(), static)):
        result = rewrite.apply(before, passes, inputs)
        assert result.certificate.verdict.kind == "EQUAL_MODULO"
        applied = [outcome.site for outcome in result.outcomes if isinstance(outcome, Applied)]
        assert len(applied) == len(passes) + 1
        exact, given = evaluate(before.model, inputs[0]), evaluate(result.program.model, inputs[0])
        found.append(decibel(exact["y"], given["y"]))
    plain, reparameterized = found
    # A step that serves the largest of 2^−5 … 2^5 is larger than the smallest; with its own scale a channel of 8 bits
    # and a weight of 8 bits keep some 40 dB, less what a column's scale and a channel's range lose.
    assert plain < 25.0
    assert reparameterized > 30.0


def test_the_recipe_puts_it_in_front_of_what_quantizes() -> None:
    names = [each.name for each in passes_of(None, "reparameterize+int8-static")]
    assert names[-2:] == ["reparameterize-norm-scale", "quantize-static"]
