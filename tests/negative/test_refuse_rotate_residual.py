"""What rotate-residual must refuse: one case per requirement, then traps that were seen in released tools."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from networks import difference, digest, feed, network
from refusals import Case, check_refusal

from rewrite.ir.weights import Transformed, weight_of
from rewrite.passes import RotateResidual
from rewrite.proof.transforms import Hadamard
from rewrite.rule import Applied, Refused, apply_pass

BLOCK = """
block ({types}float[B, 4] x, float[4, 8] w, float[8] c, float[8] even, float[8] g, float[8] b, float[8, 3] v)
    => (float[B, 3] y{outputs})
{{
    product = MatMul (x, w)
    stream = Add (product, c)
    {inside}
    n = {norm}
    y = {reader}
}}
"""
EVEN: dict[str, Any] = {"even": [0.5] * 8}


def block(
    inside: str = "s = Identity (stream)",
    norm: str = "RMSNormalization (s, even)",
    reader: str = "MatMul (n, v)",
    types: str = "",
    outputs: str = "",
) -> str:
    return BLOCK.format(inside=inside, norm=norm, reader=reader, types=types, outputs=outputs)


def case(text: str, site: str, operator: str, reason: str, **options: Any) -> Case:
    inputs = options.pop("inputs", ("x",))
    return Case(text, site, operator, reason, inputs=inputs, options={**EVEN, **options})


TIED = """tied (int64[B, S] ids, float[9, 8] table, float[8] g) => (float[B, S, 9] y)
{
    s = Gather (table, ids)
    n = RMSNormalization (s, g)
    head = Transpose <perm = [1, 0]> (table)
    y = MatMul (n, head)
}"""

CASES = {
    "R1": case(
        block("s = Identity (stream) other = LayerNormalization (s, even)", outputs=", float[B, 8] other"),
        *("s", "LayerNormalization", "which center-residual did not centre"),
    ),
    "R2": case(
        block("first = RMSNormalization (stream, g) s = Add (first, c)"),
        *("s", "RMSNormalization", "writes the stream with a γ that is not one constant"),
    ),
    "R3": case(
        block(norm="RMSNormalization (s, g)", reader="Relu (n)").replace("[B, 3] y", "[B, 8] y"),
        *("s", "RMSNormalization", "cannot be folded: Relu is positively homogeneous"),
    ),
    "R4": case(block(outputs=", float[B, 8] s"), *("s", "Identity", "s is an output of the graph")),
    "R5": case(
        block().replace("[B, 4]", "[B, 40]").replace("[4, 8]", "[40, 8]"),
        *("s", "", "w is an initializer that is also a graph input"),
        overridable=("w",),
    ),
    "R6": case(block("s = Relu (stream)"), *("s", "Relu", "positively homogeneous")),
    "R7": case(
        block(reader="MatMul (n, z)", types="float[8, 3] z, "),
        *("s", "MatMul", "something that is not a constant .z is an input"),
        inputs=("x", "z"),
    ),
    "R8": Case(TIED, "s", "Gather", "table is tied, and would be copied", inputs=("ids",)),
}

TRAPS = {
    "LayerNorm stays where the stream is not centred": (
        "R1",
        case(block(norm="LayerNormalization (s, even)"), *("s", "LayerNormalization", "reads the stream")),
    ),
    "a LayerNorm writes it (embedding norm)": (
        "R1",
        case(block("s = LayerNormalization (stream, even)"), *("s", "LayerNormalization", "writes the stream")),
    ),
    "γ is not constant by one unit in the last place": (
        "R3",
        case(
            block(norm="RMSNormalization (s, nearly)", reader="Relu (n)", types="float[8] nearly, ").replace(
                "[B, 3] y", "[B, 8] y"
            ),
            *("s", "RMSNormalization", "its γ is not one constant"),
            nearly=[1.0] * 7 + [np.nextafter(np.float32(1), np.float32(2))],
        ),
    ),
    "γ may be overridden": (
        "R3",
        case(block(), "s", "RMSNormalization", "is not a constant of the network", overridable=("even",)),
    ),
    "hidden states are returned": (
        "R4",
        case(
            block("s = Identity (stream) copy = Identity (s)", outputs=", float[B, 8] copy"),
            *("s", "Identity", "copy is an output"),
        ),
    ),
    "an input joins the stream": (
        "R4",
        case(block("s = Add (stream, z)", types="float[B, 8] z, "), *("s", "", "z is an input"), inputs=("x", "z")),
    ),
    "a vector with one factor a channel": (
        "R6",
        case(block("s = Mul (stream, g)"), *("s", "Mul", "multiplies every channel by its own constant")),
    ),
    "one number is added to all channels": (
        "R6",
        case(
            block("h = Constant <value_float = 0.5> () s = Add (stream, h)"),
            *("s", "Add", "one number to all channels"),
        ),
    ),
    "channels are picked": (
        "R6",
        case(
            block(
                "s = Identity (stream) zero = Constant <value_ints = [0]> () half = Constant <value_ints = [4]> () "
                "one = Constant <value_ints = [1]> () cut = Slice (s, zero, half, one)",
                outputs=", float[B, 4] cut",
            ),
            *("s", "Slice", "takes some channels"),
        ),
    ),
    "heads are split off before their norm": (
        "R6",
        case(
            """heads (float[B, 5, 4] x, float[4, 16] w, float[8] even) => (float[B, 5, 2, 8] y)
            {
                q = MatMul (x, w)
                shape = Constant <value_ints = [0, 0, 2, 8]> ()
                s = Reshape (q, shape)
                n = RMSNormalization (s, even)
                y = Relu (n)
            }""",
            *("s", "Reshape", "is no axis of"),
        ),
    ),
    "the stream is multiplied with itself": (
        "R7",
        case(
            block("s = Identity (stream) t = Transpose (s) gram = MatMul (s, t)", outputs=", float[B, B] gram"),
            *("s", "MatMul", "multiplies it with itself"),
        ),
    ),
    "the transposed matrix of a reader is read elsewhere": (
        "R7",
        case(
            """shared (float[B, 4] x, float[4, 8] w, float[8] even, float[3, 8] v, float[B, 8] z)
                => (float[B, 3] y, float[B, 3] other)
            {
                s = MatMul (x, w)
                n = RMSNormalization (s, even)
                t = Transpose <perm = [1, 0]> (v)
                y = MatMul (n, t)
                other = MatMul (z, t)
            }""",
            *("s", "MatMul", "t is also read here, where nothing else changes"),
            inputs=("x", "z"),
        ),
    ),
    "a bias of the size of the vocabulary": (
        "R3",
        case(
            """wide (float[B, 4] x, float[4, 8] w, float[8] g, float[8] b, float[8, 99] v) => (float[B, 99] y)
            {
                s = MatMul (x, w)
                n = RMSNormalization (s, g)
                m = Add (n, b)
                y = MatMul (m, v)
            }""",
            *("s", "RMSNormalization", "β needs new biases of 99 numbers"),
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    rule = RotateResidual(untie=requirement != "R8")
    check_refusal(rule, requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(RotateResidual(), *TRAPS[trap], alone=False)


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in RotateResidual.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    for text, inputs in ((block(), ("x",)), (TIED, ("ids",))):
        (outcome,) = apply_pass(network(text, inputs, **EVEN), RotateResidual())
        assert isinstance(outcome, Applied)


def test_rotating_under_a_layernorm_is_refused_and_would_be_wrong() -> None:
    before = network(block(norm="LayerNormalization (s, even)"), **EVEN)
    untouched = digest(before)
    (outcome,) = apply_pass(before, RotateResidual())
    assert isinstance(outcome, Refused)
    assert digest(before) == untouched
    wrong = before.clone()
    turn = Hadamard(8, 1)
    for name, axis in (("w", 1), ("c", 0), ("v", 0)):
        value = wrong.model.graph.initializers[name]
        assert value.const_value is not None
        rotated = Transformed(weight_of(value.const_value), turn, axis).numpy()
        value.const_value = ir.tensor(rotated.astype(np.float32), name=name)
    assert difference(before, wrong, feed(before)) > 1e4
