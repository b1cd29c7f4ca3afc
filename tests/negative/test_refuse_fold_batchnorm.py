"""What fold-batchnorm must refuse: one case per requirement, then the traps of batch normalization."""

import numpy as np
import pytest
from networks import difference, feed, network, operators
from refusals import Case, check_refusal

from rewrite.passes import FoldBatchnorm
from rewrite.rule import Applied, Refused, apply_pass

VECTORS = "float[6] g, float[6] b, float[6] mean, float[6] var"
VARIANCE = {"var": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]}

BEFORE = f"""
before ({{types}}float[B, 3, 8, 8] x, float[6, 3, 3, 3] k, float[6] kb, {VECTORS}) => (float[B, 6, 6, 6] y{{outputs}})
{{{{
    c = Conv <kernel_shape = [3, 3]> (x, k, kb)
    {{inside}}
    y = Relu (n)
}}}}
"""
"""A kernel in front, an activation behind: all of it goes forwards into nothing, backwards into the kernel."""

BEHIND = f"""
behind ({{types}}float[B, 6, 8, 8] x, {VECTORS}, float[4, 6, 3, 3] k) => (float[B, 4, {{size}}, {{size}}] y{{outputs}})
{{{{
    h = Tanh (x)
    {{inside}}
    y = Conv <kernel_shape = [3, 3]{{pads}}> (r, k)
}}}}
"""
"""An activation in front, a kernel behind."""

NORM = "n = BatchNormalization (c, g, b, mean, var)"


def before(inside: str = NORM, types: str = "", outputs: str = "") -> str:
    return BEFORE.format(inside=inside, types=types, outputs=outputs)


def behind(
    inside: str = "r = BatchNormalization (h, g, b, mean, var)",
    types: str = "",
    outputs: str = "",
    pads: str = "",
    size: int = 6,
) -> str:
    return BEHIND.format(inside=inside, types=types, outputs=outputs, pads=pads, size=size)


PADDED = ", pads = [1, 1, 1, 1]"
ZEROED = {**VARIANCE, "g": [1.0, 2.0, 0.0, 1.0, 1.0, 1.0]}

CASES = {
    "R1": Case(
        before("n, moved, spread = BatchNormalization <training_mode = 1> (c, g, b, mean, var)"),
        *("n", "BatchNormalization", "in training mode"),
        options=VARIANCE,
    ),
    "R2": Case(before(), "n", "BatchNormalization", "not positive in channel 2", options={"var": [1, 1, -2, 1, 1, 1]}),
    "R3": Case(
        behind("m = BatchNormalization (h, g, b, mean, var) r = Relu (m)"),
        *("m", "Relu", r"before it, Tanh writes it.*; behind it, Relu is positively homogeneous"),
        options=VARIANCE,
    ),
}

TRAPS = {
    "the mean may be overridden": (
        "R1",
        Case(
            *(before(), "n", "BatchNormalization", r"the mean \(mean\) may be overridden"),
            options={**VARIANCE, "overridable": ("mean",)},
        ),
    ),
    "the variance is computed from the input": (
        "R1",
        Case(
            before("n = BatchNormalization (c, g, b, mean, wide)", types="float[6] wide, "),
            *("n", "BatchNormalization", "the variance .* is computed"),
            inputs=("x", "wide"),
        ),
    ),
    "a second output before opset 14 means training": (
        "R1",
        Case(
            before("n, moved, spread, a, z = BatchNormalization (c, g, b, mean, var)"),
            *("n", "BatchNormalization", "gives out its statistics"),
            options={**VARIANCE, "opset": 13},
        ),
    ),
    "a variance that is not a number": (
        "R2",
        Case(
            before(), "n", "BatchNormalization", "the variance is not finite", options={"var": [1, 1, np.nan, 1, 1, 1]}
        ),
    ),
    "a variance of minus epsilon": (
        "R2",
        Case(
            before("n = BatchNormalization <epsilon = 0.5> (c, g, b, mean, var)"),
            *("n", "BatchNormalization", "not positive in channel 1"),
            options={"var": [1, -0.5, 1, 1, 1, 1]},
        ),
    ),
    "a factor that is not finite": (
        "R2",
        Case(
            before(), "n", "BatchNormalization", "γ is not finite", options={**VARIANCE, "g": [1, 1, 1, np.inf, 1, 1]}
        ),
    ),
    "the kernel is read by another": (
        "R3",
        Case(
            before(f"{NORM} z = Conv <kernel_shape = [3, 3]> (x, k)", outputs=", float[B, 6, 6, 6] z"),
            *("n", "Relu", "before it, k is also read here, and would have to be copied"),
            options=VARIANCE,
        ),
    ),
    "the kernel may be overridden": (
        "R3",
        Case(
            *(before(), "n", "Relu", "writes it with k, which is an initializer that is also a graph input"),
            options={**VARIANCE, "overridable": ("k",)},
        ),
    ),
    "the kernel's bias may be overridden": (
        "R3",
        Case(
            *(before(), "n", "Relu", "writes it with kb, which is an initializer that is also a graph input"),
            options={**VARIANCE, "overridable": ("kb",)},
        ),
    ),
    "the product is read by another": (
        "R3",
        Case(
            before(f"{NORM} z = Sigmoid (c)", outputs=", float[B, 6, 6, 6] z"),
            *("n", "Relu", "before it, Sigmoid reads c as it is before"),
            options=VARIANCE,
        ),
    ),
    "the product is an output": (
        "R3",
        Case(
            before(outputs=", float[B, 6, 6, 6] c"),
            *("n", "Relu", "before it, c is an output of the graph"),
            options=VARIANCE,
        ),
    ),
    "the result is an output, and nothing affine is before it": (
        "R3",
        Case(
            behind("m = BatchNormalization (h, g, b, mean, var) r = Identity (m)", outputs=", float[B, 6, 8, 8] m"),
            *("m", "BatchNormalization", "behind it, m is an output of the graph"),
            options=VARIANCE,
        ),
    ),
    "an activation between kernel and norm": (
        "R3",
        Case(
            before("a = Gelu (c) n = BatchNormalization (a, g, b, mean, var)"),
            *("n", "Relu", "before it, Gelu writes it"),
            options=VARIANCE,
        ),
    ),
    "a concatenation in front": (
        "R3",
        Case(
            before(
                "a = Concat <axis = 2> (c, c) n2 = BatchNormalization (a, g, b, mean, var) n = MaxPool "
                "<kernel_shape = [7, 1]> (n2)"
            ),
            *("n2", "MaxPool", "before it, Concat writes it"),
            options=VARIANCE,
        ),
    ),
    "a residual sum behind": (
        "R3",
        Case(
            behind("m = BatchNormalization (h, g, b, mean, var) r = Add (m, x)"),
            *("m", "Add", "behind it, Add adds channel by channel"),
            options=VARIANCE,
        ),
    ),
    "channels that are flattened with their positions": (
        "R3",
        Case(
            f"""flat (float[2, 6, 2, 2] x, {VECTORS}, float[24, 3] w) => (float[2, 3] y)
            {{ h = Tanh (x) n = BatchNormalization (h, g, b, mean, var) f = Flatten (n) y = MatMul (f, w) }}""",
            *("n", "Flatten", "behind it, axis 1 of .* does not survive Flatten"),
            options=VARIANCE,
        ),
    ),
    "a product of the result with itself": (
        "R3",
        Case(
            f"""gram (float[2, 6, 6] x, {VECTORS}) => (float[2, 6, 6] y)
            {{ h = Tanh (x) n = BatchNormalization (h, g, b, mean, var) y = MatMul (n, n) }}""",
            *("n", "MatMul", "behind it, MatMul is one linear map on every channel"),
            options=VARIANCE,
        ),
    ),
    "one reader of two is not affine": (
        "R3",
        Case(
            behind(
                "r = BatchNormalization (h, g, b, mean, var) z = Softmax <axis = 1> (r)",
                outputs=", float[B, 6, 8, 8] z",
            ),
            *("r", "Softmax", "behind it, Softmax acts on each channel by itself"),
            options=VARIANCE,
        ),
    ),
    "the reader's kernel may be overridden": (
        "R3",
        Case(
            *(behind(), "r", "Conv", "multiplies it with something that is not a constant"),
            options={**VARIANCE, "overridable": ("k",)},
        ),
    ),
    "the reader's kernel is read by another": (
        "R3",
        Case(
            behind(
                "r = BatchNormalization (h, g, b, mean, var) z = Conv <kernel_shape = [3, 3]> (x, k)",
                outputs=", float[B, 4, 6, 6] z",
            ),
            *("r", "Conv", "k is also read here, and would have to be copied"),
            options=VARIANCE,
        ),
    ),
    "padding, and a factor of zero": (
        "R3",
        Case(
            *(behind(pads=PADDED, size=8), "r", "Conv", "Conv pads it with zeros.*the factor 0 of channel 2"),
            options=ZEROED,
        ),
    ),
    "padding, and a factor so small that the shift in front overflows": (
        "R3",
        Case(
            *(behind(pads=PADDED, size=8), "r", "Conv", "Conv pads it with zeros.*the factor 9.99995e-40 of channel 2"),
            options={**VARIANCE, "g": [1.0, 2.0, 1e-39, 1.0, 1.0, 1.0]},
        ),
    ),
    "padding, and a shift alone": (
        "R3",
        Case(
            behind("r = Sub (h, m)", types="float[6, 1, 1] m, ", pads=PADDED, size=8),
            *("r", "Conv", "behind it, Conv pads it with zeros, which are no shift$"),
            options=VARIANCE,
        ),
    ),
    "padding that the operator chooses, and a shift alone": (
        "R3",
        Case(
            behind("r = Sub (h, m)", types="float[6, 1, 1] m, ", pads=', auto_pad = "SAME_UPPER"', size=8),
            *("r", "Conv", "behind it, Conv pads it with zeros, which are no shift$"),
            options=VARIANCE,
        ),
    ),
    "zeros put beside it, and a shift alone": (
        "R3",
        Case(
            behind(
                "s = Sub (h, m) p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () r = Pad (s, p)",
                types="float[6, 1, 1] m, ",
                size=8,
            ),
            *("s", "Pad", "behind it, Pad puts zeros beside it, which are no shift"),
            options=VARIANCE,
        ),
    ),
    "an average that counts its padding, and a shift alone": (
        "R3",
        Case(
            behind(
                "s = Sub (h, m) r = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], "
                "count_include_pad = 1> (s)",
                types="float[6, 1, 1] m, ",
            ),
            *("s", "AveragePool", "AveragePool counts the zeros of its padding"),
            options=VARIANCE,
        ),
    ),
    "a transposed convolution, and a shift alone": (
        "R3",
        Case(
            behind("r = Sub (h, m)", types="float[6, 1, 1] m, ", size=10)
            .replace("Conv <", "ConvTranspose <")
            .replace("float[4, 6, 3, 3] k", "float[6, 4, 3, 3] k"),
            *("r", "ConvTranspose", "fewer of its taps at the border"),
            options=VARIANCE,
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(FoldBatchnorm(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(FoldBatchnorm(), *TRAPS[trap])


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in FoldBatchnorm.requires}


@pytest.mark.parametrize("text", [before(), behind()])
def test_the_same_network_without_the_breach_is_rewritten(text: str) -> None:
    program = network(text, **VARIANCE)
    (outcome,) = apply_pass(program, FoldBatchnorm())
    assert isinstance(outcome, Applied)
    assert "BatchNormalization" not in operators(program)


SHIFT_STAYS = {
    "padding": (behind(pads=PADDED, size=8), "Conv pads it with zeros"),
    "padding that the operator chooses": (behind(pads=', auto_pad = "SAME_LOWER"', size=8), "Conv pads it with zeros"),
    "zeros put beside it": (
        behind(
            "s = BatchNormalization (h, g, b, mean, var) p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () "
            "r = Pad (s, p)",
            size=8,
        ),
        "Pad puts zeros beside it",
    ),
    "an average that counts its padding": (
        behind(
            "s = BatchNormalization (h, g, b, mean, var) r = AveragePool <kernel_shape = [3, 3], "
            "pads = [1, 1, 1, 1], count_include_pad = 1> (s)"
        ),
        "AveragePool counts the zeros",
    ),
    "an average that counts what ceil_mode reaches": (
        behind(
            "s = BatchNormalization (h, g, b, mean, var) r = AveragePool <kernel_shape = [2, 2], strides = [3, 3], "
            "ceil_mode = 1, count_include_pad = 1> (s)",
            size=1,
        ),
        "AveragePool counts the zeros",
    ),
    "a transposed convolution": (
        behind(size=10).replace("Conv <", "ConvTranspose <").replace("float[4, 6, 3, 3] k", "float[6, 4, 3, 3] k"),
        "ConvTranspose adds up fewer of its taps at the border",
    ),
}


@pytest.mark.parametrize("name", SHIFT_STAYS)
def test_a_shift_that_meets_zeros_stays_as_an_addition(name: str) -> None:
    text, reason = SHIFT_STAYS[name]
    program = network(text, **VARIANCE)
    original = program.clone()
    (outcome,) = apply_pass(program, FoldBatchnorm())
    assert isinstance(outcome, Applied)
    assert any(note.startswith(f"the shift stays as an addition: {reason}") for note in outcome.notes), outcome.notes
    assert [op for op in operators(program) if op != "Constant"][:2] == ["Tanh", "Add"]
    assert difference(original, program, feed(original)) <= 1.0
    (again,) = apply_pass(program, FoldBatchnorm())
    assert isinstance(again, Refused)


NO_SITES = {
    "a bias behind its matrix": "n (float[B, 3] x, float[3, 6] w, float[6] b) => (float[B, 6] y) "
    "{ h = MatMul (x, w) a = Add (b, h) y = Relu (a) }",
    "a bias behind its kernel": "n (float[B, 3, 4] x, float[6, 3, 2] k, float[6, 1] b) => (float[B, 6, 3] y) "
    "{ h = Conv <kernel_shape = [2]> (x, k) a = Add (h, b) y = Relu (a) }",
    "a norm's own shift": "n (float[B, 6] x, float[6] g, float[6] b, float[6, 3] w) => (float[B, 3] y) "
    "{ h = RMSNormalization (x, g) a = Add (h, b) y = MatMul (a, w) }",
    "a gate": "n (float[B, 6] x, float[6, 6] w, float[6, 3] v) => (float[B, 3] y) "
    "{ h = MatMul (x, w) s = Sigmoid (h) m = Mul (h, s) y = MatMul (m, v) }",
    "a number": "n (float[B, 6] x, float s, float[6, 3] v) => (float[B, 3] y) { m = Mul (x, s) y = MatMul (m, v) }",
    "a table of positions": "n (float[B, 4, 6] x, float[4, 6] p, float[6, 3] v) => (float[B, 4, 3] y) "
    "{ m = Add (x, p) y = MatMul (m, v) }",
    "a vector that widens": "n (float[B, 1] x, float[6] s, float[6, 3] v) => (float[B, 3] y) "
    "{ m = Mul (x, s) y = MatMul (m, v) }",
    "a constant divided": "n (float[B, 6] x, float[6] s, float[6, 3] v) => (float[B, 3] y) "
    "{ m = Div (s, x) y = MatMul (m, v) }",
    "division by zero": "n (float[B, 6] x, float[6] z, float[6, 3] v) => (float[B, 3] y) "
    "{ m = Div (x, z) y = MatMul (m, v) }",
    "nothing affine beside it": "n (float[B, 6] x, float[6] s) => (float[B, 6] y) { m = Mul (x, s) y = Tanh (m) }",
}


@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_normalization_is_no_site(name: str) -> None:
    assert apply_pass(network(NO_SITES[name], z=[1, 2, 0, 1, 1, 1]), FoldBatchnorm()) == []
