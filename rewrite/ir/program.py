"""A captured network: its graph as it stands now, and the graph it was captured as.

What a source knows of its inputs travels inside the ONNX file itself, so that a saved capture is as good as the
checkpoint: every graph input carries `rewrite.kind` (one of `KINDS`) and, for integers, `rewrite.low` and
`rewrite.high` (half-open range) in its metadata; the model carries `rewrite.maximum.<dimension>` for a named dimension
with an upper bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

KINDS = ("token_ids", "attention_mask", "position_ids", "token_type_ids", "image", "number")


@dataclass(frozen=True)
class Input:
    """One graph input.

    `shape` holds an int for a static axis and a name for a dynamic one; `low` and `high` bound integers, half open.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]
    kind: str = "number"
    low: int | None = None
    high: int | None = None


@dataclass
class Program:
    """A network under rewriting.

    `model` is the graph passes edit; `original` the raw capture that proofs and checks refer to, never edited. They
    share their tensors. `records` is what passes did and refused, in order; `relations` says for a value of `model` how
    it relates to the value of the same name in `original` where that is not the identity; the transforms they name are
    in `transforms`. `exact` is what `model` was before anything in it was approximated; None as long as nothing is.
    `steps` says by the name of a tensor of codes how far the worst of them is from what it stands for, in its scale.
    """

    model: ir.Model
    original: ir.Model
    source: str = ""
    records: list = field(default_factory=list)
    relations: dict[str, dict] = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    exact: ir.Model | None = None
    steps: dict[str, float] = field(default_factory=dict)

    @classmethod
    def captured(cls, model: ir.Model, source: str = "") -> Program:
        """A fresh program: nothing rewritten yet."""
        _round_attributes(model)
        return cls(model=model.clone(), original=model, source=source)

    def register(self, transform: Any) -> str:
        """The id under which relations name `transform`: its kind and a number, the same for equal transforms."""
        for name, known in self.transforms.items():
            if known == transform:
                return name
        name = f"{transform.kind}-{len(self.transforms)}"
        self.transforms[name] = transform
        return name

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The signature, as the graph's inputs carry it."""
        return signature(self.model)

    def clone(self) -> Program:
        """A program that can be rewritten without touching this one; tensors are shared."""
        own = (list(self.records), dict(self.relations), dict(self.transforms), self.exact, dict(self.steps))
        return Program(self.model.clone(), self.original, self.source, *own)

    def save(self, path: str | Path, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Write `model` to `path` and its weights to `path` + `.data`, one tensor in memory at a time.

        `progress(name, done, total)` is called before each tensor.
        """
        save_model(self.model, Path(path), progress)

    def __repr__(self) -> str:
        nodes = self.model.graph.num_nodes()
        inputs = ", ".join(f"{i.name}: {i.dtype.name.lower()}[{', '.join(map(str, i.shape))}]" for i in self.inputs)
        outputs = ", ".join(value.name or "" for value in self.model.graph.outputs)
        return f"Program({inputs} -> {outputs}; {nodes} nodes, {parameter_count(self.model):,} parameters)"


def _round_attributes(model: ir.Model) -> None:
    """Make floating-point attributes the float32 numbers that a file holds: ε is 9.99999974737875e-06, not 1e-5."""
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.FLOAT:
                stored = float(np.float32(attribute.as_float()))
                if stored != attribute.as_float():
                    node.attributes[name] = ir.AttrFloat32(name, stored)


def signature(model: ir.Model) -> tuple[Input, ...]:
    """The inputs of `model` that a caller must give (an initializer that is also an input is not one of them)."""
    return tuple(
        Input(
            name=value.name or "",
            dtype=value.dtype or ir.DataType.UNDEFINED,
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
            kind=value.metadata_props.get("rewrite.kind", "number"),
            low=_integer(value.metadata_props.get("rewrite.low")),
            high=_integer(value.metadata_props.get("rewrite.high")),
        )
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    )


def _integer(text: str | None) -> int | None:
    return None if text is None else int(text)


def parameter_count(model: ir.Model) -> int:
    """Elements in floating-point initializers."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def save_model(model: ir.Model, path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Save with external data beside the model; an ONNX Runtime session opens it as it is."""

    def report(tensor: ir.TensorProtocol, info: object) -> None:
        if progress is not None:
            progress(tensor.name or "", info.index, info.total)  # type: ignore[attr-defined]

    # Two tensors are evaluated at a time, of at most this many bytes together (or one that is larger).
    ir.save(
        model, path, external_data=f"{path.name}.data", callback=report, max_workers=2, max_in_flight_bytes=256 << 20
    )
