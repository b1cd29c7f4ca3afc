"""What an artifact says of its changes of basis."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from networks import network

from rewrite.basis.regions import Use
from rewrite.errors import RequestError
from rewrite.ir.constants import weight_behind
from rewrite.ir.edit import Editor
from rewrite.ir.program import save_model
from rewrite.ir.weights import Transformed
from rewrite.metadata import TRANSFORMS, describe_transforms
from rewrite.passes import RotateOnline
from rewrite.pipeline import _load, convert, diff, lower, verify
from rewrite.proof.transforms import Hadamard, Scaling
from rewrite.rule import TRANSFORM, Change, Pass, Site, apply_pass

TEXT = """chain (float[N, 8] x, float[8, 8] w, float[8, 8] v, float[8, 4] u) => (float[N, 4] y) {
    h = MatMul (x, w)  k = MatMul (h, v)  y = MatMul (k, u) }"""


def rotated():
    """h′ = h·D·H, of which H is merged; k′ = k·H, computed by a node at run time."""
    program = network(TEXT)
    first, second, third = list(program.model.graph)
    change = Change(program, "rotate-test", Editor(program.model, "rotate-test"))
    scale, turn, online = Scaling(np.arange(1.0, 9.0)), Hadamard(8, seed=1), Hadamard(8, scale=0.25)
    for step in (scale, turn):
        change.absorb(Use(first, 1, 1), Transformed(weight_behind(first.inputs[1]), step, 1), "turned")
        change.absorb(Use(second, 1, 0), Transformed(weight_behind(second.inputs[1]), step.dual, 0), "turned")
        change.relate(first.outputs[0], step, -1)
    matrix = change.editor.initializer("hadamard", np.float32(online.matrix()))
    product = change.editor.node("MatMul", [second.outputs[0], matrix], before=third, name="k.turned")
    change.absorb(Use(third, 1, 0), Transformed(weight_behind(third.inputs[1]), online.dual, 0), "turned")
    third.replace_input_with(0, product)
    change.computes(product.producer(), online)
    return program, product.producer().name


def test_merged_and_online_transforms_stand_in_the_written_file(tmp_path):
    program, node = rotated()
    lower(program).save(tmp_path)
    model = _load(tmp_path / "model.onnx")
    scale, turn, online = json.loads(model.metadata_props[TRANSFORMS])
    assert (scale["id"], scale["kind"], scale["size"], scale["where"]) == ("diagonal-0", "diagonal", 8, "merged")
    assert scale["values"] == [{"value": "h", "axis": -1, "step": 0}]
    assert (turn["kind"], turn["size"], turn["seed"], turn["scale"]) == ("hadamard", 8, 1, None)
    assert turn["values"] == [{"value": "h", "axis": -1, "step": 1}]
    assert (turn["pass"], turn["version"], turn["nodes"]) == ("rotate-test", 1, [])
    assert (online["where"], online["pass"], online["scale"], online["values"]) == ("online", "rotate-test", 0.25, [])
    assert online["nodes"] == [node]
    marked = [node.name for node in model.graph if TRANSFORM in node.metadata_props]
    assert marked == [node]


def test_a_centred_stream_says_so_and_without_transforms_nothing_is_said(tmp_path):
    program = network(TEXT)
    describe_transforms(program.model, program)
    assert TRANSFORMS not in program.model.metadata_props
    program.relations["h"] = {"transform": "centre", "axis": 1, "pass": "center-residual"}
    program.relations["gone"] = {"transform": "centre", "axis": 1, "pass": "center-residual"}
    describe_transforms(program.model, program)
    save_model(program.model, tmp_path / "m.onnx")
    (entry,) = json.loads(_load(tmp_path / "m.onnx").metadata_props[TRANSFORMS])
    assert (entry["id"], entry["kind"], entry["size"]) == ("centre", "centring", 8)
    assert [act["value"] for act in entry["values"]] == ["h"]


@dataclass(frozen=True)
class TurnHidden(Pass[Site]):
    """h = xW, k = hV: h in another basis."""

    name: ClassVar[str] = "turn-hidden"
    requires: ClassVar[tuple] = ()

    def sites(self, program):
        if "h" not in program.relations:
            yield Site("h", (program.model.graph[0], program.model.graph[1]))

    def rewrite(self, site, change):
        first, second = site.nodes
        for step in (Scaling(np.arange(1.0, 9.0)), Hadamard(8, seed=1)):
            change.absorb(Use(first, 1, 1), Transformed(weight_behind(first.inputs[1]), step, 1), "turned")
            change.absorb(Use(second, 1, 0), Transformed(weight_behind(second.inputs[1]), step.dual, 0), "turned")
            change.relate(first.outputs[0], step, -1)


def test_a_written_folder_knows_its_transforms(tmp_path):
    """verify and diff read the relations back with what they name; a spoiled array is one line and exit code 2."""
    program = network(TEXT)
    report = convert(program, tmp_path / "out", passes=[TurnHidden()])
    assert report.verdict.startswith("EQUAL")
    assert report.numerical == "within noise"
    save_model(program.original, tmp_path / "before.onnx")
    assert {path.name for path in (tmp_path / "out").glob("certificate.*")} == {
        "certificate.json",
        "certificate.safetensors",
    }
    found = verify(tmp_path / "before.onnx", tmp_path / "out")
    assert found.verdict.holds
    assert found.proof.claims == {"h": True}
    layers = diff(tmp_path / "before.onnx", tmp_path / "out", layers=True).layers
    assert layers.first is None
    assert {row.name: row.relation for row in layers.rows}["h"] == "diagonal-0 · hadamard-1"

    arrays = tmp_path / "out" / "certificate.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(data)
    with pytest.raises(RequestError) as caught:
        verify(tmp_path / "before.onnx", tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    convert(program, tmp_path / "out", passes=[], force=True)
    assert not arrays.exists()


def test_online_rotations_of_a_pass_are_marked(tmp_path):
    text = """mlp (float[N, 8] x, float[8, 64] w, float[64, 8] v) => (float[N, 8] y) {
        h = MatMul (x, w)  a = Gelu (h)  y = MatMul (a, v) }"""
    program = network(text)
    assert any(outcome.to_json()["outcome"] == "applied" for outcome in apply_pass(program, RotateOnline()))
    lower(program).save(tmp_path)
    model = _load(tmp_path / "model.onnx")
    (entry,) = json.loads(model.metadata_props[TRANSFORMS])
    assert (entry["kind"], entry["size"], entry["where"], entry["pass"]) == ("hadamard", 64, "online", "rotate-online")
    by_name = {node.name: node for node in model.graph}
    assert {by_name[name].op_type for name in entry["nodes"]} <= {"MatMul", "Reshape"}
    assert len(entry["nodes"]) >= 2
