"""What a region is made of: its values, who writes it, who reads it, and what stands in its way."""

from networks import network
from pass_examples import PRE_LN

from rewrite.basis.operators import bias_of, right_factor
from rewrite.basis.regions import Cause, Region, grow
from rewrite.basis.transforms import CENTRING, DIAGONAL_AND_SHIFT, ORTHOGONAL
from rewrite.ir.program import Program


def value(program: Program, name: str):
    for node in program.model.graph:
        for output in node.outputs:
            if output.name == name:
                return output
    raise KeyError(name)


def names(region: Region) -> dict[str, set[str]]:
    return {
        "values": {one.name for one in region.axes},
        "constants": {use.value.name for use in region.constants},
        "norms": {use.node.outputs[0].name for use in region.norms},
        "readers": {use.node.outputs[0].name for use in region.readers},
    }


def test_a_residual_stream_is_found_from_any_of_its_values() -> None:
    program = network(PRE_LN, ("ids",))
    expected = {
        "values": {"tokens", "positions", "x0", "o1", "m1", "x1", "o2", "s2", "x2"},
        "constants": {"table", "places", "w2", "c2", "w4", "c3"},
        "norms": {"n1", "n2", "n3"},
        "readers": set(),
    }
    for seed in expected["values"]:
        seed_value = value(program, seed)
        region = grow(seed_value, len(seed_value.shape) - 1, CENTRING)
        assert names(region) == expected
        assert not region.obstructions
        assert region.size == 8


def test_a_rotation_passes_an_rmsnorm_without_a_scale_and_is_read_behind_it() -> None:
    text = """
    rms (float[B, 4] x, float[4, 6] w, float[6] one, float[6] g, float[6, 3] v) => (float[B, 3] y, float[B, 3] z)
    {
        s = MatMul (x, w)
        n = RMSNormalization (s, one)
        m = RMSNormalization (s, g)
        y = MatMul (n, v)
        z = MatMul (m, v)
    }"""
    program = network(text, one=[1.0] * 6)
    region = grow(value(program, "s"), 1, ORTHOGONAL)
    assert names(region) == {"values": {"s", "n"}, "constants": {"w"}, "norms": {"m"}, "readers": {"y"}}
    assert {one.name for one in grow(value(program, "s"), 1, CENTRING).axes} == {"s"}


def test_an_axis_is_followed_through_layout() -> None:
    text = """
    layout (float[B, 3, 4, 4] x, float[6, 3, 4, 4] k, float[6] kb, float[1, 1, 6] token, float[6] g) => (float[C, 6] y)
    {
        c = Conv <kernel_shape = [4, 4]> (x, k, kb)
        flat = Constant <value_ints = [0, 6, -1]> ()
        r = Reshape (c, flat)
        t = Transpose <perm = [0, 2, 1]> (r)
        batch = Shape <start = 0, end = 1> (x)
        rest = Constant <value_ints = [1, 6]> ()
        shape = Concat <axis = 0> (batch, rest)
        e = Expand (token, shape)
        s = Concat <axis = 1> (e, t)
        rows = Constant <value_ints = [-1, 6]> ()
        f = Reshape (s, rows)
        y = LayerNormalization (f, g)
    }"""
    region = grow(value(network(text), "f"), 1, CENTRING)
    assert {one.name: axis for one, axis in region.axes.items()} == {"f": 1, "s": 2, "e": 2, "t": 2, "r": 1, "c": 1}
    assert {(use.value.name, use.axis) for use in region.constants} == {("k", 0), ("kb", 0), ("token", 2)}
    assert not region.obstructions


def test_an_obstruction_has_a_place_a_cause_and_a_reason() -> None:
    text = """
    bad (float[B, 6] x, float[6, 6] w) => (float[B, 6] y)
    {
        a = MatMul (x, w)
        s = Add (a, x)
        y = Tanh (s)
    }"""
    program = network(text)
    region = grow(value(program, "a"), 1, CENTRING)
    assert [(met.cause, met.value.name, met.node and met.node.op_type) for met in region.obstructions] == [
        (Cause.INTERFACE, "x", None),
        (Cause.OPERATOR, "s", "Tanh"),
    ]
    assert [use.node.op_type for use in region.readers] == ["MatMul"]


def test_one_value_along_two_axes_is_an_obstruction() -> None:
    text = """
    square (float[6, 4] x, float[4, 6] w) => (float[6, 6] y)
    { a = MatMul (x, w) b = Transpose <perm = [1, 0]> (a) s = Add (a, b) y = Identity (s) }"""
    region = grow(value(network(text), "a"), 1, CENTRING)
    assert any("along axis" in met.reason for met in region.obstructions)


def test_a_size_that_is_not_static_is_an_obstruction() -> None:
    text = "dynamic (float[B, C] x) => (float[B, C] y) { y = Relu (x) }"
    region = grow(value(network(text), "y"), 1, CENTRING)
    assert [met.reason for met in region.obstructions] == ["the size of axis 1 is not static"]


def test_a_value_read_inside_a_subgraph_is_an_obstruction() -> None:
    text = """
    branch (float[B, 4] x, bool k, float[4, 6] w, float[6] g) => (float[B, 6] y, float[B, 6] z)
    {
        s = MatMul (x, w)
        y = LayerNormalization (s, g)
        z = If (k) <
            then_branch = yes () => (float[B, 6] t) { t = Add (s, s) },
            else_branch = no () => (float[B, 6] u) { u = Identity (s) }
        >
    }"""
    region = grow(value(network(text, ("x", "k")), "s"), 1, CENTRING)
    assert {met.reason for met in region.obstructions} == {
        "Add stands in a subgraph",
        "Identity stands in a subgraph",
    }


def test_a_stack_of_matrices_behind_a_split_is_one_constant() -> None:
    text = """
    experts (float[2, 4, 6] x, float[2, 6, 5] stack) => (float[1, 4, 5] y, float[1, 4, 5] z)
    {
        a, b = Split <axis = 0, num_outputs = 2> (x)
        u, v = Split <axis = 0, num_outputs = 2> (stack)
        y = MatMul (a, u)
        z = MatMul (b, v)
    }"""
    program = network(text)
    factor = right_factor(value(program, "y").producer(), DIAGONAL_AND_SHIFT)
    assert [(use.node.op_type, use.position, use.axis) for use in factor.constants] == [("Split", 0, 1)]
    assert {(use.node.outputs[0].name, use.position) for use in factor.readers} == {("y", 1), ("z", 1)}


def test_the_bias_of_a_product_is_a_vector_added_to_it_alone() -> None:
    text = """
    biases (float[B, 5, 4] x, float[4, 6] w, float[6] b, float[5, 6] table) => (float[B, 5, 6] y, float[B, 5, 6] z)
    {
        p = MatMul (x, w) y = Add (b, p)
        q = MatMul (x, w) z = Add (q, table)
    }"""
    program = network(text)
    bias = bias_of(value(program, "p").producer())
    assert bias is not None
    assert (bias.value.name, bias.position) == ("b", 0)
    assert bias_of(value(program, "q").producer()) is None
