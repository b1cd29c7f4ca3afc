"""Checkpoints that cannot be captured say what is wrong, where, and what to do; nothing is executed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from families import FAMILIES
from networks import network

import rewrite
from rewrite.capture import check_finite
from rewrite.errors import CheckpointError, RewriteError, SourceError, UnsafeSourceError


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of one layer: most tests export it."""
    folder = tmp_path_factory.mktemp("undamaged")
    model, _ = FAMILIES["gpt2"]()
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(undamaged: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(undamaged, tmp_path / "checkpoint"))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def _write(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def _shard(folder: Path, tensors: dict[str, np.ndarray]) -> list[Path]:
    """The checkpoint in two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places: dict[str, str] = {}
    for index, part in enumerate((names[::2], names[1::2])):
        place = f"model-0000{index + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / place)
        places |= dict.fromkeys(part, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sorted(folder.glob("model-*.safetensors"))


def _refused(folder: Path | str, kind: type[RewriteError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        rewrite.capture(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.remedy
    assert caught.value.where
    for word in words:
        assert word in message


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_shards_are_read_like_one_file(folder: Path) -> None:
    _shard(folder, _tensors(folder))
    program = rewrite.capture(folder)
    weight = program.model.graph.initializers["transformer.h.0.mlp.c_fc.weight"].const_value
    assert np.array_equal(weight.numpy(), _tensors_of_shards(folder)["transformer.h.0.mlp.c_fc.weight"])


def _tensors_of_shards(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for path in folder.glob("model-*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    return tensors


def test_missing_shard(folder: Path) -> None:
    shards = _shard(folder, _tensors(folder))
    shards[1].unlink()
    _refused(folder, CheckpointError, "missing file", shards[1].name)


def test_shard_outside_the_folder(folder: Path) -> None:
    _shard(folder, _tensors(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    _refused(folder, UnsafeSourceError, "../model-00001")


def test_tensor_promised_by_the_index_and_absent(folder: Path) -> None:
    _shard(folder, _tensors(folder))
    index = folder / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    written["weight_map"]["transformer.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(written))
    _refused(folder, CheckpointError, "transformer.extra")


@pytest.mark.parametrize("kept", [4, 100, 5000])
def test_truncated_file(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    _refused(folder, CheckpointError, "truncated", "model.safetensors")


def test_file_of_another_kind(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    _refused(folder, CheckpointError, "not a safetensors file")


def test_missing_tensor(folder: Path) -> None:
    tensors = _tensors(folder)
    del tensors["transformer.h.0.ln_2.bias"]
    _write(folder, tensors)
    _refused(folder, CheckpointError, "transformer.h.0.ln_2.bias", "missing")


def test_tensor_of_another_shape(folder: Path) -> None:
    tensors = _tensors(folder)
    tensors["transformer.h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"][:, :-1].copy()
    _write(folder, tensors)
    _refused(folder, CheckpointError, "transformer.h.0.attn.c_attn.weight", "[48, 143]", "[48, 144]")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_that_is_not_finite(folder: Path, bad: float) -> None:
    tensors = _tensors(folder)
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 5] = bad
    _write(folder, tensors)
    with pytest.raises(CheckpointError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight.*\[3, 5\]"):
        check_finite(rewrite.capture(folder))


def test_finite_weights_pass(family_program: Callable, folder: Path) -> None:
    del folder
    seen: list[str] = []
    check_finite(family_program("gpt2"), lambda name, done, total: seen.append(name))
    assert "transformer.h.0.mlp.c_fc.weight" in seen


def test_unknown_model_type(folder: Path) -> None:
    _edit_config(folder, model_type="gpt_from_the_future")
    _refused(folder, SourceError, "gpt_from_the_future", "model_type")


def test_unknown_architecture(folder: Path) -> None:
    _edit_config(folder, architectures=["GPT2ForPoetry"])
    _refused(folder, SourceError, "GPT2ForPoetry")


def test_configuration_that_builds_nothing(folder: Path) -> None:
    _edit_config(folder, n_head=5)
    _refused(folder, SourceError, "cannot be built")


def test_configuration_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    _refused(folder, CheckpointError, "without weights")


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    _refused(folder, CheckpointError, "pickle", "save_pretrained")


def test_remote_code_is_not_executed(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')\n")
    _edit_config(folder, model_type="own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    _refused(folder, UnsafeSourceError, "auto_map")
    assert not trap.exists()


def test_remote_code_of_a_known_model_is_ignored(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (folder / "modeling.py").write_text(f"open({str(trap)!r}, 'w')\n")
    _edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Own"})
    assert rewrite.capture(folder).inputs
    assert not trap.exists()


def test_quantized_checkpoint(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "gptq"})
    _refused(folder, SourceError, "gptq")


@pytest.mark.parametrize("source", ["nowhere", "nowhere.onnx", "no/such.pt2"])
def test_no_such_source(source: str) -> None:
    _refused(source, SourceError, "no such file")


def test_folder_of_nothing(tmp_path: Path) -> None:
    _refused(tmp_path, SourceError, "config.json")


def test_file_that_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    _refused(tmp_path / "weights.bin", SourceError, ".bin")


def test_dtype_of_choice_rounds_once(folder: Path) -> None:
    tensors = _tensors(folder)
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    _write(folder, half)
    _edit_config(folder, dtype="float16")
    name = "transformer.h.0.mlp.c_fc.weight"
    for dtype, expected in ((None, np.float16), ("float32", np.float32)):
        weight = rewrite.capture(folder, dtype=dtype).model.graph.initializers[name].const_value
        assert weight.dtype.numpy() == expected
        assert np.array_equal(weight.numpy(), half[name].astype(expected))


def test_tie_that_the_checkpoint_contradicts_is_two_weights(folder: Path) -> None:
    tensors = _tensors(folder)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    _write(folder, tensors)
    initializers = rewrite.capture(folder).model.graph.initializers
    assert np.array_equal(initializers["lm_head.weight"].const_value.numpy(), tensors["lm_head.weight"])
    assert np.array_equal(initializers["transformer.wte.weight"].const_value.numpy(), tensors["transformer.wte.weight"])


def test_tie_stored_twice_is_one_weight(folder: Path) -> None:
    tensors = _tensors(folder)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    _write(folder, tensors)
    initializers = rewrite.capture(folder).model.graph.initializers
    assert len({"lm_head.weight", "transformer.wte.weight"} & set(initializers)) == 1


def test_body_checkpoint_binds_to_a_headed_model(folder: Path) -> None:
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _tensors(folder).items()}
    _write(folder, tensors)
    assert "transformer.h.0.ln_1.weight" in rewrite.capture(folder).model.graph.initializers


@pytest.mark.parametrize(
    ("value", "operator", "passes"),
    [(np.inf, "Min", True), (-np.inf, "Add", True), (np.inf, "Mul", False), (np.nan, "Min", False)],
)
def test_an_infinite_scalar_may_bound_and_mask(value: float, operator: str, passes: bool) -> None:
    text = f"bounded (float[2, 3] x, float[1] b) => (float[2, 3] y) {{ y = {operator} (x, b) }}"
    program = network(text, b=np.array([value]))
    if passes:
        check_finite(program)
    else:
        with pytest.raises(CheckpointError):
            check_finite(program)
