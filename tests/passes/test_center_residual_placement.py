"""center-residual where a stream cannot absorb P everywhere: what is inserted, what stays raw, and the proof."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from basis_checks import applied, check_proved, check_runs, check_same
from networks import difference, digest, feed, network, operators

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.ir.program import Program
from rewrite.passes import CenterResidual
from rewrite.proof import prove
from rewrite.rule import Applied, Refused, apply_pass, explain

EMBEDDING_NORM = """
embedding_norm (int64[B, S] ids, float[7, 6] table, float[6] g0, float[6] b0, float[6] g1, float[6] b1, float[6, 8] w1,
                float[8, 6] w2, float[6] c2, float[6] g2, float[6] b2, float[6, 6] w3, float[6] g3, float[6, 7] head)
    => (float[B, S, 7] logits)
{
    e = Gather (table, ids)
    x0 = LayerNormalization (e, g0, b0)
    n1 = LayerNormalization (x0, g1, b1)
    h1 = MatMul (n1, w1)
    a1 = Gelu (h1)
    o1 = MatMul (a1, w2)
    m1 = Add (o1, c2)
    x1 = Add (x0, m1)
    n2 = LayerNormalization (x1, g2, b2)
    m2 = MatMul (n2, w3)
    x2 = Add (x1, m2)
    n3 = LayerNormalization (x2, g3)
    logits = MatMul (n3, head)
}
"""
"""A norm writes the stream, as in Bloom."""

RAW_READER = EMBEDDING_NORM.replace("h1 = MatMul (n1, w1)", "h1 = MatMul (x0, w1) first = Identity (n1)").replace(
    "(float[B, S, 7] logits)", "(float[B, S, 7] logits, float[B, S, 6] first)"
)
"""The first branch reads the embedding norm itself, as in ModernBERT."""

POSITIONS = """
positions (float[B, 9, 4] x, float[4, 6] w, float[6] c, float[6, 3, 3] k, float[6] g1, float[6, 6] v1, float[6] g2,
           float[6] b2, float[6, 5] v2, float[6] g3) => (float[B, 9, 5] y, float[B, 9, 6] z)
{
    product = MatMul (x, w)
    hidden = Add (product, c)
    rows = Transpose <perm = [0, 2, 1]> (hidden)
    mixed = Conv <kernel_shape = [3], pads = [1, 1], group = 2> (rows, k)
    active = Gelu (mixed)
    columns = Transpose <perm = [0, 2, 1]> (active)
    s = Add (hidden, columns)
    n1 = LayerNormalization (s, g1)
    m1 = MatMul (n1, v1)
    s1 = Add (s, m1)
    n2 = LayerNormalization (s1, g2, b2)
    y = MatMul (n2, v2)
    z = LayerNormalization (s1, g3)
}
"""
"""A grouped convolution of the stream and a GELU of it are added to it, as in wav2vec2."""

SHORT_INPUT = """
short_input (float[B, S, 4] x, float[S, 6] p, float[4, 6] w, float[6] g1, float[6] b1, float[6, 5] v)
    => (float[B, S, 5] y)
{
    m = MatMul (x, w)
    s = Add (m, p)
    n = LayerNormalization (s, g1, b1)
    y = MatMul (n, v)
}
"""
"""Positions are given by the caller: centring them costs less than the one norm saves."""


def rewritten(text: str, inputs: tuple[str, ...] = ("x",)) -> tuple[Program, Program, Applied]:
    """Before, after, and the one site that was applied with an insertion; everything about it is checked."""
    before = network(text, inputs)
    after = before.clone()
    outcomes = applied(after, [CenterResidual()])
    check_same(before, after, inputs_of(before))
    check_proved(before, after)
    check_runs(before, after, inputs_of(before))
    (outcome,) = [one for one in outcomes if isinstance(one, Applied) and one.insertions]
    return before, after, outcome


def inputs_of(program: Program) -> dict[str, np.ndarray]:
    """Random inputs in which a dimension of one name has one size."""
    return feed(program, rows=5, columns=5)


def test_an_embedding_norm_is_centred_behind_once() -> None:
    _, after, outcome = rewritten(EMBEDDING_NORM, ("ids",))
    assert operators(after).count("RMSNormalization") == 4
    assert operators(after).count("ReduceMean") == 1
    (insertion,) = outcome.insertions
    assert (insertion.transform, insertion.behind, insertion.value) == ("centring", "x0", "x0.centred")
    assert insertion.serves == ("n1", "n2", "n3")
    assert 0 < insertion.cost < insertion.gain
    assert set(after.relations) == {"e", "o1", "m1", "x1", "m2", "x2"}, "x0 keeps its mean, and says so"


def test_a_raw_reader_keeps_the_raw_value() -> None:
    _, after, outcome = rewritten(RAW_READER, ("ids",))
    (insertion,) = outcome.insertions
    assert insertion.behind == "x0"
    readers = {use.node.op_type for node in after.model.graph for use in node.outputs[0].uses() if is_x0(node)}
    assert readers == {"MatMul", "ReduceMean", "Sub"}
    (product,) = [node for node in after.model.graph if node.outputs[0].name == "h1"]
    assert product.inputs[0].name == "x0"


def is_x0(node: ir.Node) -> bool:
    return node.outputs[0].name == "x0"


def test_a_nonlinear_summand_is_centred_behind_the_sum() -> None:
    _, after, outcome = rewritten(POSITIONS)
    assert [insertion.behind for insertion in outcome.insertions] == ["s"]
    assert operators(after).count("RMSNormalization") == 3
    assert set(after.relations) == {"m1", "s1"}


def test_the_operand_that_is_cheapest_to_centre_is_chosen() -> None:
    _, after, outcome = rewritten(SHORT_INPUT, ("x", "p"))
    assert [insertion.behind for insertion in outcome.insertions] == ["p"]
    assert set(after.relations) == {"m", "s"}


@pytest.mark.parametrize("centring_ns", [0.47, 5.0])
def test_the_costs_decide(centring_ns: float) -> None:
    program = network(EMBEDDING_NORM, ("ids",))
    outcomes = apply_pass(program, CenterResidual(centring_ns=centring_ns))
    pays = centring_ns < 3 * 0.38
    assert isinstance(outcomes[1], Applied) == pays
    assert ("ReduceMean" in operators(program)) == pays
    if not pays:
        assert isinstance(outcomes[1], Refused)
        assert outcomes[1].refusal.requirement == "R4"
        assert "explicit centring would not pay" in outcomes[1].refusal.reason


def test_a_target_says_what_its_kernels_cost() -> None:
    """Under the names of options; an option that was set is left as it was."""
    from rewrite.pipeline import _priced
    from rewrite.targets import TARGETS

    class Dear:
        costs = {"centring_ns": 7.0, "norm_ns": 2.0}
        multiply_ns = {(0, 0): 1.0}
        kernels = frozenset(("weights",))

    assert _priced([CenterResidual(norm_ns=1.0)], Dear()) == [CenterResidual(norm_ns=1.0, centring_ns=7.0)]
    for target in TARGETS:
        assert set(target.costs) <= {option.name for option in fields(CenterResidual)}


def test_a_stream_that_ends_as_an_output_stays_raw() -> None:
    """A centred value cannot become raw again, so no norm before the output gains; a refusal changes nothing."""
    text = EMBEDDING_NORM.replace("(float[B, S, 7] logits)", "(float[B, S, 7] logits, float[B, S, 6] x2)")
    program = network(text, ("ids",))
    apply_pass(program, CenterResidual())
    assert operators(program).count("RMSNormalization") == 1, "the embedding's own norm, whose input is affine"
    untouched = digest(program)
    (outcome,) = apply_pass(program, CenterResidual())
    assert digest(program) == untouched
    assert "all that x2 is computed from has to stay raw" in outcome.refusal.reason


def test_an_insertion_is_explained_with_its_cost_and_gain() -> None:
    outcome = explain(network(EMBEDDING_NORM, ("ids",)), CenterResidual())[1]
    assert "centring inserted behind x0: cost" in str(outcome)
    (plain,) = json.loads(json.dumps(outcome.to_json()))["insertions"]
    assert plain["behind"] == "x0"
    assert plain["serves"] == ["n1", "n2", "n3"]
    assert plain["cost_ns"] == pytest.approx(0.47 * 64 * 6)
    assert plain["gain_ns"] == pytest.approx(3 * 0.38 * 64 * 6)


def test_an_output_of_the_command_line_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    from rewrite.report import SiteRow, print_sites

    print_sites([SiteRow.of(one.to_json()) for one in explain(network(EMBEDDING_NORM, ("ids",)), CenterResidual())])
    assert "inserted" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- wrong right-hand sides


def centred_twice_removed(program: Program) -> Program:
    """x0 + mean instead of x0 − mean."""
    return _replaced(program, "Sub", "Add")


def largest_instead_of_mean(program: Program) -> Program:
    return _replaced(program, "ReduceMean", "ReduceMax")


def _replaced(program: Program, old: str, new: str) -> Program:
    mutant = program.clone()
    (node,) = [node for node in mutant.model.graph if node.op_type == old]
    node.op_type = new
    return mutant


def mean_over_the_tokens(program: Program) -> Program:
    mutant = program.clone()
    (node,) = [node for node in mutant.model.graph if node.op_type == "ReduceMean"]
    axes = node.inputs[1]
    axes.const_value = ir.tensor(np.array([1]), name=axes.name)
    return mutant


def norm_reads_the_raw_value(program: Program) -> Program:
    mutant = program.clone()
    _reader(mutant, "RMSNormalization").replace_input_with(0, _raw(mutant))
    return mutant


def sum_reads_the_raw_value(program: Program) -> Program:
    mutant = program.clone()
    _reader(mutant, "Add").replace_input_with(0, _raw(mutant))
    return mutant


def _raw(program: Program) -> ir.Value:
    (node,) = [node for node in program.model.graph if node.op_type == "Sub"]
    return node.inputs[0]


def _reader(program: Program, op_type: str) -> ir.Node:
    (node,) = [node for node in program.model.graph if node.op_type == "Sub"]
    return next(use.node for use in node.outputs[0].uses() if use.node.op_type == op_type)


@pytest.mark.parametrize(
    "mutant",
    [
        *(centred_twice_removed, largest_instead_of_mean, mean_over_the_tokens),
        *(norm_reads_the_raw_value, sum_reads_the_raw_value),
    ],
)
def test_a_wrong_insertion_is_rejected(mutant: Callable[[Program], Program]) -> None:
    before = network(EMBEDDING_NORM, ("ids",))
    after = before.clone()
    apply_pass(after, CenterResidual())
    assert prove(before.model, after.model).verdict.holds
    wrong = mutant(after)
    assert difference(before, wrong, feed(before)) > 1e4
    assert not prove(before.model, wrong.model).verdict.holds


# ------------------------------------------------------------------------------------------------ networks and families


@pytest.mark.parametrize("seed", range(12))
def test_random_streams(seed: int) -> None:
    """Residual streams with summands, raw readers and outputs at random places."""
    generator = np.random.default_rng(seed)
    lines, outputs, value = ["s0 = MatMul (x, w)"], [], "s0"
    for index in range(1, int(generator.integers(3, 7))):
        lines.append(f"n{index} = LayerNormalization ({value}, g, b)")
        kind = generator.choice(["affine", "affine", "affine", "gelu", "norm", "raw"])
        lines += [f"r{index} = MatMul ({value}, v0)", f"t{index} = Tanh (r{index})"] if kind == "raw" else []
        lines.append(f"h{index} = MatMul ({'t' if kind == 'raw' else 'n'}{index}, v{index})")
        made = {"gelu": f"Gelu (h{index})", "norm": f"LayerNormalization (h{index}, b, g)"}.get(
            str(kind), f"Add (h{index}, c{index})"
        )
        lines += [f"m{index} = {made}", f"s{index} = Add ({value}, m{index})"]
        value = f"s{index}"
        if generator.random() < 0.15:
            outputs.append(value)
    lines.append(f"y = LayerNormalization ({value}, g, b)")
    results = ", ".join(f"float[B, 6] {name}" for name in ("y", *outputs))
    own = ", ".join(f"float[6] c{index}, float[6, 6] v{index}" for index in range(7))
    arguments = f"float[B, 4] x, float[4, 6] w, float[6] g, float[6] b, {own}"
    before = network(f"stream ({arguments}) => ({results})\n{{\n" + "\n".join(lines) + "\n}", seed=seed)
    after = before.clone()
    applied(after, [CenterResidual()])
    check_same(before, after, feed(before))
    check_proved(before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "inserted", "gained"),
    [
        *(("bloom", 1, 5), ("modernbert", 1, 4), ("wav2vec2", 1, 7)),
        *(("clip_vision", 0, 1), ("swin", 0, 6), ("convnext", 0, 1), ("bert", 0, 1)),
    ],
)
def test_families(name: str, inserted: int, gained: int, family_program: Callable[[str], Program]) -> None:
    after = family_program(name)
    canonicalize(after)
    before = after.clone()
    outcomes = applied(after, [CenterResidual()])
    assert len([i for one in outcomes if isinstance(one, Applied) for i in one.insertions]) == inserted
    counts = [operators(program).count("LayerNormalization") for program in (before, after)]
    assert counts[0] - counts[1] == gained
    check_same(before, after, generate_inputs(before.model, sizes=((2, 7),))[0])
    check_proved(before, after)


def test_each_insertion_stands_behind_its_value() -> None:
    """The nodes are in an order in which they can run."""
    _, after, _ = rewritten(EMBEDDING_NORM, ("ids",))
    made = [node.outputs[0].name for node in after.model.graph]
    wanted = ("x0", "x0.mean", "x0.centred", "x1", "x2")
    assert all(made.index(first) < made.index(second) for first, second in pairwise(wanted))
