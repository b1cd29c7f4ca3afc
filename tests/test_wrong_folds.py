"""Batch norms that exporters and optimizers fold wrongly, each as a file that `verify` rejects beside one it proves.

Two are of released exporters: of two convolutions on one input the folded bias of the second was stored under the name
of the first's (0 % on ImageNet), and a batch norm in training mode was folded as if it were frozen. The others are the
shift of a batch norm through zero padding, and the skip's share of a bias in PRepBN.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from families import perturb
from networks import feed, network
from test_foreign_pairs import optimized, rewritten, scripted, variances

import rewrite
from rewrite.capture.finish import quiet
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.passes import PASSES, FoldBatchnorm
from rewrite.pipeline import verify
from rewrite.rule import Applied, Refused

NOTICEABLE = 1e-3
"""Relative: far more than rounding."""


def error(before: Program | ir.Model, after: Program | ir.Model) -> float:
    """The largest relative difference of an output in float64."""
    first, second = (each.model if isinstance(each, Program) else each for each in (before, after))
    inputs = feed(Program.captured(first.clone()))
    expected, found = evaluate(first, inputs), evaluate(second, inputs)
    return max(float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in expected.items())


# ── A name that is taken ────────────────────────────────────────────────────────────────────────────────────────────

DOWNSAMPLE = """
downsample (float[B, 4, 6, 6] x, float[5, 4, 3, 3] k1, float[5] g1, float[5] b1, float[5] m1, float[5] v1,
            float[5, 5, 3, 3] k2, float[5] c2, float[5] g2, float[5] b2, float[5] m2, float[5] v2, float[5, 4, 1, 1] k3,
            float[5] g3, float[5] b3, float[5] m3, float[5] v3) => (float[B, 5, 3, 3] y)
{
    p1 = Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, k1)
    n1 = BatchNormalization (p1, g1, b1, m1, v1)
    r1 = Relu (n1)
    p2 = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r1, k2, c2)
    n2 = BatchNormalization (p2, g2, b2, m2, v2)
    p3 = Conv <kernel_shape = [1, 1], strides = [2, 2]> (x, k3)
    n3 = BatchNormalization (p3, g3, b3, m3, v3)
    s = Add (n2, n3)
    y = Relu (s)
}
"""
"""The block of a ResNet where two convolutions without bias read one value."""

Naming = Callable[[onnx.NodeProto], str]


def by_input(convolution: onnx.NodeProto) -> str:
    """The name that onnxscript 0.5 gave a new bias (pytorch issues 166797, 169178, 174042)."""
    return f"{convolution.input[0]}_bias"


def by_weight(convolution: onnx.NodeProto) -> str:
    """The name that it gives today."""
    return f"{convolution.input[1]}_bias"


def folded(model: onnx.ModelProto, name: Naming) -> onnx.ModelProto:
    """`model` with every batch norm in the convolution before it, in float32; a name that is taken is overwritten."""
    graph = model.graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    read = Counter(each for node in graph.node for each in node.input)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        convolution = producers.get(norm.input[0])
        if convolution is None or convolution.op_type != "Conv":
            continue
        gamma, beta, mean, variance = (stored[each] for each in norm.input[1:])
        epsilon = next((each.f for each in norm.attribute if each.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + np.float32(epsilon))
        _, kernel, *biases = convolution.input
        stored[kernel] = stored[kernel] * factor[:, None, None, None]
        bias = stored[biases[0]] if biases else np.zeros_like(mean)
        place = biases[0] if biases and read[biases[0]] == 1 else name(convolution)
        convolution.input[:] = [*convolution.input[:2], place]
        stored[place] = (bias - mean) * factor + beta
        convolution.output[0] = norm.output[0]
        graph.node.remove(norm)
    del graph.initializer[:]
    used = {each for node in graph.node for each in node.input}
    graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in stored.items() if n in used)
    return model


def test_a_bias_under_a_name_that_is_taken_is_refuted(tmp_path: Path) -> None:
    original = network(DOWNSAMPLE, **variances("v1", "v2", "v3", size=5))
    ir.save(original.original, tmp_path / "original.onnx")
    for name, naming in (("right", by_weight), ("wrong", by_input)):
        onnx.save(folded(onnx.load(tmp_path / "original.onnx"), naming), tmp_path / f"{name}.onnx")
    assert error(original, ir.load(tmp_path / "right.onnx")) < 1e-5
    assert error(original, ir.load(tmp_path / "wrong.onnx")) > 0.1

    right = verify(tmp_path / "original.onnx", tmp_path / "right.onnx").verdict
    assert right.holds, right
    answer = verify(tmp_path / "original.onnx", tmp_path / "wrong.onnx", refutation=tmp_path / "part")
    assert answer.verdict.kind == "REFUTED", answer
    # The first convolution reads what was overwritten.
    part = ir.load(tmp_path / "part" / "rewritten.onnx")
    assert [node.op_type for node in part.graph] == ["Conv"]
    assert answer.verdict.node == next(node.name for node in ir.load(tmp_path / "wrong.onnx").graph)

    done = subprocess.run(
        [sys.executable, "-m", "rewrite.cli", "verify", tmp_path / "original.onnx", tmp_path / "wrong.onnx"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.startswith(f"REFUTED({answer.verdict.node}")


@pytest.mark.slow
def test_a_checkpoint_tells_a_wrong_file_from_a_right_one(tmp_path: Path) -> None:
    """A ResNet's checkpoint against the file of an exporter that folded: the source's own weights decide."""
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = perturb(transformers.ResNetForImageClassification(config).eval())
        model.save_pretrained(tmp_path / "checkpoint")
    captured = rewrite.capture(tmp_path / "checkpoint")
    captured.save(tmp_path / "captured.onnx")
    for name, naming in (("right", by_weight), ("wrong", by_input)):
        onnx.save(folded(onnx.load(tmp_path / "captured.onnx"), naming), tmp_path / f"{name}.onnx")
    right = verify(tmp_path / "checkpoint", tmp_path / "right.onnx").verdict
    assert right.holds, right
    wrong = verify(tmp_path / "checkpoint", tmp_path / "wrong.onnx").verdict
    assert wrong.kind == "REFUTED", wrong
    assert wrong.node in {node.name for node in ir.load(tmp_path / "wrong.onnx").graph}


@pytest.mark.slow
def test_the_installed_exporter_folds_a_block_rightly(tmp_path: Path) -> None:
    """Two convolutions without bias read one value, each with its batch norm: the case in which names were taken."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (torch.nn.Conv2d(3, 4, size, padding=size // 2, bias=False) for size in (3, 1))
            self.first, self.second = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.first(self.left(x)) + self.second(self.right(x)))

    torch.manual_seed(0)
    module, x = perturb(Block()).eval(), torch.randn(2, 3, 6, 6)
    captured = rewrite.capture(module, (x,))
    with quiet():
        torch.onnx.export(
            module, (x,), tmp_path / "model.onnx", dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True
        )
    exported = ir.load(tmp_path / "model.onnx")
    assert "BatchNormalization" not in {node.op_type for node in exported.graph}
    # What a graph calls its input and its output is no part of the function.
    for ours, theirs in zip(
        (*captured.original.graph.inputs, *captured.original.graph.outputs),
        (*exported.graph.inputs, *exported.graph.outputs),
    ):
        theirs.name = ours.name
    verdict = verify(captured, exported).verdict
    assert verdict.holds, verdict


# ── Training mode ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=["TRAINING", "PRESERVE"])
def training(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network in training mode as torch's older exporter writes it."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
    module = perturb(torch.nn.Sequential(*layers)).train()
    path = tmp_path_factory.mktemp("training") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.randn(4, 3, 5, 5),),
            path,
            dynamo=False,
            training=getattr(torch.onnx.TrainingMode, request.param),
            do_constant_folding=False,
            opset_version=17,
        )
    return path


@pytest.mark.parametrize("tool", [optimized, rewritten])
def test_what_onnxscript_makes_of_training_mode_is_refuted(training: Path, tool: Callable, tmp_path: Path) -> None:
    scripted(tool)(training, tmp_path / "result.onnx")
    result = ir.load(tmp_path / "result.onnx")
    kept = any(node.op_type == "BatchNormalization" for node in result.graph)
    verdict = verify(training, tmp_path / "result.onnx").verdict
    if kept:
        assert verdict.holds, verdict
        pytest.skip("this version of onnxscript leaves it alone")
    assert error(ir.load(training), result) > 0.1
    assert verdict.kind == "REFUTED", verdict


def test_no_pass_touches_a_batch_norm_in_training_mode(training: Path) -> None:
    program = rewrite.capture(training)
    outcomes = rewrite.explain(program, [FoldBatchnorm()])
    (refused,) = [outcome.refusal for outcome in outcomes if isinstance(outcome, Refused)]
    assert (refused.requirement, refused.operator) == ("R1", "BatchNormalization")
    assert "training" in refused.reason
    result = rewrite.apply(program, [rule() for rule in PASSES])
    assert not [outcome for outcome in result.outcomes if isinstance(outcome, Applied)], result
    assert "BatchNormalization" in {node.op_type for node in result.program.model.graph}
    assert result.certificate.verdict.kind == "EQUAL"


# ── A shift through padding, and the skip's share ───────────────────────────────────────────────────────────────────

Arrays = dict[str, np.ndarray]
BEFORE = """
before (float[B, 3, {n}] x, float[3] g, float[3] b, float[3] m, float[3] v, float[{kernel}] k, float[4] c)
    => ({result} y)
{{
    n = BatchNormalization (x, g, b, m, v)
    {inside}
    y = {operator} {attributes} ({value}, k, c)
}}
"""
AFTER = """
after (float[B, 3, {n}] x, float[{kernel}] k, float[4] c) => ({result} y)
{{ {inside} y = {operator} {attributes} ({value}, k, c) }}
"""


@dataclass(frozen=True)
class Fold:
    """A network and what it is folded into, by its constants.

    `right` says whether that is the same function, `proved` whether the proof follows where it is.
    """

    before: str
    after: str
    fold: Callable[[Arrays], Arrays]
    right: bool
    proved: bool = True


def image(
    operator: str, attributes: str, kernel: str, result: str, inside: str = "", value: str = ""
) -> tuple[str, str]:
    """A batch norm in front of an operator on images, perhaps with `inside` between, and the operator alone."""
    written = {"n": "6, 6", "operator": operator, "attributes": attributes, "kernel": kernel, "result": result}
    return (
        BEFORE.format(**written, inside=inside.format("n"), value=value or "n"),
        AFTER.format(**written, inside=inside.format("x"), value=value or "x"),
    )


def affine(w: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """a and t of a batch norm a⊙x + t."""
    a = w["g"] / np.sqrt(w["v"] + float(np.float32(1e-5)))
    return a, w["b"] - a * w["m"]


def through(w: Arrays) -> Arrays:
    """a and t go into a convolution behind: K⊙a, and t summed over every tap."""
    a, t = affine(w)
    return {"k": w["k"] * a[:, None, None], "c": w["c"] + np.einsum("oihw,i->o", w["k"], t)}


def through_transposed(w: Arrays) -> Arrays:
    a, t = affine(w)
    return {"k": w["k"] * a[:, None, None, None], "c": w["c"] + np.einsum("iohw,i->o", w["k"], t)}


PADDED = ("Conv", "<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>", "4, 3, 3, 3", "float[B, 4, 6, 6]")
PLAIN = ("Conv", "<kernel_shape = [3, 3]>", "4, 3, 3, 3", "float[B, 4, 4, 4]")
PAD = "pads = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () padded = Pad ({}, pads)"
AVERAGE = "pooled = AveragePool <kernel_shape = [3, 3]> ({})"
POOL = "pooled = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = {}> ({{}})"

PREP = """
prep (float[B, 5, 4] x, float[4, 3] w, float[3] c, float[3] g, float[3] b, float[3] m, float[3] v, float[1] alpha,
      float[3, 2] u) => (float[B, 5, 2] y)
{
    p = MatMul (x, w)
    h = Add (p, c)
    t = Transpose <perm = [0, 2, 1]> (h)
    n = BatchNormalization (t, g, b, m, v)
    s = Mul (alpha, t)
    a = Add (n, s)
    r = Transpose <perm = [0, 2, 1]> (a)
    y = MatMul (r, u)
}
"""
PREP_BACK = """
folded (float[B, 5, 4] x, float[4, 3] w, float[3] c, float[3, 2] u) => (float[B, 5, 2] y)
{ p = MatMul (x, w) h = Add (p, c) y = MatMul (h, u) }
"""
PREP_ON = """
folded (float[B, 5, 4] x, float[4, 3] w, float[3] c, float[3, 2] u, float[2] d) => (float[B, 5, 2] y)
{ p = MatMul (x, w) h = Add (p, c) q = MatMul (h, u) y = Add (q, d) }
"""


def behind(w: Arrays, *, share: bool) -> Arrays:
    """PRepBN into the matrix before it; `share`: with the skip's α·b."""
    a, t = affine(w)
    alpha = w["alpha"]
    bias = a * w["c"] + t + (alpha * w["c"] if share else 0.0)
    return {"w": w["w"] * (a + alpha), "c": bias, "u": w["u"]}


def ahead(w: Arrays, *, skip: bool) -> Arrays:
    """PRepBN into the matrix behind it; `skip`: with α in the diagonal."""
    a, t = affine(w)
    return {"w": w["w"], "c": w["c"], "u": (a + w["alpha"] * skip)[:, None] * w["u"], "d": t @ w["u"]}


FOLDS = {
    "through no padding": Fold(*image(*PLAIN), through, True),
    "through zero padding": Fold(*image(*PADDED), through, False),
    "through an explicit Pad": Fold(*image(*PLAIN[:3], "float[B, 4, 6, 6]", PAD, "padded"), through, False),
    "through an average": Fold(*image(*PLAIN[:3], "float[B, 4, 2, 2]", AVERAGE, "pooled"), through, True),
    # An average over what is there divides by another number at the border: it is right, and perhaps not proved.
    "through an average over what is there": Fold(*image(*PLAIN, POOL.format(0), "pooled"), through, True, False),
    "through an average over padding too": Fold(*image(*PLAIN, POOL.format(1), "pooled"), through, False),
    "into a transposed convolution": Fold(
        *image("ConvTranspose", "<kernel_shape = [3, 3]>", "3, 4, 3, 3", "float[B, 4, 8, 8]"), through_transposed, False
    ),
    "PRepBN backwards": Fold(PREP, PREP_BACK, lambda w: behind(w, share=True), True),
    "PRepBN backwards without the skip's share of the bias": Fold(
        PREP, PREP_BACK, lambda w: behind(w, share=False), False
    ),
    "PRepBN forwards": Fold(PREP, PREP_ON, lambda w: ahead(w, skip=True), True),
    "PRepBN forwards without the skip": Fold(PREP, PREP_ON, lambda w: ahead(w, skip=False), False),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_fold_is_proved_or_refuted(name: str, tmp_path: Path) -> None:
    fold = FOLDS[name]
    before = network(fold.before, **variances("v", size=3))
    constants = {n: value.const_value.numpy() for n, value in before.original.graph.initializers.items()}
    arrays = {n: array.astype(np.float64) for n, array in constants.items() if array.dtype.kind == "f"}
    after = network(fold.after, **fold.fold(arrays))
    answer = verify(before, after, refutation=tmp_path)
    if fold.right:
        assert error(before, after) < 1e-5
        assert answer.verdict.kind in ("EQUAL", *(() if fold.proved else ("UNKNOWN",))), answer
    else:
        assert error(before, after) > NOTICEABLE
        assert answer.verdict.kind == "REFUTED", answer
        assert answer.verdict.node in {node.name for node in after.model.graph}


@pytest.mark.parametrize("name", FOLDS)
def test_what_passes_do_there_is_proved(name: str) -> None:
    """fold-batchnorm takes all it may, and leaves the shift where padding is in its way."""
    fold = FOLDS[name]
    before = network(fold.before, **variances("v", size=3))
    result = rewrite.apply(before, [FoldBatchnorm()])
    assert result.certificate.verdict.kind == "EQUAL", result
    if not fold.proved:
        return
    left = [node.op_type for node in result.program.model.graph]
    assert "BatchNormalization" not in left, result
    # Where the shift may not pass, one Add stays.
    assert ("Add" in left) == (not fold.right or "PRepBN" in name), left
