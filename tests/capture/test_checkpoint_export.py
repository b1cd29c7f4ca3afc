"""A rewritten network as a checkpoint again: transformers loads it and computes the same, or it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from capture_comparison import agrees
from families import FAMILIES, GROUPED, _text
from networks import network
from safetensors.numpy import load_file, save_file

from rewrite.capture import capture
from rewrite.capture.canonicalize import canonicalize
from rewrite.capture.checkpoint_export import Checkpoint, plan, write_checkpoint
from rewrite.capture.checkpoint_images import Untied, images, solve
from rewrite.capture.safetensors_file import read_checkpoint, read_header
from rewrite.check import evaluate
from rewrite.errors import OutputError, RequestError
from rewrite.export_hf import convert_checkpoint
from rewrite.ir import weights as lazy
from rewrite.ir.program import Program
from rewrite.passes import CenterResidual, FoldNorm, FoldScale, RotateHeads, RotateResidual
from rewrite.pipeline import verify
from rewrite.rule import apply_pass

FILES = {"certificate.json", "config.json", "generation_config.json", "model.safetensors", "report.html", "report.json"}
BUILDERS = {**FAMILIES, "llama_tied": _text("LlamaForCausalLM", "LlamaConfig", **GROUPED, tie_word_embeddings=True)}
CASES = {
    "llama": [RotateResidual(), RotateHeads()],
    "llama_tied": [RotateResidual()],
    "qwen2": [FoldNorm(), RotateHeads()],
    "mixtral": [FoldNorm()],
    "gemma2": [FoldNorm()],
}


QUICK = ("llama_tied", "qwen2", "mixtral")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_transformers_loads_what_was_written_and_computes_the_same(family, tmp_path):
    import torch

    model, inputs = BUILDERS[family]()
    model.save_pretrained(tmp_path / "before")
    report = convert_checkpoint(tmp_path / "before", tmp_path / "after", passes=CASES[family])
    assert report.verdict.startswith("EQUAL")
    assert report.numerical == "within noise"
    assert report.first_departure is None
    assert {row.pass_name for row in report.applied} == {each.name for each in CASES[family]}
    assert {path.name for path in (tmp_path / "after").iterdir()} >= FILES

    again = type(model).from_pretrained(tmp_path / "after").eval()
    assert sum(p.numel() for p in again.parameters()) >= sum(p.numel() for p in model.parameters())
    changed = dict(again.named_parameters())
    assert any(not torch.equal(p, changed[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        eager, found = (each(**inputs).logits.numpy() for each in (model, again))
    program = capture(tmp_path / "before")
    feed = {value.name: inputs[value.name].numpy() for value in program.inputs}
    reference = evaluate(program.original, feed)["logits"]
    assert agrees(found, eager, reference, longest_sum=128)
    tied = bool(model.config.tie_word_embeddings)
    assert again.config.tie_word_embeddings is (tied and family != "llama_tied")


def test_the_command_line_writes_verifies_and_replaces(tmp_path):
    from test_cli import rewrite

    model, _ = BUILDERS["llama"]()
    model.save_pretrained(tmp_path / "before", max_shard_size="40KB")
    (tmp_path / "before" / "tokenizer.json").write_text("{}")
    (tmp_path / "before" / "pytorch_model.bin").write_bytes(b"stale")
    arguments = ("convert", tmp_path / "before", "-o", tmp_path / "after", "--to", "hf", "--pass", "rotate-residual")
    done = rewrite(*arguments, "--no-check")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "after").iterdir()}
    shards = {path.name for path in (tmp_path / "before").glob("*.safetensors")}
    assert len(shards) > 1
    assert shards | {"model.safetensors.index.json", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names
    before, after = read_checkpoint(tmp_path / "before"), read_checkpoint(tmp_path / "after")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert json.loads((tmp_path / "after" / "certificate.json").read_text())["transforms"]
    assert verify(str(tmp_path / "before"), str(tmp_path / "after")).verdict.holds

    assert rewrite(*arguments).returncode == 2
    (tmp_path / "after" / "mine.txt").write_text("do not delete")
    with pytest.raises(OutputError, match=r"mine\.txt"):
        convert_checkpoint(tmp_path / "before", tmp_path / "after", passes=["fold-norm"], force=True)
    (tmp_path / "after" / "mine.txt").unlink()
    convert_checkpoint(tmp_path / "before", tmp_path / "after", passes=[], force=True, check=False)
    assert "certificate.json" in {path.name for path in (tmp_path / "after").iterdir()}


def test_gpt2_without_means_is_another_architecture(tmp_path):
    model, _ = BUILDERS["gpt2"]()
    model.save_pretrained(tmp_path / "before")
    with pytest.raises(RequestError, match="the architecture has LayerNormalization") as caught:
        convert_checkpoint(tmp_path / "before", tmp_path / "after", passes=["center-residual"])
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_what_is_no_checkpoint_and_what_does_not_fit_is_refused(tmp_path):
    from test_cli import one_line, rewrite, small_model

    source = small_model(tmp_path / "small.onnx")
    assert "only a Hugging Face checkpoint" in one_line(rewrite("convert", source, "-o", tmp_path / "o", "--to", "hf"))
    refused = rewrite("convert", source, "-o", tmp_path / "o", "--to", "hf", "--dtype", "float16")
    assert "keeps its type" in one_line(refused)
    assert "onnx or hf" in one_line(rewrite("convert", source, "-o", tmp_path / "o", "--to", "pickle"))


# ── Graphs without a model library ──────────────────────────────────────────────────────────────────────────────────

BLOCK = """block (float[N, 8] x, float[8] g, float[8] b, float[8, 6] w, float[6] c, float[6] s) => (float[N, 6] y) {
    n = LayerNormalization (x, g, b)  h = MatMul (n, w)  k = Add (h, c)  t = Tanh (k)  y = Mul (t, s) }"""


def stored(tmp_path: Path, text: str = BLOCK) -> Program:
    """The network with its weights on disk."""
    return on_disk(network(text), tmp_path)


def on_disk(program: Program, tmp_path: Path) -> Program:
    constants = program.model.graph.initializers
    save_file({name: value.const_value.numpy() for name, value in constants.items()}, tmp_path / "w.safetensors")
    for name, tensor in read_header(tmp_path / "w.safetensors").items():
        constants[name].const_value = tensor
    return Program.captured(program.model)


def name_of(tensor: ir.TensorProtocol) -> str:
    return f"disk.{tensor.name}"


def found(before: Program, after: Program) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in images(before.model, after.model, name_of).items()}


def edited(text: str, **weights: np.ndarray) -> Program:
    return network(text, **weights)


def test_what_did_not_change_has_no_image(tmp_path):
    before = stored(tmp_path)
    assert found(before, before.clone()) == {}


def test_a_folded_norm_leaves_ones_zeros_and_new_matrices(tmp_path):
    before = stored(tmp_path)
    after = before.clone()
    (outcome,) = apply_pass(after, FoldNorm())
    assert outcome.changed
    new = found(before, after)
    g, b, w, c = (before.model.graph.initializers[name].const_value.numpy().astype(float) for name in "gbwc")
    np.testing.assert_array_equal(new["disk.g"], np.ones(8))
    np.testing.assert_array_equal(new["disk.b"], np.zeros(8))
    np.testing.assert_array_equal(new["disk.w"], g[:, None] * w)
    np.testing.assert_allclose(new["disk.c"], c + b @ w, rtol=1e-12)
    assert "disk.s" not in new


def test_a_scale_and_a_bias_that_are_gone_were_one_and_zero(tmp_path):
    before = stored(tmp_path)
    text = BLOCK.replace("k = Add (h, c)  t = Tanh (k)  y = Mul (t, s)", "y = Tanh (h)")
    kept = {name: before.model.graph.initializers[name].const_value.numpy() for name in "gbw"}
    after = edited(text.replace(", float[6] c, float[6] s", ""), **kept)
    new = found(before, after)
    np.testing.assert_array_equal(new["disk.c"], np.zeros(6))
    np.testing.assert_array_equal(new["disk.s"], np.ones(6))
    assert sorted(new) == ["disk.c", "disk.s"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("t = Tanh (k)", "t = Sigmoid (k)", "the architecture has Tanh"),
        ("y = Mul (t, s)", "u = Mul (t, s)  y = Add (u, c)", "a bias that the architecture has not"),
        ("t = Tanh (k)", "u = Mul (k, s)  t = Tanh (u)", "a scale that the architecture has not"),
        ("(x, g, b)", "<epsilon = 0.5> (x, g, b)", "other attributes"),
        ("h = MatMul (n, w)", "h = MatMul (x, w)", "n is gone"),
        ("y = Mul (t, s)", "q = Exp (s)  y = Mul (t, q)", "the architecture has Tanh"),
        ("float[6] c", "float[1] c", r"the shape \[6\] there and \[1\] here"),
    ],
)
def test_another_graph_is_refused_with_the_node_and_the_reason(old, new, reason, tmp_path):
    assert old in BLOCK
    with pytest.raises(RequestError, match=reason):
        found(stored(tmp_path), edited(BLOCK.replace(old, new)))


def test_a_number_that_the_architecture_writes_itself_stays(tmp_path):
    text = BLOCK.replace("y = Mul (t, s)", "two = Constant <value_float = 2.0> ()  u = Mul (t, two)  y = Mul (u, s)")
    before = stored(tmp_path, text)
    canonicalize(before)
    after = before.clone()
    assert found(before, after) == {}
    constant = next(v for v in after.model.graph.initializers.values() if v.const_value.size == 1)
    constant.const_value = ir.tensor(np.float32(3.0), name=constant.name)
    with pytest.raises(RequestError, match="a number of the architecture"):
        found(before, after)
    gone = edited(
        text.replace("u = Mul (t, two)", "")
        .replace("(u, s)", "(t, s)")
        .replace("two = Constant <value_float = 2.0> ()", "")
    )
    with pytest.raises(RequestError, match="is no weight of it, and is gone"):
        found(before, gone)


TIED = """tied (int64[N] ids, float[40, 30] table, float[30] g) => (float[N, 40] y) {
    x = Gather (table, ids)  n = RMSNormalization (x, g)  t = Transpose <perm = [1, 0]> (table)  y = MatMul (n, t) }"""


def test_a_tied_table_has_one_image_or_is_untied(tmp_path):
    before = on_disk(network(TIED, inputs=("ids",)), tmp_path)
    canonicalize(before)
    after = before.clone()
    gather, transpose = after.model.graph[0], next(n for n in after.model.graph if n.op_type == "Transpose")
    old = gather.inputs[0]
    turned = lazy.Scale(lazy.Source(old.const_value), lazy.Constant(np.array(-1.0)))
    new = ir.Value(
        name="new", shape=old.shape, type=old.type, const_value=lazy.MaterializedTensor(turned, old.dtype, "new")
    )
    after.model.graph.register_initializer(new)
    gather.replace_input_with(0, new)
    with pytest.raises(Untied) as caught:
        images(before.model, after.model, name_of)
    assert caught.value.tensor.startswith("disk.")
    transpose.replace_input_with(0, new)
    np.testing.assert_array_equal(found(before, after)["disk.table"], -old.const_value.numpy().astype(float))


def test_layouts_of_a_capture_are_undone(tmp_path):
    """Stacked experts, joined and transposed matrices, 1 + w: solved for what is on disk."""
    rng = np.random.default_rng(0)
    tensors = [
        ir.ExternalTensor("m", 64 * i, 48, ir.DataType.FLOAT, shape=ir.Shape([4, 3]), name=str(i)) for i in range(4)
    ]
    a, b, c, d = map(lazy.Source, tensors)
    pair = [lazy.Transpose(lazy.Concat((x, y), 0), (1, 0)) for x, y in ((a, b), (c, d))]
    held = lazy.Reshape(lazy.Stack(tuple(pair)), (6, 8))
    image = lazy.Constant(rng.standard_normal((6, 8)))
    solved = {tensor.name: weight.numpy() for tensor, weight in solve(held, image)}
    cube = image.value.reshape(2, 3, 8)
    for index, name in enumerate("0123"):
        half = slice(0, 4) if index % 2 == 0 else slice(4, 8)
        np.testing.assert_array_equal(solved[name], cube[index // 2][:, half].T)
    threes, one = lazy.Constant(np.full((4, 3), 3.0)), lazy.Constant(np.ones((4, 3)))
    for held, expected in ((lazy.Add((a, one)), 2.0), (lazy.Scale(a, lazy.Constant(np.array(2.0))), 1.5)):
        ((_, weight),) = solve(held, threes)
        np.testing.assert_array_equal(weight.numpy(), np.full((4, 3), expected))
    with pytest.raises(NotImplementedError, match="Center"):
        list(solve(lazy.Center(a, 0), image))


def test_a_layer_scale_that_was_folded_is_one_in_the_checkpoint(tmp_path):
    text = """scaled (float[N, 8] x, float[8, 6] w, float[6] c, float[6] s, float[6, 6] v) => (float[N, 6] y) {
        h = MatMul (x, w)  k = Add (h, c)  m = Mul (k, s)  t = Tanh (m)  y = MatMul (t, v) }"""
    before = stored(tmp_path, text)
    after = before.clone()
    assert [outcome for outcome in apply_pass(after, FoldScale()) if hasattr(outcome, "changed")]
    new = found(before, after)
    np.testing.assert_array_equal(new["disk.s"], np.ones(6))
    assert sorted(new) == ["disk.c", "disk.s", "disk.w"]


def test_bytes_that_did_not_change_are_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    tensors = {"a": rng.standard_normal((3, 5)).astype(np.float16), "b": np.arange(4), "c": np.float32(2.5)}
    save_file({name: np.asarray(array) for name, array in tensors.items()}, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    kept = read_checkpoint(source)
    changed = lazy.Scale(lazy.Source(kept["a"]), lazy.Constant(np.array(3.0)))
    write_checkpoint(Checkpoint(source, {"a": changed}), out)
    written = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(written["a"], (tensors["a"].astype(np.float64) * 3).astype(np.float16))
    np.testing.assert_array_equal(written["b"], tensors["b"])
    assert written["c"] == 2.5
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_centred_llama_is_refused_by_its_pass_and_stays_as_it_was(tmp_path):
    """A checkpoint where nothing applied is the one that was given, byte by byte."""
    model, _ = BUILDERS["llama"]()
    model.save_pretrained(tmp_path / "before")
    program = capture(tmp_path / "before")
    canonical = program.clone()
    canonicalize(canonical)
    work = canonical.clone()
    apply_pass(work, CenterResidual())
    planned = plan(tmp_path / "before", canonical, work)
    assert not planned.changed
    (tmp_path / "after").mkdir()
    write_checkpoint(planned, tmp_path / "after")
    before, after = (read_checkpoint(tmp_path / name) for name in ("before", "after"))
    assert all(np.array_equal(before[name].numpy(), after[name].numpy()) for name in before)
    shutil.rmtree(tmp_path / "after")
