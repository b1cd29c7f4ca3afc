"""What merge-affine must refuse: one case per requirement, and traps."""

import pytest
from networks import digest, network
from refusals import Case, check_refusal

from rewrite.ir.edit import TRANSFORM
from rewrite.passes import MergeAffine
from rewrite.rule import Applied, apply_pass

MATRICES = """
matrices (float[N, 3, 8] x, float[8, 8] w, float[8, 4] v, float[8] b{types}) => (float[N, 3, 4] y{outputs})
{{ h = MatMul (x, w) a = Add (h, b) {inside} y = MatMul (i, v) }}
"""


def matrices(inside: str = "i = Identity (a)", types: str = "", outputs: str = "") -> str:
    return MATRICES.format(inside=inside, types=types, outputs=outputs)


KERNELS = """
kernels (float[N, 4, 6, 7] x, float[8, 4, {first}] k, float[8] b, float[4, 8, {second}] l{types})
    => (float[N, 4, {size}] y)
{{
    h = Conv <kernel_shape = [{first}]{attributes}> (x, k{bias})
    {inside}
    y = Conv <kernel_shape = [{second}], pads = [{pads}]> (i, l)
}}
"""


def kernels(
    first: str = "1, 1",
    second: str = "3, 3",
    pads: str = "1, 1, 1, 1",
    bias: str = "",
    *,
    inside: str = "i = Identity (h)",
    size: str = "6, 7",
    attributes: str = "",
    types: str = "",
) -> str:
    return KERNELS.format(
        **{"first": first, "second": second, "pads": pads, "bias": bias, "inside": inside, "size": size},
        **{"attributes": attributes, "types": types},
    )


NORM = ", float[8] g, float[8] c, float[8] m, float[8] v"

CASES = {
    "R1": Case(matrices(), "y", "MatMul", "w is an initializer that is also", options={"overridable": ("w",)}),
    "R2": Case(kernels(bias=", b"), "y", "Conv", "zero padding lies behind a shift"),
    "R3": Case(
        matrices("i = Identity (a) z = Relu (a)", outputs=", float[N, 3, 8] z"),
        *("y", "Relu", "a is also read here"),
    ),
    "R4": Case(
        matrices("i = Identity (a) z = MatMul (q, w)", ", float[N, 3, 8] q", ", float[N, 3, 8] z"),
        *("y", "MatMul", "w is also read here, and would have to be copied"),
        inputs=("x", "q"),
    ),
    "R5": Case(
        """low (float[N, 3, 64] x, float[64, 2] a, float[2, 64] b) => (float[N, 3, 64] y)
        { h = MatMul (x, a) y = MatMul (h, b) }""",
        *("y", "MatMul", "one operator costs 122,880 multiply–adds and passes, 31,488 as they are"),
    ),
}

TRAPS = {
    "a kernel behind a padded kernel": (
        "R2",
        Case(kernels("3, 3", attributes=", pads = [1, 1, 1, 1]"), "y", "Conv", "zero padding lies behind a kernel"),
    ),
    "a kernel behind a kernel of fewer rows": (
        "R2",
        Case(
            kernels("1, 2", "3, 3", "1, 1, 1, 2"),
            *("y", "Conv", "zero padding lies behind a kernel"),
        ),
    ),
    "a 1×1 that pads behind a shift": (
        "R2",
        Case(kernels(second="1, 1", bias=", b", size="8, 9"), "y", "Conv", "zero padding lies behind a shift"),
    ),
    "zero padding behind a norm": (
        "R2",
        Case(
            kernels(inside="i = BatchNormalization (h, g, c, m, v)", types=NORM),
            *("y", "Conv", "zero padding lies behind a shift"),
            options={"v": [1.0] * 8},
        ),
    ),
    "explicit zero padding behind a shift": (
        "R2",
        Case(
            kernels(
                *("1, 1", "3, 3", "0, 0, 0, 0", ", b"),
                inside="amounts = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () i = Pad (h, amounts)",
            ),
            *("y", "Pad", "zero padding lies behind a shift"),
        ),
    ),
    "an average pool that counts its padding, behind a shift": (
        "R2",
        Case(
            """pool (float[N, 4, 6, 7] x, float[8, 4, 1, 1] k, float[8] b) => (float[N, 8, 6, 7] y)
            {
                h = Conv <kernel_shape = [1, 1]> (x, k, b)
                y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (h)
            }""",
            *("y", "AveragePool", "zero padding lies behind a shift"),
        ),
    ),
    "an average pool that does not count its padding": (
        "R2",
        Case(
            """pool (float[N, 4, 6, 7] x, float[8, 4, 1, 1] k) => (float[N, 8, 6, 7] y)
            {
                h = Conv <kernel_shape = [1, 1]> (x, k)
                y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (h)
            }""",
            *("y", "AveragePool", "does not count its padding"),
        ),
    ),
    "batch normalization in training mode": (
        "R2",
        Case(
            kernels(inside="i, p, q = BatchNormalization <training_mode = 1> (h, g, c, m, v)", types=NORM),
            *("y", "BatchNormalization", "training mode"),
        ),
    ),
    "the first is an output of the graph": (
        "R3",
        Case(matrices(outputs=", float[N, 3, 8] h"), "y", "MatMul", "h is an output of the graph"),
    ),
    "both matrices are one that something else reads": (
        "R4",
        Case(
            """one (float[N, 3, 8] x, float[N, 3, 8] q, float[8, 8] w) => (float[N, 3, 8] y, float[N, 3, 8] z)
            { h = MatMul (x, w) y = MatMul (h, w) r = Relu (q) z = MatMul (r, w) }""",
            *("y", "MatMul", "w is also read here"),
            inputs=("x", "q"),
        ),
    ),
    "7×1 behind 1×7": (
        "R5",
        Case(
            """asymmetric (float[N, 8, 9, 9] x, float[8, 8, 1, 7] h, float[8, 8, 7, 1] v) => (float[N, 8, 9, 9] y)
            {
                p = Conv <kernel_shape = [1, 7], pads = [3, 3, 3, 3]> (x, h)
                y = Conv <kernel_shape = [7, 1]> (p, v)
            }""",
            *("y", "Conv", "one operator costs"),
        ),
    ),
    "a depthwise kernel before a 1×1": (
        "R5",
        Case(
            """separable (float[N, 8, 9, 9] x, float[8, 1, 3, 3] d, float[8, 8, 1, 1] p) => (float[N, 8, 9, 9] y)
            {
                h = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (x, d)
                y = Conv <kernel_shape = [1, 1]> (h, p)
            }""",
            *("y", "Conv", "one operator costs"),
        ),
    ),
    "a kernel through a Transpose": (
        "R2",
        Case(
            """moved (float[N, 5, 8] x, float[8, 6] w, float[4, 6, 3] l) => (float[N, 4, 5] y)
            {
                h = MatMul (x, w)
                t = Transpose <perm = [0, 2, 1]> (h)
                y = Conv <kernel_shape = [3], pads = [1, 1]> (t, l)
            }""",
            *("y", "Conv", "it moves over axes that are others"),
        ),
    ),
    "a Transpose that something else reads": (
        "R3",
        Case(
            """moved (float[N, 5, 8] x, float[8, 6] w, float[4, 6, 1] l) => (float[N, 4, 5] y, float[N, 6, 5] z)
            {
                h = MatMul (x, w)
                t = Transpose <perm = [0, 2, 1]> (h)
                z = Relu (t)
                y = Conv <kernel_shape = [1]> (t, l)
            }""",
            *("y", "Relu", "t is also read here"),
        ),
    ),
}

NO_SITES = {
    "something between": matrices("i = Tanh (a)"),
    "a factor for each place": matrices("i = Mul (a, s)", ", float[3, 8] s"),
    "the rows are the channels of the second": (
        """rows (float[N, 8, 8] x, float[8, 8] w, float[8, 4] v) => (float[N, 8, 4] y)
        { h = MatMul (x, w) t = Transpose <perm = [0, 2, 1]> (h) y = MatMul (t, v) }"""
    ),
    "two factors of a score": (
        """score (float[N, 3, 8] x, float[8, 8] w) => (float[N, 3, 3] y)
        { h = MatMul (x, w) t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (h, t) }"""
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(MergeAffine(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(MergeAffine(), *TRAPS[trap])


@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_pair_is_no_site(name: str) -> None:
    program = network(NO_SITES[name])
    before = digest(program)
    assert not apply_pass(program, MergeAffine())
    assert digest(program) == before


def test_a_transform_at_run_time_stays() -> None:
    program = network(matrices())
    (product,) = (node for node in program.model.graph if node.outputs[0].name == "h")
    product.metadata_props[TRANSFORM] = "hadamard-0"
    assert not apply_pass(program, MergeAffine())


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in MergeAffine.requires}


@pytest.mark.parametrize("text", [matrices(), kernels(), kernels(bias=", b", pads="0, 0, 0, 0", size="4, 5")])
def test_the_same_network_without_the_breach_is_rewritten(text: str) -> None:
    (outcome,) = apply_pass(network(text), MergeAffine())
    assert isinstance(outcome, Applied)
