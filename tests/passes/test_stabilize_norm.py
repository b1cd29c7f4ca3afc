"""stabilize-norm: the same result from a smaller stream, exactly; s from data; float16; and families."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from diagonal_checks import check_family, proof_of, replace, rewritten, stored
from networks import difference, feed, network, operators

from rewrite.calibrate import calibrated
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.ir.statistics import ChannelRange
from rewrite.ir.weights import Constant, Scale
from rewrite.passes import StabilizeNorm
from rewrite.rule import apply_pass

STREAM = """
stream (int64[B, S] ids, float[9, 6] table, float[6] g1, float[6, 5] w1, float[5, 6] w2, float[6] b2, float[6] g2,
        float[6] b3, float[6, 4] head, float[6, 3] raw) => (float[B, S, 4] y, float[B, S, 3] z)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization <epsilon = 0.01> (x0, g1)
    h = MatMul (n1, w1)
    t = Tanh (h)
    m = MatMul (t, w2)
    o = Add (m, b2)
    x1 = Add (x0, o)
    n2 = LayerNormalization <epsilon = 0.001> (x1, g2, b3)
    y = MatMul (n2, head)
    z = MatMul (x1, raw)
}
"""

WRITTEN_BY_A_NORM = """
post (float[B, 5] x, float[5, 6] w, float[6] g1, float[6] b1, float[6, 6] v, float[6] g2) => (float[B, 6] y)
{
    h = MatMul (x, w)
    n = LayerNormalization (h, g1, b1)
    m = MatMul (n, v)
    s = Add (n, m)
    y = RMSNormalization (s, g2)
}
"""


@pytest.mark.parametrize("scale", [2.0**-8, 0.5, 4.0])
def test_the_function_and_every_value_agree(scale: float) -> None:
    before = network(STREAM, ("ids",))
    after, (applied,) = rewritten(before, StabilizeNorm(scale=scale), feed(before))
    assert operators(after) == operators(before)
    assert set(after.relations) == {"x0", "m", "o", "x1"}
    assert applied.notes == (f"2 norms read it {scale:g} times as large",)
    for node, epsilon in zip([node for node in after.model.graph if "Norm" in node.op_type], (0.01, 0.001)):
        assert node.attributes.get_float("epsilon") == float(np.float32(epsilon)) * scale**2


def test_a_power_of_two_changes_no_bit() -> None:
    before = network(STREAM, ("ids",))
    after, _ = rewritten(before, StabilizeNorm(scale=2.0**-6), feed(before))
    expected, found = evaluate(before.model, feed(before)), evaluate(after.model, feed(before))
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_norm_that_writes_the_stream_absorbs_the_scale() -> None:
    before = network(WRITTEN_BY_A_NORM)
    after, applied = rewritten(before, StabilizeNorm(scale=0.25), feed(before))
    assert [one.site for one in applied] == ["h", "s"]
    assert np.array_equal(stored(after, "g1.scaled"), stored(before, "g1") / 4)


def test_the_scale_is_the_largest_that_keeps_the_squares_in_range() -> None:
    program = network(STREAM, ("ids",))
    seen = {
        "x0": ChannelRange(np.full(6, -100.0), np.full(6, 30.0)),
        "x1": ChannelRange(np.full(6, -1.0), np.full(6, 300.0)),
    }
    (site,) = StabilizeNorm(statistics=seen).sites(program)
    assert site.factor == 0.25
    assert 6 * (300 * site.factor) ** 2 <= 65504 < 6 * (300 * 2 * site.factor) ** 2
    (site,) = StabilizeNorm(statistics=seen, largest=100.0).sites(program)
    assert 6 * (300 * site.factor) ** 2 <= 100 < 6 * (300 * 2 * site.factor) ** 2


def test_a_stream_in_range_is_left_alone() -> None:
    program = network(STREAM, ("ids",))
    rule = calibrated(StabilizeNorm(), program, [feed(program)])
    assert isinstance(rule, StabilizeNorm)
    assert set(rule.statistics or ()) == {"x0", "x1"}
    assert apply_pass(program, rule) == []
    assert calibrated(StabilizeNorm(scale=0.5), program, []) == StabilizeNorm(scale=0.5)


def test_without_data_the_choice_is_said() -> None:
    before = network(STREAM, ("ids",))
    _, (applied,) = rewritten(before, StabilizeNorm(), feed(before))
    assert applied.notes == ("2 norms read it 0.0625 times as large, chosen without data",)


def test_squares_that_overflow_float16_do_not_any_more() -> None:
    table = np.full((9, 6), 200.0)
    table[:, 0] = 250.0
    before = network(STREAM, ("ids",), table=table)
    rule = calibrated(StabilizeNorm(), before, [feed(before)])
    after, _ = rewritten(before, rule, feed(before))
    largest = {}
    for name, program in (("before", before), ("after", after)):
        x = evaluate(program.model, feed(before), watch=["x1"], unrounded=True)["x1"].astype(np.float16)
        with np.errstate(over="ignore"):
            largest[name] = np.square(x).sum(-1, dtype=np.float16).max()
    assert np.isinf(largest["before"])
    assert np.isfinite(largest["after"])


def test_a_tied_table_is_copied_where_that_is_asked_for() -> None:
    text = STREAM.replace("float[6, 4] head, ", "").replace("float[B, S, 4] y", "float[B, S, 9] y")
    text = text.replace("y = MatMul (n2, head)", "head = Transpose <perm = [1, 0]> (table) y = MatMul (n2, head)")
    before = network(text, ("ids",))
    _, (applied,) = rewritten(before, StabilizeNorm(scale=0.5, untie=True), feed(before))
    assert applied.untied_bytes == 9 * 6 * 4


@pytest.mark.parametrize("scale", [0.0, -0.5, 0.3, float("nan")])
def test_only_powers_of_two(scale: float) -> None:
    with pytest.raises(ValueError, match="no power of two"):
        StabilizeNorm(scale=scale)


def _half_epsilon(after: Program) -> None:
    import onnx_ir as ir

    norm = next(node for node in after.model.graph if node.op_type == "RMSNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 0.0) * 2)


MUTANTS: dict[str, Callable[[Program], None]] = {
    "ε·s": _half_epsilon,
    "a writer keeps its bias": lambda after: replace(
        after, "b2.scaled", lambda _: Constant(stored(network(STREAM, ("ids",)), "b2"))
    ),
    "a reader of the raw stream is forgotten": lambda after: replace(
        after, "raw.unscaled", lambda w: Scale(w, Constant(np.array(0.5)))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_computes_another_function(mutant: str) -> None:
    before = network(STREAM, ("ids",))
    after, _ = rewritten(before, StabilizeNorm(scale=0.5), feed(before))
    proof = proof_of(before, after)
    assert proof.verdict.holds
    assert all(proof.claims.values())
    MUTANTS[mutant](after)
    assert difference(before, after, feed(before)) > 1e4
    assert not proof_of(before, after).verdict.holds


@pytest.mark.parametrize(
    ("family", "untie", "applied", "refused"),
    [
        ("llama", False, 1, set()),
        ("qwen2", False, 0, {"R6"}),  # a tied head
        ("qwen2", True, 1, set()),
        ("bert", False, 5, set()),  # post-LN: every norm writes the next stream
        ("convnext", False, 6, set()),  # depthwise kernels read and write it
        ("olmo2", False, 9, set()),
        ("swin", False, 2, {"R2"}),
    ],
)
def test_families(
    family: str, untie: bool, applied: int, refused: set[str], family_program: Callable[[str], Program]
) -> None:
    check_family(family_program(family), lambda _: StabilizeNorm(scale=0.125, untie=untie), applied, refused)
