"""Every preset from capture to the file: the erasure theorem, what is declared, what is refused, and what is rejected.

The networks are small enough for every run and have what matters: tied and untied heads, grouped queries, gates,
convolutions with residual sums. docs/zoo.md has all families.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import rewrite
from rewrite import pipeline
from rewrite.check.inputs import generate_inputs
from rewrite.errors import InputsError, RequestError
from rewrite.export_hf import convert_checkpoint
from rewrite.ir.program import Program, save_model
from rewrite.passes import APPROXIMATIONS
from rewrite.recipes import RECIPES, passes_of

PRESETS = ("int8-dynamic", "int8-static", "int4-weight", "int4-weight-int8-activation")
FAMILIES = ("gpt2", "llama", "qwen2", "resnet")
QUANTIZED = {each.name for each in APPROXIMATIONS}


def converted(program: Program, recipe: str, out: Path, **options):
    inputs = generate_inputs(program.original)[:3]
    return pipeline.convert(program, out, recipe=recipe, inputs=inputs, **options)


@pytest.mark.parametrize(
    "recipe", [*PRESETS, "rotate+int4-weight", "smooth+int8-dynamic", "rotate+smooth+int8-static", "integer"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_erasing_what_is_declared_leaves_the_original(
    family: str, recipe: str, family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    program = family_program(family)
    report = converted(program, recipe, tmp_path / "out")
    rows = [row for row in report.sites if row.pass_name in QUANTIZED]
    applied = [row for row in rows if row.outcome == "applied"]
    if family == "resnet" and "static" not in recipe and recipe != "integer":
        # Convolutions have no other integer kernel, and the classifier is small: all of it is said.
        assert not applied
        assert rows
        assert "approximated nothing" in report.warnings[-1]
        return
    assert applied, report
    assert report.verdict.startswith("EQUAL_MODULO("), report.verdict
    assert not [row for row in report.sites if row.requirement == "PROOF"], "the proof followed every pass"
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    weights = [site for site in certificate["approximations"] if site["kind"] == "weight"]
    assert weights
    assert all(site["error_steps"] is not None and site["error_relative"] < 1 for site in weights)
    # Every matrix and kernel of the network is a site or a refusal.
    stored = [v for v in program.model.graph.initializers.values() if v.const_value is not None and v.dtype is not None]
    large = [v for v in stored if v.dtype.is_floating_point() and v.const_value.size >= 4096 and len(v.shape or ()) > 1]
    assert len({row.site.partition(".weight")[0] for row in rows}) >= len(large)
    answer = pipeline.verify(program, tmp_path / "out")
    assert str(answer.proof.verdict) == report.verdict


def _corrupted(kind: str, array: np.ndarray) -> np.ndarray:
    changed = array.copy()
    flat = changed.reshape(-1)
    if kind == "scale":
        flat[0] *= np.float32(1.5)
    elif kind == "scales":
        changed *= np.float32(1.02)
    elif kind == "swapped scales":
        flat[[0, -1]] = flat[[-1, 0]]
    else:
        flat[:] = np.roll(flat, 1)
    return changed


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("kind", ["nothing", "scale", "scales", "swapped scales", "codes"])
def test_corrupted_artifacts_are_rejected(
    recipe: str, kind: str, family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    """Against the certificate, whose digest is brought up to date, so that it is the numbers that decide."""
    program, out = family_program("gpt2"), tmp_path / "out"
    converted(program, recipe, out, check=False)
    model = ir.load(out / "model.onnx")
    ir.external_data.load_to_model(model)
    ending = ".codes" if kind == "codes" else ".scales"
    name, value = next((n, v) for n, v in model.graph.initializers.items() if n.endswith(ending) and "mlp.c_fc" in n)
    assert value.const_value is not None
    if kind != "nothing":
        value.const_value = ir.tensor(_corrupted(kind, value.const_value.numpy()), name=name)
    save_model(model, out / "model.onnx")
    certificate = json.loads((out / "certificate.json").read_text())
    certificate["rewritten"] = pipeline.content_digest(pipeline._load(out / "model.onnx"))
    (out / "certificate.json").write_text(json.dumps(certificate))
    verdict = pipeline.verify(program, out).proof.verdict
    assert verdict.holds is (kind == "nothing"), verdict


def test_a_declared_format_that_is_another_is_rejected(
    family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    program, out = family_program("gpt2"), tmp_path / "out"
    converted(program, "int4-weight", out, check=False)
    written = json.loads((out / "certificate.json").read_text())
    assert pipeline.verify(program, out).proof.verdict.holds
    for part, value in (("format", "int8"), ("scale", 1.0), ("error_steps", 0.1), ("error_relative", 0.5)):
        changed = json.loads(json.dumps(written))
        changed["approximations"][0][part] = value
        (out / "certificate.json").write_text(json.dumps(changed))
        assert not pipeline.verify(program, out).proof.verdict.holds, part
    del written["approximations"][0]
    (out / "certificate.json").write_text(json.dumps(written))
    assert not pipeline.verify(program, out).proof.verdict.holds


def test_calibration_is_deterministic(family_program: Callable[[str], Program], tmp_path: Path) -> None:
    for recipe in ("int8-static", "int4-weight"):
        files = []
        for run in ("one", "two"):
            converted(family_program("gpt2"), recipe, tmp_path / f"{recipe}-{run}", check=False)
            files.append((tmp_path / f"{recipe}-{run}" / "model.onnx.data").read_bytes())
        assert files[0] == files[1]


def test_requests_that_make_no_sense_are_refused(family_program: Callable[[str], Program], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="fold-norm stands behind quantize-dynamic"):
        passes_of(["quantize-dynamic", "fold-norm"], None)
    with pytest.raises(RequestError, match="no recipe 'int3'"):
        passes_of(None, "rotate+int3")
    (tmp_path / "recipe.json").write_text('[{"pass": "quantize-weights", "bits": 5}]')
    with pytest.raises(RequestError, match="5 bits"):
        passes_of(None, str(tmp_path / "recipe.json"))
    with pytest.raises(RequestError, match="no place for what quantize-weights makes"):
        convert_checkpoint("models/checkpoints/bytegpt", tmp_path / "out", recipe="int4-weight")


def test_unusable_data_is_said_before_the_network_is_captured(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputsError, match="holds no files"):
        pipeline.convert("no network at all", tmp_path / "out", recipe="int8-static", calibration=tmp_path / "data")
    assert not (tmp_path / "out").exists()


def test_a_preset_that_quantizes_nothing_says_so(family_program: Callable[[str], Program], tmp_path: Path) -> None:
    """Static ranges need data; where there is none the float network is converted, and never without a word."""
    report = pipeline.convert(family_program("gpt2"), tmp_path / "out", recipe="int8-static", check=False)
    assert report.verdict.startswith("EQUAL(")
    assert "quantize-static approximated nothing: the range of" in report.warnings[-1]
    assert not converted(family_program("gpt2"), "int8-static", tmp_path / "with", check=False).warnings


def test_the_cost_is_measured_on_real_data_where_there_is_some(
    family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    """Ranges that fit the data do not fit what the check makes up, which says nothing of the cost."""
    program = family_program("resnet")
    dim = [{name: 0.01 * array for name, array in one.items()} for one in generate_inputs(program.original)[:3]]
    passes = [replace(each, minimum=64) if each.approximates else each for each in passes_of(None, "int8-static")]
    decibels = []
    for name, options in {
        "the given inputs": {"inputs": dim},
        "what it was calibrated on": {"calibration": dim},
    }.items():
        report = pipeline.convert(program, tmp_path / "out", passes=passes, force=True, **options)
        assert report.approximation is not None
        assert report.approximation.data == name
        assert report.approximation.main is not None
        decibels.append(report.approximation.main.sqnr_db)
    assert decibels[0] == decibels[1] > 20
    report = pipeline.convert(family_program("gpt2"), tmp_path / "out", recipe="int4-weight", force=True)
    assert report.approximation is not None
    assert report.approximation.data.startswith("generated inputs")


def test_every_preset_is_one_approximation_behind_the_default() -> None:
    for name in PRESETS:
        assert RECIPES[name][: len(RECIPES["default"])] == RECIPES["default"]


@pytest.mark.parametrize("recipe", ["int8-dynamic", "int4-weight"])
def test_packed_projections_are_taken_apart_before_they_are_codes(
    recipe: str, family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    """Lowering cannot take codes apart, and the runtime multiplies three weights faster than one and copies it out."""
    report = converted(family_program("gpt2"), recipe, tmp_path / "out")
    made = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert "Split" not in made
    packed = [row.site for row in report.sites if row.pass_name in QUANTIZED and ".0.attn.c_attn" in row.site]
    assert len(packed) == 3


def test_apply_proves_and_declares(family_program: Callable[[str], Program]) -> None:
    result = rewrite.apply(family_program("gpt2"), passes_of(None, "int8-dynamic"))
    assert result.certificate.verdict.kind == "EQUAL_MODULO"
    assert result.program.exact is not None
    assert {site.kind for site in result.proof.sites} == {"weight", "activation"}
