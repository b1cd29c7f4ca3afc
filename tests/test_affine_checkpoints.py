"""The shipped networks whose norms and branches are affine at inference: converted, proved, and as good as before.

Each loses every norm and branch that the maths lets go; what is left is named here with the reason it was refused for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

import rewrite
from rewrite.check.inputs import generate_inputs
from rewrite.check.reference import evaluate
from rewrite.models.evaluate import held_out_quality
from rewrite.recipes import passes_of

CHECKPOINTS = Path(__file__).parents[1] / "models" / "checkpoints"

EXACT = 1e-10
"""Relative, with weights that are not rounded. Sums of these sizes are good to 1e-13 in float64."""

COUNTED = ("BatchNormalization", "Sub", "Div", "Sqrt", "Mul", "Conv", "ConvTranspose", "AveragePool", "MatMul", "Add")
"""What norms, branches and the layers that take them are made of; the other operators are as they were."""


@dataclass(frozen=True)
class Expected:
    """What becomes of a network.

    left: the operators of `COUNTED` in the artifact.  applied: how often each pass was.  refused: how often each pass
    was for each requirement, and words of which each reason holds one.  note: the beginning of what one application
    says of what it could not fold.
    """

    left: dict[str, int]
    applied: dict[str, int]
    refused: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = field(default_factory=dict)
    note: str = ""


TRANSFORMER = {"Conv": 1, "MatMul": 19, "Add": 26}
"""Queries, keys, values and three more matrices in each of three blocks, and the classifier, all with biases; six
residual additions and the positions."""

EXPECTED = {
    # 3 × 3 + 1 × 1 (+ identity), each with BatchNorm, become one convolution; the Add is the classifier's bias. The
    # identity branch's BatchNorm stands between a ReLU and the sum, so it is the sum that takes it.
    "digits-repvgg": Expected(
        {"Conv": 6, "MatMul": 1, "Add": 1},
        {"fold-batchnorm": 12, "merge-branches": 6},
        {("fold-batchnorm", "R3"): (3, ("before it, Relu writes it",))},
    ),
    # A layer's first BatchNorm stands between what was concatenated, pooled or rectified and a ReLU.
    "digits-densenet": Expected(
        {"BatchNormalization": 10, "Conv": 18, "MatMul": 1, "Add": 1},
        {"fold-batchnorm": 9, "merge-affine": 1},
        {("fold-batchnorm", "R3"): (10, ("behind it, Relu",))},
    ),
    # The ends of residual blocks are added to what the next block reads, so that they stay apart from it.
    "digits-mobilenet": Expected(
        {"Conv": 16, "MatMul": 1, "Add": 3},
        {"fold-batchnorm": 16},
        {("merge-affine", "R3"): (2, ("is also read here",))},
    ),
    # The Mul and Sigmoid of GLU and SiLU are left.
    "digits-conv1d": Expected({"Conv": 8, "Mul": 4, "MatMul": 1, "Add": 3}, {"fold-batchnorm": 7}),
    # The stem pads with zeros: the scale of the input's normalization goes into it, the shift is a fourth addition.
    "digits-conv3d": Expected(
        {"Conv": 6, "MatMul": 1, "Add": 4}, {"fold-batchnorm": 7}, note="the shift stays as an addition: Conv pads it"
    ),
    # The matrices around the code are of rank 12, and cheaper as two.
    "digits-decoder": Expected(
        {"Conv": 2, "ConvTranspose": 3, "MatMul": 2, "Add": 2},
        {"fold-batchnorm": 5},
        {("merge-affine", "R5"): (1, ("one operator costs",))},
    ),
    "digits-prepbn-vit": Expected(TRANSFORMER, {"fold-batchnorm": 7}),
    "digits-un-vit": Expected(TRANSFORMER, {"fold-parametrization": 7, "fold-batchnorm": 7}),
}
FAST = ("digits-repvgg", "digits-un-vit")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]
)
def test_converted_proved_and_as_good(name: str, tmp_path: Path) -> None:
    expected, out = EXPECTED[name], tmp_path / "out"
    program = rewrite.capture(CHECKPOINTS / name)
    report = rewrite.convert(program, out)

    assert report.verdict.startswith("EQUAL("), report
    assert report.numerical == "within noise"
    left = Counter(node.op_type for node in onnx.load(out / "model.onnx").graph.node)
    assert {kind: left[kind] for kind in COUNTED if left[kind]} == expected.left

    applied = Counter(row.pass_name for row in report.applied)
    assert {each: applied[each] for each in expected.applied} == expected.applied
    stayed = [note for row in report.applied for note in row.notes if "stays" in note]
    assert [note.startswith(expected.note) for note in stayed] == ([True] if expected.note else [])
    refused = Counter((row.pass_name, row.requirement) for row in report.refused)
    assert refused == Counter({key: count for key, (count, _) in expected.refused.items()})
    for row in report.refused:
        _, words = expected.refused.get((row.pass_name, row.requirement), (0, ("",)))
        assert row.node
        assert any(word in row.reason for word in words), row

    measure, before = held_out_quality(CHECKPOINTS / name)
    assert held_out_quality(out) == (measure, pytest.approx(before, rel=0 if measure == "accuracy" else 1e-6))

    result = rewrite.apply(program, passes_of(None, None))
    for inputs in generate_inputs(program.original):
        reference, found = evaluate(program.original, inputs), evaluate(result.program.model, inputs, unrounded=True)
        for value, array in reference.items():
            assert np.linalg.norm(found[value] - array) <= EXACT * np.linalg.norm(array), value
