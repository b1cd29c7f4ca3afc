"""A checkpoint rewritten into a checkpoint: the same architecture, computing the same function from other weights.

    capture → canonicalize → passes → every tensor's new content → files → capture of those files → proof → check

What is proved is what was written: the new checkpoint is captured as anyone would, and its graph is proved equal to the
capture of the old one. Nothing appears at OUT before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewrite.artifact import CERTIFICATE, TRANSFORMS, new_folder
from rewrite.errors import RequestError
from rewrite.proof import prove
from rewrite.recipes import passes_of
from rewrite.stages import Stages

if TYPE_CHECKING:
    from rewrite.pipeline import Data
    from rewrite.report import Report
    from rewrite.rule import Pass

TARGET = "checkpoint"


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    passes: Sequence[str | Pass[Any]] | None = None,
    recipe: str | None = None,
    inputs: str | Path | Sequence[Mapping[str, np.ndarray]] | None = None,
    calibration: str | Path | Data | None = None,
    calibration_samples: int = 128,
    check: bool = True,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run passes over the checkpoint in `source` and write the result as a checkpoint into `out`.

    `inputs`, `calibration` and `calibration_samples` are those of `rewrite.pipeline.convert`. Returns the report, which
    is also written there, with the certificate.

    Raises:
        RequestError: the architecture has no place for what a pass did, or the written checkpoint is not proved equal;
            nothing is written. And the exceptions of `rewrite.errors` for a source or an output that is unusable.
    """
    from rewrite.calibrate import calibrated
    from rewrite.capture import capture, check_finite
    from rewrite.capture.canonicalize import canonicalize
    from rewrite.capture.checkpoint_export import checkpoint_folder, plan, write_checkpoint
    from rewrite.check import diff_models, label, localize
    from rewrite.check.outliers import measure_outliers
    from rewrite.pipeline import _certificate, _claims, _inputs, calibration_of
    from rewrite.report import Report, SiteRow, Sizes
    from rewrite.rule import apply_pass

    folder = checkpoint_folder(source)
    steps, stages = passes_of(passes, recipe), Stages(progress)
    if (coded := next((each.name for each in steps if each.approximates), None)) is not None:
        raise RequestError(f"a checkpoint has no place for what {coded} makes", where="--to hf", remedy="--to onnx")
    with new_folder(Path(out), source, force) as partial:
        with stages("capture"):
            program = capture(folder)
            check_finite(program)
        sets = _inputs(program.original, inputs) if check or inputs is not None else []
        data: Data = sets if inputs is not None else []
        if calibration is not None:
            with stages("calibration data"):
                data = calibration_of(program, source, calibration, calibration_samples, progress)
        with stages("passes"):
            canonical = program.clone()
            canonicalize(canonical)
            work = canonical.clone()
            outcomes = []
            for each in steps:
                outcomes += apply_pass(work, calibrated(each, work, data, progress) if data else each)
        with stages("saving"):
            write_checkpoint(plan(folder, canonical, work), partial)
        with stages("capture of what was written"):
            written = capture(partial).original
        with stages("proof"):
            proof = prove(program.original, written, claims=_claims(work), transforms=work.transforms)
        if not proof.verdict.holds:
            raise RequestError(
                f"the checkpoint that these passes make is not proved equal: {proof.verdict}",
                where=str(source),
                remedy="choose other passes with --pass",
            )
        with stages("certificate"):
            certificate = _certificate(work, written, outcomes, proof)
            certificate.files = sorted(path.name for path in partial.iterdir())
            certificate.save(partial / CERTIFICATE)
        sites = tuple(SiteRow.of(outcome.to_json()) for outcome in outcomes)
        before, after = (_weights(where) for where in (folder, partial))
        report = Report(
            source=program.source or str(source),
            verdict=str(proof.verdict),
            target=TARGET,
            sites=sites,
            sizes=Sizes(before, after, sum(row.untied_bytes for row in sites)),
            warnings=() if any(row.outcome == "applied" for row in sites) else (_UNCHANGED,),
            proof={
                "values in normal form": str(proof.values),
                "constants with another exact value": str(len(proof.solved)),
                "relations checked": str(len(proof.claims)),
            },
        )
        if check:
            with stages("check"):
                found = diff_models(program.original, written, sets)
                report = report.with_difference(found, [label(one) for one in sets])
                measured = measure_outliers(work.model, sets, work.relations, work.transforms)
                report = report.with_outliers(measured)
                if sets:
                    # In `work` a value has its old name only with its old meaning; in a capture of the files always.
                    known = {"relations": _claims(work), "transforms": work.transforms}
                    report = report.with_layers(localize(program.original, work.model, sets[0], **known))
        report = stages.write(report, partial)
    return report


def _weights(folder: Path) -> int:
    """Bytes of the files that hold the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name != TRANSFORMS)


_UNCHANGED = "every site was refused: the checkpoint is the one that was given"
