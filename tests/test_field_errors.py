"""Silent errors of released tools, each as a pair of files that `verify` rejects, beside what is done here instead.

A case is a small network, the wrong rewrite of it as the tool made it (nothing raised, nothing warned), and the passes
that are asked for in its place: they are applied and proved, or refused at a node with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from head_networks import HALF, PLAIN, SEPARATE, attention
from networks import feed, network

import rewrite
from rewrite.check.reference import evaluate
from rewrite.ir.program import Program
from rewrite.passes import (
    CenterResidual,
    Equalize,
    FoldNorm,
    RotateHeads,
    RotateResidual,
    ScaleQueryKey,
    Smooth,
)
from rewrite.pipeline import verify
from rewrite.proof.transforms import Hadamard
from rewrite.rule import Applied, Pass, Refused

Arrays = dict[str, np.ndarray]
Edit = Callable[[Arrays], Arrays]

NOTICEABLE = 1e-3
"""Relative: far more than rounding, and so is each of the tools' errors."""


@dataclass(frozen=True)
class Refusal:
    """Which pass refuses, for which requirement, at which operator, with what in its reason."""

    rule: Pass[Any]
    requirement: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Case:
    """A network, the new constants of the wrong rewrite, and what passes do in its place.

    `applied` are passes that apply and are proved, one after the other; `right` is what the tool meant to do;
    `exchanged` are operators that it took for others, `folded` is the network it leaves if it has fewer nodes.
    """

    tool: str
    text: str
    wrong: Edit
    applied: tuple[Pass[Any], ...] = ()
    refused: tuple[Refusal, ...] = ()
    right: Edit | None = None
    exchanged: Mapping[str, str] = field(default_factory=dict)
    folded: str = ""
    inputs: tuple[str, ...] = ("x",)
    weights: Mapping[str, Any] = field(default_factory=dict)

    def program(self) -> Program:
        return network(self.text, self.inputs, **self.weights)


def exact(program: Program) -> Arrays:
    """The constants of a network in float64."""
    constants = {name: value.const_value for name, value in program.model.graph.initializers.items()}
    return {name: np.asarray(one.numpy(), np.float64) for name, one in constants.items() if one is not None}


def rewritten(case: Case, edit: Edit) -> ir.Model:
    """The tool's file: other constants, each computed in float64 and rounded once, in other operators."""
    before = case.program()
    changed: dict[str, Any] = {name: array.astype(np.float32) for name, array in edit(exact(before)).items()}
    if case.folded:
        return network(case.folded, case.inputs, **{**exact(before), **changed}).model
    for name, array in changed.items():
        tensor = before.model.graph.initializers[name]
        assert array.shape == tensor.shape, name
        tensor.const_value = ir.tensor(array, name=name)
    for node in before.model.graph:
        node.op_type = case.exchanged.get(node.op_type, node.op_type)
    return before.model


def fed(program: Program) -> Arrays:
    """Inputs; angles of rotary positions are as long as the sequence."""
    inputs = feed(program)
    if "angles" in inputs:
        inputs["angles"] = np.random.default_rng(1).normal(size=(1, 1, 5, 2)).astype(np.float32)
    return inputs


# ------------------------------------------------------------------------------------------------- streams with RMSNorm

LLAMA = """
llama (int64[B, S] ids, float[9, 8] table, float[8] g1, float[8, 12] gate, float[8, 12] up, float[12, 8] down,
       float[8] g2, float[8, 9] head) => (float[B, S, 9] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, g1)
    a = MatMul (n1, gate)
    s = Sigmoid (a)
    silu = Mul (a, s)
    u = MatMul (n1, up)
    m = Mul (silu, u)
    d = MatMul (m, down)
    x1 = Add (x0, d)
    n2 = RMSNormalization (x1, g2)
    logits = MatMul (n2, head)
}
"""

ROTATION = Hadamard(8, seed=0).matrix()


def centred(array: np.ndarray) -> np.ndarray:
    return array - array.mean(axis=-1, keepdims=True)


def rotated(w: Arrays, *, centre: bool = False, fold: bool = True) -> Arrays:
    """LLAMA in another basis; `fold`: γ goes into its readers first."""
    g1, g2 = (w["g1"], w["g2"]) if fold else (np.ones(8), np.ones(8))
    changed = {
        **{name: ROTATION.T @ (g1[:, None] * w[name]) for name in ("gate", "up")},
        "head": ROTATION.T @ (g2[:, None] * w["head"]),
        "table": (centred(w["table"]) if centre else w["table"]) @ ROTATION,
        "down": w["down"] @ ROTATION,
    }
    return {**changed, "g1": np.ones(8), "g2": np.ones(8)} if fold else changed


GEMMA2 = """
gemma2 (int64[B, S] ids, float[9, 8] table, float[8] input_norm, float[8, 8] v, float[8] post_attention_norm,
        float[8] pre_feedforward_norm, float[8, 12] gate, float[8, 12] up, float[12, 8] down,
        float[8] post_feedforward_norm, float[8] final_norm, float[8, 9] head) => (float[B, S, 9] logits)
{
    x0 = Gather (table, ids)
    n1 = RMSNormalization (x0, input_norm)
    o = MatMul (n1, v)
    p1 = RMSNormalization (o, post_attention_norm)
    x1 = Add (x0, p1)
    n2 = RMSNormalization (x1, pre_feedforward_norm)
    a = MatMul (n2, gate)
    t = Gelu <approximate = "tanh"> (a)
    u = MatMul (n2, up)
    m = Mul (t, u)
    d = MatMul (m, down)
    p2 = RMSNormalization (d, post_feedforward_norm)
    x2 = Add (x1, p2)
    n3 = RMSNormalization (x2, final_norm)
    logits = MatMul (n3, head)
}
"""


def rotated_through_sandwich(w: Arrays) -> Arrays:
    """Norms after a branch are taken for norms before one: what they read is rotated, and their γ stays."""
    return {
        "table": centred(w["table"]) @ ROTATION,
        "v": ROTATION.T @ (w["input_norm"][:, None] * w["v"]) @ ROTATION,
        **{name: ROTATION.T @ (w["pre_feedforward_norm"][:, None] * w[name]) for name in ("gate", "up")},
        "down": w["down"] @ ROTATION,
        "head": ROTATION.T @ (w["final_norm"][:, None] * w["head"]),
        **{name: np.ones(8) for name in ("input_norm", "pre_feedforward_norm", "final_norm")},
    }


SPREAD = np.linspace(0.5, 3.0, 8)


def smoothed_by_name(w: Arrays) -> Arrays:
    """In a Llama the norm called post_attention is the MLP's; here it is the attention's own."""
    return {
        "post_attention_norm": w["post_attention_norm"] / SPREAD,
        **{name: SPREAD[:, None] * w[name] for name in ("gate", "up")},
    }


GEMMA = """
gemma (int64[B, S] ids, float[9, 8] table, float[8] w1, float[8, 8] m1, float[8] w2, float[8, 9] head)
    => (float[B, S, 9] logits)
{
    one = Constant <value_float = 1.0> ()
    two = Constant <value_float = 2.0> ()
    epsilon = Constant <value_float = 0.000001> ()
    last = Constant <value_ints = [-1]> ()
    x0 = Gather (table, ids)
    p1 = Pow (x0, two)
    q1 = ReduceMean (p1, last)
    a1 = Add (q1, epsilon)
    s1 = Sqrt (a1)
    r1 = Reciprocal (s1)
    c1 = Mul (x0, r1)
    g1 = Add (w1, one)
    n1 = Mul (c1, g1)
    h = MatMul (n1, m1)
    x1 = Add (x0, h)
    p2 = Pow (x1, two)
    q2 = ReduceMean (p2, last)
    a2 = Add (q2, epsilon)
    s2 = Sqrt (a2)
    r2 = Reciprocal (s2)
    c2 = Mul (x1, r2)
    g2 = Add (w2, one)
    n2 = Mul (c2, g2)
    logits = MatMul (n2, head)
}
"""


def folded_as_a_plain_scale(w: Arrays) -> Arrays:
    """W ← diag(w)·W and w ← 1, where the norm's scale is 1 + w."""
    return rotated_with_scales(w, w["w1"], w["w2"]) | {"w1": np.ones(8), "w2": np.ones(8)}


def folded_with_one(w: Arrays) -> Arrays:
    """W ← diag(1 + w)·W and w ← 0."""
    return rotated_with_scales(w, 1.0 + w["w1"], 1.0 + w["w2"]) | {"w1": np.zeros(8), "w2": np.zeros(8)}


def rotated_with_scales(w: Arrays, first: np.ndarray, last: np.ndarray) -> Arrays:
    return {
        "m1": ROTATION.T @ (first[:, None] * w["m1"]) @ ROTATION,
        "head": ROTATION.T @ (last[:, None] * w["head"]),
        "table": w["table"] @ ROTATION,
    }


# ----------------------------------------------------------------------------------------------- norms and activations

RELU_BEFORE_NORM = """
before (float[B, S, 5] x, float[5, 8] w, float[8] c, float[8] g, float[8, 4] v) => (float[B, S, 4] y)
{
    h = MatMul (x, w)
    a = Add (h, c)
    r = Relu (a)
    n = LayerNormalization (r, g)
    y = MatMul (n, v)
}
"""

RELU_AFTER_NORM = """
after (float[B, S, 8] x, float[8] g, float[8] b, float[8, 4] w, float[4] c) => (float[B, S, 4] y)
{
    n = LayerNormalization (x, g, b)
    r = Relu (n)
    h = MatMul (r, w)
    y = Add (h, c)
}
"""


def centred_before_relu(w: Arrays) -> Arrays:
    """The matrix before the activation is centred, and what the norm reads is taken to be."""
    return {"w": centred(w["w"]), "c": centred(w["c"])}


def merged_past_relu(w: Arrays) -> Arrays:
    """γ and β are merged into the matrix behind the activation."""
    return {
        "w": w["g"][:, None] * w["w"],
        "c": w["c"] + w["b"] @ w["w"],
        "g": np.ones_like(w["g"]),
        "b": np.zeros_like(w["b"]),
    }


# --------------------------------------------------------------------------------------------------------------- heads

NORMED_VALUES = attention(
    SEPARATE.replace(
        "v = Transpose <perm = [0, 2, 1, 3]> (v2)",
        "v3 = RMSNormalization (v2, gv)\n    v = Transpose <perm = [0, 2, 1, 3]> (v3)",
    ),
    PLAIN,
    weights={"gv": "float[4]"},
)


def turned_through_a_norm(w: Arrays) -> Arrays:
    """R2 with a per-head norm between: 4 channels a head, 2 key-value heads for 4 query heads."""
    turn = Hadamard(4, seed=0).matrix()
    return {
        "wv": w["wv"] @ np.kron(np.eye(2), turn),
        "bv": w["bv"] @ np.kron(np.eye(2), turn),
        "wo": np.kron(np.eye(4), turn).T @ w["wo"],
    }


def scaled(w: Arrays, scale: np.ndarray) -> Arrays:
    """Every query channel of a head times s, every key channel by s; rotary positions mix channels i and i + 2."""
    queries, keys = np.tile(scale, 4), np.tile(scale, 2)
    return {
        **{"wq": w["wq"] * queries, "bq": w["bq"] * queries},
        **{"wk": w["wk"] / keys, "bk": w["bk"] / keys},
    }


# ------------------------------------------------------------------------------------------------------- batch norms

PATCH_EMBED = """
patches (float[B, 3, 4, 4] x, float[6, 3, 2, 2] kernel, float[6] bias, float[6] g, float[6] b, float[6] mean,
         float[6] var, float[1] alpha) => (float[B, 6, 2, 2] y)
{
    c = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, kernel, bias)
    n = BatchNormalization (c, g, b, mean, var)
    s = Mul (alpha, c)
    y = Add (n, s)
}
"""
MERGED_PATCH_EMBED = """
patches (float[B, 3, 4, 4] x, float[6, 3, 2, 2] kernel, float[6] bias) => (float[B, 6, 2, 2] y)
{
    y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, kernel, bias)
}
"""

TRAINING = """
training (float[4, 3, 5, 5] x, float[6, 3, 1, 1] kernel, float[6] bias, float[6] g, float[6] b, float[6] mean,
          float[6] var, float[4, 6, 1, 1] next) => (float[4, 4, 5, 5] y)
{
    c = Conv <kernel_shape = [1, 1]> (x, kernel, bias)
    n, running_mean, running_var = BatchNormalization <training_mode = 1> (c, g, b, mean, var)
    r = Relu (n)
    y = Conv <kernel_shape = [1, 1]> (r, next)
}
"""
WITHOUT_BATCH_NORM = """
training (float[4, 3, 5, 5] x, float[6, 3, 1, 1] kernel, float[6] bias, float[4, 6, 1, 1] next) => (float[4, 4, 5, 5] y)
{
    c = Conv <kernel_shape = [1, 1]> (x, kernel, bias)
    r = Relu (c)
    y = Conv <kernel_shape = [1, 1]> (r, next)
}
"""
VARIANCE = {"var": [0.5, 0.8, 1.1, 1.4, 1.7, 2.0]}


def folded(w: Arrays) -> Arrays:
    """The batch norm's frozen statistics folded into the kernel in front of it."""
    factor = w["g"] / np.sqrt(w["var"] + float(np.float32(1e-5)))
    return {
        "kernel": factor[:, None, None, None] * w["kernel"],
        "bias": factor * (w["bias"] - w["mean"]) + w["b"],
    }


CASES = {
    "an RMSNorm model's embeddings are centred": Case(
        "llm-compressor's SpinQuant on Llama, Qwen and Granite",
        LLAMA,
        lambda w: rotated(w, centre=True),
        right=rotated,
        applied=(RotateResidual(seed=0),),
        refused=(Refusal(CenterResidual(), "R2", "RMSNormalization", "sees its mean"),),
        inputs=("ids",),
    ),
    "norms after a branch are rotated through": Case(
        "llm-compressor's SpinQuant on Gemma 2",
        GEMMA2,
        rotated_through_sandwich,
        refused=(Refusal(RotateResidual(), "R2", "RMSNormalization", "writes"),),
        inputs=("ids",),
    ),
    "a norm is taken for another by its name": Case(
        "llm-compressor's SmoothQuant mapping on Gemma 2",
        GEMMA2,
        smoothed_by_name,
        applied=(Smooth(),),
        refused=(Refusal(Smooth(), "R3", "RMSNormalization", "touches the norm's result"),),
        inputs=("ids",),
    ),
    "a scale 1 + w is folded as w": Case(
        "Olive's QuaRot on Gemma",
        GEMMA,
        folded_as_a_plain_scale,
        right=folded_with_one,
        applied=(FoldNorm(), RotateResidual(seed=0)),
        inputs=("ids",),
    ),
    "an activation between the matrix and the norm": Case(
        "Brevitas' LayerNormToRMS",
        RELU_BEFORE_NORM,
        centred_before_relu,
        exchanged={"LayerNormalization": "RMSNormalization"},
        refused=(Refusal(CenterResidual(), "R8", "Relu", ""),),
    ),
    "an activation between the norm and the matrix": Case(
        "Brevitas' MergeLnAffine",
        RELU_AFTER_NORM,
        merged_past_relu,
        refused=(Refusal(FoldNorm(), "R3", "Relu", ""),),
    ),
    "a rotation past a γ that is not merged": Case(
        "Brevitas' graph rotation, γ unmerged",
        LLAMA,
        lambda w: rotated(w, fold=False),
        right=rotated,
        applied=(RotateResidual(seed=0),),
        inputs=("ids",),
    ),
    "a rotation past a norm of each head": Case(
        "Brevitas' graph rotation, per-head norm",
        NORMED_VALUES,
        turned_through_a_norm,
        refused=(Refusal(RotateHeads(), "R4", "RMSNormalization", "normalizes over the axis"),),
    ),
    "the skip's share of the bias is dropped": Case(
        "SLAB's PatchEmbed.merge_bn",
        PATCH_EMBED,
        lambda w: {**folded(w), "kernel": folded(w)["kernel"] + w["alpha"] * w["kernel"]},
        right=lambda w: {name: array + w["alpha"] * w[name] for name, array in folded(w).items()},
        folded=MERGED_PATCH_EMBED,
        weights=VARIANCE,
    ),
    "query and key channels are scaled freely under rotary positions": Case(
        "OmniQuant and a derivative of OSTQuant",
        attention(rotary=HALF),
        lambda w: scaled(w, np.array([0.5, 1.0, 1.5, 2.0])),
        applied=(ScaleQueryKey(),),
        inputs=("x", "angles"),
    ),
    "a batch norm in training mode is folded": Case(
        "onnxscript's default rules",
        TRAINING,
        folded,
        folded=WITHOUT_BATCH_NORM,
        refused=(Refusal(Equalize(), "R1", "BatchNormalization", ""),),
        weights=VARIANCE,
    ),
}
"""The mistake → the tool that makes it, and what is done here."""


def error(before: Program, model: ir.Model) -> float:
    """The largest relative difference of an output in float64."""
    inputs = fed(before)
    expected, found = evaluate(before.model, inputs), evaluate(model, inputs)
    return max(float(np.linalg.norm(found[name] - value) / np.linalg.norm(value)) for name, value in expected.items())


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{case.tool}: {name}") for name, case in CASES.items()])
def test_the_wrong_pair_is_refuted_at_a_node(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before, wrong = case.program(), rewritten(case, case.wrong)
    assert error(before, wrong) > NOTICEABLE, "the mistake shows"
    found = verify(before, wrong, refutation=tmp_path / "part")
    assert found.proof.verdict.kind == "REFUTED", found.proof.verdict
    assert found.proof.verdict.node in {node.name for node in wrong.graph}
    assert found.counterexample is not None
    parts = [ir.load(tmp_path / "part" / f"{each}.onnx") for each in ("original", "rewritten")]
    assert all(len(part.graph) <= len(before.model.graph) for part in parts)


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{case.tool}: {name}") for name, case in CASES.items()])
def test_the_right_rewrite_is_proved_or_refused_with_a_reason(name: str) -> None:
    case = CASES[name]
    before = case.program()
    assert case.applied or case.refused or case.right
    if case.applied:
        result = rewrite.apply(before, case.applied)
        assert result.certificate.verdict.kind == "EQUAL", result
        applied = {outcome.pass_name for outcome in result.outcomes if isinstance(outcome, Applied)}
        assert applied == {rule.name for rule in case.applied}, result
        assert error(before, result.program.model) < 1e-5
    if case.right is not None:
        right = rewritten(case, case.right)
        assert error(before, right) < 1e-5
        verdict = verify(before, right).proof.verdict
        assert verdict.holds, verdict
    for expected in case.refused:
        refusals = [one.refusal for one in rewrite.explain(before, [expected.rule]) if isinstance(one, Refused)]
        there = [one for one in refusals if one.requirement == expected.requirement]
        wanted = (expected.operator, expected.reason)
        assert any(one.node and one.operator == wanted[0] and wanted[1] in one.reason for one in there), refusals
