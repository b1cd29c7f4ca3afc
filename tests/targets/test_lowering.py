"""Lowering to ONNX Runtime: the same function in float64, the forms that are promised, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import rewrite.targets
from rewrite.capture.canonicalize import canonicalize
from rewrite.check.reference import evaluate
from rewrite.errors import RequestError, SourceError, UnsupportedOperatorError
from rewrite.ir.program import Program, save_model
from rewrite.targets import TARGETS, OrtCpu, OrtCuda, open_session
from rewrite.targets.target import SESSION_FILE

EMITTED = {
    "Gelu", "Attention", "RotaryEmbedding", "MatMul", "Add", "Where", "Squeeze", "Reshape", "Shape", "Concat", "Expand",
    "Cos", "Sin", "Mul",
}  # fmt: skip


def inputs_of(program: Program) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    if program.inputs[0].kind == "image":
        return {"pixel_values": random.standard_normal((2, *program.inputs[0].shape[1:]), np.float32)}
    # One row is padded on the left, so that whole rows of its attention are masked.
    mask = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7])
    return {"input_ids": random.integers(3, 90, (3, 7)), "attention_mask": mask}


def lowered(program: Program) -> tuple[ir.Model, Counter]:
    canonicalize(program)
    model = OrtCpu().lower(program)
    return model, Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_lowering_is_the_same_function(family: str, family_program, tmp_path) -> None:
    program = family_program(family)
    model, operators = lowered(program)
    inputs = inputs_of(program)
    expected = evaluate(program.model, inputs)
    found = evaluate(model, inputs)
    # Sums of at most a hundred terms a layer in another order; GELU's constants, where it was written out, are within
    # an ulp of float32 of the operator's.
    raised = "Gelu" in operators and "Gelu" not in [node.op_type for node in program.model.graph]
    allowed = 4 * np.finfo(np.float32).eps if raised else 100 * np.finfo(np.float64).eps
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= allowed * np.abs(array).max()
    assert "Transpose" not in operators or operators["Transpose"] == 1  # of the image's patches, or of a tied head
    assert operators["Attention"] == 2
    for node in model.graph:
        if node.metadata_props.get("rewrite.pass") == "ort-cpu":
            assert node.domain == ""
            assert node.op_type in EMITTED
        if node.op_type == "Attention":
            assert len(node.inputs[0].shape) == 3
            assert {"q_num_heads", "kv_num_heads", "scale"} <= set(node.attributes)
    if family == "llama":
        assert operators["RotaryEmbedding"] == 4
        assert not operators["Neg"] + operators["Slice"]
    if family == "gpt2":
        assert not operators["Split"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_the_file_runs_and_stays_within_the_noise_of_the_original(family: str, family_program, tmp_path) -> None:
    program = family_program(family)
    inputs = inputs_of(program)
    save_model(program.original, tmp_path / "original.onnx")
    reference = evaluate(program.original, inputs)
    canonicalize(program)
    OrtCpu().save(program, tmp_path / "out")
    # In a process of its own: the session's options flush denormals in the thread that opens it.
    script = """
import sys, numpy, onnxruntime
from rewrite.targets import open_session
folder, inputs = sys.argv[1], dict(numpy.load(sys.argv[2]))
ours = open_session(f"{folder}/out", intra_op_num_threads=1)
theirs = onnxruntime.InferenceSession(f"{folder}/original.onnx", providers=["CPUExecutionProvider"])
numpy.savez(sys.argv[3], ours=ours.run(None, inputs)[0], original=theirs.run(None, inputs)[0])
"""
    np.savez(tmp_path / "inputs.npz", **inputs)
    arguments = [str(tmp_path), str(tmp_path / "inputs.npz"), str(tmp_path / "outputs.npz")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
    outputs = np.load(tmp_path / "outputs.npz")
    (exact,) = reference.values()
    noise = np.linalg.norm(outputs["original"] - exact)
    # Two float32 runs of one function: each its own rounding, of about the same size.
    assert np.linalg.norm(outputs["ours"] - exact) <= 4 * max(noise, np.finfo(np.float32).eps * np.linalg.norm(exact))


def test_lowering_leaves_the_program_alone(family_program) -> None:
    program = family_program("gpt2")
    canonicalize(program)
    before = [(node.op_type, node.outputs[0].name) for node in program.model.graph]
    OrtCpu().lower(program)
    assert [(node.op_type, node.outputs[0].name) for node in program.model.graph] == before


def test_a_packed_weight_that_something_else_reads_stays_packed() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[n,2] x) => (float[n,1] y, float[n,1] z, EXTRA) <float[2,2] w = {1, 2, 3, 4}> {
        p = MatMul(x, w)
        y, z = Split <axis = -1, num_outputs = 2> (p)
        MORE
    }"""
    for extra, more, expected in (
        ("float[n,2] q", "q = Neg(x)", {"MatMul": 2, "Neg": 1}),
        ("float[n,2] q", "q = Neg(p)", {"MatMul": 1, "Split": 1, "Neg": 1}),
        ("float[2,2] q", "q = Neg(w)", {"MatMul": 1, "Split": 1, "Neg": 1}),
    ):
        model = ir.from_onnx_text(text.replace("EXTRA", extra).replace("MORE", more))
        model.graph[0].outputs[0].shape = ir.Shape(["n", 2])
        program = Program.captured(model)
        result = OrtCpu().lower(program)
        assert Counter(node.op_type for node in result.graph) == expected
        inputs = {"x": np.float32([[1, -2], [3, 5]])}
        for name, array in evaluate(model, inputs).items():
            np.testing.assert_array_equal(evaluate(result, inputs)[name], array)


ROTARY = """<ir_version: 10, opset_import: ["" : 23]>
g (float[b,s,16] q, float[b,s,16] k, float[b,s,16] v, float[1,s,4] f, float[1,s,4] g) => (float[b,s,16] y)
<int64[4] heads = {0, 0, 2, 8}, int64[3] together = {0, 0, 16}, int64[1] zero = {0}, int64[1] four = {4},
 int64[1] end = {8}, int64[1] last = {3}, int64[1] one = {1}> {
    ff = Concat <axis = -1> (f, OTHER)
    cos = Cos(ff)
    sin = Sin(ff)
    cos4 = Unsqueeze(cos, one)
    sin4 = Unsqueeze(sin, one)
    q4 = Reshape(q, heads)
    qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape(k, heads)
    kt = Transpose <perm = [0, 2, 1, 3]> (k4)
    v4 = Reshape(v, heads)
    vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    q1 = Slice(qt, zero, four, last)
    q2 = Slice(qt, four, end, last)
    qn = Neg(NEGATED)
    qr = Concat <axis = -1> (qn, KEPT)
    qc = Mul(qt, cos4)
    qs = Mul(qr, sin4)
    query = Add(qc, qs)
    a = Attention(query, kt, vt)
    at = Transpose <perm = [0, 2, 1, 3]> (a)
    y = Reshape(at, together)
}"""


def rotary(other: str = "f", negated: str = "q2", kept: str = "q1") -> Program:
    text = ROTARY.replace("OTHER", other).replace("NEGATED", negated).replace("KEPT", kept)
    model = ir.from_onnx_text(text)
    four_axes = {"q4": "bs28", "k4": "bs28", "v4": "bs28", "at": "bs28", "cos4": "11s8", "sin4": "11s8"}
    three_axes = {"ff": "1s8", "cos": "1s8", "sin": "1s8"}
    for node in model.graph:
        output = node.outputs[0]
        letters = {**four_axes, **three_axes}.get(output.name, "b2s4" if output.name in ("q1", "q2", "qn") else "b2s8")
        output.dtype = ir.DataType.FLOAT
        if not output.is_graph_output():
            output.shape = ir.Shape([int(letter) if letter.isdigit() else letter for letter in letters])
    return Program.captured(model)


@pytest.mark.parametrize(
    ("form", "raised"),
    [
        ({}, 1),
        ({"other": "g"}, 0),  # the caches' halves differ
        ({"negated": "q1", "kept": "q2"}, 0),  # pairs turned the other way, and swapped
        ({"kept": "q2"}, 0),
    ],
)
def test_rotary_embedding_is_read_only_where_it_is_one(form: dict, raised: int) -> None:
    program = rotary(**form)
    model = OrtCpu().lower(program)
    operators = Counter(node.op_type for node in model.graph)
    assert operators["RotaryEmbedding"] == raised
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal((3, 5, 16), np.float32) for name in "qkv"}
    inputs |= {name: random.standard_normal((1, 5, 4), np.float32) for name in "fg"}
    expected, found = evaluate(program.model, inputs)["y"], evaluate(model, inputs)["y"]
    assert np.abs(found - expected).max() <= 100 * np.finfo(np.float64).eps * np.abs(expected).max()


def test_bfloat16_is_refused_on_the_cpu_and_not_on_cuda() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> '
        "g (bfloat16[2,2] x, bfloat16[2,2] w) => (bfloat16[2,2] y) { y = MatMul(x, w) }"
    )
    with pytest.raises(UnsupportedOperatorError, match="ort-cpu has no bfloat16 kernel for MatMul") as raised:
        OrtCpu().lower(Program.captured(model))
    assert "--dtype float32" in str(raised.value)
    OrtCuda().lower(Program.captured(model))


def test_another_dtype_than_the_captured_is_asked_of_the_capture(family_program) -> None:
    program = family_program("gpt2")
    with pytest.raises(RequestError, match="float32, not float16") as raised:
        OrtCpu().lower(program, dtype="float16")
    assert "capture with dtype='float16'" in str(raised.value)
    OrtCpu().lower(program, dtype="float32")


def test_an_opset_the_runtime_does_not_know_is_refused() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 27]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    with pytest.raises(UnsupportedOperatorError, match="opset 27"):
        OrtCpu().lower(Program.captured(model))


def test_session_files_say_how_to_open_the_model(tmp_path) -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    with pytest.raises(SourceError, match=SESSION_FILE):
        open_session(tmp_path)
    OrtCpu().save(Program.captured(model), tmp_path)
    exact = {"session.set_denormal_as_zero": "0"}
    session = open_session(tmp_path, config=exact, intra_op_num_threads=1)
    np.testing.assert_array_equal(session.run(None, {"x": np.float32([1, -2])})[0], [-1, 2])
    with pytest.raises(RequestError, match="no_such_option"):
        open_session(tmp_path, config=exact, no_such_option=1)


def test_targets_are_named_and_ordered() -> None:
    assert [target.name for target in TARGETS] == ["ort-cpu", "ort-cuda"]
    folder = Path(rewrite.targets.__file__).resolve().parent
    code = f"import sys; sys.path.insert(0, {str(folder.parent)!r}); import targets"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: imported as 'targets', expected 'rewrite.targets'" in done.stderr


@pytest.mark.cuda
def test_cuda_runs_what_it_lowers(family_program, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA execution provider")
    program = family_program("llama")
    inputs = inputs_of(program)
    canonicalize(program)
    OrtCuda().save(program, tmp_path)
    found = open_session(tmp_path).run(None, inputs)[0]
    (exact,) = evaluate(program.original, inputs).values()
    assert np.linalg.norm(found - exact) <= 64 * np.finfo(np.float32).eps * np.linalg.norm(exact)
