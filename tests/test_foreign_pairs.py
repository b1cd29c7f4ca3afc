"""Pairs made by others: what `verify` says of optimizers' outputs without a certificate, right ones and wrong ones."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from networks import network

from rewrite.ir.program import Program
from rewrite.pipeline import FOLDED_ULPS, Verification, verify

# ── Tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Tool = Callable[[Path, Path], None]


def runtime(level: str) -> Tool:
    """ONNX Runtime's own optimizer: the graph as a session would run it."""

    def run(source: Path, result: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(result)
        options.log_severity_level = 4
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return run


def scripted(function: Callable[[ir.Model], ir.Model | None]) -> Tool:
    """A tool on onnx_ir models, in place or not."""

    def run(source: Path, result: Path) -> None:
        model = ir.load(source)
        with quiet():
            changed = function(model)
        ir.save(changed or model, result)

    return run


@contextmanager
def quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def optimized(model: ir.Model) -> None:
    from onnxscript import optimizer

    optimizer.optimize(model)


def rewritten(model: ir.Model) -> ir.Model:
    from onnxscript import rewriter

    return rewriter.rewrite(model)


def fused(model: ir.Model) -> ir.Model:
    from onnxscript.rewriter import ort_fusions

    done = ort_fusions.optimize_for_ort(model)
    return done[0] if isinstance(done, tuple) else done


def fused_by_transformers(model: ir.Model) -> None:
    fusions = pytest.importorskip("transformers.exporters.onnxruntime_fusions")
    fusions.fuse_for_onnxruntime(model, "cpu")


def optional(module: str, function: str) -> Tool:
    """A tool that the tests do not install: its cases are skipped where it is absent."""

    def run(source: Path, result: Path) -> None:
        tool = pytest.importorskip(module, reason=f"{module} is not installed")
        changed = getattr(tool, function)(onnx.load(source))
        onnx.save(changed[0] if isinstance(changed, tuple) else changed, result)

    return run


TOOLS: dict[str, Tool] = {
    "ort-basic": runtime("BASIC"),
    "ort-extended": runtime("EXTENDED"),
    "ort-all": runtime("ALL"),
    "onnxscript-optimizer": scripted(optimized),
    "onnxscript-rewriter": scripted(rewritten),
    "onnxscript-ort-fusions": scripted(fused),
    "transformers-ort-fusions": scripted(fused_by_transformers),
    "onnxsim": optional("onnxsim", "simplify"),
    "onnxslim": optional("onnxslim", "slim"),
}

# ── Networks ────────────────────────────────────────────────────────────────────────────────────────────────────────

BLOCK = """
block (float[B, S, 8] x, float[8] g, float[8] b, float[8, 16] w1, float[16] c1, float[16, 8] w2, float[8] c2,
       float[8, 8] w3, float[8] c3, float[8] g2, float[8] b2) => (float[B, S, 8] y)
{
    n = LayerNormalization (x, g, b)
    h = MatMul (n, w1)
    a = Add (h, c1)
    root = Constant <value_float = 1.4142135> ()
    one = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    d = Div (a, root)
    e = Erf (d)
    s = Add (e, one)
    m = Mul (a, s)
    f = Mul (m, half)
    o = MatMul (f, w2)
    p = Add (o, c2)
    r = Add (p, x)
    n2 = LayerNormalization (r, g2, b2)
    shape = Shape (n2)
    rows = Constant <value_ints = [-1, 8]> ()
    flat = Reshape (n2, rows)
    t = Transpose <perm = [1, 0]> (w3)
    q = MatMul (flat, t)
    z = Add (q, c3)
    v = Relu (z)
    y = Reshape (v, shape)
}
"""
"""GELU written out, a residual norm, a product on flattened rows, a transposed weight."""

CONVOLUTIONS = """
convolutions (float[B, 4, 6, 6] x, float[8, 4, 3, 3] k1, float[8] g1, float[8] b1, float[8] m1, float[8] v1,
              float[8, 8, 3, 3] k2, float[8] c2, float[8] g2, float[8] b2, float[8] m2, float[8] v2)
    => (float[B, 8, 6, 6] y)
{
    c = Conv <pads = [1, 1, 1, 1]> (x, k1)
    n = BatchNormalization (c, g1, b1, m1, v1)
    r = Relu (n)
    d = Conv <pads = [1, 1, 1, 1]> (r, k2, c2)
    e = BatchNormalization <epsilon = 0.001> (d, g2, b2, m2, v2)
    s = Add (e, r)
    y = Relu (s)
}
"""


def variances(*names: str, size: int = 8) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(11)
    return {name: generator.uniform(0.25, 4.0, size).astype(np.float32) for name in names}


NETWORKS: dict[str, Callable[[], Program]] = {
    "block": lambda: network(BLOCK),
    "convolutions": lambda: network(CONVOLUTIONS, **variances("v1", "v2")),
}


def judged(program: Program, tool: Tool, folder: Path) -> Verification:
    source, result = folder / "source.onnx", folder / "result.onnx"
    ir.save(program.original, source)
    tool(source, result)
    return verify(source, result, refutation=folder / "refuted")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_an_optimizer_makes_is_proved(name: str, tool: str, tmp_path: Path) -> None:
    answer = judged(NETWORKS[name](), TOOLS[tool], tmp_path)
    assert answer.verdict.holds, str(answer)
    # Only constants folded in float32, and channels in blocks, need a declaration.
    declared = answer.verdict.ulps > 1 or "blocks" in answer.verdict.reason
    assert answer.verdict.kind in (("EQUAL_MODULO",) if declared else ("EQUAL", "BITWISE"))
    assert answer.verdict.ulps <= (FOLDED_ULPS if name == "convolutions" else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "resnet"])
def test_what_an_optimizer_makes_of_a_family_is_proved(family, tool, family_program, tmp_path: Path) -> None:
    answer = judged(family_program(family), TOOLS[tool], tmp_path)
    assert answer.verdict.holds, str(answer)


# ── Wrong folds ─────────────────────────────────────────────────────────────────────────────────────────────────────

NORMED = """
normed (float[B, 2, 3] x, float[2, 2, 1] w, float[2] b, float[2] g, float[2] h, float[2] m, float[2] v)
    => (float[B, 2, 3] y)
{
    c = Conv (x, w, b)
    y = BatchNormalization <epsilon = 0.001> (c, g, h, m, v)
}
"""
PLAIN = "plain (float[B, 2, 3] x, float[2, 2, 1] w, float[2] b) => (float[B, 2, 3] y) { y = Conv (x, w, b) }"


def folded(scale: Callable[..., np.ndarray], shift: Callable[..., np.ndarray]) -> tuple[Program, Program]:
    """A normalization behind a convolution, and a convolution that should hold it; in float32, as tools compute it."""
    first = network(NORMED, **variances("v", size=2))
    stored = {name: value.const_value.numpy() for name, value in first.original.graph.initializers.items()}
    w, b, g, h, m, v = (stored[name] for name in "wbghmv")
    factor = scale(g, v, np.float32(0.001))
    return first, network(PLAIN, w=w * factor[:, None, None], b=shift(b, h, m, factor))


def right_scale(g, v, epsilon):
    return g / np.sqrt(v + epsilon)


def right_shift(b, h, m, factor):
    return (b - m) * factor + h


def test_a_fold_computed_in_float32_is_equal() -> None:
    answer = verify(*folded(right_scale, right_shift))
    assert answer.verdict.holds, str(answer)


WRONG_FOLDS = {
    "another ε": (lambda g, v, e: g / np.sqrt(v + np.float32(1e-5)), right_shift),
    "no ε": (lambda g, v, e: g / np.sqrt(v), right_shift),
    "ε outside the root": (lambda g, v, e: g / (np.sqrt(v) + e), right_shift),
    "no root": (lambda g, v, e: g / (v + e), right_shift),
    "γ left out": (lambda g, v, e: 1 / np.sqrt(v + e), right_shift),
    "the convolution's bias left out": (right_scale, lambda b, h, m, factor: h - m * factor),
    "the convolution's bias not scaled": (right_scale, lambda b, h, m, factor: b + h - m * factor),
    "the mean added": (right_scale, lambda b, h, m, factor: (b + m) * factor + h),
    "channels swapped": (lambda g, v, e: right_scale(g, v, e)[::-1], right_shift),
}


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_a_wrong_fold_is_refuted(case: str, tmp_path: Path) -> None:
    original, wrong = folded(*WRONG_FOLDS[case])
    answer = verify(original, wrong, refutation=tmp_path)
    assert answer.verdict.kind == "REFUTED", str(answer)
    assert answer.refutation is not None
    assert [node.op_type for node in answer.refutation.original.graph] == ["Conv", "BatchNormalization"]
    assert [node.op_type for node in answer.refutation.rewritten.graph] == ["Conv"]
    # The files are a pair of their own, and the answer to it is the same.
    paths = answer.to_json()["refutation"]["paths"]
    assert verify(paths["original"], paths["rewritten"]).verdict.kind == "REFUTED"


TRAINING = """
training (float[B, 2, 3] x, float[2, 2, 1] w, float[2] g, float[2] h, float[2] m, float[2] v)
    => (float[B, 2, 3] y)
{
    c = Conv (x, w)
    y, m2, v2 = BatchNormalization <training_mode = 1> (c, g, h, m, v)
}
"""


def test_a_normalization_in_training_mode_folded_by_a_released_tool_is_refuted(tmp_path: Path) -> None:
    """onnxscript's default rules fold it although its statistics are those of the batch."""
    program = network(TRAINING, **variances("v", size=2))
    result = tmp_path / "result.onnx"
    source = tmp_path / "source.onnx"
    ir.save(program.original, source)
    scripted(rewritten)(source, result)
    if any(node.op_type == "BatchNormalization" for node in ir.load(result).graph):
        pytest.skip("this version of onnxscript leaves it alone")
    answer = verify(source, result)
    assert answer.verdict.kind == "REFUTED", str(answer)


def test_the_same_fold_made_by_hand_is_refuted() -> None:
    program = network(TRAINING, **variances("v", size=2))
    stored = {name: value.const_value.numpy() for name, value in program.original.graph.initializers.items()}
    factor = right_scale(stored["g"], stored["v"], np.float32(1e-5))
    wrong = network(PLAIN, w=stored["w"] * factor[:, None, None], b=stored["h"] - stored["m"] * factor)
    assert verify(program, wrong).verdict.kind == "REFUTED"


SHARED = """
shared (float[B, 2, 3] x, float[2, 2, 1] w, float[2] g, float[2] h, float[2] m, float[2] v) => (float[B, 2, 3] y)
{
    c = Conv (x, w)
    n = BatchNormalization (c, g, h, m, v)
    y = Conv (n, w)
}
"""
SHARED_FOLDED = """
shared (float[B, 2, 3] x, float[2, 2, 1] w, float[2] b) => (float[B, 2, 3] y)
{
    n = Conv (x, w, b)
    y = Conv (n, w)
}
"""


def test_a_fold_into_a_weight_that_another_operator_reads_is_refuted() -> None:
    program = network(SHARED, **variances("v", size=2))
    stored = {name: value.const_value.numpy() for name, value in program.original.graph.initializers.items()}
    factor = right_scale(stored["g"], stored["v"], np.float32(1e-5))
    wrong = network(SHARED_FOLDED, w=stored["w"] * factor[:, None, None], b=stored["h"] - stored["m"] * factor)
    answer = verify(program, wrong)
    assert answer.verdict.kind == "REFUTED", str(answer)
    assert answer.refutation is not None
    assert answer.refutation.value == "y"
    assert [node.op_type for node in answer.refutation.rewritten.graph] == ["Conv"]


FLATTENED = """flattened (float[B, 2, 3] x, float[3, 3] w) => (float[B, 6] y) {{
    p = MatMul (x, w)
    shape = Constant <value_ints = {shape}> ()
    y = Reshape (p, shape) }}"""


def test_a_size_baked_for_one_batch_is_not_equal() -> None:
    """Right for a batch of 1, which is what the tool had seen; the graph promises any."""
    original = network(FLATTENED.format(shape="[-1, 6]"))
    assert verify(original, network(FLATTENED.format(shape="[0, 6]"))).verdict.holds
    baked = network(FLATTENED.format(shape="[-1, 6]")).original.clone()
    constant = next(node for node in baked.graph if node.op_type == "Constant")
    constant.attributes["value_ints"] = ir.AttrInt64s("value_ints", [1, 6])
    assert not verify(original.original, baked).verdict.holds


SCALED = """scaled (float[B, 3] x, float[3, 4] w, float[4] b, float[4] s) => (float[B, 4] y) {
    p = MatMul (x, w) q = Mul (p, s) y = Add (q, b) }"""
GEMM = (
    "gemm (float[B, 3] x, float[{shape}] w, float[4] b) => (float[B, 4] y) {{ y = Gemm <transB = {trans}> (x, w, b) }}"
)


@pytest.mark.parametrize("trans", [0, 1])
def test_a_scale_folded_into_a_product(trans: int) -> None:
    """MatMul, Mul and Add as one Gemm, its weight transposed or not; the scale on the wrong side is refuted."""
    original = network(SCALED)
    stored = {name: value.const_value.numpy() for name, value in original.original.graph.initializers.items()}
    right = stored["w"] * stored["s"]
    shape = "4, 3" if trans else "3, 4"
    text = GEMM.format(shape=shape, trans=trans)
    assert verify(original, network(text, w=right.T if trans else right, b=stored["b"])).verdict.kind == "EQUAL"
    wrong = stored["w"] * stored["s"][[1, 0, 2, 3]]
    assert verify(original, network(text, w=wrong.T if trans else wrong, b=stored["b"])).verdict.kind == "REFUTED"
