"""Inputs made from a signature, and inputs given as a file."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import graph

from rewrite.check.inputs import generate_inputs, load_inputs
from rewrite.errors import InputsError

TEXT = """g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask, int64[batch,sequence] position_ids)
    => (int64[batch,sequence] y) { a = Add(input_ids, attention_mask) y = Add(a, position_ids) }"""


def language_model(maximum: int = 20):
    model = graph(TEXT)
    model.metadata_props["rewrite.maximum.sequence"] = str(maximum)
    bounds = {"input_ids": ("token_ids", 3, 50), "attention_mask": ("attention_mask", 0, 2)}
    bounds["position_ids"] = ("position_ids", 0, maximum)
    for value in model.graph.inputs:
        kind, low, high = bounds[value.name]
        value.metadata_props.update({"rewrite.kind": kind, "rewrite.low": str(low), "rewrite.high": str(high)})
    return model


def test_generated_inputs_are_valid_and_cover_the_edges(tmp_path):
    model = language_model()
    sets = generate_inputs(model, seed=1)
    shapes = [one["input_ids"].shape for one in sets]
    assert {(1, 7), (2, 16), (3, 20), (1, 1)} <= set(shapes)  # 33 is capped at 20
    ids = [one["input_ids"] for one in sets]
    assert any((x == 3).all() for x in ids)
    assert any((x == 49).all() for x in ids)
    masks = [one["attention_mask"] for one in sets]
    assert any(m[0, 0] == 0 and m[0, -1] == 1 for m in masks)
    assert any(m[0, 0] == 1 and m[0, -1] == 0 for m in masks)
    assert all(m.any(axis=1).all() for m in masks)  # every row keeps a token
    for index, one in enumerate(sets):
        path = tmp_path / f"{index}.npz"
        np.savez(path, **one)
        loaded = load_inputs(path, model)[0]
        assert all(np.array_equal(loaded[name], one[name]) and loaded[name].dtype == one[name].dtype for name in one)


def test_the_same_seed_gives_the_same_inputs_and_another_seed_others():
    model = language_model()
    first, again, other = generate_inputs(model, 5), generate_inputs(model, 5), generate_inputs(model, 6)
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(first, again) for name in a)
    assert any(not np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other))


def test_images_and_sizes_on_request():
    model = graph("g (float[batch,3,8,8] pixels) => (float[batch,3,8,8] y) { y = Relu(pixels) }")
    model.graph.inputs[0].metadata_props["rewrite.kind"] = "image"
    sets = generate_inputs(model)
    assert {one["pixels"].shape for one in sets} == {(1, 3, 8, 8), (2, 3, 8, 8), (3, 3, 8, 8)}
    assert any((one["pixels"] == 0).all() for one in sets)
    assert generate_inputs(model, sizes=[(4, 1)])[0]["pixels"].shape == (4, 3, 8, 8)


def test_numbers_booleans_and_overridable_initializers():
    model = graph("g (float16[n,2] x, bool[n] c) => (float16[n,2] y) { y = Add(x, b) }", {"b": np.ones(2, np.float16)})
    model.graph.inputs.append(model.graph.initializers["b"])
    made = generate_inputs(model)[0]
    assert made["x"].dtype == np.float16
    assert made["c"].dtype == np.bool_
    assert "b" not in made


GOOD = {"input_ids": np.full((2, 4), 7), "attention_mask": np.ones((2, 4), int), "position_ids": np.zeros((2, 4), int)}
REJECTED = {
    "missing": ({"position_ids": None}, "lacks position_ids"),
    "extra": ({"token_type_ids": np.zeros((2, 4), int)}, "unknown token_type_ids"),
    "type": ({"input_ids": np.full((2, 4), 7, np.int32)}, "type int32.*int64"),
    "rank": ({"input_ids": np.full((4,), 7)}, "1 axes"),
    "disagreeing sizes": ({"attention_mask": np.ones((2, 5), int)}, "sequence 5, input_ids has 4"),
    "id too high": ({"input_ids": np.full((2, 4), 50)}, r"from 50 to 50.*\[3, 50\)"),
    "id too low": ({"input_ids": np.full((2, 4), 2)}, r"expected \[3, 50\)"),
    "empty": ({name: np.zeros((2, 0), int) for name in GOOD}, "empty on axis 1"),
    "too long": ({name: np.full((1, 21), 3) for name in GOOD}, "sequence 21.*at most 20"),
    "pickled": ({"input_ids": np.array([object()])}, "unpickling"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_load_refuses_with_one_line(case, tmp_path):
    change, pattern = REJECTED[case]
    arrays = {name: array for name, array in {**GOOD, **change}.items() if array is not None}
    path = tmp_path / "inputs.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputsError, match=pattern) as caught:
        load_inputs(path, language_model())
    assert "\n" not in str(caught.value)
    assert "inputs.npz" in str(caught.value)


def test_load_accepts_good_arrays(tmp_path):
    np.savez(tmp_path / "inputs.npz", **GOOD)
    assert set(load_inputs(tmp_path / "inputs.npz", language_model())[0]) == set(GOOD)


def test_load_refuses_numbers_that_are_not_finite(tmp_path):
    model = graph("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    np.savez(tmp_path / "a.npz", x=np.array([1, np.nan], np.float32))
    with pytest.raises(InputsError, match="not finite"):
        load_inputs(tmp_path / "a.npz", model)


def test_load_refuses_a_static_size_that_differs(tmp_path):
    model = graph("g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }")
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(InputsError, match=r"4 on axis 1.*\[n, 3\]"):
        load_inputs(tmp_path / "a.npz", model)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", b"\x80\x04K\x01."])
def test_load_refuses_what_is_no_archive(content, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputsError):
        load_inputs(path, language_model())


def test_load_refuses_a_single_array_a_folder_and_nothing(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    for path in (tmp_path / "a.npy", tmp_path, tmp_path / "absent.npz"):
        with pytest.raises(InputsError):
            load_inputs(path, language_model())
