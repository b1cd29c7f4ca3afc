"""rotate-online: exact turns in front of down projections, and on queries and keys in every form of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from basis_checks import applied, check_proved, check_runs, check_same
from networks import difference, feed, network, operators

from rewrite.capture.canonicalize import canonicalize
from rewrite.check.inputs import generate_inputs
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor, Transformed
from rewrite.passes import CenterResidual, FoldNorm, FoldScale, RotateOnline, RotateResidual
from rewrite.passes.rotate_online import turn
from rewrite.proof import prove
from rewrite.proof.transforms import Hadamard, Repeated
from rewrite.rule import Applied, Refused, apply_pass

GATED = """
gated (float[B, S, 6] x, float[6, N] wg, float[6, N] wu, float[N, 5] wd, float[5] b) => (float[B, S, 5] y)
{
    g = MatMul (x, wg)
    s = Sigmoid (g)
    a = Mul (g, s)
    u = MatMul (x, wu)
    h = Mul (a, u)
    d = MatMul (h, wd)
    y = Add (d, b)
}
"""

SHARED = """
shared (float[B, S, 6] x, float[6, 8] w, float[8, 5] v1, float[8, 4] v2) => (float[B, S, 5] y, float[B, S, 4] z)
{
    g = MatMul (x, w)
    h = Relu (g)
    y = MatMul (h, v1)
    z = MatMul (h, v2)
}
"""

EXPERTS = """
experts (float[B, 6] x, float[6, 8] w1, float[6, 8] w2, float[2, 8, 5] down) => (float[B, 5] y)
{
    zero = Constant <value_ints = [0]> ()
    d1, d2 = Split <axis = 0, num_outputs = 2> (down)
    down1 = Squeeze (d1, zero)
    down2 = Squeeze (d2, zero)
    g1 = MatMul (x, w1)
    h1 = Relu (g1)
    g2 = MatMul (x, w2)
    h2 = Gelu (g2)
    y1 = MatMul (h1, down1)
    y2 = MatMul (h2, down2)
    y = Add (y1, y2)
}
"""

ROTARY = """
    left = Constant <value_ints = [0]> () half = Constant <value_ints = [4]> () all = Constant <value_ints = [8]> ()
    last = Constant <value_ints = [-1]> ()
    {v}1 = Slice ({v}0, left, half, last)
    {v}2 = Slice ({v}0, half, all, last)
    {v}3 = Neg ({v}2)
    {v}4 = Concat <axis = -1> ({v}3, {v}1)
    {v}5 = Mul ({v}0, cos)
    {v}6 = Mul ({v}4, sin)
    {v} = Add ({v}5, {v}6)
"""


def rotary(name: str, constants: bool = True) -> str:
    text = ROTARY.replace("{v}", name)
    return text if constants else "\n".join(text.split("\n")[3:])


GROUPED = (
    (
        """
grouped (float[B, S, 6] x, float[6, 32] wq, float[6, 16] wk, float[6, 16] wv, float[5, 8] cos, float[5, 8] sin)
    => (float[B, 4, S, 8] y)
{
    four = Constant <value_ints = [0, 0, 4, 8]> ()
    two = Constant <value_ints = [0, 0, 2, 8]> ()
    qp = MatMul (x, wq)
    qh = Reshape (qp, four)
    q0 = Transpose <perm = [0, 2, 1, 3]> (qh)
    kp = MatMul (x, wk)
    kh = Reshape (kp, two)
    k0 = Transpose <perm = [0, 2, 1, 3]> (kh)
    vp = MatMul (x, wv)
    vh = Reshape (vp, two)
    v = Transpose <perm = [0, 2, 1, 3]> (vh)
"""
        + rotary("q")
        + rotary("k", constants=False)
    )
    .replace("[B, S,", "[B, 5,")
    .replace("4, S, 8", "4, 5, 8")
)
"""Two heads of keys for four of queries, turned by rotary positions; attention is still to come."""

ATTENTION = {
    "the operator": GROUPED + "    y = Attention (q, k, v)\n}",
    "written out, keys repeated": GROUPED
    + """
    place = Constant <value_ints = [2]> ()
    times = Constant <value_ints = [1, 1, 2, 1, 1]> ()
    joined = Constant <value_ints = [0, 4, -1, 8]> ()
    ku = Unsqueeze (k, place)
    kx = Expand (ku, times)
    kr = Reshape (kx, joined)
    vu = Unsqueeze (v, place)
    vx = Expand (vu, times)
    vr = Reshape (vx, joined)
    kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    scale = Constant <value_float = 0.25> ()
    ks = Mul (kt, scale)
    scores = MatMul (q, ks)
    shares = Softmax <axis = -1> (scores)
    y = MatMul (shares, vr)
}""",
}

THREE_AXES = """
packed (float[B, S, 32] q, float[B, S, 16] k, float[B, S, 16] v, float[6, 16] w) => (float[B, S, 32] y)
{ y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v) }
"""

CACHED = """
cached (float[B, 2, S, 8] q, float[B, 2, 1, 8] step, float[B, 2, T, 8] past, float[B, 2, U, 8] v)
    => (float[B, 2, S, 8] y, float[B, 2, U, 8] present)
{
    present = Concat <axis = 2> (past, step)
    kt = Transpose <perm = [0, 1, 3, 2]> (present)
    scores = MatMul (q, kt)
    shares = Softmax <axis = -1> (scores)
    y = MatMul (shares, v)
}
"""


@pytest.mark.parametrize("size", [8, 12, 16, 20, 24, 64, 92])
def test_a_down_projection_of_any_size(size: int) -> None:
    before = network(GATED.replace("N", str(size)))
    after = before.clone()
    (outcome,) = applied(after, (RotateOnline(),))
    assert isinstance(outcome, Applied)
    check_same(before, after, feed(before))
    check_proved(before, after)
    check_runs(before, after, feed(before))


@pytest.mark.parametrize(("text", "turns"), [(SHARED, 1), (EXPERTS, 2)], ids=["two readers of one value", "experts"])
def test_readers_that_belong_together(text: str, turns: int) -> None:
    before = network(text)
    after = before.clone()
    assert {type(outcome) for outcome in applied(after, (RotateOnline(),))} == {Applied}
    assert operators(after).count("Reshape") == 2 * turns
    check_same(before, after, feed(before))
    check_proved(before, after)
    check_runs(before, after, feed(before))


@pytest.mark.parametrize("form", ATTENTION)
def test_queries_and_keys_behind_rotary_positions(form: str) -> None:
    before = network(ATTENTION[form])
    after = before.clone()
    (outcome,) = applied(after, (RotateOnline(),))
    assert isinstance(outcome, Applied)
    check_same(before, after, feed(before, columns=5))
    check_runs(before, after, feed(before, columns=5))
    made = {node.outputs[0].name: list(node.outputs[0].shape or ()) for node in after.model.graph}
    # Keys are turned for two heads, before they are repeated for four.
    assert (made["q.turned"][1], made["k.turned"][1]) == (4, 2)


def test_attention_over_three_axes_is_turned_head_by_head() -> None:
    before = network(THREE_AXES, ("q", "k", "v"))
    after = before.clone()
    (outcome,) = applied(after, (RotateOnline(),))
    assert isinstance(outcome, Applied)
    inputs = feed(before)
    check_same(before, after, inputs)
    check_runs(before, after, inputs)


def test_keys_of_a_cache_that_others_see_are_turned_behind_it() -> None:
    before = network(CACHED, ("q", "step", "past", "v"))
    after = before.clone()
    (outcome,) = applied(after, (RotateOnline(),))
    assert isinstance(outcome, Applied)
    generator = np.random.default_rng(1)
    shapes = {"q": (2, 2, 1, 8), "step": (2, 2, 1, 8), "past": (2, 2, 4, 8), "v": (2, 2, 5, 8)}
    inputs = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    assert difference(before, after, inputs) <= 1.0
    (turned,) = (node for node in after.model.graph if node.outputs[0].name == "present.turned.cut")
    assert turned.inputs[0] is after.model.graph.outputs[1]


def test_what_is_computed_online_is_exact_in_every_format() -> None:
    for size in (8, 12, 64, 80, 92, 128, 4864, 18944):
        transform = turn(size)
        while isinstance(transform, Repeated):
            transform = transform.inner
        assert isinstance(transform, Hadamard)
        scale = transform.factor
        assert scale == 2.0 ** round(np.log2(scale))
        assert 0.7 < scale * transform.size**0.5 < 1.42


def test_what_queries_and_keys_are_turned_by_undo_each_other_exactly() -> None:
    for size in (8, 12, 64, 80, 96, 128, 192, 256):
        one = turn(size, doubled=True)
        assert one is not None
        for dtype in (np.float16, np.float32):
            query, key = one.matrix().astype(dtype), one.dual.matrix().astype(dtype)
            assert np.array_equal(query.astype(np.float64) @ key.astype(np.float64).T, np.eye(size))


def test_options_choose_the_places() -> None:
    mlp = network(GATED.replace("N", "16"))
    attention = network(ATTENTION["the operator"])
    assert not apply_pass(mlp.clone(), RotateOnline(down=False))
    assert not apply_pass(attention.clone(), RotateOnline(query_key=False))
    (outcome,) = apply_pass(mlp.clone(), RotateOnline(min_size=17))
    assert isinstance(outcome, Refused)
    assert outcome.refusal.requirement == "R1"


# ----------------------------------------------------------------------------------------------- wrong right-hand sides

MUTANTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "the matrix is as it was": ("wd.turned", lambda w: w.inner),
    "the matrix by H, not by its inverse": ("wd.turned", lambda w: Transformed(w.inner, w.map.dual, w.axis)),
    "the matrix by the transpose": (
        "wd.turned",
        lambda w: Transformed(w.inner, Hadamard(12, scale=w.map.scale, transposed=True), w.axis),
    ),
    "an online factor by its transpose": ("turn.12", lambda w: type(w)(w.value.T)),
    "an online factor of twice the scale": ("turn.12", lambda w: type(w)(w.value * 2)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_right_hand_side_shows_and_is_not_proved(mutant: str) -> None:
    before = network(GATED.replace("N", "12"))
    after = before.clone()
    apply_pass(after, RotateOnline())
    assert difference(before, after, feed(before)) <= 1.0, "the positive control"
    check_proved(before, after)
    name, wrong = MUTANTS[mutant]
    value = after.model.graph.initializers[name]
    assert isinstance(value.const_value, MaterializedTensor)
    assert value.dtype is not None
    value.const_value = MaterializedTensor(wrong(value.const_value.weight), value.dtype, name)  # type: ignore[arg-type]
    assert difference(before, after, feed(before)) > 1e4
    assert not prove(before.model, after.model).verdict.holds


# ------------------------------------------------------------------------------------------------------------ families

FAMILIES = ("llama", "qwen2", "gpt2", "falcon_parallel", "vit", "mixtral", "bloom", "phi")
QUICK = ("llama", "qwen2", "gpt2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FAMILIES])
def test_a_family_is_turned(name: str, family_program: Callable[[str], Program]) -> None:
    after = family_program(name)
    canonicalize(after)
    before = after.clone()
    recipe = (FoldScale(), CenterResidual(), FoldNorm(), RotateResidual(), RotateOnline())
    outcomes = [one for one in applied(after, recipe) if one.pass_name == "rotate-online"]
    assert [type(one) for one in outcomes] == [Applied] * 4
    inputs = generate_inputs(before.model, sizes=((2, 7),))[0]
    check_same(before, after, inputs)
    check_runs(before, after, inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_down_projections_of_a_family_are_proved(name: str, family_program: Callable[[str], Program]) -> None:
    after = family_program(name)
    canonicalize(after)
    before = after.clone()
    applied(after, (FoldScale(), CenterResidual(), FoldNorm(), RotateResidual(), RotateOnline(query_key=False)))
    check_proved(before, after)
