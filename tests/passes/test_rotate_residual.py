"""rotate-residual: the same function in another basis, tied tables, several streams, families, and what must show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from basis_checks import applied, check_proved, check_runs, check_same
from networks import difference, feed, network
from pass_examples import PRE_LN

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.ir.constants import uniform
from rewrite.ir.edit import is_operator
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor, Transformed
from rewrite.passes import CenterResidual, FoldNorm, FoldScale
from rewrite.passes.rotate_residual import RotateResidual, random_orthogonal
from rewrite.proof import prove
from rewrite.proof.transforms import Hadamard, Orthogonal
from rewrite.rule import Applied, apply_pass, steps

RECIPE = (FoldScale(), CenterResidual(), FoldNorm(), RotateResidual(seed=3))

TIED = """
tied (int64[B, S] ids, float[11, 8] table, float[8] g1, float[8, 8] w1, float[8] c1, float[8, 12] w2, float[12, 8] w3,
      float[8] g2, float[8] g3) => (float[B, S, 11] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, g1)
    h1 = MatMul (n1, w1)
    a1 = Add (h1, c1)
    x1 = Add (x0, a1)
    n2 = RMSNormalization <epsilon = 0.001> (x1, g2)
    h2 = MatMul (n2, w2)
    r2 = Gelu (h2)
    o2 = MatMul (r2, w3)
    x2 = Add (o2, x1)
    n3 = RMSNormalization (x2, g3)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul (n3, head)
}
"""
EVEN: dict[str, Any] = {"g1": [1.0] * 8, "g2": [0.5] * 8, "g3": [1.5] * 8}
"""Constant γ, which may stay in the norms."""

MIXTURE = """
mixture (int64[B, S] ids, float[11, 8] table, float[8] g1, float[8, 3] router, float[3, 8, 6] up, float[3, 6, 8] down,
         float[8] g2, float[8, 11] head) => (float[B, S, 11] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, g1)
    votes = MatMul (n1, router)
    shares = Softmax <axis = -1> (votes)
    zero = Constant <value_ints = [0]> ()
    s1, s2, s3 = Split <axis = -1, num_outputs = 3> (shares)
    u1, u2, u3 = Split <axis = 0, num_outputs = 3> (up)
    v1, v2, v3 = Split <axis = 0, num_outputs = 3> (down)
    up1 = Squeeze (u1, zero)
    down1 = Squeeze (v1, zero)
    h1 = MatMul (n1, up1)
    r1 = Relu (h1)
    o1 = MatMul (r1, down1)
    m1 = Mul (o1, s1)
    up2 = Squeeze (u2, zero)
    down2 = Squeeze (v2, zero)
    h2 = MatMul (n1, up2)
    r2 = Relu (h2)
    o2 = MatMul (r2, down2)
    m2 = Mul (o2, s2)
    up3 = Squeeze (u3, zero)
    down3 = Squeeze (v3, zero)
    h3 = MatMul (n1, up3)
    r3 = Relu (h3)
    o3 = MatMul (r3, down3)
    m3 = Mul (o3, s3)
    both = Add (m1, m2)
    mixed = Add (both, m3)
    x1 = Add (x0, mixed)
    n2 = RMSNormalization (x1, g2)
    logits = MatMul (n2, head)
}
"""
"""A router, and experts that are parts of one stack."""

TWO_STREAMS = """
translate (int64[B, S] ids, int64[B, T] starts, float[11, 8] table, float[8] g1, float[8, 8] w1, float[8] g2,
           float[8, 6] q, float[8, 6] k, float[8, 5] v, float[5, 8] o, float[8] g3, float[8] g4)
    => (float[B, T, 11] logits)
{
    e0 = Gather (table, ids)
    e1 = RMSNormalization (e0, g1)
    e2 = MatMul (e1, w1)
    e3 = Add (e0, e2)
    memory = RMSNormalization (e3, g2)
    d0 = Gather (table, starts)
    d1 = RMSNormalization (d0, g3)
    queries = MatMul (d1, q)
    keys = MatMul (memory, k)
    values = MatMul (memory, v)
    columns = Transpose <perm = [0, 2, 1]> (keys)
    scores = MatMul (queries, columns)
    shares = Softmax <axis = -1> (scores)
    taken = MatMul (shares, values)
    result = MatMul (taken, o)
    d2 = Add (d0, result)
    d3 = RMSNormalization (d2, g4)
    head = Transpose <perm = [1, 0]> (table)
    logits = MatMul (d3, head)
}
"""
"""An encoder whose result the decoder's keys and values read, and one table for both and the head."""

PATCHES = """
patches (float[B, 3, 4, 4] x, float[8, 3, 2, 2] kernel, float[8] bias, float[1, 1, 8] token, float[1, 5, 8] places,
         float[8] even, float[8, 8] w, float[8, 5] head) => (float[B, 5] y)
{
    image = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, kernel, bias)
    shape = Constant <value_ints = [0, 8, 4]> ()
    flat = Reshape (image, shape)
    rows = Transpose <perm = [0, 2, 1]> (flat)
    size = Shape <start = 0, end = 1> (x)
    ends = Constant <value_ints = [1, 8]> ()
    whole = Concat <axis = 0> (size, ends)
    tokens = Expand (token, whole)
    joined = Concat <axis = 1> (tokens, rows)
    x0 = Add (joined, places)
    n1 = RMSNormalization (x0, even)
    h1 = MatMul (n1, w)
    x1 = Add (x0, h1)
    n2 = RMSNormalization (x1, even)
    zero = Constant <value_int = 0> ()
    first = Gather <axis = 1> (n2, zero)
    y = MatMul (first, head)
}
"""
"""A kernel writes the stream, a class token is expanded into it."""


@pytest.mark.parametrize("rule", [RotateResidual(), RotateResidual(seed=1, kind="random")])
@pytest.mark.parametrize(
    ("text", "inputs", "weights"),
    [
        pytest.param(PRE_LN, ("ids",), {}, id="centred first"),
        pytest.param(TIED, ("ids",), EVEN, id="tied"),
        pytest.param(TIED, ("ids",), {}, id="untied"),
        pytest.param(MIXTURE, ("ids",), {}, id="experts"),
        pytest.param(TWO_STREAMS, ("ids", "starts"), {}, id="encoder and decoder"),
        pytest.param(PATCHES, ("x",), {"even": [0.75] * 8}, id="kernel and class token"),
    ],
)
def test_the_function_stays(text: str, inputs: tuple[str, ...], weights: dict[str, Any], rule: RotateResidual) -> None:
    before = network(text, inputs, **weights)
    after = before.clone()
    outcomes = applied(after, (*RECIPE[:-1], rule))
    assert [type(one) for one in outcomes if one.pass_name == rule.name] == [Applied] * (1 + (text is TWO_STREAMS))
    assert check_same(before, after, feed(before)) >= 5
    check_proved(before, after)
    check_runs(before, after, feed(before))


def test_no_channel_stands_out_any_more() -> None:
    table = np.random.default_rng(0).normal(size=(11, 8))
    table[:, 2] *= 1000
    program = network(TIED, ("ids",), table=table, **EVEN)
    apply_pass(program, RotateResidual())
    (gather,) = (node for node in program.model.graph if is_operator(node, "Gather"))
    turned = np.abs(gather.inputs[0].const_value.numpy()).max(axis=0)  # type: ignore[union-attr]
    assert turned.max() / turned.min() < 1.1


def test_a_tied_table_stays_tied_under_a_constant_scale() -> None:
    program = network(TIED, ("ids",), **EVEN)
    (outcome,) = apply_pass(program, RotateResidual())
    assert isinstance(outcome, Applied)
    assert outcome.untied_bytes == 0
    readers = [node for node in program.model.graph if is_operator(node, "Gather", "Transpose")]
    assert readers[0].inputs[0] is readers[1].inputs[0]
    tables = [name for name in program.model.graph.initializers if name.startswith("table")]
    assert tables == ["table.rotated"]


def test_a_scale_of_its_own_unties_the_table_and_says_what_that_costs() -> None:
    program = network(TIED, ("ids",))
    apply_pass(program, FoldNorm())
    (outcome,) = apply_pass(program, RotateResidual())
    assert isinstance(outcome, Applied)
    assert outcome.untied_bytes == 11 * 8 * 4
    assert "352 bytes untied" in str(outcome)
    assert {uniform(node.inputs[1]) for node in program.model.graph if node.op_type == "RMSNormalization"} == {1.0}


def test_one_seed_is_one_matrix_for_every_stream_so_that_a_shared_table_stays_shared() -> None:
    even: dict[str, Any] = {name: [1.0] * 8 for name in ("g1", "g2", "g3", "g4")}
    program = network(TWO_STREAMS, ("ids", "starts"), **even)
    outcomes = apply_pass(program, RotateResidual())
    assert [type(outcome) for outcome in outcomes] == [Applied, Applied]
    assert list(program.transforms.values()) == [Hadamard(8, 0)]
    assert [name for name in program.model.graph.initializers if name.startswith("table")] == ["table.rotated"]


def test_the_seed_decides() -> None:
    def table(rule: RotateResidual) -> np.ndarray:
        program = network(TIED, ("ids",), **EVEN)
        apply_pass(program, rule)
        return program.model.graph.initializers["table.rotated"].const_value.numpy()  # type: ignore[union-attr]

    for kind in ("hadamard", "random"):
        assert np.array_equal(table(RotateResidual(5, kind)), table(RotateResidual(5, kind)))
        assert not np.array_equal(table(RotateResidual(5, kind)), table(RotateResidual(6, kind)))


def test_a_size_without_a_hadamard_matrix_is_turned_at_random() -> None:
    assert isinstance(RotateResidual().transform(8), Hadamard)
    assert isinstance(RotateResidual().transform(7), Orthogonal)
    assert isinstance(RotateResidual(kind="random").transform(8), Orthogonal)
    odd = """
    odd (int64[B, S] ids, float[9, 7] table, float[7] even, float[7, 4] w) => (float[B, S, 4] y)
    { x = Gather (table, ids) n = RMSNormalization (x, even) y = MatMul (n, w) }"""
    before = network(odd, ("ids",), even=np.full(7, 2.0))
    after = before.clone()
    applied(after, (RotateResidual(),))
    check_same(before, after, feed(before))
    check_proved(before, after)


def test_a_random_orthogonal_matrix_is_orthogonal() -> None:
    matrix = random_orthogonal(31, 4)
    assert np.abs(matrix @ matrix.T - np.eye(31)).max() < 31 * np.finfo(np.float64).eps


@pytest.mark.parametrize("options", [{"kind": "cayley"}, {"seed": -1}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cayley|-1"):
        RotateResidual(**options)


# ----------------------------------------------------------------------------------------------- wrong right-hand sides


def _rotated() -> tuple[Program, Program]:
    before = network(TIED, ("ids",), g1=EVEN["g1"], g2=EVEN["g2"])
    after = before.clone()
    assert [type(one) for one in apply_pass(after, RotateResidual(seed=2))] == [Applied]
    return before, after


def _change(program: Program, name: str, weight: Callable[[Transformed], object]) -> None:
    value = program.model.graph.initializers[name]
    assert isinstance(value.const_value, MaterializedTensor)
    assert value.dtype is not None
    value.const_value = MaterializedTensor(weight(value.const_value.weight), value.dtype, name)  # type: ignore[arg-type]


MUTANTS: dict[str, tuple[str, Callable]] = {
    "a writer is as it was": ("w3.rotated", lambda w: w.inner),
    "a reader is as it was": ("w2.rotated", lambda w: w.inner),
    "a bias is as it was": ("c1.rotated", lambda w: w.inner),
    "a writer by the inverse": ("w3.rotated", lambda w: Transformed(w.inner, w.map.inverse, w.axis)),
    "a reader by the inverse": ("w2.rotated", lambda w: Transformed(w.inner, w.map.inverse, w.axis)),
    "another seed in one writer": ("w3.rotated", lambda w: Transformed(w.inner, Hadamard(8, 9), w.axis)),
    "a square matrix on its outputs alone": ("w1.rotated.rotated", lambda w: w.inner),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_right_hand_side_shows_and_is_not_proved(mutant: str) -> None:
    before, after = _rotated()
    assert difference(before, after, feed(before)) <= 1.0, "the positive control"
    check_proved(before, after)
    name, weight = MUTANTS[mutant]
    _change(after, name, weight)
    assert difference(before, after, feed(before)) > 1e4
    assert not prove(before.model, after.model).verdict.holds


# ------------------------------------------------------------------------------------------------------------ families

FAMILIES = ("llama", "qwen2", "gpt2", "falcon_parallel", "vit", "opt", "starcoder2", "cohere")
QUICK = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_a_family_is_rotated(name: str, family_program: Callable[[str], Program]) -> None:
    after = family_program(name)
    canonicalize(after)
    before = after.clone()
    outcomes = applied(after, RECIPE)
    assert [type(one) for one in outcomes if one.pass_name == "rotate-residual"] == [Applied]
    inputs = generate_inputs(before.model, sizes=((2, 7),))[0]
    assert check_same(before, after, inputs) >= 5
    check_proved(before, after)
    check_runs(before, after, inputs)


@pytest.mark.parametrize(
    ("name", "requirement"),
    [pytest.param(*each, marks=pytest.mark.slow) for each in (("bert", "R1"), ("gemma2", "R2"), ("dinov2", "R3"))],
)
def test_a_family_that_must_be_refused(name: str, requirement: str, family_program: Callable[[str], Program]) -> None:
    program = family_program(name)
    canonicalize(program)
    outcomes = [outcome for rule in RECIPE for outcome in apply_pass(program, rule)]
    found = [one for one in outcomes if one.pass_name == "rotate-residual"]
    assert requirement in {one.refusal.requirement for one in found}  # type: ignore[union-attr]
    assert not any(isinstance(one, Applied) for one in found)


def test_what_is_recorded_composes_with_a_centring() -> None:
    program = network(PRE_LN, ("ids",))
    applied(program, RECIPE)
    assert [step["transform"] for step in steps(program.relations["x1"])] == ["centre", "hadamard-0"]
