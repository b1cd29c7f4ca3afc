"""What split-outliers must refuse: one case per requirement, and traps."""

import numpy as np
import onnx_ir as ir
import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.ir.statistics import ChannelRange
from rewrite.passes import SplitOutliers
from rewrite.rule import Applied, Refused, apply_pass

PRODUCT = """
product ({types}float[B, S, 24] x, float[24, 16] w) => (float[B, S, 16] y{outputs})
{{
    {inside}
}}
"""

FEW = np.where(np.isin(np.arange(24), (2, 17)), -50.0, 1.0)


def product(inside: str = "y = MatMul (x, w)", types: str = "", outputs: str = "") -> str:
    return PRODUCT.format(inside=inside, types=types, outputs=outputs)


def rule(magnitude: np.ndarray | None = FEW, **options: object) -> SplitOutliers:
    """The pass with what was measured of x (24,)."""
    seen = None if magnitude is None else {"x": ChannelRange(-np.abs(magnitude), np.abs(magnitude))}
    return SplitOutliers(**{"minimum": 256, "most": 0.1, "statistics": seen, **options})  # type: ignore[arg-type]


RULE = rule()
CASES: dict[str, tuple[SplitOutliers, Case]] = {
    "R1": (
        RULE,
        Case(product(), "w", "MatMul", "w may be replaced by a caller", options={"overridable": ("w",)}),
    ),
    "R2": (
        RULE,
        Case(
            """filters (float[B, 24, 6, 6] x, float[24, 24, 3, 3] w) => (float[B, 24, 4, 4] y)
            { y = Conv <kernel_shape = [3, 3]> (x, w) }""",
            *("w", "Conv", "Conv has no kernel of this kind"),
        ),
    ),
    "R4": (rule(minimum=385), Case(product(), "w", "MatMul", "it has 384 entries, 385 are worth it")),
    "R5": (
        RULE,
        Case(
            product("z = MatMul (x2, w) y = MatMul (x, w)", "float[B, S, 24] x2, ", ", float[B, S, 16] z"),
            *("w", "MatMul", "w is also read here, and would have to be copied"),
            inputs=("x", "x2"),
        ),
    ),
    "R6": (rule(None), Case(product(), "w", "MatMul", "the magnitudes of x were not measured")),
    "R7": (rule(np.full(24, 3.0)), Case(product(), "w", "MatMul", "no channel of x exceeds 18, the largest is 3")),
    "R8": (
        rule(np.where(np.arange(24) < 3, 50.0, 1.0)),
        Case(product(), "w", "MatMul", "3 of 24 channels exceed 6, 2 may"),
    ),
}

TRAPS: dict[str, tuple[str, SplitOutliers, Case]] = {
    "a tied table": (
        "R5",
        RULE,
        Case(
            """tied (int64[B, S] ids, float[16, 24] w) => (float[B, S, 16] y)
            {
                x = Gather (w, ids)
                head = Transpose <perm = [1, 0]> (w)
                y = MatMul (x, head)
            }""",
            *("w", "Gather", "w is also read here"),
            inputs=("ids",),
        ),
    ),
    "one transpose with two readers": (
        "R5",
        RULE,
        Case(
            """turned (float[B, S, 24] x, float[B, S, 24] x2, float[16, 24] w)
                => (float[B, S, 16] y, float[B, S, 16] z)
            {
                t = Transpose <perm = [1, 0]> (w)
                y = MatMul (x, t)
                z = MatMul (x2, t)
            }""",
            *("w", "MatMul", "t is also read here"),
            inputs=("x", "x2"),
        ),
    ),
    "the left factor": (
        "R2",
        RULE,
        Case(
            "left (float[24, 16] x, float[16, 24] w) => (float[16, 16] y) { y = MatMul (w, x) }",
            *("w", "MatMul", "it is the left factor"),
        ),
    ),
    "a stack of matrices": (
        "R2",
        RULE,
        Case(
            "experts (float[3, 5, 24] x, float[3, 24, 16] w) => (float[3, 5, 16] y) { y = MatMul (x, w) }",
            *("w", "MatMul", "a stack of matrices"),
        ),
    ),
    "more than half of the channels are always 0": (
        "R8",
        rule(np.where(np.arange(24) < 11, 1.0, 0.0)),
        Case(product(), "w", "MatMul", "11 of 24 channels exceed 0, 2 may"),
    ),
    "one that is asked to stay": (
        "R1",
        rule(keep=("w*",)),
        Case(product(), "w", "MatMul", r"w\* is to stay in floating point"),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
def test_a_broken_requirement_is_refused(requirement: str) -> None:
    made, case = CASES[requirement]
    check_refusal(made, requirement, case)


def test_a_weight_of_float64_is_refused() -> None:
    program = network(product())
    weight = program.model.graph.initializers["w"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float64), name="w")
    weight.dtype = ir.DataType.DOUBLE
    (outcome,) = apply_pass(program, RULE)
    assert isinstance(outcome, Refused)
    assert (outcome.refusal.requirement, outcome.refusal.reason) == ("R3", "it is double")


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    requirement, made, case = TRAPS[trap]
    check_refusal(made, requirement, case, alone=False)


def test_every_requirement_has_a_case() -> None:
    assert {*CASES, "R3"} == {requirement.id for requirement in SplitOutliers.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    (outcome,) = apply_pass(network(product()), RULE)
    assert isinstance(outcome, Applied)
