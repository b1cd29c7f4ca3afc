"""What center-residual must refuse: one case per requirement, then the traps that caught released tools."""

import pytest
from networks import network
from pass_examples import PRE_LN
from refusals import Case, check_refusal

from rewrite.passes import CenterResidual
from rewrite.rule import Applied, apply_pass

BLOCK = """
block ({types}float[B, 4] x, float[4, 6] w, float[6] c, float[6] g, float[6] b, float[6, 3] v)
    => (float[B, 3] y{outputs})
{{
    product = MatMul (x, w)
    stream = Add (product, c)
    {inside}
    n = {norm}
    y = MatMul (n, v)
}}
"""


def block(
    inside: str = "s = Identity (stream)",
    norm: str = "LayerNormalization (s, g, b)",
    types: str = "",
    outputs: str = "",
) -> str:
    return BLOCK.format(inside=inside, norm=norm, types=types, outputs=outputs)


CASES = {
    "R1": Case(block(), "s", "LayerNormalization", "opset 22", options={"opset": 22}),
    "R2": Case(
        block("s = Identity (stream) other = RMSNormalization (s, g)", outputs=", float[B, 6] other"),
        *("s", "RMSNormalization", "sees its mean"),
    ),
    "R3": Case(
        block(norm="LayerNormalization (s, one, b)", types="float[1] one, "),
        *("s", "LayerNormalization", r"γ has shape \(1,\), not \(6,\)"),
    ),
    "R4": Case(
        block("first = LayerNormalization (stream, g2, b) s = Add (first, p)", types="float[6] g2, float[6] p, "),
        *("s", "RMSNormalization", "with a γ that is not one constant"),
    ),
    "R5": Case(
        block("s = Identity (stream)", outputs=", float[B, 6] s"), *("s", "Identity", "s is an output of the graph")
    ),
    "R6": Case(
        block().replace("[B, 4]", "[B, 40]").replace("[4, 6]", "[40, 6]"),
        *("s", "", "w is an initializer that is also a graph input"),
        options={"overridable": ("w",)},
    ),
    "R7": Case(
        block("s = Identity (stream) raw = MatMul (s, v)", outputs=", float[B, 3] raw"),
        *("s", "MatMul", "reads the raw stream"),
    ),
    "R8": Case(block("s = Relu (stream)"), "s", "Relu", "positively homogeneous"),
    "R9": Case(
        """tied (int64[B, S] ids, float[7, 6] table, float[6] g) => (float[B, S, 7] y)
        {
            s = Gather (table, ids)
            n = LayerNormalization (s, g)
            head = Transpose <perm = [1, 0]> (table)
            y = MatMul (n, head)
        }""",
        *("s", "Transpose", "table would be copied for 1 norm, 2 asked for"),
        inputs=("ids",),
    ),
    "R10": Case(
        """kept (int64[B, S] ids, float[7, 6] table, float[6] g, float[6] b) => (float[B, S, 7] y, float[B, S, 6] z)
        {
            s = Gather (table, ids)
            n = LayerNormalization (s, g, b)
            m = LayerNormalization (s, b, g)
            z = Tanh (n)
            o = Tanh (m)
            head = Transpose <perm = [1, 0]> (table)
            y = MatMul (o, head)
        }""",
        *("s", "LayerNormalization", "would save less than a copied table takes"),
        inputs=("ids",),
    ),
}

TRAPS = {
    "a statistic of the norm is used": (
        "R3",
        Case(
            block(norm="LayerNormalization (s, g, b)", outputs=", float[B, 1] mean").replace(
                "    n = ", "    n, mean = "
            ),
            *("s", "LayerNormalization", "its statistic mean is used"),
        ),
    ),
    "the norm runs over two axes": (
        "R3",
        Case(
            """two (float[B, 3, 4] x, float[4, 6] w, float[3, 6] g) => (float[B, 3, 6] y)
            { s = MatMul (x, w) y = LayerNormalization <axis = 1> (s, g) }""",
            *("s", "LayerNormalization", "over the 2 last axes together"),
        ),
    ),
    "LayerNorm → ReLU → Linear with the stream on": (
        "R8",
        Case(
            block("s = Identity (stream) r = Relu (s) raw = MatMul (r, v)", outputs=", float[B, 3] raw"),
            "s",
            "Relu",
            "",
        ),
    ),
    "a table with one entry a channel multiplies the stream": (
        "R8",
        Case(block("s = Mul (stream, g)"), "s", "Mul", "multiplies every channel by its own constant"),
    ),
    "a number is added to every channel": (
        "R8",
        Case(
            block("h = Constant <value_float = 0.5> () s = Add (stream, h)"), "s", "Add", "one number to all channels"
        ),
    ),
    "a graph input joins the stream": (
        "R5",
        Case(block("s = Add (stream, z)", types="float[B, 6] z, "), "s", "", "z is an input", inputs=("x", "z")),
    ),
    "patch merging concatenates tokens along the channels": (
        "R8",
        Case(
            """merge (float[B, 2, 4] x, float[4, 6] w, float[12] g) => (float[B, 12] y)
            {
                stream = MatMul (x, w)
                zero = Constant <value_int = 0> () one = Constant <value_int = 1> ()
                left = Gather <axis = 1> (stream, zero) right = Gather <axis = 1> (stream, one)
                s = Concat <axis = 1> (left, right)
                y = LayerNormalization (s, g)
            }""",
            *("s", "Concat", "joins channels of several values"),
        ),
    ),
    "a depthwise convolution reads the stream": (
        "R8",
        Case(
            """deep (float[B, 3, 5] x, float[6, 3, 1] w, float[6, 1, 3] k, float[6] g, float[6] g2)
                => (float[B, 5, 6] y, float[B, 3, 6] z)
            {
                stream = Conv <kernel_shape = [1]> (x, w)
                s = Transpose <perm = [0, 2, 1]> (stream)
                y = LayerNormalization (s, g)
                deep = Conv <kernel_shape = [3], group = 6> (stream, k)
                t = Transpose <perm = [0, 2, 1]> (deep)
                z = LayerNormalization (t, g2)
            }""",
            *("s", "Conv", "6 groups of channels"),
        ),
    ),
    "heads are split off before the norm": (
        "R8",
        Case(
            """heads (float[B, 5, 4] x, float[4, 6] w, float[3] g) => (float[B, 5, 2, 3] y)
            {
                q = MatMul (x, w)
                shape = Constant <value_ints = [0, 0, 2, 3]> ()
                s = Reshape (q, shape)
                y = LayerNormalization (s, g)
            }""",
            *("s", "Reshape", r"is no axis of \[B, 5, 6\] before Reshape"),
        ),
    ),
    "the stream is written by an RMSNorm (sandwich norm)": (
        "R4",
        Case(block("s = RMSNormalization (stream, g2)", types="float[6] g2, "), "s", "RMSNormalization", "has a mean"),
    ),
    "dropout may be on": (
        "R8",
        Case(
            block("s = Dropout (stream, ratio, on)", types="float ratio, bool on, "),
            *("s", "Dropout", "may be in training mode"),
            inputs=("x", "on"),
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(CenterResidual(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(CenterResidual(), *TRAPS[trap])


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in CenterResidual.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(block()), CenterResidual())
    assert isinstance(outcome, Applied)


def test_post_layernorm_is_refused_everywhere_but_at_the_embedding() -> None:
    text = """
    post_ln (int64[B, S] ids, float[7, 6] table, float[6] g1, float[6] b1, float[6, 6] w, float[6] g2)
        => (float[B, S, 6] y)
    {
        e = Gather (table, ids)
        x0 = LayerNormalization (e, g1, b1)
        h = MatMul (x0, w)
        x1 = Add (x0, h)
        y = LayerNormalization (x1, g2)
    }"""
    embedding, stream = apply_pass(network(text, ("ids",)), CenterResidual())
    assert isinstance(embedding, Applied)
    assert stream.refusal.requirement == "R4"


def test_a_norm_with_a_constant_scale_may_write_the_stream() -> None:
    from networks import difference, feed

    text = block("s = LayerNormalization (stream, even, b)", types="float[6] even, ")
    before = network(text, even=[1.5] * 6)
    after = before.clone()
    outcomes = apply_pass(after, CenterResidual())
    assert [isinstance(outcome, Applied) for outcome in outcomes] == [True, True]
    assert difference(before, after, feed(before)) <= 1.0


def test_a_table_that_is_dear_to_copy_is_centred_behind() -> None:
    """Copying the table is worth 3 norms here, an explicit centring behind the sum less than 2."""
    program = network(PRE_LN, ("ids",))
    (outcome,) = apply_pass(program, CenterResidual(norms_per_copy=4))
    assert isinstance(outcome, Applied)
    assert outcome.untied_bytes == 0
    assert [insertion.behind for insertion in outcome.insertions] == ["x0"]
    assert "table.centred" not in program.model.graph.initializers


def test_a_table_is_neither_copied_nor_centred_behind_where_neither_pays() -> None:
    (outcome,) = apply_pass(network(PRE_LN, ("ids",)), CenterResidual(norms_per_copy=4, centring_ns=2.0))
    assert outcome.refusal.requirement == "R9"
    assert "table would be copied for 3 norms, 4 asked for" in outcome.refusal.reason
