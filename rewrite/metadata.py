"""What an artifact says of its changes of basis, in ONNX metadata, so that another tool can undo or extend them.

`model.metadata_props["rewrite.transforms"]` is a JSON list with one entry a transform, and a node that computes a
transform at run time carries its id as `rewrite.transform`. The format is described in docs/metadata.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from rewrite.ir.edit import ORIGIN, TRANSFORM, shape_of
from rewrite.ir.program import Program
from rewrite.proof.transforms import Shift, Step
from rewrite.rule import steps

VERSION = 1
TRANSFORMS = "rewrite.transforms"
"""The model's key: every transform of the artifact."""


def describe_transforms(model: ir.Model, program: Program) -> None:
    """Write into `model`, made from `program`, which transforms its values are in and which nodes compute one.

    A value is listed under every transform of its relation, with the axis and the place in the order of steps. Nothing
    is written where there is no transform.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    online: dict[str, list[str]] = {}
    for node in model.graph.all_nodes():
        if (name := node.metadata_props.get(TRANSFORM)) is not None:
            online.setdefault(name, []).append(node.name or "")
    acts: dict[str, list[dict[str, Any]]] = {}
    passes: dict[str, str] = {}
    for name, relation in program.relations.items():
        for place, step in enumerate(steps(relation) if name in values else ()):
            axis = {"value": name, "axis": step["axis"], "step": place}
            acts.setdefault(step["transform"], []).append(axis)
            passes.setdefault(step["transform"], step.get("pass", ""))
    entries = []
    for name in dict.fromkeys((*acts, *(known for known in program.transforms if known in online))):
        what = _described(program.transforms[name]) if name in program.transforms else _centring(acts[name], values)
        entries.append(
            {
                **{"version": VERSION, "id": name, **what},
                **{"pass": passes.get(name) or _made_by(model, online.get(name, ()))},
                **{"where": "online" if name in online else "merged", "nodes": online.get(name, [])},
                "values": acts.get(name, []),
            }
        )
    if entries:
        model.metadata_props[TRANSFORMS] = json.dumps(entries, ensure_ascii=False, separators=(",", ":"))


def _described(step: Step) -> dict[str, Any]:
    """What the certificate says of it, and its size."""
    size = len(step.values) if isinstance(step, Shift) else step.size
    return {**step.to_json(), "size": size}


def _centring(acts: list[dict[str, Any]], values: Mapping[str | None, ir.Value]) -> dict[str, Any]:
    """P = I − 11ᵀ/d, which relations know by the name "centre"."""
    for act in acts:
        shape = shape_of(values[act["value"]])
        if shape is not None and isinstance(size := shape[act["axis"]], int):
            return {"kind": "centring", "size": size}
    return {"kind": "centring"}


def _made_by(model: ir.Model, nodes: list[str] | tuple[()]) -> str:
    found = (node.metadata_props.get(ORIGIN) for node in model.graph.all_nodes() if node.name in set(nodes))
    return next((name for name in found if name), "")
