"""What eliminate-dead-channels and merge-duplicate-channels must refuse: one case per requirement, and traps."""

import numpy as np
import pytest
from networks import network
from refusals import Case, check_refusal

from rewrite.passes import EliminateDeadChannels, MergeDuplicateChannels
from rewrite.rule import Applied, apply_pass

MLP = """
mlp ({types}float[B, 3, 5] x, float[5, 6] w1, float[6] b, float[6, 4] w2) => (float[B, 3, 4] y{outputs})
{{
    h = MatMul (x, w1)
    a = Add (h, b)
    {inside}
    y = MatMul (r, w2)
}}
"""


def mlp(inside: str = "r = Relu (a)", types: str = "", outputs: str = "") -> str:
    return MLP.format(inside=inside, types=types, outputs=outputs)


def weights(first: str = "w1", shape: tuple[int, ...] = (5, 6), axis: int = 1, **others: np.ndarray) -> dict:
    """Channel 1 is 0 (its bias is not), channel 4 is channel 2."""
    array = np.random.default_rng(3).integers(-99, 99, shape) / 16.0
    channels = np.moveaxis(array, axis, -1)
    channels[..., 1], channels[..., 4] = 0.0, channels[..., 2]
    return {first: array, "b": [3.0, 1.0, 2.0, 5.0, 2.0, 1.0], **others}


def case(text: str, *where: str, inputs: tuple[str, ...] = ("x",), **options: object) -> Case:
    return Case(text, *where, inputs=inputs, options={**weights(), **options})


CASES = {
    "R1": case(
        mlp(
            "r = Relu (a) shape = Constant <value_ints = [-1, 6]> () z = Reshape (r, shape)",
            outputs=", float[N, 6] z",
        ),
        *("r", "Reshape", "writes the number of channels"),
    ),
    "R2": case(mlp(outputs=", float[B, 3, 6] r"), "r", "Relu", "r is an output"),
    "R3": case(
        mlp("r = Relu (a) unused = Add (r, d)", "float[6] d, "),
        *("r", "", "d is an initializer that is also"),
        overridable=("d",),
    ),
    "R4": case(
        mlp("r = Relu (a) z = MatMul (r, u)", "float[6, 2] u, ", ", float[B, 3, 2] z"),
        *("r", "MatMul", "not a constant"),
        inputs=("x", "u"),
    ),
    "R5": case(
        mlp("r = Relu (a) z = MatMul (x, w1)", outputs=", float[B, 3, 6] z"),
        *("r", "MatMul", "w1 is also read here, and would have to be copied"),
    ),
}

DEAD = {
    "R6": Case(
        """padded (float[B, 3, 8] x, float[6, 3, 3] k1, float[6] b, float[4, 6, 3] k2) => (float[B, 4, 6] y)
        {
            c = Conv <kernel_shape = [3]> (x, k1, b)
            r = Relu (c)
            y = Conv <kernel_shape = [3], pads = [1, 1]> (r, k2)
        }""",
        *("r", "Conv", "a constant that is not 0"),
        options=weights("k1", (6, 3, 3), 0),
    ),
}

TRAPS = {
    "a mean over the channels": (
        "R1",
        case(
            mlp(
                "r = Relu (a) two = Constant <value_ints = [2]> () z = ReduceMean (r, two)",
                outputs=", float[B, 3, 1] z",
            ),
            *("r", "ReduceMean", ""),
        ),
    ),
    "a matrix that reads them is read elsewhere": (
        "R5",
        case(
            mlp("r = Relu (a) z = MatMul (p, w2)", "float[B, 3, 6] p, ", ", float[B, 3, 4] z"),
            *("r", "MatMul", "w2 is also read here"),
            inputs=("x", "p"),
        ),
    ),
    "heads are split off": (
        "R1",
        case(
            mlp(
                "r = Relu (a) shape = Constant <value_ints = [0, 0, 2, 3]> () z = Reshape (r, shape)",
                outputs=", float[B, 3, 2, 3] z",
            ),
            *("r", "Reshape", ""),
        ),
    ),
}


@pytest.mark.parametrize("requirement", CASES)
@pytest.mark.parametrize("rule", [EliminateDeadChannels(), MergeDuplicateChannels()])
def test_a_broken_requirement_is_refused(
    requirement: str, rule: EliminateDeadChannels | MergeDuplicateChannels
) -> None:
    check_refusal(rule, requirement, CASES[requirement])


@pytest.mark.parametrize("requirement", DEAD)
def test_a_broken_requirement_of_constants_is_refused(requirement: str) -> None:
    check_refusal(EliminateDeadChannels(), requirement, DEAD[requirement])
    given = DEAD[requirement]
    (outcome,) = apply_pass(network(given.text, given.inputs, **given.options), MergeDuplicateChannels())
    assert isinstance(outcome, Applied), "a proportion goes through padding"


@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_refused(trap: str) -> None:
    for rule in (EliminateDeadChannels(), MergeDuplicateChannels()):
        check_refusal(rule, *TRAPS[trap])


@pytest.mark.parametrize(
    ("inside", "types", "inputs"),
    [
        ("r = Softmax (a)", "", ("x",)),
        ("r = Mul (a, p)", "float[B, 3, 6] p, ", ("x", "p")),
        ("s = CumSum (a, last) r = Relu (s)", "int64 last, ", ("x", "last")),
    ],
)
def test_what_mixes_channels_leaves_nothing_to_leave_out(inside: str, types: str, inputs: tuple[str, ...]) -> None:
    for rule in (EliminateDeadChannels(), MergeDuplicateChannels()):
        assert apply_pass(network(mlp(inside, types), inputs, **weights()), rule) == []


def test_every_requirement_has_a_case() -> None:
    assert {*CASES, *DEAD} == {requirement.id for requirement in EliminateDeadChannels.requires}
    assert set(CASES) == {requirement.id for requirement in MergeDuplicateChannels.requires}


def test_the_same_network_without_the_breach_is_rewritten() -> None:
    for rule in (EliminateDeadChannels(), MergeDuplicateChannels()):
        (outcome,) = apply_pass(network(mlp(), **weights()), rule)
        assert isinstance(outcome, Applied)
