"""The ordered recipe: capture, canonicalize, passes, lowering, proof, check. `convert` is the whole of it in one page.

Everything here has a result object with a readable repr; nothing prints. Heavy libraries load when a stage needs them:
`verify` on files loads neither torch nor ONNX Runtime.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from rewrite.artifact import CERTIFICATE, MODEL, REPORT, new_folder
from rewrite.errors import RequestError
from rewrite.ir.program import Program, save_model
from rewrite.proof import Proof, Verdict, prove
from rewrite.proof.certificate import Certificate, content_digest, read_certificate
from rewrite.recipes import passes_of
from rewrite.stages import Stages

if TYPE_CHECKING:
    from rewrite.calibration_data import CalibrationSets
    from rewrite.check import Difference
    from rewrite.check.refute import Refutation
    from rewrite.report import Report
    from rewrite.rule import Outcome, Pass
    from rewrite.targets import Target

Progress = Callable[[str], None]
Inputs = Mapping[str, np.ndarray]
MEASURED_SETS = 16
"""Sets of calibration data that the cost of an approximation is measured on."""
Data: TypeAlias = "Sequence[Inputs] | CalibrationSets"
"""Sets of inputs that are read several times."""


# ── Passes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Result:
    """A rewritten program, what was done and refused, and the certificate of both."""

    program: Program
    outcomes: list[Outcome]
    certificate: Certificate
    proof: Proof

    def __repr__(self) -> str:
        lines = [str(self.certificate.verdict)]
        lines += [f"  {outcome}" for outcome in self.outcomes]
        return "\n".join(lines)


def apply(program: Program, passes: Iterable[Pass[Any]], inputs: Sequence[Inputs] = ()) -> Result:
    """Apply `passes` in order to a copy of `program` and prove the result; `program` is left as it is.

    Passes that choose their numbers by data measure them on `inputs` (sets of graph inputs), where there are any. A
    pass whose result cannot be proved is undone and recorded as refused by the proof: what comes back is proved, or
    is the program that was given.
    """
    steps = list(passes)
    work, outcomes = _rewritten(program, steps, inputs)
    proof = _proof(work, work.model)
    if not proof.verdict.holds:
        work, outcomes, proof = _proved_stepwise(program, steps, inputs)
    return Result(work, outcomes, _certificate(work, work.model, outcomes, proof), proof)


def _rewritten(
    program: Program,
    passes: Sequence[Pass[Any]],
    inputs: Data,
    progress: Progress | None = None,
    target: Target | None = None,
) -> tuple[Program, list[Outcome]]:
    from rewrite.capture.canonicalize import canonicalize

    work = program.clone()
    canonicalize(work)
    outcomes: list[Outcome] = []
    for each in passes:
        outcomes += _applied(work, each, inputs, progress, target)
    return work, outcomes


def _applied(
    work: Program, each: Pass[Any], inputs: Data, progress: Progress | None = None, target: Target | None = None
) -> list[Outcome]:
    """One pass, in place."""
    from rewrite.rule import apply_pass

    return apply_pass(work, _prepared(work, each, inputs, progress, target))


def _prepared(
    work: Program, each: Pass[Any], inputs: Data, progress: Progress | None = None, target: Target | None = None
) -> Pass[Any]:
    """The pass, calibrated where there is data; what was there before the first that approximates is kept.

    What is to be approximated has the weights that the kernels of `target` read.
    """
    from rewrite.calibrate import calibrated

    if each.approximates and work.exact is None:
        if target is not None:
            target.divide_weights(work.model)
        work.exact = work.model.clone()
    return calibrated(each, work, inputs, progress) if inputs else each


def _proved_stepwise(
    program: Program, passes: Sequence[Pass[Any]], inputs: Data, target: Target | None = None
) -> tuple[Program, list[Outcome], Proof]:
    """Pass by pass, each kept only if the proof follows it; an approximation at the sites where it does."""
    from rewrite.followed import followed
    from rewrite.rule import apply_pass

    work, outcomes = _rewritten(program, [], ())
    proof = prove(work.original, work.model)
    if not proof.verdict.holds:
        # Not even the canonical form can be followed: what is an equivalence stays as it was captured.
        outcomes = [_refused_by_proof(each, proof.verdict) for each in passes if not each.approximates]
        passes = [each for each in passes if each.approximates]
        work = program.clone()
        proof = prove(work.original, work.model)
    for each in passes:
        trial = work.clone()
        rule = _prepared(trial, each, inputs, target=target)
        before = trial.clone() if each.approximates else trial
        done = apply_pass(trial, rule)
        attempt = _proof(trial, trial.model)
        found = (trial, done, attempt) if attempt.verdict.holds else None
        if found is None and each.approximates:
            found = followed(before, rule, lambda partly: _proof(partly, partly.model))
        if found is None:
            outcomes.append(_refused_by_proof(each, attempt.verdict))
        else:
            work, done, proof = found
            outcomes += done
    return work, outcomes, proof


def _refused_by_proof(each: Pass[Any], verdict: Verdict) -> Outcome:
    from rewrite.followed import refused

    return refused(each, "all", verdict)


def _proof(work: Program, rewritten: ir.Model) -> Proof:
    """The proof of what became of a program, with all that its passes say of it."""
    steps = work.steps if work.exact is not None else 1.0
    return prove(work.original, rewritten, claims=_claims(work), transforms=work.transforms, steps=steps)


def _claims(work: Program) -> dict[str, dict[str, Any]]:
    """The relations that speak of values of the original: those of its names."""
    named = {value.name for node in work.original.graph for value in node.outputs}
    return {name: relation for name, relation in work.relations.items() if name in named}


def _certificate(work: Program, rewritten: ir.Model, outcomes: Sequence[Outcome], proof: Proof) -> Certificate:
    return Certificate.of(
        proof,
        content_digest(work.original),
        content_digest(rewritten),
        [outcome.to_json() for outcome in outcomes],
        {name: relation for name, relation in _claims(work).items() if name in proof.claims},
        dict(work.original.opset_imports),
        work.transforms,
    )


def explain(source: Any, passes: Iterable[Pass[Any]] | None = None, example_inputs: Any = None) -> list[Outcome]:
    """What passes would do with `source`: every site, applied or refused with the requirement and the node."""
    program = source if isinstance(source, Program) else _captured(source, example_inputs)
    return _rewritten(program, passes_of(None, None) if passes is None else list(passes), ())[1]


# ── Lowering ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Lowered:
    """A program in the kernels of one target. `save` writes what a plain ONNX Runtime session opens."""

    model: ir.Model
    target: Target

    def save(self, folder: str | Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
        """Write model.onnx, its weights and the session options into `folder`; returns the model's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / MODEL, progress)
        self.target.write_session(folder)
        return folder / MODEL

    def __repr__(self) -> str:
        return f"Lowered({self.target.name}; {self.model.graph.num_nodes()} nodes)"


def lower(program: Program, target: str = "ort-cpu", dtype: str | None = None) -> Lowered:
    """The program in the kernels that `target` runs fastest; `program` is left as it is."""
    chosen = _target(target)
    return _described(chosen.lower(program) if dtype is None else chosen.lower(program, dtype=dtype), chosen, program)


def _described(model: ir.Model, target: Target, program: Program) -> Lowered:
    """`model`, made from `program`, with its changes of basis written into its metadata."""
    from rewrite.metadata import describe_transforms

    describe_transforms(model, program)
    return Lowered(model, target)


def _target(name: str) -> Target:
    from rewrite.targets import TARGETS

    known = {target.name: target for target in TARGETS}
    if name not in known:
        raise RequestError(f"no target {name!r}", where="--target", remedy=f"one of {', '.join(known)}")
    return known[name]


def _priced(passes: Sequence[Pass[Any]], target: Target) -> list[Pass[Any]]:
    """The passes with the target's kernels and what they cost, in the options that were left as they are by default."""
    priced: list[Pass[Any]] = []
    for each in passes:
        options: Any = each
        defaults = {option.name: option.default for option in fields(options)} if is_dataclass(each) else {}
        known = {**target.costs, "kernels": target.kernels, "multiply_ns": target.multiply_ns}
        left = [name for name in known if name in defaults and defaults[name] == getattr(each, name)]
        priced.append(replace(options, **{name: known[name] for name in left}) if left else each)
    return priced


# ── The main job ────────────────────────────────────────────────────────────────────────────────────────────────────


def convert(
    source: Any,
    out: str | Path,
    *,
    target: str = "ort-cpu",
    passes: Sequence[str | Pass[Any]] | None = None,
    recipe: str | None = None,
    inputs: str | Path | Sequence[Inputs] | None = None,
    calibration: str | Path | Data | None = None,
    calibration_samples: int = 128,
    example_inputs: Any = None,
    dtype: str | None = None,
    check: bool = True,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert `source` to the fastest proved-equal model for `target`, in the folder `out`.

    `inputs` are what the numbers are checked on; without them the check generates some. Passes that go by data are
    calibrated on `calibration`: sets of inputs, or a path to arrays, text or images, of which `calibration_samples` are
    read at most (`rewrite.calibration_data`); without it on `inputs`.

    Returns the report, which is also written there, with the certificate. Nothing appears at `out` before everything is
    done; an existing `out` is replaced only with `force`.

    Raises the exceptions of `rewrite.errors` for a source, request or output that is unusable.
    """
    chosen = _target(target)
    steps = _priced(passes_of(passes, recipe), chosen)
    if isinstance(calibration, str | Path):
        from rewrite.calibration_data import find_files

        find_files(Path(calibration))  # data that cannot be used is said before the network is captured
    stages = Stages(progress)
    with new_folder(Path(out), source, force) as folder:
        with stages("capture"):
            program = source if isinstance(source, Program) else _captured(source, example_inputs, dtype)
        with stages("weights are finite"):
            from rewrite.capture.finite import check_finite

            check_finite(program)
        sets = _inputs(program.original, inputs) if check or inputs is not None else []
        data: Data = sets if inputs is not None else []  # what is generated says nothing of the ranges of real data
        if calibration is not None:
            with stages("calibration data"):
                data = calibration_of(program, source, calibration, calibration_samples, progress)
        with stages("passes"):
            work, outcomes = _rewritten(program, steps, data, progress, chosen)
        with stages("lowering"):
            lowered = _described(chosen.lower(work), chosen, work)
        with stages("saving"):
            path = lowered.save(folder)
        with stages("proof"):
            proof = _proof(work, _load(path))
        if not proof.verdict.holds:
            with stages("retreat"):
                work, outcomes, lowered, proof = _retreat(program, steps, data, chosen, folder)
        with stages("certificate"):
            certificate = _certificate(work, _load(path), outcomes, proof)
            certificate.save(folder / CERTIFICATE)
        report = _report(source, chosen, program, steps, outcomes, proof, path)
        if check:
            with stages("check"):
                measured = _measured_on(sets, inputs is not None, data)
                report = _checked(report, work, proof, path, sets, *measured)
        report = stages.write(report, folder)
    return report


def _retreat(
    program: Program, steps: Sequence[Pass[Any]], inputs: Data, target: Target, folder: Path
) -> tuple[Program, list[Outcome], Lowered, Proof]:
    """The proof did not follow: keep the passes that it follows, then the lowering if it follows that as well."""
    work, outcomes, proof = _proved_stepwise(program, steps, inputs, target)
    for lowered in (_described(target.lower(work), target, work), _described(work.model, target, work)):
        path = lowered.save(folder)
        proof = _proof(work, _load(path))
        if proof.verdict.holds:
            return work, outcomes, lowered, proof
    work, failed = program.clone(), proof.verdict
    lowered = Lowered(work.model, target)
    proof = prove(work.original, _load(lowered.save(folder)))
    return work, [_refused_by_proof(each, failed) for each in steps], lowered, proof


def calibration_of(
    program: Program, source: Any, given: str | Path | Data, samples: int, progress: Progress | None
) -> Data:
    """What passes are calibrated on: sets of inputs as they are given, or those that a path holds."""
    if not isinstance(given, str | Path):
        return given
    from rewrite.calibration_data import calibration_sets

    return calibration_sets(
        given, program, None if isinstance(source, Program) else source, samples=samples, progress=progress
    )


def _captured(source: Any, example_inputs: Any = None, dtype: str | None = None) -> Program:
    from rewrite.capture import capture

    return capture(source, example_inputs, dtype=dtype)


def _load(path: Path) -> ir.Model:
    from rewrite.capture.onnx_file import load_onnx

    return load_onnx(path)


def _inputs(model: ir.Model, given: str | Path | Sequence[Inputs] | None) -> list[dict[str, np.ndarray]]:
    from rewrite.check.inputs import generate_inputs, load_inputs

    if given is None:
        return generate_inputs(model)
    if isinstance(given, str | Path):
        loaded = load_inputs(given, model)
        return [loaded] if isinstance(loaded, dict) else list(loaded)
    return [dict(one) for one in given]


def _measured_on(sets: Sequence[Inputs], given: bool, calibration: Iterable[Inputs]) -> tuple[Sequence[Inputs], str]:
    """What an approximation is measured on, real data before generated, and what that is in words."""
    if given:
        return sets, "the given inputs"
    found = list(itertools.islice(calibration, MEASURED_SETS))
    return (
        (found, "what it was calibrated on") if found else (sets, "generated inputs, which real ones need not be like")
    )


def _checked(
    report: Report,
    work: Program,
    proof: Proof,
    path: Path,
    sets: list[dict[str, np.ndarray]],
    measured: Sequence[Inputs],
    data: str,
) -> Report:
    """The report with the numbers: exact constants against the capture in float64, and the artifact as it runs.

    Where sites are declared, the network without them is compared with the capture, and the artifact with what its
    graph says. What the approximation costs is taken over `measured`, which is `data`.
    """
    from rewrite.check import diff_models, label
    from rewrite.check.approximation import measure_approximation
    from rewrite.check.outliers import measure_outliers
    from rewrite.targets import session_options

    # Flushing denormals would also flush those of this process, and with them what is compared.
    options = session_options(path.parent, config={"session.set_denormal_as_zero": "0"})
    exact = work.exact if proof.sites else None
    rewritten = work.model if exact is None else exact
    ran = {"artifact": path, "options": options} if exact is None else {}
    difference = diff_models(
        work.original,
        rewritten,
        sets,
        relations=_claims(work),
        transforms=work.transforms,
        layers=True,
        **ran,
    )
    report = report.with_outliers(measure_outliers(rewritten, sets, work.relations, work.transforms))
    report = report.with_difference(difference, [label(one) for one in sets])
    if exact is None:
        return report
    found = measure_approximation(
        exact,
        work.model,
        measured,
        original=work.original,
        artifact=path,
        options=options,
        reasons={row.site: row.reason for row in report.refused if row.pass_name in _approximating()},
        declared=proof.sites,
        judged=sets,
        data=data,
    )
    return report.with_approximation(found)


def _approximating() -> frozenset[str]:
    """The names of the passes that approximate."""
    from rewrite.passes import APPROXIMATIONS

    return frozenset(each.name for each in APPROXIMATIONS)


def _report(
    source: Any,
    target: Target,
    program: Program,
    steps: Sequence[Pass[Any]],
    outcomes: Sequence[Outcome],
    proof: Proof,
    path: Path,
) -> Report:
    """The report; whoever asked for an approximation that was applied nowhere is told so."""
    from rewrite.report import Report, SiteRow, Sizes

    sites = tuple(SiteRow.of(outcome.to_json()) for outcome in outcomes)
    tensors = [value.const_value for value in program.original.graph.initializers.values()]
    after = sum(file.stat().st_size for file in path.parent.glob(f"{MODEL}*"))
    warnings = []
    if not any(row.outcome == "applied" for row in sites):
        warnings.append("every site was refused: the network is the one that was given, in this target's kernels")
    for each in [step for step in steps if step.approximates]:
        rows = [row for row in sites if row.pass_name == each.name]
        if not any(row.outcome == "applied" for row in rows):
            asked = [row.requirement for row in rows]
            why = next((row.reason for row in rows if row.requirement == max(asked, key=asked.count)), "no weights")
            warnings.append(f"{each.name} approximated nothing: {why}")
    return Report(
        source=program.source or str(source),
        verdict=str(proof.verdict),
        target=target.name,
        detail="" if proof.verdict.kind == "EQUAL_MODULO" else proof.verdict.reason,
        sites=sites,
        sizes=Sizes(sum(t.nbytes for t in tensors if t is not None), after, sum(row.untied_bytes for row in sites)),
        warnings=tuple(warnings),
        proof={
            "values in normal form": str(proof.values),
            "constants with another exact value": str(len(proof.solved)),
            "relations checked": str(len(proof.claims)),
        },
    )


# ── Questions about pairs ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Verification:
    """The proof of a pair, and what was asked of its certificate; `counterexample` where the answer is REFUTED."""

    proof: Proof
    certificate: dict[str, Any] | None = None
    counterexample: dict[str, np.ndarray] = field(default_factory=dict)
    refutation: Refutation | None = None

    @property
    def verdict(self) -> Verdict:
        return self.proof.verdict

    def to_json(self) -> dict[str, Any]:
        verdict = self.verdict
        return {
            "verdict": str(verdict),
            "holds": verdict.holds,
            **{"kind": verdict.kind, "ulps": verdict.ulps, "node": verdict.node, "reason": verdict.reason},
            "outputs": {name: str(each) for name, each in self.proof.outputs.items()},
            "relations": self.proof.claims,
            "solved": list(self.proof.solved),
            "counterexample": {name: array.tolist() for name, array in self.counterexample.items()},
            **({"refutation": self.refutation.to_json()} if self.refutation is not None else {}),
        }

    def __repr__(self) -> str:
        lines = [str(self.verdict)]
        lines += [f"  {name}: {verdict}" for name, verdict in self.proof.outputs.items()]
        if self.proof.claims:
            holding = sum(self.proof.claims.values())
            lines.append(f"  {holding} of {len(self.proof.claims)} relations of the certificate hold")
        if self.refutation is not None:
            lines.append(f"  {self.refutation}")
            if self.refutation.paths:
                lines.append(f"  saved: {', '.join(self.refutation.paths.values())}")
        return "\n".join(lines)


FOLDED_ULPS = 5.0
"""How far constants that others fold in float32 may be from exact: β − μ·(γ/√(σ² + ε)) rounds five times."""


def verify(
    original: Any,
    rewritten: Any,
    certificate: str | Path | None = None,
    *,
    refutation: str | Path | None = None,
) -> Verification:
    """Prove that `rewritten` computes `original`: files, OUT folders, programs, or sources that are captured first.

    With a certificate (given, or the OUT folder's own) its digests, relations and approximations are checked too:
    what computes with codes has to be what it declares, as far from exact as it says. Without one,
    constants may be as far from exact as folding them in float32 takes them, and the verdict then says so:
    EQUAL_MODULO. A pair that is not proved is evaluated in float64 on generated inputs: a difference that no rounding
    explains makes it REFUTED, and the smallest part in which the two differ is written into the folder `refutation`.
    """
    first, second = _model(original), _model(rewritten)
    written = _certificate_of(rewritten, certificate)
    hints = written or {}
    proof = prove(
        first,
        second,
        claims=hints.get("relations"),
        transforms=hints.get("transforms"),
        approximations=hints.get("approximations"),
    )
    if written is None and not proof.verdict.holds:
        proof = _proved_modulo(first, second, proof)
    if proof.verdict.holds and written is not None:
        for what, model in (("original", first), ("rewritten", second)):
            if content_digest(model) != written[what]:
                reason = f"the certificate is of another {what} model"
                proof.verdict = Verdict("UNKNOWN", node=what, reason=reason)
    elif proof.verdict == Verdict("EQUAL") and content_digest(first) == content_digest(second):
        proof.verdict = Verdict("BITWISE")
    spoiled = written is not None and proof.outputs and all(each.holds for each in proof.outputs.values())
    # Where there are codes, a difference refutes nothing: what is asked is how far they are from what they stand for.
    if proof.verdict.kind != "UNKNOWN" or spoiled or proof.sites:
        return Verification(proof, written)
    from rewrite.check.refute import refute

    found = refute(first, second, relations=hints.get("relations"), transforms=hints.get("transforms"))
    if found is None:
        return Verification(proof, written)
    # What is wrong stands first; where the proof stopped is often the same place, seen from the constants.
    reason = f"{found.value} is off by {found.difference:.2g}, rounding explains {found.explained:.2g}"
    if proof.verdict.reason:
        reason += f"; the proof stopped: {proof.verdict.reason}"
    proof.verdict = Verdict("REFUTED", proof.verdict.ulps, found.node, reason)
    if refutation is not None:
        found.save(refutation)
    return Verification(proof, written, found.counterexample.inputs, found)


def _proved_modulo(first: ir.Model, second: ir.Model, proof: Proof) -> Proof:
    """The proof under the conditions that others' files need, each of which the verdict names; or `proof` as it is."""
    blocked = any(node.domain == "com.microsoft.nchwc" for node in second.graph)
    for block in (16, 8, 4) if blocked else (None,):
        attempt = prove(first, second, block=block) if blocked else proof
        if not attempt.verdict.holds and 1.0 < attempt.verdict.ulps <= FOLDED_ULPS:
            attempt = prove(first, second, ulps=FOLDED_ULPS, block=block)
        # Of several block sizes that do not hold, the reason of none is worth more than that the size is unknown.
        if attempt.verdict.holds or not blocked:
            return attempt
    return proof


def _certificate_of(rewritten: Any, given: str | Path | None) -> dict[str, Any] | None:
    path = Path(given) if given is not None else None
    if path is None and isinstance(rewritten, str | Path) and (Path(rewritten) / CERTIFICATE).is_file():
        path = Path(rewritten) / CERTIFICATE
    if path is None:
        return None
    try:
        return read_certificate(path)
    except (OSError, ValueError) as error:
        raise RequestError(str(error), where=str(path), remedy="give the certificate that convert wrote") from error


def diff(
    a: Any,
    b: Any,
    inputs: str | Path | Sequence[Inputs] | None = None,
    *,
    layers: bool = False,
) -> Difference:
    """Compare two sources, programs or OUT folders on inputs: each output against float64, and with `layers` every
    value on the way, through the relations that are known of `b`.
    """
    from rewrite.check import diff_models

    first, second = _model(a), _model(b)
    if isinstance(b, Program):
        relations, transforms = b.relations, b.transforms
    else:
        written = _certificate_of(b, None) or {}
        relations, transforms = written.get("relations"), written.get("transforms")
    sets = _inputs(first, inputs)
    return diff_models(first, second, sets, relations=relations, transforms=transforms, layers=layers)


def _model(source: Any) -> ir.Model:
    """The graph to compare: a program's own, a file's, or a capture of anything else."""
    if isinstance(source, Program):
        return source.model
    if isinstance(source, ir.Model):
        return source
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".onnx" or (path / MODEL).is_file():
            return _load(path if path.suffix == ".onnx" else path / MODEL)
    return _captured(source).original


def read_report(out: str | Path) -> Report:
    """The report that a conversion wrote into `out`."""
    from rewrite.report import Report

    return Report.from_json((Path(out) / REPORT).read_text(encoding="utf-8"))


__all__ = ["Lowered", "Result", "Verification", "apply", "convert", "diff", "explain", "json", "lower", "verify"]
