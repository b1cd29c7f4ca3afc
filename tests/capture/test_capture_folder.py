"""What a folder is taken for: a checkpoint, an ONNX model or a `.pt2` archive, and folders that are none of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file

import rewrite
from rewrite.errors import CheckpointError, SourceError, UnsafeSourceError

ONNX_TEXT = """<ir_version: 10, opset_import: ["" : 23]> f (float[2] x) => (float[2] y) { y = Relu (x) }"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive of a convolution and BatchNorm, its weights, and an ONNX model of something else."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    module(torch.randn(8, 1, 5, 5))  # running statistics that are not 0 and 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            module.eval(), (torch.rand(2, 1, 5, 5),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )
        torch.export.save(exported, folder / "model.pt2")
    save_file(module.state_dict(), folder / "model.safetensors")
    onnx.save(onnx.parser.parse_model(ONNX_TEXT), folder / "model.onnx")
    return folder


def _folder(made: Path, tmp_path: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(made / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("beside", [(), ("model.safetensors",)])
def test_archive_in_a_folder(made: Path, tmp_path: Path, beside: tuple[str, ...]) -> None:
    program = rewrite.capture(_folder(made, tmp_path, "model.pt2", *beside))
    kinds = [node.op_type for node in program.model.graph]
    assert kinds == ["Conv", "BatchNormalization"]
    assert program.inputs[0].shape[0] == "batch"
    assert program.source == str(tmp_path)


def test_onnx_model_beside_weights_that_belong_to_no_configuration(made: Path, tmp_path: Path) -> None:
    program = rewrite.capture(_folder(made, tmp_path, "model.onnx", "model.safetensors"))
    assert [node.op_type for node in program.model.graph] == ["Relu"]


def _refused(folder: Path, kind: type[Exception], *words: str, **options: str) -> None:
    with pytest.raises(kind) as caught:
        rewrite.capture(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, str(folder)):
        assert word in message


def test_archive_and_onnx_model_are_ambiguous(made: Path, tmp_path: Path) -> None:
    _refused(_folder(made, tmp_path, "model.pt2", "model.onnx"), SourceError, "model.onnx", "model.pt2", "both")


def test_configuration_comes_first(made: Path, tmp_path: Path) -> None:
    folder = _folder(made, tmp_path, "model.pt2")
    (folder / "config.json").write_text("{}")
    _refused(folder, CheckpointError, "a configuration without weights")


@pytest.mark.parametrize("beside", [(), ("model.safetensors",)])
def test_folder_without_any(made: Path, tmp_path: Path, beside: tuple[str, ...]) -> None:
    _refused(_folder(made, tmp_path, *beside), SourceError, "none of config.json, model.onnx and model.pt2")


def test_archive_of_another_name_is_not_guessed(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "model.pt2", tmp_path / "net.pt2")
    _refused(tmp_path, SourceError, "none of")


def test_dtype_of_an_archive_is_part_of_it(made: Path, tmp_path: Path) -> None:
    _refused(_folder(made, tmp_path, "model.pt2"), SourceError, "dtype", dtype="float16")


def test_folder_with_a_pickle_for_an_archive(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt2")  # a zip, as archives are, that names classes
    with pytest.raises((SourceError, UnsafeSourceError)):
        rewrite.capture(tmp_path)


def test_command_exits_with_two_and_one_line(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "model.pt2").write_text("not a zip file")
    done = subprocess.run(
        [sys.executable, "-m", "rewrite.cli", "convert", str(source), "-o", str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "400"},
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert "not a .pt2 archive" in line
    assert "Traceback" not in done.stderr
    assert not out.exists()
