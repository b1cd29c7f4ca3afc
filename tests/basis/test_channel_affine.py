"""Clusters: what is one factor and one shift a channel, where it starts and ends, and what it leaves of layout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from networks import feed, network

from rewrite.basis.affine_neighbours import scaled_inside
from rewrite.basis.channel_affine import Cluster, channel_affine, cluster_ends, computed
from rewrite.basis.channel_layouts import Moved, Permuted, Reshaped, pads, then
from rewrite.check.reference import values_of
from rewrite.ir.program import Program
from rewrite.ir.weights import Constant

VECTORS = "float[6] g, float[6] b, float[6] mean, float[6] var"
SPREAD = {"var": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]}
POSITIVE = {**SPREAD, "v": [0.5, 1.0, 1.5, 2.0, 2.5, 3.0], "e": 0.01, "t": [1.0, -2.0, 0.5, 1.5, -1.0, 3.0]}
NORM = "BatchNormalization <epsilon = 0.01>"


def written(program: Program, name: str) -> ir.Value:
    return next(value for node in program.model.graph for value in node.outputs if value.name == name)


def holds(program: Program, cluster: Cluster) -> bool:
    """Whether the result is factor ⊙ L(root) + shift, with L the `path`, in float64."""
    values = dict(values_of(program.model, feed(program)))
    moved = values[cluster.root.name or ""]
    for node in cluster.path:
        if node.op_type == "Transpose":
            moved = moved.transpose(node.attributes.get_ints("perm"))
        else:
            moved = moved.reshape(values[node.outputs[0].name or ""].shape)
    along = [-1 if axis == cluster.axis else 1 for axis in range(moved.ndim)]
    made = moved * cluster.factor.reshape(along) + cluster.shift.reshape(along)
    return bool(np.allclose(made, values[cluster.result.name or ""], rtol=1e-12, atol=1e-12))


CLUSTERS = {
    "a norm": (f"float[2, 6, 5] x, {VECTORS}", f"y = {NORM} (x, g, b, mean, var)", "x", 0),
    "a norm and its input": (
        f"float[2, 6] x, {VECTORS}",
        f"n = {NORM} (x, g, b, mean, var) y = Sub (x, n)",
        *("x", 0),
    ),
    "arithmetic on both sides": (
        "float[2, 5, 6] x, float[6] s, float[1, 6] t, float[1] u",
        "a = Mul (s, x) c = Sub (u, a) d = Neg (c) e = Div (d, t) y = Add (e, s)",
        *("x", 0),
    ),
    "turned and back": (
        f"float[2, 5, 6] x, {VECTORS}, float[1] alpha",
        f"t = Transpose <perm = [0, 2, 1]> (x) n = {NORM} (t, g, b, mean, var) m = Mul (alpha, t) s = Add (n, m) "
        "y = Transpose <perm = [0, 2, 1]> (s)",
        *("x", 0),
    ),
    "turned, cut and back by another way": (
        f"float[2, 5, 6] x, {VECTORS}",
        f"rows = Constant <value_ints = [10, 6]> () whole = Constant <value_ints = [2, 5, 6]> () "
        f"r = Reshape (x, rows) n = {NORM} (r, g, b, mean, var) y = Reshape (n, whole)",
        *("x", 0),
    ),
    "layout that stays": (
        f"float[2, 5, 6] x, {VECTORS}",
        f"s = Constant <value_ints = [2, 6, 5, 1]> () t = Transpose <perm = [0, 2, 1]> (x) r = Reshape (t, s) "
        f"y = {NORM} (r, g, b, mean, var)",
        *("x", 2),
    ),
    "two branches of layout": (
        f"float[2, 5, 6] x, {VECTORS}, float[6] s",
        f"t = Transpose <perm = [0, 2, 1]> (x) n = {NORM} (t, g, b, mean, var) back = Transpose <perm = [0, 2, 1]> (n) "
        "m = Mul (x, s) y = Add (m, back)",
        *("x", 0),
    ),
    "a constant that is computed": (
        "float[2, 6] x, float[6] v, float e, float[6] g",
        "f = Add (v, e) s = Sqrt (f) i = Reciprocal (s) n = Mul (x, i) y = Mul (n, g)",
        *("x", 0),
    ),
    "a zero that is spread": (
        "float[2, 6] x, float[6] g",
        "shape = Constant <value_ints = [6]> () zero = Constant <value_float = 0.5> () z = Expand (zero, shape) "
        "m = Mul (x, g) y = Add (m, z)",
        *("x", 0),
    ),
    "another axis starts anew": (
        f"float[2, 6, 5] x, float[5] s, {VECTORS}",
        f"m = Mul (x, s) y = {NORM} (m, g, b, mean, var)",
        *("m", 0),
    ),
    "channels that become others start anew": (
        f"float[2, 3, 2] x, float[3, 1] s, {VECTORS}",
        f"m = Mul (x, s) f = Flatten (m) y = {NORM} (f, g, b, mean, var)",
        *("f", 0),
    ),
    "what begins anew begins so for both branches": (
        f"float[2, 6, 5] x, float[5] s, {VECTORS}, float[1] alpha",
        f"m = Add (x, s) n = {NORM} (m, g, b, mean, var) a = Mul (m, alpha) y = Add (n, a)",
        *("m", 0),
    ),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_largest_cluster(name: str) -> None:
    given, body, root, path = CLUSTERS[name]
    program = network(f"cluster ({given}) => ({made_of(given, body)} y) {{ {body} }}", **POSITIVE)
    cluster = channel_affine(written(program, "y"))
    assert cluster is not None
    assert cluster.root.name == root
    assert len(cluster.path) == path
    assert holds(program, cluster)
    assert cluster_ends(program.model.graph)[-1] is cluster.result


def made_of(given: str, body: str) -> str:
    """The type of the result: that of x, or what the last Reshape or Flatten makes of it."""
    if "[2, 6, 5, 1]" in body:
        return "float[2, 6, 5, 1]"
    return "float[2, 6]" if "Flatten" in body else given[: given.index("]") + 1]


def test_a_cluster_starts_where_something_else_reads() -> None:
    program = network(
        f"""exposed (float[2, 6] x, {VECTORS}, float[6] s, float[6] t) => (float[2, 6] y, float[2, 6] z)
        {{ m = Mul (x, s) z = Tanh (m) n = {NORM} (m, g, b, mean, var) y = Add (n, m) }}""",
        **SPREAD,
    )
    cluster = channel_affine(written(program, "y"))
    assert cluster is not None
    assert cluster.root.name == "m"
    assert [value.name for value in cluster_ends(program.model.graph)] == ["m", "y"]


def test_a_branch_that_is_an_output_is_a_cluster_of_its_own() -> None:
    program = network(
        f"""output (float[2, 6] x, {VECTORS}) => (float[2, 6] n, float[2, 6] y)
        {{ n = {NORM} (x, g, b, mean, var) y = Add (n, x) }}""",
        **SPREAD,
    )
    assert channel_affine(written(program, "y")) is None
    assert [value.name for value in cluster_ends(program.model.graph)] == ["n"]


def test_layout_at_the_end_that_cancels_nothing_is_left_out() -> None:
    program = network(
        f"""turned (float[2, 6, 5] x, {VECTORS}) => (float[2, 5, 6] y)
        {{ n = {NORM} (x, g, b, mean, var) y = Transpose <perm = [0, 2, 1]> (n) }}""",
        **SPREAD,
    )
    cluster = channel_affine(written(program, "y"))
    assert cluster is not None
    assert cluster.result.name == "n"


NONE = {
    "numbers alone": "float[2, 6] x, float[1] s) => (float[2, 6] y) { y = Mul (x, s) }",
    "two values": "float[2, 6] x, float[2, 6] z, float[6] s) => (float[2, 6] y) { y = Add (x, z) }",
    "a square": "float[2, 6] x) => (float[2, 6] y) { y = Mul (x, x) }",
    "a table": "float[2, 5, 6] x, float[5, 6] s) => (float[2, 5, 6] y) { y = Mul (x, s) }",
    "a vector that widens": "float[2, 1] x, float[6] s) => (float[2, 6] y) { y = Add (x, s) }",
    "a quotient by the value": "float[2, 6] x, float[6] s) => (float[2, 6] y) { y = Div (s, x) }",
    "a quotient by zero": "float[2, 6] x, float[6] zero) => (float[2, 6] y) { y = Div (x, zero) }",
    "layouts that differ": "float[3, 3, 6] x, float[6] s) => (float[3, 3, 6] y) "
    "{ t = Transpose <perm = [1, 0, 2]> (x) m = Mul (t, s) y = Add (m, x) }",
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_cluster(name: str) -> None:
    program = network(f"none ({NONE[name]}", ("x", "z"), zero=np.zeros(6))
    assert channel_affine(written(program, "y")) is None


def test_a_constant_behind_very_many_operators_is_none() -> None:
    def chain(length: int) -> ir.Value:
        steps = " ".join(f"c{i + 1} = Abs (c{i})" for i in range(length))
        program = network(f"deep (float[6] c0, float[2, 6] x) => (float[2, 6] y) {{ {steps} y = Mul (x, c{length}) }}")
        return written(program, f"c{length}")

    assert computed(chain(15)) is not None
    assert computed(chain(40)) is None


def test_layouts_cancel_and_keep_the_order() -> None:
    turn, cut, back = Permuted((0, 2, 1)), Reshaped((2, 6, 5), (2, 30)), Reshaped((2, 30), (2, 6, 5))
    assert then((turn,), turn) == ()
    assert then((turn,), Permuted((1, 2, 0))) == (Permuted((2, 1, 0)),)
    assert then(then((turn,), cut), back) == (turn,)
    assert then(then(then((turn,), cut), back), turn) == ()
    assert then(then((), Reshaped(("n", 6), ("n", 2, 3))), Reshaped(("n", 2, 3), ("m", 6))) != ()
    node = ir.node("Slice", [])
    assert then((Moved(node),), Moved(node)) == (Moved(node), Moved(node))


@pytest.mark.parametrize(
    ("attributes", "padded"),
    [
        ({}, False),
        ({"pads": [0, 0]}, False),
        ({"pads": [0, 1]}, True),
        ({"auto_pad": "VALID"}, False),
        ({"auto_pad": "VALID", "pads": [1, 1]}, False),
        ({"auto_pad": "SAME_LOWER", "kernel_shape": [3]}, True),
        ({"auto_pad": "SAME_UPPER", "kernel_shape": [1]}, False),
        ({"auto_pad": "SAME_UPPER"}, True),
    ],
)
def test_what_pads(attributes: dict[str, object], padded: bool) -> None:
    assert pads(ir.node("AveragePool", [], attributes)) == padded


@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 3, 2), 1), ((4, 3, 2), 2), ((6, 1, 3), 3), ((4, 2), 4), ((6, 2), 3)]
)
def test_channels_inside_groups(shape: tuple[int, ...], groups: int) -> None:
    kernel = np.random.default_rng(0).normal(size=shape)
    factor = np.random.default_rng(1).normal(size=shape[1] * groups)
    found = scaled_inside(Constant(kernel), factor, groups).numpy()
    for row in range(shape[0]):
        for inside in range(shape[1]):
            channel = row // (shape[0] // groups) * shape[1] + inside
            assert np.allclose(found[row, inside], kernel[row, inside] * factor[channel], rtol=1e-15)
