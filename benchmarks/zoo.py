"""The zoo: every pass on every family that transformers builds and torch exports, each result proved and recomputed.

    python benchmarks/zoo.py [FAMILY …] [--cache FOLDER] [--jobs N] [--capture-only] [--again] [--docs FILE]

Each family (`zoo_families.py`) is built small with non-trivial random weights and captured once, in a process of its
own; the capture is kept in the cache folder. On it, each pass runs alone after the passes it builds on
(`PREREQUISITES`), and the default recipe runs as `rewrite convert` does. Every result is proved, and evaluated in
float64 with unrounded constants against the capture: a result that is proved but off by more than `EXACT` is a silent
error, and so is one whose lowered form runs with more noise than `rewrite.check` accepts. The exit status is 1 if there
is one, or a crash; both are named. With `--together`, all passes run in order as well. Results are kept per family, so
that a run that was stopped goes on where it was; they are made anew when the source of `rewrite` has changed since.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs/zoo.md"

EXACT = 1e-9
"""Largest relative error of a proved result in float64: what 1e4 roundings in sequence, amplified by norms, may do."""

CAPTURED = 1e-3
"""Largest relative error of a capture run in float32 against torch: a wrong translation is off by more."""

CAPTURE_SECONDS, TRIAL_SECONDS = 300, 300

Results = dict[str, Any]


# ── What runs ───────────────────────────────────────────────────────────────────────────────────────────────────────

_STREAM = ("fold-scale", "center-residual", "fold-norm")
PREREQUISITES: dict[str, tuple[str, ...]] = {
    "fold-scale": (),
    "center-residual": ("fold-scale",),
    "fold-norm": ("fold-scale", "center-residual"),
}
"""The passes that run before one, where it is not those of the default recipe: a rotation needs γ folded."""


WITHOUT_DATA = ("stabilize-norm",)
"""Passes that run without data, which would say that no stream of a small network comes near the range of fp16."""


def before(name: str) -> tuple[str, ...]:
    """Names of the passes to run before the pass `name`."""
    return PREREQUISITES.get(name, _STREAM)


# ── One family, in a process of its own ─────────────────────────────────────────────────────────────────────────────


def capture(name: str, folder: Path) -> Results:
    """Build, capture and save a family; what came of it, also where torch or our capture refuses."""
    import torch
    import transformers
    from zoo_families import ZOO

    import rewrite
    from rewrite.errors import RewriteError

    transformers.utils.logging.set_verbosity_error()
    begin = time.perf_counter()
    try:
        module, inputs = ZOO[name].build()
        with torch.no_grad():
            expected = {key: value for key, value in module(**inputs).items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # noqa: BLE001 - a catalogue entry that the installed transformers cannot build
        return {"status": "not built", "reason": _line(error)}
    try:
        program = rewrite.capture(module, inputs)
        program.save(folder / "model.onnx")
    except RewriteError as error:
        return {"status": "not captured", "reason": str(error), "seconds": time.perf_counter() - begin}
    except Exception as error:  # noqa: BLE001 - a bug of ours, which is what the zoo is for
        return {"status": "crash", "reason": _line(error), "trace": traceback.format_exc()}
    seconds = time.perf_counter() - begin
    result = {"status": "captured", "seconds": seconds, "nodes": program.original.graph.num_nodes()}
    try:
        result["torch"] = _torch_error(folder / "model.onnx", inputs, expected)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime cannot run it, which is told apart from a wrong result
        result |= {"status": "not run", "reason": _line(error)}
    return result


def _torch_error(path: Path, inputs: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """The largest relative error of the capture in ONNX Runtime against what torch computed."""
    from rewrite.check.runtime import run_original

    found = run_original(path, {key: value.numpy() for key, value in inputs.items()})
    worst = 0.0
    for name in found.keys() & expected.keys():
        reference = expected[name].numpy()
        if found[name].shape != reference.shape:
            return math.inf
        worst = max(worst, relative_error(found[name], reference))
    return worst


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """‖found − reference‖ / ‖reference‖ over the entries that are numbers: finite, and no masking value.

    Integers and booleans are either equal or infinitely wrong.
    """
    from rewrite.check.noise import comparable, norm

    if found.shape != reference.shape:
        return math.inf
    if reference.dtype.kind != "f":
        return 0.0 if np.array_equal(found, reference) else math.inf
    where = comparable(reference, np.float32)
    if not np.isfinite(found[where]).all():
        return math.inf
    error, size = norm(found[where].astype(np.float64) - reference[where]), norm(reference[where].astype(np.float64))
    return 0.0 if error == 0 else error / size if size else math.inf


class Trial:
    """A captured family, with the passes' results on it judged one by one."""

    def __init__(self, program: Any, passes: Sequence[type]) -> None:
        from rewrite.capture.canonicalize import canonicalize
        from rewrite.check.inputs import generate_inputs
        from rewrite.check.reference import evaluate
        from rewrite.check.runtime import Session, unoptimized

        self.program, self.passes = program, {each.name: each for each in passes}
        sets = generate_inputs(program.original, sizes=((2, 11),))
        padded = [one for one in sets[1:] if any((one[n] == 0).any() for n in one if n == "attention_mask")]
        self.inputs = [sets[0], *padded[:1]]
        self.references = [evaluate(program.original, one) for one in self.inputs]
        self.noises: list[dict[str, Any]] | None = None
        try:
            with Session(program.original, unoptimized()) as session:
                self.noises = noises(self.references, [session.run(one) for one in self.inputs])
        except Exception:  # noqa: BLE001 - ONNX Runtime cannot run the original, as the capture says
            self.noises = None
        canonical = program.clone()
        canonicalize(canonical)
        self.canonical = canonical
        self.norms = norms(canonical.model)
        self.verdict, self.error = self.judged(canonical)
        self._after: dict[tuple[str, ...], Any] = {(): canonical}
        self._steps: dict[tuple[str, ...], Results] = {}

    def ran(self, work: Any) -> Results:
        """How a program runs, lowered, in ONNX Runtime: the largest noise ratio of an output, and the worst verdict."""
        import rewrite
        from rewrite.check.compare import SEVERITY, compare
        from rewrite.check.runtime import Session
        from rewrite.targets import session_options

        if self.noises is None:
            return {}
        compared = []
        with tempfile.TemporaryDirectory(prefix="rewrite-zoo-") as folder:
            path = rewrite.lower(work).save(folder)
            # Flushing denormals would also flush those of this process, and with them what is compared.
            options = session_options(folder, config={"session.set_denormal_as_zero": "0"})
            with Session(path, options) as session:
                for one, reference, noise in zip(self.inputs, self.references, self.noises):
                    found = session.run(one)
                    for name, exact in reference.items():
                        dtype = noise[name].dtype if name in noise else exact.dtype
                        compared.append(compare(found[name], exact, dtype, noise.get(name)))
        ratios = [max(each.noise_ratio, each.peak_ratio) for each in compared]
        verdict = max((each.verdict for each in compared), key=SEVERITY.index)
        return {"noise": max((each for each in ratios if not math.isnan(each)), default=None), "numerical": verdict}

    def judged(self, work: Any) -> tuple[Any, float]:
        """The verdict of the proof, and the largest relative error of an output in float64 with unrounded constants."""
        from rewrite.check.reference import evaluate
        from rewrite.proof import prove

        named = {value.name for node in work.original.graph for value in node.outputs}
        claims = {name: relation for name, relation in work.relations.items() if name in named}
        proof = prove(work.original, work.model, claims=claims, transforms=work.transforms)
        worst = 0.0
        for one, reference in zip(self.inputs, self.references):
            found = evaluate(work.model, one, unrounded=True)
            worst = max([worst, *(relative_error(found[name], array) for name, array in reference.items())])
        return proof.verdict, worst

    def step(self, names: tuple[str, ...]) -> Results:
        """What the last pass of `names` does after those before it, each of which is kept only where it is proved."""
        from rewrite.calibrate import calibrated
        from rewrite.rule import apply_pass

        if names not in self._steps:
            begin, work = time.perf_counter(), self.after(names[:-1]).clone()
            rule = self.passes[names[-1]]()
            rule = rule if rule.name in WITHOUT_DATA else calibrated(rule, work, self.inputs[:1])
            outcomes = apply_pass(work, rule)
            refused = [outcome.to_json() for outcome in outcomes if not _applied(outcome)]
            applied, kept = len(outcomes) - len(refused), False
            result: Results = {"applied": applied, "refused": refused, "status": "refused" if refused else "no site"}
            if applied:
                verdict, error = self.judged(work)
                kept, measured = verdict.holds, self.ran(work) if verdict.holds else {}
                state = status(str(verdict), error, measured.get("numerical"))
                result |= {"verdict": str(verdict), "node": verdict.node, "cause": verdict.reason, "error": error}
                result |= {**measured, "status": state}
            self._after[names] = work if kept else self._after[names[:-1]]
            self._steps[names] = result | {"kept": kept, "seconds": time.perf_counter() - begin}
        return self._steps[names]

    def after(self, names: tuple[str, ...]) -> Any:
        """The program after passes that are each kept only if the result is proved, as `rewrite.apply` does."""
        if names not in self._after:
            self.step(names)
        return self._after[names]

    def run(self, name: str) -> Results:
        """What a pass does after its prerequisites."""
        return self.step((*(each for each in before(name) if each in self.passes), name))

    def together(self) -> Results:
        """Every pass in order: what they make of each other's networks.

        Where the proof does not follow the whole, passes that it does not follow alone are left out, and where that is
        not enough, each pass is kept only if it is proved after those before it.
        """
        from rewrite.rule import apply_pass

        names = tuple(self.passes)
        alone = tuple(name for name in names if self.run(name)["status"] not in ("not proved", "wrong, not proved"))
        for chosen in dict.fromkeys((names, alone)):
            work = self.canonical.clone()
            kept = sum(any(map(_applied, apply_pass(work, self.passes[name]()))) for name in chosen)
            verdict, error = self.judged(work)
            if verdict.holds or not error <= EXACT:
                return {"status": status(str(verdict), error), "verdict": str(verdict), "error": error, "kept": kept}
        verdict, error = self.judged(self.after(names))
        kept = sum(self._steps[names[: count + 1]]["kept"] for count in range(len(names)))
        return {"status": status(str(verdict), error), "verdict": str(verdict), "error": error, "kept": kept}

    def default(self, folder: Path) -> Results:
        """`rewrite convert` with the default recipe: what it proves of the artifact, and how that runs."""
        import rewrite
        from rewrite.capture.onnx_file import load_onnx
        from rewrite.recipes import RECIPES

        report = rewrite.convert(self.program, folder / "out", inputs=self.inputs)
        artifact = load_onnx(folder / "out" / "model.onnx")
        work = self.after(tuple(name for name in RECIPES["default"] if name in self.passes))
        error = self.judged(work)[1]
        return {
            "status": status(report.verdict, error, report.numerical),
            "verdict": report.verdict,
            "error": error,
            "norms": norms(work.model),
            "nodes": artifact.graph.num_nodes(),
            "noise": report.worst_noise_ratio,
            "numerical": report.numerical,
            "undone": [row.pass_name for row in report.refused if row.requirement == "PROOF"],
        }


def noises(references: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What rounding did to every floating output of the original, as `rewrite.check` counts it."""
    from rewrite.check.noise import Noise, typical

    found = [
        {name: Noise.of(run[name], exact) for name, exact in reference.items() if exact.dtype.kind == "f"}
        for reference, run in zip(references, runs)
    ]
    for name in {name for each in found for name in each}:
        share = typical([each[name] for each in found])
        for each, reference in zip(found, references):
            each[name] = each[name].at_least(*share, reference[name]) if each[name].is_rounding else each[name]
    return found


def status(verdict: str, error: float, numerical: str | None = None) -> str:
    """What a verdict, a float64 error and a run amount to; an error that is not a number counts as too large."""
    from rewrite.check.compare import ABOVE, DIFFERENT

    right = error <= EXACT and numerical not in (ABOVE, DIFFERENT)
    if verdict.startswith(("BITWISE", "EQUAL")):
        return "proved" if right else "SILENT ERROR"
    return "not proved" if right else "wrong, not proved"


def norms(model: Any) -> dict[str, int]:
    """How many norms of each kind a graph has."""
    kinds = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "BatchNormalization")
    count = Counter(node.op_type for node in model.graph.all_nodes())
    return {kind: count[kind] for kind in kinds if count[kind]}


def _applied(outcome: Any) -> bool:
    from rewrite.rule import Applied

    return isinstance(outcome, Applied)


def try_family(
    program: Any,
    passes: Sequence[type],
    keep: Any = lambda result: None,
    together: bool = False,
    known: Results | None = None,
    again: Sequence[str] = (),
) -> Results:
    """Every pass on one captured program, the default recipe, and with `together` all passes in order.

    `keep(result)` sees it grow. Given `known`, an earlier result, only the passes `again` run, and the default recipe.
    """
    result: Results = {"passes": dict(known["passes"]) if known is not None else {}}
    try:
        trial = Trial(program, passes)
    except Exception as error:  # noqa: BLE001 - a crash is a result here
        return {**_crash(error), "passes": {}}
    verdict = status(str(trial.verdict), trial.error)
    result |= {"status": verdict, "verdict": str(trial.verdict), "error": trial.error, "norms": trial.norms}
    for each in passes if known is None else [each for each in passes if each.name in again]:
        keep(result | {"running": each.name})
        try:
            result["passes"][each.name] = trial.run(each.name)
        except Exception as error:  # noqa: BLE001 - as above
            result["passes"][each.name] = {"applied": 0, "refused": [], **_crash(error)}
    with tempfile.TemporaryDirectory(prefix="rewrite-zoo-") as folder:
        parts: dict[str, Any] = {"default": lambda: trial.default(Path(folder))}
        if together:
            parts["together"] = trial.together
        for part, attempt in parts.items():
            keep(result | {"running": part})
            try:
                result[part] = attempt()
            except Exception as error:  # noqa: BLE001 - as above
                result[part] = _crash(error)
    return result


def _crash(error: Exception) -> Results:
    """A crash, unless `rewrite` says itself what it cannot do."""
    from rewrite.errors import RewriteError

    if isinstance(error, RewriteError):
        return {"status": "declined", "reason": str(error)}
    return {"status": "crash", "reason": _line(error), "trace": traceback.format_exc()}


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


# ── All families ────────────────────────────────────────────────────────────────────────────────────────────────────


def source_digest() -> str:
    """A digest of everything a result depends on besides the capture."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted([*ROOT.glob("rewrite/**/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("targets/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> Results | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(path: Path, result: Results) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    os.replace(unfinished, path)


def _worker(arguments: list[str], seconds: float) -> tuple[int | None, str]:
    """Run this script in another process; its exit status (None: out of time) and the end of what it wrote."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"out of time after {seconds:.0f} s"
    return done.returncode, done.stderr.strip()[-2000:]


def captured(name: str, cache: Path, again: bool) -> Results:
    """The capture of a family: the one in the cache, or a new one."""
    folder = cache / name
    known = _read(folder / "capture.json")
    if known is not None and not again:
        return known
    making = cache / f"{name}.making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    code, text = _worker(["--worker", "capture", name, "--cache", str(making)], CAPTURE_SECONDS)
    result = _read(making / "capture.json")
    if result is None:
        reason = text.splitlines()[-1] if text else f"exit status {code}"
        result = {"status": "not captured" if code is None else "crash", "reason": reason}
        _write(making / "capture.json", result)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return result


def tried(name: str, cache: Path, digest: str, keep: bool, together: bool, again: Sequence[str]) -> Results:
    """What the passes do on a captured family: the result in the cache if nothing changed since, or a new one."""
    path = cache / name / "result.json"
    known = _read(path)
    whole = known is not None and "running" not in known and ("together" in known or not together)
    names = _again(again, known) if known is not None and whole else []
    if known is not None and whole and not names and (keep or again or known.get("digest") == digest):
        return known
    if not names:
        path.unlink(missing_ok=True)
    begin = time.perf_counter()
    options = ["--together"] * together + (["--passes", *names] if names else [])
    code, text = _worker(["--worker", "try", name, "--cache", str(cache), *options], TRIAL_SECONDS)
    result = _read(path) or {"passes": {}}
    if code != 0 or "running" in result:
        where = result.pop("running", "start")
        reason = text.splitlines()[-1] if text else f"exit status {code}"
        result |= {"status": "crash", "reason": f"{where}: {reason}", "trace": text}
    result |= {"digest": digest, "seconds": time.perf_counter() - begin}
    _write(path, result)
    return result


def _again(asked: Sequence[str], known: Results) -> list[str]:
    """The passes of an earlier result that `--passes` asks for: by name, and those that were not proved."""
    states = {name: found["status"] for name, found in known["passes"].items()}
    if "unproved" in asked:
        return [name for name, state in states.items() if name in asked or "not proved" in state]
    return [name for name in states if name in asked]


def work(kind: str, name: str, folder: Path, together: bool, again: Sequence[str]) -> None:
    """What a worker process does."""
    if kind == "capture":
        _write(folder / "capture.json", capture(name, folder))
        return
    from rewrite.capture.onnx_file import load_onnx
    from rewrite.ir.program import Program
    from rewrite.passes import PASSES

    path = folder / name / "result.json"
    program = Program.captured(load_onnx(folder / name / "model.onnx"), name)
    known = _read(path) if again else None
    _write(path, try_family(program, PASSES, lambda result: _write(path, result), together, known, again))


def faults(name: str, result: Results) -> list[str]:
    """Silent errors and crashes of a family, a line each."""
    lines = []
    for part, found in _parts(result).items():
        if found.get("status") == "SILENT ERROR":
            ran = f"; run: {found['numerical']}, {found.get('noise', math.nan):.3g}" if "numerical" in found else ""
            lines.append(f"{name}, {part}: SILENT ERROR, {found['verdict']}, float64 error {found['error']:.1e}{ran}")
        elif found.get("status") == "crash":
            lines.append(f"{name}, {part}: crash, {found['reason']}")
    return lines


def _parts(result: Results) -> dict[str, Results]:
    whole = {"default recipe": result.get("default", {}), "all passes": result.get("together", {})}
    return {"canonical form": result, **result.get("passes", {}), **whole}


def suspects(name: str, result: Results) -> list[str]:
    """Results that are wrong and that the proof did not let pass, and captures that are not what torch computes."""
    lines = []
    for part, found in _parts(result).items():
        if found.get("status") == "wrong, not proved":
            lines.append(f"{name}, {part}: off by {found['error']:.1e}, and rightly not proved: {found['verdict']}")
    return lines


# ── The page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def page(captures: Mapping[str, Results], results: Mapping[str, Results], kinds: Mapping[str, str], known: int) -> str:
    """docs/zoo.md; `known` is how many families the catalogue has."""
    passes = list(dict.fromkeys(name for result in results.values() for name in result.get("passes", {})))
    found = [line for name, result in results.items() for line in faults(name, result)]
    caught = [line for name, result in results.items() for line in suspects(name, result)]
    nodes = {name: captures.get(name, {}).get("nodes", 0) for name in results}
    lines = ["# The zoo", "", *_summary(results, kinds, passes, found, caught, known)]
    lines += ["", "## Passes", "", *_passes(results, passes)]
    lines += ["", "## Families", "", *_families(captures, results, kinds)]
    lines += ["", "## Passes on families", "", *_matrix(results, passes)]
    lines += ["", "## Where a requirement does not hold", "", *_reasons(results)]
    lines += ["", "## Where the proof does not follow", "", *_unproved(results, nodes)]
    left = {name: each for name, each in captures.items() if name not in results}
    if left:
        lines += ["", "## Not captured", "", "| family | what came of it | reason |", "|---|---|---|"]
        lines += [f"| {name} | {each['status']} | {_cell(each.get('reason', ''))} |" for name, each in left.items()]
    return "\n".join(lines) + "\n"


def _summary(
    results: Mapping[str, Results],
    kinds: Mapping[str, str],
    passes: Sequence[str],
    found: Sequence[str],
    caught: Sequence[str],
    known: int,
) -> Iterable[str]:
    from importlib.metadata import version

    from rewrite.check.noise import NOISE_LIMIT

    chosen = "" if len(results) == known else "FAMILY … "
    yield f"Written by `python benchmarks/zoo.py {chosen}--docs docs/{DOCS.name}`, from small networks with"
    yield "non-trivial random weights: each family is captured, each pass runs on it after the passes it builds on,"
    yield f"every result is proved and evaluated in float64 with unrounded constants (bound: {EXACT:.0e}) and runs,"
    yield "lowered, in ONNX Runtime; the default recipe is converted and checked as a user would."
    yield ""
    count = Counter(kinds[name] for name in results)
    trials = [each for result in results.values() for each in result.get("passes", {}).values()]
    states = Counter(each["status"] for each in trials)
    equal = sum(result.get("default", {}).get("status") == "proved" for result in results.values())
    errors = [e["error"] for r in results.values() for e in (*r["passes"].values(), r) if "error" in e]
    finite = [error for error in errors if error <= EXACT]
    yield f"* {len(results)} families, of {known} in `benchmarks/zoo_families.py`:"
    yield f"  {', '.join(f'{n} {kind}' for kind, n in count.items())};"
    libraries = ("transformers", "torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "numpy")
    yield f"  {', '.join(f'{each} {version(each)}' for each in libraries)}."
    yield f"* {len(passes)} passes, {len(trials)} runs: {states['proved']} applied and proved, {states['refused']}"
    yield f"  refused with a reason, {states['no site']} without a site, {states['not proved']} applied and undone:"
    yield "  the proof does not follow them (a refusal with the reason PROOF)."
    yield f"* Largest float64 error of a proved result: {max(finite, default=0.0):.1e}; largest noise ratio:"
    ratios = [each["noise"] for each in trials if each.get("noise") is not None]
    yield f"  {max(ratios, default=0.0):.2f}, of norms or of largest entries ({NOISE_LIMIT:g} is accepted)."
    yield f"* Default recipe, lowered: proved on {equal} of {len(results)} families."
    yield f"* Silent errors: {sum('SILENT' in line for line in found)}. Crashes: {sum('crash' in x for x in found)}."
    yield f"* Results that are wrong and that the proof refused: {len(caught)}."
    for line in (*found, *caught):
        yield f"  * {_cell(line)}"
    yield ""
    yield "Captures are cached, so that a rerun takes minutes; `--again` captures anew, `--help` says the rest."


def _passes(results: Mapping[str, Results], passes: Sequence[str]) -> Iterable[str]:
    yield "Families where the pass was applied and proved, at how many sites; where it refused every site, had none, or"
    yield "was undone because the proof does not follow it. Error: the largest in float64. Noise: median and largest."
    yield ""
    yield "| pass | proved | sites | refused | no site | PROOF | error | noise | largest on |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---|"
    for each in passes:
        tried = {name: result["passes"][each] for name, result in results.items() if each in result.get("passes", {})}
        states = Counter(found["status"] for found in tried.values())
        proved = {name: found for name, found in tried.items() if found["status"] == "proved"}
        sites = sum(found["applied"] for found in proved.values())
        error = max((found["error"] for found in proved.values()), default=None)
        noise = sorted((found["noise"], name) for name, found in proved.items() if found.get("noise") is not None)
        shown = (f"{noise[len(noise) // 2][0]:.2f}, {noise[-1][0]:.2f}", noise[-1][1]) if noise else ("", "")
        counts = (states["proved"], sites, states["refused"], states["no site"], states["not proved"])
        yield f"| {each} | {' | '.join(map(str, counts))} | {_number(error)} | {' | '.join(shown)} |"


def _families(
    captures: Mapping[str, Results], results: Mapping[str, Results], kinds: Mapping[str, str]
) -> Iterable[str]:
    from rewrite.check.compare import ABOVE, DIFFERENT

    yield "LN, RMS, GN, BN: norms of the canonical form, before and after the default recipe. Undone: a pass of it that"
    yield "the proof does not follow. Error: relative, float64, exact constants. Noise: the artifact's rounding error"
    yield "over the original's. torch: relative error of the capture in float32."
    yield ""
    yield "| family | kind | nodes | default recipe | norms | error | noise | torch |"
    yield "|---|---|---:|---|---|---:|---:|---:|"
    for name, result in results.items():
        done, made = result.get("default", {}), captures.get(name, {})
        after = f"{made.get('nodes', '?')} → {done['nodes']}" if "nodes" in done else f"{made.get('nodes', '?')}"
        undone = "".join(f"; undone: {each}" for each in done.get("undone", ()))
        noise = _ratio(done.get("noise")) + (
            f" {done['numerical']}" if done.get("numerical") in (ABOVE, DIFFERENT) else ""
        )
        numbers = (_number(done.get("error")), noise, _number(made.get("torch")))
        cells = (name, kinds[name], after, _verdict(done) + undone, _norms(result, done), *numbers)
        yield f"| {' | '.join(cells)} |"


def _verdict(found: Results) -> str:
    if found.get("status") == "declined":
        return _cell(f"declined: {found['reason']}")
    if found.get("status") in ("crash", "SILENT ERROR", None):
        return f"**{found.get('status', 'crash')}**"
    kind = found["verdict"].split("(")[0].split(" ")[0]
    return kind if found["status"] == "proved" else f"{kind}: {_cell(found['verdict'])[:120]}"


_SHORT = {"LayerNormalization": "LN", "RMSNormalization": "RMS", "GroupNormalization": "GN", "BatchNormalization": "BN"}


def _norms(result: Results, done: Results) -> str:
    first, last = result.get("norms", {}), done.get("norms", {})
    kinds = [kind for kind in _SHORT if kind in first or kind in last]
    return ", ".join(f"{_SHORT[kind]} {first.get(kind, 0)} → {last.get(kind, 0)}" for kind in kinds)


def _matrix(results: Mapping[str, Results], passes: Sequence[str]) -> Iterable[str]:
    yield "A number: sites where the pass was applied, proved, and equal in float64; after × the noise ratio of the"
    yield "lowered network. Then the requirements that refused sites. –: the network has no such site. PROOF: applied,"
    yield "not followed by the proof, hence undone."
    whole = any("together" in result for result in results.values())
    if whole:
        yield "All: every pass in order, each kept where the proof follows: how many were, and the whole's verdict."
    yield ""
    yield "| family | " + " | ".join(passes) + " |" + " all |" * whole
    yield "|---|" + "---|" * (len(passes) + whole)
    for name, result in results.items():
        cells = [_tried(result.get("passes", {}).get(each)) for each in passes]
        last = result.get("together", {})
        yield f"| {name} | {' | '.join(cells)} |" + f" {last.get('kept', '')} {_verdict(last)} |" * whole


def _tried(found: Results | None) -> str:
    if found is None:
        return "?"
    if found["status"] in ("crash", "SILENT ERROR", "declined"):
        return f"**{found['status']}**"
    if found["status"] in ("not proved", "wrong, not proved"):
        return "PROOF"
    reasons = sorted({each["requirement"] for each in found["refused"]})
    noise = f" ×{found['noise']:.1f}" if found.get("noise") is not None else ""
    return " ".join([f"{found['applied']}{noise}"] * bool(found["applied"]) + reasons) or "–"


def _reasons(results: Mapping[str, Results]) -> Iterable[str]:
    texts: dict[tuple[str, str], tuple[str, int, str]] = {}
    for name, result in results.items():
        for each, found in result.get("passes", {}).items():
            for refusal in found.get("refused", ()):
                key = (each, refusal["requirement"])
                text, count, example = texts.get(key, (refusal["text"], 0, f"{name}: {refusal['reason']}"))
                texts[key] = (text, count + 1, example)
    yield "| pass | reason | requirement | sites refused | for example |"
    yield "|---|---|---|---:|---|"
    for (each, requirement), (text, count, example) in sorted(texts.items()):
        yield f"| {each} | {requirement} | {_cell(text)} | {count} | {_cell(example)} |"


def unproved(results: Mapping[str, Results], nodes: Mapping[str, int]) -> list[tuple[str, str, list[str], str]]:
    """Pass, cause, families (the smallest first) and that one's node, of what the proof does not follow; the most
    frequent first."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, result in results.items():
        for each, trial in result.get("passes", {}).items():
            if trial.get("status") in ("not proved", "wrong, not proved"):
                found.setdefault((each, _general(trial["cause"])), {})[name] = trial["node"]
    rows = []
    for (each, cause), places in found.items():
        names = sorted(places, key=lambda name: (nodes.get(name, 0), name))
        rows.append((each, cause, names, places[names[0]]))
    return sorted(rows, key=lambda row: (-len(row[2]), row[0], row[1]))


_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_NAMED = re.compile(rf"(?<![\w.])(?:(?P<number>{_NUMBER})|\w+(?:[./]\w+)+)(?![\w.])")


def _general(cause: str) -> str:
    """A reason without the names and numbers of one network."""
    return _NAMED.sub(lambda match: "n" if match["number"] else "…", cause)


def _unproved(results: Mapping[str, Results], nodes: Mapping[str, int]) -> Iterable[str]:
    yield "| pass | the proof says | families | for example |"
    yield "|---|---|---:|---|"
    for each, cause, names, node in unproved(results, nodes):
        yield f"| {each} | {_cell(cause)} | {len(names)} | {names[0]}, at {_cell(node)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace(str(ROOT), ".")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


# ── Command line ────────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="names in zoo_families.py; all by default")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rewrite-zoo", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2, help="families tried at a time; captures run one at a time")
    parser.add_argument("--capture-only", action="store_true", help="fill the cache and stop")
    parser.add_argument("--cached-only", action="store_true", help="leave out families that are not in the cache")
    parser.add_argument("--again", action="store_true", help="capture anew")
    parser.add_argument("--keep", action="store_true", help="keep results of another version of the source")
    parser.add_argument("--together", action="store_true", help="all passes in order on each family as well")
    parser.add_argument(
        "--passes", nargs="+", default=[], metavar="PASS", help="run these again, and what was 'unproved'"
    )
    parser.add_argument("--docs", type=Path, default=None, metavar="FILE", help=f"write the page, {DOCS.name} say")
    parser.add_argument("--worker", choices=("capture", "try"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.families[0], given.cache, given.together, given.passes)
        return 0
    given.cache.mkdir(parents=True, exist_ok=True)
    from zoo_families import ZOO

    if unknown := [name for name in given.families if name not in ZOO]:
        parser.error(f"no family {unknown[0]}")
    names = given.families or list(ZOO)
    captures: dict[str, Results] = {}
    for name in names:
        if given.cached_only and not (given.cache / name / "capture.json").is_file():
            continue
        new = given.again or not (given.cache / name / "capture.json").is_file()
        captures[name] = captured(name, given.cache, given.again)
        if new:
            made = captures[name]
            print(f"{name}: {made['status']} {made.get('reason', '')} in {made.get('seconds', 0):.0f} s", flush=True)
    if given.capture_only:
        return 0
    usable = [name for name, made in captures.items() if (given.cache / name / "model.onnx").is_file()]
    digest, results = source_digest(), {}
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        waiting = {
            name: pool.submit(tried, name, given.cache, digest, given.keep, given.together, given.passes)
            for name in usable
        }
        for name, future in waiting.items():
            results[name] = future.result()
            done = results[name].get("default", {})
            print(f"{name}: {done.get('verdict', results[name]['status'])}", *faults(name, results[name]), flush=True)
    if given.docs:
        kinds = {name: ZOO[name].kind for name in results}
        given.docs.write_text(page(captures, results, kinds, len(ZOO)), encoding="utf-8")
    found = [line for name, result in results.items() for line in faults(name, result)]
    for name, made in captures.items():
        if made["status"] == "crash":
            found.append(f"{name}: crash in capture, {made['reason']}")
        if made.get("torch", 0.0) > CAPTURED:
            found.append(f"{name}: the capture differs from torch by {made['torch']:.1e}")
    for line in (*(line for name, result in results.items() for line in suspects(name, result)), *found):
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
