"""Which kind of source is it? One function decides, and every capture starts here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rewrite.errors import InputsError, SourceError
from rewrite.ir.program import Program

logger = logging.getLogger("rewrite")

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
MODEL_FILE = "model.onnx"
ARCHIVE_FILE = "model.pt2"
FIXED = "rewrite.fixed."
"""Metadata of an axis that was asked to be dynamic and is not."""

DTYPES = ("float32", "float16", "bfloat16", "float64")


def capture(
    source: Any,
    example_inputs: Any = None,
    *,
    dtype: Any = None,
    task: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Program:
    """Capture `source` as a program whose weights stay where they are.

    Args:
        source: a Hugging Face checkpoint folder; an `nn.Module`; a `torch.export` ExportedProgram, its `.pt2` file or a
            folder with model.pt2; a factory `package.module:function` that returns a module or (module, example
            inputs); an `.onnx` file, an OUT folder of `rewrite convert`, or an ONNX model in memory.
        example_inputs: a dict or tuple of tensors, needed for a module. Its first axis becomes `batch`, the second
            axis of token ids and masks `sequence`; other axes are fixed.
        dtype: floating-point type of the weights ("float32", …); a checkpoint's or module's own by default.
        task: head of a checkpoint ("features", "causal-lm", …); the class its configuration names by default.
        progress: called as `progress(step, done, total)`.

    Raises:
        SourceError: no such source, or a model that cannot be built or exported.
        CheckpointError: weights that are missing, truncated, misshapen or pickled.
        UnsafeSourceError: loading would execute code or leave the source's folder.
        InputsError: example inputs are missing or do not fit.
        UnsupportedOperatorError: the exporter has no translation for an operator.
    """
    program = _capture(source, example_inputs, _dtype_name(dtype), task, progress)
    for key, size in program.model.metadata_props.items():
        if key.startswith(FIXED):
            logger.warning("%s: the model fixes its %s at %s", program.source, key.removeprefix(FIXED), size)
    return program


def _capture(source: Any, example_inputs: Any, dtype: str | None, task: str | None, progress: Any) -> Program:
    if isinstance(source, str | Path):
        return _capture_path(str(source), example_inputs, dtype, task, progress)
    if isinstance(source, ir.Model) or type(source).__name__ == "ModelProto":
        from rewrite.capture.onnx_file import capture_onnx

        _refuse_dtype(dtype, "an ONNX model")
        return Program.captured(capture_onnx(source), "ONNX model in memory")
    from rewrite.capture.module import capture_module

    return Program.captured(
        capture_module(source, example_inputs, dtype=dtype, progress=progress), type(source).__name__
    )


def _capture_path(source: str, example_inputs: Any, dtype: str | None, task: str | None, progress: Any) -> Program:
    path = Path(source)
    if not path.exists() and FACTORY.fullmatch(source):
        from rewrite.capture.module import capture_module, module_from_factory

        module, inputs = module_from_factory(source)
        chosen = inputs if example_inputs is None else example_inputs
        return Program.captured(capture_module(module, chosen, dtype=dtype, progress=progress), source)
    if not path.exists():
        raise SourceError(
            "no such file or folder",
            where=source,
            remedy="give a checkpoint folder, a .onnx or .pt2 file, or package.module:function",
        )
    if path.is_dir():
        return Program.captured(_capture_folder(path, example_inputs, dtype, task, progress), source)
    if path.suffix == ".onnx":
        from rewrite.capture.onnx_file import capture_onnx

        _refuse_dtype(dtype, source)
        return Program.captured(capture_onnx(path), source)
    if path.suffix == ".pt2":
        from rewrite.capture.module import capture_archive

        _refuse_dtype(dtype, source)
        return Program.captured(capture_archive(path, progress=progress), source)
    raise SourceError(
        f"files of the kind {path.suffix or 'without a suffix'} are no source",
        where=source,
        remedy="give a checkpoint folder, a .onnx or .pt2 file, or package.module:function",
    )


def _capture_folder(path: Path, example_inputs: Any, dtype: str | None, task: str | None, progress: Any) -> ir.Model:
    configured, exported, archived = ((path / name).is_file() for name in ("config.json", MODEL_FILE, ARCHIVE_FILE))
    if configured and (not exported or any(path.glob("*.safetensors"))):
        return _checkpoint(path, example_inputs, dtype, task, progress)
    if exported and archived and not configured:
        raise SourceError(
            f"{MODEL_FILE} and {ARCHIVE_FILE} are both in the folder",
            where=str(path),
            remedy="give the file that is meant instead of the folder",
        )
    if exported:
        from rewrite.capture.onnx_file import capture_onnx

        _refuse_dtype(dtype, str(path))
        return capture_onnx(path / MODEL_FILE)
    if archived:
        # Its weights are inside; a model.safetensors beside it is what the archive was made of.
        from rewrite.capture.module import capture_archive

        _refuse_dtype(dtype, str(path))
        return capture_archive(path / ARCHIVE_FILE, progress=progress)
    raise SourceError(
        f"none of config.json, {MODEL_FILE} and {ARCHIVE_FILE} is in the folder",
        where=str(path),
        remedy=f"give the folder that holds config.json and model.safetensors, or {ARCHIVE_FILE}",
    )


def _checkpoint(path: Path, example_inputs: Any, dtype: str | None, task: str | None, progress: Any) -> ir.Model:
    if example_inputs is not None and not isinstance(example_inputs, dict):
        raise InputsError("example inputs of a checkpoint must be a dict of its forward arguments", where=str(path))
    try:
        from rewrite.capture.huggingface import capture_checkpoint
    except ModuleNotFoundError as error:
        raise SourceError(
            f"{error.name} is needed to read a checkpoint folder", where=str(path), remedy="pip install rewrite[hf]"
        ) from error
    return capture_checkpoint(path, example_inputs, dtype=dtype, task=task, progress=progress)


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.").lower()
    if name not in DTYPES:
        raise SourceError(f"unknown dtype {name}", remedy=f"one of {', '.join(DTYPES)}")
    return name


def _refuse_dtype(dtype: str | None, where: str) -> None:
    if dtype is not None:
        raise SourceError(
            "the dtype of an exported graph is part of it",
            where=where,
            remedy="choose a dtype when capturing from a checkpoint or a module",
        )
