"""What merge-branches must refuse: one case per requirement, and traps."""

import pytest
from networks import digest, network
from refusals import Case, check_refusal

from rewrite.passes import MergeBranches
from rewrite.rule import Applied, apply_pass

KERNELS = """
kernels (float[{batch}, 4, 6, 7] x, float[4, 4, 3, 3] k3, float[4, 4, 1, 1] k1, float[4] b{types})
    => (float[{batch}, 4, 6, 7] y{outputs})
{{
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k3, b)
    {other}
    y = Add (c, p)
}}
"""


def kernels(other: str = "p = Conv (x, k1)", types: str = "", outputs: str = "", batch: str = "N") -> str:
    return KERNELS.format(other=other, types=types, outputs=outputs, batch=batch)


MATRICES = """
matrices (float[N, 3, 8] x, float[8, 8] w, float[8, 8] v{types}) => (float[N, 3, 8] y{outputs})
{{ h = MatMul (x, w) {other} y = Add (h, p) }}
"""


def matrices(other: str = "p = MatMul (x, v)", types: str = "", outputs: str = "") -> str:
    return MATRICES.format(other=other, types=types, outputs=outputs)


NORM = "float[4] g, float[4] c2, float[4] m, float[4] v"
POSITIVE = {"v": [0.5, 1.0, 1.5, 2.0]}

CASES = {
    "R1": Case(kernels(), "y", "Conv", "k1 is an initializer that is also", options={"overridable": ("k1",)}),
    "R2": Case(
        kernels(
            "q = Conv (x, k1, b) p = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (q, d)", ", float[4,4,3,3] d"
        ),
        *("y", "Conv", "zero padding lies behind a shift"),
    ),
    "R3": Case(
        kernels("p = Conv (x, k1) z = Relu (p)", outputs=", float[N, 4, 6, 7] z"),
        *("y", "Relu", "p is also read here"),
    ),
    "R4": Case(
        """grids (float[N, 4, 3, 3] x, float[4, 4, 3, 3] k3, float[4, 4, 1, 1] k1) => (float[N, 4, 3, 3] y)
        { c = Conv <kernel_shape = [3, 3]> (x, k3) p = Conv (x, k1) y = Add (c, p) }""",
        *("y", "Conv", "other sizes"),
    ),
    "R5": Case(
        matrices("p = MatMul (x, v) t = Transpose <perm = [0, 2, 1]> (x) z = MatMul (v, t)", "", ", float[N, 8, 3] z"),
        *("y", "MatMul", "v is also read here, and would have to be copied"),
    ),
    "R6": Case(
        """asymmetric (float[N, 8, 9, 9] x, float[8, 8, 1, 7] h, float[8, 8, 7, 1] v) => (float[N, 8, 9, 9] y)
        {
            a = Conv <kernel_shape = [1, 7], pads = [0, 3, 0, 3]> (x, h)
            b = Conv <kernel_shape = [7, 1], pads = [3, 0, 3, 0]> (x, v)
            y = Add (a, b)
        }""",
        *("y", "Add", r"one operator costs 2,115,072 multiply–adds and passes, its branches 829,440"),
    ),
}

TRAPS = {
    "a factor that a caller may override": (
        "R1",
        Case(
            kernels("q = Conv (x, k1) p = Mul (q, s)", ", float[4, 1, 1] s"),
            *("y", "Mul", "s is an initializer"),
            options={"overridable": ("s",)},
        ),
    ),
    "statistics that a caller may override": (
        "R1",
        Case(
            kernels("p = BatchNormalization (x, g, c2, m, v)", f", {NORM}"),
            *("y", "BatchNormalization", "m is an initializer"),
            options={"overridable": ("m",), **POSITIVE},
        ),
    ),
    "batch normalization in training mode": (
        "R2",
        Case(
            kernels("p, q, r = BatchNormalization <training_mode = 1> (x, g, c2, m, v)", f", {NORM}"),
            *("y", "BatchNormalization", "training mode"),
        ),
    ),
    "a variance that is not positive": (
        "R2",
        Case(
            kernels("p = BatchNormalization (x, g, c2, m, v)", f", {NORM}"),
            *("y", "BatchNormalization", r"variance \+ ε is not positive in channel 2"),
            options={"v": [1.0, 2.0, -1e-3, 1.0]},
        ),
    ),
    "a factor that is not finite": (
        "R2",
        Case(
            kernels("q = Conv (x, k1) p = Div (q, s)", ", float[4, 1, 1] s"),
            *("y", "Div", "s is not finite, or divides by zero"),
            options={"s": [1.0, 0.0, 1.0, 1.0]},
        ),
    ),
    "an average pool that does not count its padding (PoolFormer)": (
        "R2",
        Case(
            kernels("p = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)"),
            *("y", "AveragePool", "does not count its padding"),
        ),
    ),
    "a pool of other windows at the end": (
        "R2",
        Case(
            """ceil (float[N, 4, 6, 6] x, float[4, 4, 2, 2] k) => (float[N, 4, 3, 3] y)
            {
                c = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, k)
                p = AveragePool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)
                y = Add (c, p)
            }""",
            *("y", "AveragePool", "rounds its size up"),
        ),
    ),
    "a kernel behind a kernel, padded": (
        "R2",
        Case(
            kernels(
                "q = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, d) "
                "p = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (q, e)",
                ", float[4,4,3,3] d, float[4,4,3,3] e",
            ),
            *("y", "Conv", "zero padding lies behind a kernel"),
        ),
    ),
    "zero padding behind a norm": (
        "R2",
        Case(
            kernels(
                "n = BatchNormalization (x, g, c2, m, v) p = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (n, d)",
                f", float[4,4,3,3] d, {NORM}",
            ),
            *("y", "Conv", "zero padding lies behind a shift"),
            options=POSITIVE,
        ),
    ),
    "a branch is an output of the graph": (
        "R3",
        Case(kernels(outputs=", float[N, 4, 6, 7] p"), "y", "Conv", "p is an output of the graph"),
    ),
    "the inside of a branch is read": (
        "R3",
        Case(
            matrices("a = MatMul (x, r) p = MatMul (a, s) z = Relu (a)", ", float[8, 2] r, float[2, 8] s").replace(
                "=> (float[N, 3, 8] y)", "=> (float[N, 3, 8] y, float[N, 3, 2] z)"
            ),
            *("y", "Relu", "a is also read here"),
        ),
    ),
    "a branch is added twice": (
        "R3",
        Case(
            """twice (float[N, 3, 8] x, float[8, 8] w) => (float[N, 3, 8] y)
            { h = MatMul (x, w) d = Add (h, h) y = Add (d, x) }""",
            *("y", "MatMul", "h is read more than once"),
        ),
    ),
    "other strides with results of one size": (
        "R4",
        Case(
            """strides (float[N, 4, 1, 6] x, float[4, 4, 1, 3] k, float[4, 4, 1, 1] p) => (float[N, 4, 1, 4] y)
            {
                a = Conv <kernel_shape = [1, 3]> (x, k)
                b = Conv <kernel_shape = [1, 1], strides = [1, 2], pads = [0, 1, 0, 0]> (x, p)
                y = Add (a, b)
            }""",
            *("y", "Conv", "its strides are"),
        ),
    ),
    "channels are repeated": (
        "R4",
        Case(
            """repeated (float[N, 4, 6, 6] x, float[1, 4, 3, 3] k, float[4, 4, 1, 1] p) => (float[N, 4, 6, 6] y)
            { a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, k) b = Conv (x, p) y = Add (a, b) }""",
            *("y", "Conv", "it has 4 channels, another branch has 1"),
        ),
    ),
    "columns are repeated": (
        "R4",
        Case(
            """repeated (float[N, 3, 8] x, float[8, 1] w, float[8, 8] v) => (float[N, 3, 8] y)
            { h = MatMul (x, w) p = MatMul (x, v) y = Add (h, p) }""",
            *("y", "MatMul", "it has 8 channels, another branch has 1"),
        ),
    ),
    "sizes that are not static, of other slack": (
        "R4",
        Case(
            """dynamic (float[N, 4, H] x, float[4, 4, 3] k, float[4, 4, 1] p) => (float[N, 4, L] y)
            {
                a = Conv <kernel_shape = [3], strides = [2], pads = [1, 1]> (x, k)
                b = Conv <kernel_shape = [1], strides = [2], pads = [1, 0]> (x, p)
                y = Add (a, b)
            }""",
            *("y", "Conv", "not static"),
        ),
    ),
    "a kernel of one group and one of every channel": (
        "R6",
        Case(
            """groups (float[N, 8, 9, 9] x, float[8, 1, 5, 5] d, float[8, 8, 1, 1] p) => (float[N, 8, 9, 9] y)
            {
                a = Conv <kernel_shape = [5, 5], pads = [2, 2, 2, 2], group = 8> (x, d)
                b = Conv (x, p)
                y = Add (a, b)
            }""",
            *("y", "Add", "one operator costs"),
        ),
    ),
    "low-rank branches": (
        "R6",
        Case(
            """low (float[N, 3, 64] x, float[64, 1] a, float[1, 64] b, float[64, 1] c, float[1, 64] d)
                => (float[N, 3, 64] y)
            {
                h = MatMul (x, a) i = MatMul (h, b) j = MatMul (x, c) k = MatMul (j, d) y = Add (i, k)
            }""",
            *("y", "Add", "one operator costs 122,880"),
        ),
    ),
}

NO_SITES = {
    "a residual stream with a nonlinear branch": matrices("r = Relu (h) p = MatMul (r, v)").replace("(h, p)", "(x, p)"),
    "two values": (
        """two (float[N, 3, 8] x, float[8, 8] w, float[8, 8] v) => (float[N, 3, 8] y)
        { r = Relu (x) h = MatMul (x, w) p = MatMul (r, v) y = Add (h, p) }"""
    ),
    "a norm and its input (PRepBN), without a kernel": (
        f"prep (float[N, 4, 6, 7] x, {NORM}) => (float[N, 4, 6, 7] y)"
        "{ n = BatchNormalization (x, g, c2, m, v) y = Add (x, n) }"
    ),
    "a bias of one matrix": (
        """bias (float[N, 3, 8] x, float[8, 8] w, float[8] b) => (float[N, 3, 8] y)
        { h = MatMul (x, w) y = Add (h, b) }"""
    ),
    "a bias for each place": (
        """places (float[N, 3, 8] x, float[8, 8] w, float[3, 8] b) => (float[N, 3, 8] y)
        { h = MatMul (x, w) y = Add (h, b) }"""
    ),
    "dropout that may be in training mode": matrices(
        "q = MatMul (x, v) half = Constant <value_float = 0.5> () p = Dropout (q, half, train)", ", bool train"
    ).replace("y = Add (h, p)", "y = Add (x, p)"),
    "integers": (
        "integers (int64[N, 8] x, int64[8, 8] w, int64[8, 8] v) => (int64[N, 8] y)"
        "{ h = MatMul (x, w) p = MatMul (x, v) y = Add (h, p) }"
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    check_refusal(MergeBranches(), requirement, CASES[requirement])


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    check_refusal(MergeBranches(), *TRAPS[trap])


@pytest.mark.parametrize("name", NO_SITES)
def test_what_is_no_sum_of_branches_is_no_site(name: str) -> None:
    inputs = ("x", "train") if "train" in NO_SITES[name] else ("x", "w", "v") if name == "integers" else ("x",)
    program = network(NO_SITES[name], inputs)
    before = digest(program)
    assert not apply_pass(program, MergeBranches())
    assert digest(program) == before


def test_every_requirement_has_a_case() -> None:
    assert set(CASES) == {requirement.id for requirement in MergeBranches.requires}


@pytest.mark.parametrize("text", [kernels(), matrices()])
def test_the_same_network_without_the_breach_is_rewritten(text: str) -> None:
    (outcome,) = apply_pass(network(text), MergeBranches())
    assert isinstance(outcome, Applied)
