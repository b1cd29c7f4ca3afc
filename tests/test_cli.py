"""The command line as its users meet it: exit codes, one line per error, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

PRE_LN = """
<ir_version: 10, opset_import: ["" : 23]>
block (int64[batch, sequence] ids) => (float[batch, sequence, 7] y)
{
    x = Gather (table, ids)
    n = LayerNormalization <axis = -1> (x, gamma, beta)
    u = MatMul (n, up)
    r = Relu (u)
    w = MatMul (r, down)
    b = Add (w, bias)
    s = Add (x, b)
    m = LayerNormalization <axis = -1> (s, gamma, beta)
    y = MatMul (m, head)
}
"""


def small_model(path: Path, **changed: np.ndarray) -> Path:
    """A Pre-LN block of which every norm can go, as a file."""
    rng = np.random.default_rng(0)
    shapes = {"table": (11, 8), "gamma": (8,), "beta": (8,), "up": (8, 16), "down": (16, 8)}
    shapes |= {"bias": (8,), "head": (8, 7)}
    model = onnx.parser.parse_model(PRE_LN)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} | changed
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def rewrite(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rewrite.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source file and the OUT folder of its conversion."""
    folder = tmp_path_factory.mktemp("cli")
    source, out = small_model(folder / "small.onnx"), folder / "out"
    done = rewrite("convert", source, "-o", out)
    assert done.returncode == 0, done.stderr
    return source, out


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error line of a refused request, which must be the only one."""
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_convert_writes_a_proved_model_that_a_plain_session_runs(converted: tuple[Path, Path]) -> None:
    import onnxruntime

    source, out = converted
    assert {p.name for p in out.iterdir()} >= {"model.onnx", "certificate.json", "report.json", "report.html"}
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["verdict"].startswith("EQUAL(")
    operators = [node.op_type for node in ir.load(out / "model.onnx").graph]
    assert "LayerNormalization" not in operators
    ids = np.arange(10).reshape(2, 5)
    a, b = (onnxruntime.InferenceSession(str(p)).run(None, {"ids": ids})[0] for p in (source, out / "model.onnx"))
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


def test_converting_again_gives_the_same_bytes(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    assert rewrite("convert", source, "-o", tmp_path / "again").returncode == 0
    for name in ("model.onnx", "certificate.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_json_goes_to_stdout_alone(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    done = rewrite("convert", source, "-o", tmp_path / "out", "--json", "--no-check")
    assert json.loads(done.stdout)["verdict"].startswith("EQUAL(")
    assert done.stderr == ""


def test_verify_says_yes_and_exits_with_0(converted: tuple[Path, Path]) -> None:
    source, out = converted
    done = rewrite("verify", source, out, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["kind"] == "EQUAL"
    assert all(json.loads(done.stdout)["relations"].values())


def test_verify_of_a_model_with_itself_is_bitwise(converted: tuple[Path, Path]) -> None:
    source, _ = converted
    done = rewrite("verify", source, source)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "BITWISE")


def test_verify_refutes_another_network(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted
    other = small_model(tmp_path / "other.onnx", bias=np.zeros(8, np.float32))
    done = rewrite("verify", other, out / "model.onnx", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["kind"]) == (1, "REFUTED")
    assert "ids" in answer["counterexample"]


def test_verify_rejects_a_certificate_of_another_model(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["rewritten"] = "0" * 64
    (tmp_path / "c.json").write_text(json.dumps(certificate))
    done = rewrite("verify", source, out, "--certificate", tmp_path / "c.json")
    assert done.returncode == 1
    assert "certificate is of another rewritten model" in done.stdout


def test_verify_rejects_a_certificate_with_a_false_relation(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["relations"]["s"] = {"transform": "identity"}
    (tmp_path / "c.json").write_text(json.dumps(certificate))
    done = rewrite("verify", source, out, "--certificate", tmp_path / "c.json")
    assert done.returncode == 1
    assert "relation" in done.stdout


def test_verify_needs_neither_torch_nor_onnxruntime(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = converted
    for name in ("torch", "onnxruntime", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = rewrite("verify", source, out, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


def test_diff_of_the_pair_is_within_noise(converted: tuple[Path, Path]) -> None:
    source, out = converted
    done = rewrite("diff", source, out, "--layers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within noise" in done.stdout


def test_diff_of_different_networks_exits_with_1(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted
    other = small_model(tmp_path / "other.onnx", bias=np.zeros(8, np.float32))
    assert rewrite("diff", other, out).returncode == 1


def test_explain_shows_sites_and_refusals(converted: tuple[Path, Path]) -> None:
    source, _ = converted
    records = json.loads(rewrite("explain", source, "--json").stdout)
    assert {record["outcome"] for record in records} == {"applied"}
    assert "center-residual" in rewrite("explain", source).stdout


def test_passes_lists_every_requirement() -> None:
    from rewrite.passes import PASSES

    text = rewrite("passes").stdout
    for each in PASSES:
        assert each.name in text
        assert all(requirement.text in text for requirement in each.requires)


def test_bench_times_two_in_turn(converted: tuple[Path, Path]) -> None:
    source, out = converted
    done = rewrite("bench", source, out, "--rounds", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert all(ratio > 0 for ratio in json.loads(done.stdout)["ratio"])


def test_help_answers_without_heavy_imports() -> None:
    begin = time.perf_counter()
    assert rewrite("--help").returncode == 0
    assert time.perf_counter() - begin < 5


# ── Unusable requests ───────────────────────────────────────────────────────────────────────────────────────────────


def test_unknown_names_are_refused_with_the_known_ones(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    out = tmp_path / "out"
    assert "center-residual" in one_line(rewrite("convert", source, "-o", out, "--pass", "no-such-pass"))
    assert "ort-cpu" in one_line(rewrite("convert", source, "-o", out, "--target", "abacus"))
    assert "default" in one_line(rewrite("convert", source, "-o", out, "--recipe", "soup"))
    assert not out.exists()


def test_a_missing_source_is_one_line(tmp_path: Path) -> None:
    assert "nowhere" in one_line(rewrite("convert", tmp_path / "nowhere", "-o", tmp_path / "out"))


def test_missing_arguments_are_one_line() -> None:
    one_line(rewrite("convert"))


def test_an_existing_out_is_kept_without_force(converted: tuple[Path, Path]) -> None:
    source, out = converted
    before = (out / "model.onnx").read_bytes()
    assert "--force" in one_line(rewrite("convert", source, "-o", out))
    assert (out / "model.onnx").read_bytes() == before


def test_force_replaces_our_folder_but_never_someone_elses(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    out = tmp_path / "out"
    assert rewrite("convert", source, "-o", out, "--no-check").returncode == 0
    assert rewrite("convert", source, "-o", out, "--no-check", "--force").returncode == 0
    (out / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in one_line(rewrite("convert", source, "-o", out, "--force"))
    assert (out / "thesis.txt").read_text() == "years of work"


def test_an_out_inside_or_around_the_source_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = converted
    assert "inside the source" in one_line(rewrite("convert", out, "-o", out / "deeper"))
    assert "holds the source" in one_line(rewrite("convert", out, "-o", out.parent, "--force"))


def test_an_out_that_is_a_file_is_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    (tmp_path / "file").write_text("")
    one_line(rewrite("convert", source, "-o", tmp_path / "file", "--force"))
    one_line(rewrite("convert", source, "-o", tmp_path / "file" / "out"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = small_model(tmp_path / "nan.onnx", bias=np.array([np.nan] + [0] * 7, np.float32))
    assert "bias" in one_line(rewrite("convert", source, "-o", tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.onnx"]


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"\x00\xff" * 100)
    one_line(rewrite("convert", tmp_path / "noise.onnx", "-o", tmp_path / "out"))


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    model = onnx.load(small_model(tmp_path / "small.onnx"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "352")):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\x00" * 352)
    (tmp_path / "inside" / "m.onnx").write_bytes(model.SerializeToString())
    for command in (("convert", "-o", tmp_path / "out"), ("explain",)):
        assert "secret.bin" in one_line(rewrite(command[0], tmp_path / "inside" / "m.onnx", *command[1:]))
    one_line(rewrite("verify", tmp_path / "inside" / "m.onnx", tmp_path / "small.onnx"))


@pytest.mark.parametrize(
    "arrays",
    [
        {"wrong": np.zeros((1, 3), np.int64)},
        {"ids": np.zeros((1, 3), np.float32)},
        {"ids": np.zeros((3,), np.int64)},
        {"ids": np.array([[0, 10**6]])},
    ],
    ids=["name", "dtype", "rank", "range"],
)
def test_inputs_that_do_not_fit_are_refused(converted: tuple[Path, Path], tmp_path: Path, arrays: dict) -> None:
    source, _ = converted
    np.savez(tmp_path / "given.npz", **arrays)
    one_line(rewrite("convert", source, "-o", tmp_path / "out", "--inputs", tmp_path / "given.npz"))
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_no_archive_are_refused(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    (tmp_path / "given.npz").write_bytes(b"not an archive")
    one_line(rewrite("convert", source, "-o", tmp_path / "out", "--inputs", tmp_path / "given.npz"))


def test_a_pass_that_applies_nowhere_warns_and_with_strict_exits_with_1(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = converted
    ask = ("convert", source, "--pass", "fold-scale", "--no-check", "-o")
    done = rewrite(*ask, tmp_path / "a")
    assert (done.returncode, "applied nowhere" in done.stderr) == (0, True)
    assert rewrite(*ask, tmp_path / "b", "--strict").returncode == 1


def test_a_full_disk_is_one_line_and_leaves_nothing(converted: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the write of the weights fails in the middle."""
    source = small_model(tmp_path / "big.onnx", table=np.ones((40000, 8), np.float32))
    script = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        f"sys.argv = ['rewrite', 'convert', {str(source)!r}, '-o', {str(tmp_path / 'out')!r}, '--no-check']; "
        "runpy.run_module('rewrite.cli', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    one_line(done)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx"]


def test_a_killed_run_leaves_no_out_and_the_next_one_works(tmp_path: Path) -> None:
    source = small_model(tmp_path / "small.onnx")
    out = tmp_path / "out"
    script = (
        "import os, signal, rewrite.pipeline as p; "
        "p.prove = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL); "
        f"p.convert({str(source)!r}, {str(out)!r}, check=False)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.glob(".out.*.partial")), "the kill came after something was written"
    assert rewrite("convert", source, "-o", out, "--no-check").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small.onnx"]


def test_capture_writes_the_original(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = converted
    path = tmp_path / "captured.onnx"
    assert rewrite("capture", source, "-o", path).returncode == 0
    assert "exists" in one_line(rewrite("capture", source, "-o", path))
    assert rewrite("verify", source, path).returncode == 0
