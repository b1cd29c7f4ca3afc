"""A certificate on disk: what is read back is what was written, and what was changed is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rewrite.errors import RequestError
from rewrite.pipeline import _certificate_of
from rewrite.proof import transforms as t
from rewrite.proof.certificate import Certificate, read_certificate
from rewrite.proof.relation import Verdict

RNG = np.random.default_rng(0)
STEPS = {
    "hadamard-0": t.Hadamard(12, seed=7),
    "hadamard-1": t.Hadamard(8, scale=0.25, transposed=True),
    "diagonal-2": t.Scaling(RNG.standard_normal(5) + 3),
    "reciprocal-3": t.Reciprocal(t.Scaling(RNG.standard_normal(5) + 3)),
    "orthogonal-4": t.Orthogonal(np.linalg.qr(RNG.standard_normal((6, 6)))[0]),
    "repeated-5": t.Repeated(t.Invertible(RNG.standard_normal((2, 3, 3))), 2, 3),
    "inverse-6": t.Invertible(RNG.standard_normal((4, 4))).dual,
    "isometry-7": t.Isometry(9),
    "selection-8": t.Selection(4, (3, 0, 0)),
    "shift-9": t.Shift(RNG.standard_normal(5)),
}


def certificate(steps: dict) -> Certificate:
    relations = {f"h.{name}": {"transform": name, "axis": -1, "pass": "test"} for name in steps}
    return Certificate("a", "b", Verdict("EQUAL", 0.5), relations=relations, transforms=steps)


@pytest.mark.parametrize("name", STEPS)
def test_a_transform_comes_back_as_it_was(name, tmp_path):
    certificate({name: STEPS[name]}).save(tmp_path / "certificate.json")
    assert read_certificate(tmp_path / "certificate.json")["transforms"] == {name: STEPS[name]}
    assert (tmp_path / "certificate.safetensors").exists() == bool(STEPS[name].tensors)


def test_all_of_them_share_one_file_and_no_array_is_in_the_json(tmp_path):
    certificate(STEPS).save(tmp_path / "certificate.json")
    content = read_certificate(tmp_path / "certificate.json")
    assert content["transforms"] == STEPS
    assert content["relations"]["h.shift-9"]["pass"] == "test"
    assert len((tmp_path / "certificate.json").read_text()) < 4000


def written(tmp_path):
    path = tmp_path / "certificate.json"
    certificate(STEPS).save(path)
    return path, path.with_suffix(".safetensors")


def flip_a_byte(path, arrays):
    data = bytearray(arrays.read_bytes())
    data[-3] ^= 1
    arrays.write_bytes(data)


def edit(change):
    def apply(path, arrays):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


CORRUPTIONS = {
    "a byte of an array": flip_a_byte,
    "no arrays": lambda path, arrays: arrays.unlink(),
    "arrays cut short": lambda path, arrays: arrays.write_bytes(arrays.read_bytes()[:-8]),
    "arrays that are no safetensors": lambda path, arrays: arrays.write_bytes(b"\x80\x04pickle" * 9),
    "no JSON": lambda path, arrays: path.write_text("{"),
    "nested too deeply": lambda path, arrays: path.write_text("[" * 100_000),
    "a list": lambda path, arrays: path.write_text("[]"),
    "transforms that are no objects": edit(lambda c: c.update(transforms={"hadamard-0": 3})),
    "relations that are a list": edit(lambda c: c.update(relations=[1])),
    "an unknown kind": edit(lambda c: c["transforms"]["hadamard-0"].update(kind="quantum")),
    "a size that is text": edit(lambda c: c["transforms"]["hadamard-0"].update(size="12")),
    "a size without a Hadamard matrix": edit(lambda c: c["transforms"]["hadamard-0"].update(size=7)),
    "an array by another name": edit(lambda c: c["transforms"]["diagonal-2"].update(values="values.0")),
    "an array's name that is a path": edit(lambda c: c["transforms"]["diagonal-2"].update(values="../x")),
    "an index outside": edit(lambda c: c["transforms"]["selection-8"].update(indices=[9])),
    "another array": edit(
        lambda c: (
            c["transforms"]["diagonal-2"].update(values=c["transforms"]["shift-9"]["values"])
            or c["transforms"]["orthogonal-4"].update(values=c["transforms"]["shift-9"]["values"])
        )
    ),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_what_was_changed_is_refused_in_one_line(what, tmp_path):
    path, arrays = written(tmp_path)
    CORRUPTIONS[what](path, arrays)
    with pytest.raises(RequestError) as caught:
        _certificate_of("", path)
    assert len(str(caught.value).splitlines()) == 1
