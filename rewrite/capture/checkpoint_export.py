"""Write a Hugging Face checkpoint again, with other numbers in some of its tensors.

Everything else stays: names, shards, types, the bytes of tensors that did not change, tokenizer and configuration.
Where a table that was tied has to be two, the configuration says so and the second tensor is written under the name
that the model gives it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from rewrite.capture.checkpoint_images import Name, Untied, images, refused, same_bytes, stored_in
from rewrite.capture.safetensors_file import (
    DTYPES,
    INDEX,
    PICKLED,
    SINGLE,
    StoredTensor,
    read_checkpoint,
    read_header,
)
from rewrite.errors import RequestError
from rewrite.ir.program import Program
from rewrite.ir.weights import MaterializedTensor, Weight, weight_of

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".data", ".ot", ".ckpt"}
"""Suffixes of files that hold weights in this or another form: what is copied beside the new ones would be stale."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What is to be written: new expressions by the tensor's name, and whether tables are tied no more.

    `added` maps names that the checkpoint does not have yet to those of the tensors they were tied to.
    """

    folder: Path
    changed: Mapping[str, Weight]
    untied: bool = False
    added: Mapping[str, str] = field(default_factory=dict)


def plan(folder: Path, canonical: Program, rewritten: Program) -> Checkpoint:
    """What the checkpoint in `folder` becomes when its network becomes `rewritten`.

    `canonical` is the capture of the checkpoint in canonical form, which `rewritten` started from.

    Raises:
        RequestError: the architecture has no place for what was done.
    """
    stored = read_checkpoint(folder)
    names = {(tensor.path, tensor.offset): name for name, tensor in stored.items()}

    def place(tensor: ir.TensorProtocol) -> str | None:
        return names.get((tensor.path, tensor.offset)) if isinstance(tensor, ir.ExternalTensor) else None

    try:
        changed = images(canonical.model, rewritten.model, place)
        return Checkpoint(folder, changed | _copies(stored, changed, canonical, place))
    except Untied as tied:
        network, names_of, added = _untied(folder, stored, tied.tensor)
    try:
        changed = images(network.model, rewritten.model, lambda tensor: names_of.get(id(tensor)))
    except Untied as tied:
        raise refused(f"two uses of {tied.tensor} need different numbers in it", None) from tied
    return Checkpoint(folder, changed, True, added)


def _copies(stored: dict[str, StoredTensor], changed: Mapping[str, Weight], canonical: Program, place: Name) -> dict:
    """Tensors that repeat a changed one byte by byte and that the network does not read: tied, and stored twice."""
    values = canonical.original.graph.initializers.values()
    weights = [weight_of(value.const_value) for value in values if value.const_value is not None]
    read = {place(tensor) for weight in weights for tensor in stored_in(weight)}
    return {
        name: weight
        for name, tensor in stored.items()
        for source, weight in changed.items()
        if name not in read and same_bytes(tensor, stored[source])
    }


def _untied(
    folder: Path, stored: dict[str, StoredTensor], tensor: str
) -> tuple[Program, dict[int, str], dict[str, str]]:
    """The same network without tied weights, in canonical form: every name has a tensor of its own."""
    from rewrite.capture.bind import aliases
    from rewrite.capture.canonicalize import canonicalize
    from rewrite.capture.finish import quiet
    from rewrite.capture.huggingface import _dtype, build_on_meta, capture_pretrained, read_config
    from rewrite.capture.signature import pretrained_signature

    with quiet():
        config, cls = read_config(folder, None, stored)
        dtype = _dtype(None, config, stored)
        tied = aliases(build_on_meta(cls, config, dtype, folder))
        config, cls = read_config(folder, None, stored)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        model = build_on_meta(cls, config, dtype, folder)
        apart = aliases(model)
        parted = {
            (name, other)
            for name, names in tied.items()
            for other in names
            if name in stored and other not in apart.get(name, names)
        }
        if not parted:
            raise refused(f"{tensor} is shared by design, and two of its uses need different numbers", None)
        added = {other: name for name, other in sorted(parted) if other not in stored}
        every = {**stored, **{name: _again(stored[source], name) for name, source in added.items()}}
        signature = pretrained_signature(model, None, folder)
        captured = capture_pretrained(model, signature, every, where=str(folder), report=lambda *_: None)
    program = Program.captured(captured, str(folder))
    canonicalize(program)
    return program, {id(tensor): name for name, tensor in every.items()}, added


def _again(tensor: StoredTensor, name: str) -> StoredTensor:
    return StoredTensor(str(tensor.path), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name)


# ── Files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_checkpoint(checkpoint: Checkpoint, out: Path) -> None:
    """Write the checkpoint into the folder `out`, one tensor in memory at a time, in the shards that it came in."""
    shards = _shards(checkpoint.folder)
    places: dict[str, str] = {}
    size = 0
    for shard, tensors in shards.items():
        content: dict[str, StoredTensor | MaterializedTensor] = {}
        for name, tensor in tensors.items():
            content[name] = _renewed(name, tensor, checkpoint.changed)
            for other in (added for added, source in checkpoint.added.items() if source == name):
                content[other] = _renewed(other, tensor, checkpoint.changed)
        _write_shard(out / shard, content)
        places |= dict.fromkeys(content, shard)
        size += sum(tensor.nbytes for tensor in content.values())
    if len(shards) > 1 or (checkpoint.folder / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path in _others(checkpoint.folder):
        shutil.copyfile(path, out / path.name)
    if checkpoint.untied:
        _untie(out / "config.json")


def _renewed(name: str, tensor: StoredTensor, changed: Mapping[str, Weight]) -> StoredTensor | MaterializedTensor:
    return MaterializedTensor(changed[name], tensor.dtype, name) if name in changed else tensor


def _shards(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of every file of a checkpoint, by the file's name; a tensor that two hold is that of the index."""
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        path = single if single.is_file() else next(iter(sorted(folder.glob("*.safetensors"))))
        return {SINGLE: read_header(path)}
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {
        shard: {name: tensor for name, tensor in read_header(folder / shard).items() if places.get(name) == shard}
        for shard in sorted(set(places.values()))
    }


def _write_shard(path: Path, tensors: Mapping[str, StoredTensor | MaterializedTensor]) -> None:
    """One safetensors file: the header, padded to eight bytes, then every tensor's bytes as they are evaluated."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = [int(size) for size in tensor.shape.numpy()]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.tofile(file)


def _others(folder: Path) -> Iterator[Path]:
    """Files beside the weights: configuration, tokenizer, licence. No folder, nothing hidden, no evidence of ours."""
    ours = {INDEX, *PICKLED, "certificate.json", "report.json", "report.html", "session.json"}
    for path in sorted(folder.iterdir()):
        plain = path.is_file() and not path.name.startswith(".") and not path.name.endswith(".index.json")
        if plain and path.suffix not in _WEIGHTS and path.name not in ours:
            yield path


def _untie(path: Path) -> None:
    written = json.loads(path.read_text(encoding="utf-8"))
    for part in (written, *(value for value in written.values() if isinstance(value, dict))):
        if part is written or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def files_of(out: Path) -> Sequence[str]:
    """The names of all files of a written checkpoint."""
    return sorted(path.name for path in out.iterdir())


def is_checkpoint(source: object) -> bool:
    """Whether a source is a checkpoint folder."""
    if not isinstance(source, str | Path):
        return False
    return (Path(source) / "config.json").is_file() and any(Path(source).glob("*.safetensors"))


def checkpoint_folder(source: object) -> Path:
    """The folder of a checkpoint. Raises RequestError for a source that is none."""
    if not is_checkpoint(source):
        raise RequestError(
            "only a Hugging Face checkpoint can be written as one again",
            where=str(source),
            remedy="give a folder with config.json and safetensors, or convert with --to onnx",
        )
    return Path(str(source))
