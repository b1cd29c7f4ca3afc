"""A conversion that approximates says what it costs, and what runs is held to what its graph says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rewrite import pipeline
from rewrite.check.faithful import AS_DECLARED, NOT_DECLARED
from rewrite.check.inputs import generate_inputs
from rewrite.ir.program import Program


def test_the_report_holds_every_site_and_every_weight_that_stayed(
    family_program: Callable[[str], Program], tmp_path: Path
) -> None:
    program, out = family_program("gpt2"), tmp_path / "out"
    report = pipeline.convert(
        program, out, recipe="int4-weight-int8-activation", inputs=generate_inputs(program.original)[:2]
    )
    assert report.numerical == AS_DECLARED
    found = report.approximation
    assert found is not None
    certificate = json.loads((out / "certificate.json").read_text())
    assert [dict(site) for site in found.declared] == certificate["approximations"]
    codes = {site["name"] for site in certificate["approximations"] if site["kind"] == "weight"}
    assert codes <= {name for row in found.sites for name in row.codes}
    assert all(row.reason for row in found.kept)
    assert abs(sum(row.share or 0.0 for row in found.sites) - 1) < 1e-9
    assert all(row.weight_sqnr_db > 10 and row.product_sqnr_db > 10 for row in found.sites)
    assert all({"original", "rewritten", "stored"} == set(row.weight) for row in found.sites)
    assert pipeline.read_report(out).to_json() == report.to_json()
    assert "Quantization" in (out / "report.html").read_text(encoding="utf-8")


def test_an_artifact_that_is_another_is_told(
    family_program: Callable[[str], Program], tmp_path: Path, monkeypatch
) -> None:
    """What runs rounds no activations, what is declared does."""
    from rewrite.check import approximation

    program = family_program("gpt2")
    other = tmp_path / "other"
    pipeline.convert(program, other, recipe="int4-weight", check=False)
    measure = approximation.measure_approximation

    def swapped(*models, **options):
        return measure(*models, **{**options, "artifact": other / "model.onnx"})

    monkeypatch.setattr(approximation, "measure_approximation", swapped)
    report = pipeline.convert(
        program, tmp_path / "out", recipe="int4-weight-int8-activation", inputs=generate_inputs(program.original)[:2]
    )
    assert report.numerical == NOT_DECLARED
