"""What was proved, on paper: a certificate that names both models by their content and can be checked again.

A certificate is a claim, not evidence. `verify` proves the pair anew and then asks whether what the certificate says is
true: the digests are those of the two models, and every relation it states holds in the normal forms.

Relations name transforms by id, and the certificate says what each is (`transforms.py`). Their arrays lie beside it in
`certificate.safetensors`, float64, each under a name that holds a digest of its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from rewrite.proof.checker import Proof
from rewrite.proof.constants import Stored, blocks
from rewrite.proof.relation import Verdict
from rewrite.proof.transforms import Step, read_step, tensors_of

VERSION = 1
TENSORS = ".safetensors"
"""The suffix of the file beside a certificate that holds the arrays of its transforms."""


@dataclass
class Certificate:
    """What one run rewrote and what was proved of it.

    `original` and `rewritten` are content digests; `sites` and `refusals` are the passes' records in plain types;
    `relations` says of a rewritten value how it relates to the original's value of the same name where that is not the
    identity, and `transforms` what the transforms are that relations name; `solved` names the shipped constants that
    stand for an exact value within δ ulps of them. `approximations` are the places where the rewritten model computes
    with codes (`sites.py`), each with its format, scale and errors. `files` are the names of a rewritten checkpoint's
    files.
    """

    original: str
    rewritten: str
    verdict: Verdict
    outputs: dict[str, str] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    relations: dict[str, dict[str, Any]] = field(default_factory=dict)
    transforms: dict[str, Step] = field(default_factory=dict)
    solved: list[str] = field(default_factory=list)
    semantics: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    approximations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        proof: Proof,
        original: str,
        rewritten: str,
        records: Sequence[Mapping[str, Any]],
        relations: Mapping[str, Mapping[str, Any]],
        semantics: Mapping[str, int],
        transforms: Mapping[str, Step] | None = None,
    ) -> Certificate:
        return cls(
            original,
            rewritten,
            proof.verdict,
            {name: str(verdict) for name, verdict in proof.outputs.items()},
            [dict(record) for record in records if record["outcome"] == "applied"],
            [dict(record) for record in records if record["outcome"] != "applied"],
            {name: dict(relation) for name, relation in relations.items()},
            dict(transforms or {}),
            list(proof.solved),
            dict(semantics),
            approximations=[site.to_json() for site in proof.sites],
        )

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "version": VERSION,
            "verdict": str(verdict),
            "ulps": verdict.ulps,
            **{"original": self.original, "rewritten": self.rewritten, "semantics": self.semantics},
            **{"outputs": self.outputs, "sites": self.sites, "refusals": self.refusals},
            "transforms": {name: step.to_json() for name, step in self.transforms.items()},
            **{"relations": self.relations, "solved": self.solved},
            **({"approximations": self.approximations} if self.approximations else {}),
            **({"files": self.files} if self.files else {}),
        }

    def save(self, path: Path) -> None:
        """Write the JSON, and the arrays of the transforms beside it where there are any."""
        if arrays := tensors_of(list(self.transforms.values())):
            from safetensors.numpy import save_file

            stored = {name: np.ascontiguousarray(array, np.float64) for name, array in arrays.items()}
            save_file(stored, path.with_suffix(TENSORS))
        path.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        return f"Certificate({self.verdict}; {len(self.sites)} sites, {len(self.refusals)} refusals)"

    __repr__ = __str__


def content_digest(model: ir.Model) -> str:
    """SHA-256 over what a model computes with: graph and tensors. File packing, node names, metadata do not count."""
    digest = hashlib.sha256()
    graph = model.graph

    def write(*parts: object) -> None:
        digest.update(repr(parts).encode())

    write(sorted(model.opset_imports.items()))
    for value in (*graph.inputs, *graph.outputs):
        write(value.name, str(value.dtype), [d if isinstance(d, int) else str(d.value) for d in value.shape or ()])
    for node in graph:
        write(node.domain, node.op_type, node.overload)
        write([value.name if value is not None else None for value in node.inputs], [v.name for v in node.outputs])
        for name in sorted(node.attributes):
            attribute = node.attributes[name]
            value = attribute.value
            if isinstance(value, ir.TensorProtocol):
                value = (value.dtype, tuple(value.shape), hashlib.sha256(value.tobytes()).hexdigest())
            elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                value = ir.to_proto(attribute).SerializeToString(deterministic=True)
            elif isinstance(value, float):
                value = float(np.float32(value))
            write(name, str(attribute.type), value)
    tensors = [(n, v.const_value) for n, v in sorted(graph.initializers.items()) if v.const_value is not None]
    with ThreadPoolExecutor(2) as pool:
        for (name, tensor), content in zip(tensors, pool.map(lambda pair: tensor_digest(*pair), tensors)):
            write(name, str(tensor.dtype), tuple(tensor.shape), content)
    return digest.hexdigest()


def tensor_digest(name: str, tensor: ir.TensorProtocol) -> str:
    """SHA-256 of a tensor's bytes, read by blocks."""
    digest = hashlib.sha256()
    if tensor.dtype.bitwidth < 8 or tensor.dtype == ir.DataType.STRING:
        digest.update(tensor.tobytes() if tensor.dtype != ir.DataType.STRING else repr(tensor.numpy()).encode())
        return digest.hexdigest()
    stored = Stored("", name, tensor)
    for region in blocks(stored.shape, 1 << 22):
        digest.update(np.ascontiguousarray(stored.raw(region)).view(np.uint8).data)
    return digest.hexdigest()


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate as it was written, its "transforms" as objects.

    Raises ValueError where it is none of a known version, or where its transforms or their arrays are not what they
    say. OSError where a file cannot be read. The arrays are looked for beside the certificate and nowhere else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or content.get("version") != VERSION or "rewritten" not in content:
        raise ValueError("this is no certificate of a known version")
    relations, written = content.get("relations", {}), content.get("transforms", {})
    for part in (relations, written):
        if not isinstance(part, dict) or not all(isinstance(entry, dict) for entry in part.values()):
            raise ValueError("its relations or transforms are no objects by name")
    approximations = content.get("approximations", [])
    if not isinstance(approximations, list) or not all(isinstance(each, dict) for each in approximations):
        raise ValueError("its approximations are no list of objects")
    content = {**content, "approximations": approximations}
    return {**content, "relations": relations, "transforms": _read_transforms(written, path.with_suffix(TENSORS))}


def _read_transforms(written: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Step]:
    arrays: dict[str, np.ndarray] = {}
    transforms: dict[str, Step] = {}
    for name, content in written.items():
        asked: set[str] = set()

        def array(key: str, asked: set[str] = asked) -> np.ndarray:
            if not arrays:
                arrays.update(_read_arrays(path))
            if key not in arrays:
                raise ValueError(f"{path.name} has no array {key}")
            asked.add(key)
            return arrays[key]

        try:
            step = read_step(content, array)
            known = set(step.tensors)
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the transform {name} is malformed: {error}") from error
        except ValueError as error:
            raise ValueError(f"the transform {name}: {error}") from error
        if asked != known:
            # An array's name holds a digest of its content.
            raise ValueError(f"{path.name} holds another array than the transform {name} was written with")
        transforms[name] = step
    return transforms


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}") from error
