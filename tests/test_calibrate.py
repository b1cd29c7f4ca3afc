"""A pass gets the ranges it asks for, and is left alone where it asks for none."""

from networks import feed, network

from rewrite.calibrate import calibrated
from rewrite.passes import Equalize, FoldNorm, ReparameterizeNormScale, Smooth, StabilizeNorm

TEXT = """
text (float[B, S, 5] x, float[5] g, float[5, 4] w) => (float[B, S, 4] y)
{ n = RMSNormalization (x, g) y = MatMul (n, w) }"""


def test_passes_that_ask_for_nothing_are_left_alone() -> None:
    program = network(TEXT)
    for rule in (FoldNorm(), Equalize(), StabilizeNorm(scale=0.5)):
        assert calibrated(rule, program, [feed(program)]) is rule


def test_passes_get_what_they_ask_for_and_keep_their_options() -> None:
    program = network(TEXT)
    for rule, name in ((Smooth(alpha=0.7), "n"), (ReparameterizeNormScale(bits=4), "n"), (StabilizeNorm(), "x")):
        filled = calibrated(rule, program, iter([feed(program), feed(program, 1)]))
        assert type(filled) is type(rule)
        assert set(filled.statistics) == {name}
        assert rule.statistics is None
    filled = calibrated(Smooth(alpha=0.7), program, [feed(program)])
    assert isinstance(filled, Smooth)
    assert filled.alpha == 0.7


def test_numbers_that_are_given_stay() -> None:
    program = network(TEXT)
    rule = Smooth(statistics={})
    assert calibrated(rule, program, [feed(program)]) is rule


def test_a_network_without_a_place_is_not_evaluated() -> None:
    program = network("text (float[B, 5] x, float[5, 4] w) => (float[B, 4] y) { y = MatMul (x, w) }")
    assert calibrated(Smooth(), program, [{}]) == Smooth()
