"""Every quantization preset on the families of the zoo: what is quantized, what is not and why, and what is proved.

    python benchmarks/zoo_presets.py [FAMILY …] [--cache FOLDER] [--jobs N] [--docs FILE]

Captures are those of `benchmarks/zoo.py`, from its cache. Each preset runs with every weight of 256 entries or more, so
that small networks show what large ones would; it is calibrated on three generated sets, lowered, proved, and run in
ONNX Runtime. Weights are random: the dB say that nothing is broken, not how good a format is. The exit status is 1 if
anything crashes, or if what is proved is off by as much as it is large.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

PRESETS = ("int8-dynamic", "int8-static", "int4-weight", "int4-weight-int8-activation")

LEAST_ENTRIES = 256


@dataclasses.dataclass(frozen=True)
class Row:
    """What one preset made of one family: weights quantized and in all, the worst output's SQNR, and the verdict."""

    family: str
    preset: str
    quantized: int = 0
    weights: int = 0
    decibels: float = math.nan
    verdict: str = ""
    reasons: tuple[str, ...] = ()
    crash: str = ""


def tried(family: str, cache: Path) -> list[Row]:
    """All presets on one family."""
    from rewrite.capture.onnx_file import load_onnx
    from rewrite.check.inputs import generate_inputs
    from rewrite.check.reference import evaluate
    from rewrite.ir.program import Program

    try:
        program = Program.captured(load_onnx(cache / family / "model.onnx"), family)
        sets = generate_inputs(program.original)[:3]
        exact = evaluate(program.original, sets[-1])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the page has to say
        return [Row(family, preset, crash=f"{type(error).__name__}: {error}".splitlines()[0]) for preset in PRESETS]
    return [_tried(program, preset, sets, exact) for preset in PRESETS]


def _tried(program, preset: str, sets: Sequence[dict[str, np.ndarray]], exact: dict[str, np.ndarray]) -> Row:
    from rewrite import pipeline
    from rewrite.check.runtime import Session
    from rewrite.passes import APPROXIMATIONS
    from rewrite.recipes import passes_of
    from rewrite.targets import session_options

    names = {each.name for each in APPROXIMATIONS}
    steps = [dataclasses.replace(s, minimum=LEAST_ENTRIES) if s.approximates else s for s in passes_of(None, preset)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = pipeline.convert(program, Path(folder) / "out", passes=steps, inputs=sets, check=False, force=True)
            path = Path(folder) / "out" / "model.onnx"
            options = session_options(path.parent, config={"session.set_denormal_as_zero": "0"})
            with Session(path, options) as session:
                found = session.run(sets[-1])
    except Exception as error:  # noqa: BLE001 - as above
        traceback.print_exc()
        return Row(program.source, preset, crash=f"{type(error).__name__}: {error}".splitlines()[0])
    rows = [row for row in report.sites if row.pass_name in names]
    refused = Counter(_reason(row.requirement, row.reason) for row in rows if row.outcome != "applied")
    return Row(
        program.source,
        preset,
        sum(row.outcome == "applied" for row in rows),
        len(rows),
        min(
            (_decibels(found[name], array) for name, array in exact.items() if array.dtype.kind == "f"),
            default=math.inf,
        ),
        report.verdict,
        tuple(f"{reason} ({count})" for reason, count in refused.most_common()),
    )


UNPROVED = "the proof does not follow"


def _reason(requirement: str, reason: str) -> str:
    return f"{UNPROVED}: {reason}" if requirement == "PROOF" else reason


def _decibels(found: np.ndarray, exact: np.ndarray) -> float:
    """SQNR over the entries that are finite and no masks."""
    where = np.isfinite(exact) & (np.abs(exact) < 1e30)
    signal, error = exact[where], np.asarray(found, np.float64)[where] - exact[where]
    if not signal.any() or not error.any():
        return math.inf
    return 10 * math.log10(float(signal @ signal) / float(error @ error))


def page(rows: Sequence[Row]) -> str:
    """The page in Markdown."""
    families = sorted({row.family for row in rows})
    crashes = [row for row in rows if row.crash]
    undone = [row for row in rows if any(reason.startswith(UNPROVED) for reason in row.reasons)]
    modulo = [row for row in rows if row.verdict.startswith("EQUAL_MODULO")]
    lines = [
        "# The zoo, quantized",
        "",
        "Written by `python benchmarks/zoo_presets.py --docs docs/zoo-quantized.md`: every preset on small networks",
        "with random weights, calibrated on generated inputs. Each cell: weights quantized of all, and the SQNR in dB",
        "of the worst output. ‡ marks a verdict that declares nothing: nothing could be quantized, or the proof does",
        "not follow and what was done is undone.",
        "",
        f"* {len(families)} families, {len(rows)} runs: {len(modulo)} EQUAL_MODULO their sites,"
        f" {len(crashes)} crashes.",
        "",
        f"| family | {' | '.join(PRESETS)} |",
        f"|---|{'---|' * len(PRESETS)}",
    ]
    by_place = {(row.family, row.preset): row for row in rows}
    for family in families:
        cells = [_cell(by_place[family, preset]) for preset in PRESETS if (family, preset) in by_place]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", "## Why weights stay in floating point", "", *_reasons(rows)]
    if undone:
        lines += ["", "## What the proof does not follow", ""]
        lines += sorted({f"* {row.family}: {row.reasons[0]}" for row in undone})
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.crash:
        return f"crash: {row.crash[:60]}"
    mark = "" if row.verdict.startswith("EQUAL_MODULO") else "‡"
    return f"{row.quantized}/{row.weights}, {row.decibels:.0f}{mark}"


def _reasons(rows: Iterable[Row]) -> list[str]:
    found: dict[str, set[str]] = {}
    for row in rows:
        for reason in row.reasons:
            words = "".join("…" if letter.isdigit() else letter for letter in reason.rpartition(" (")[0])
            while "……" in words:
                words = words.replace("……", "…")
            found.setdefault(words, set()).add(row.family)
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [f"* {reason}: {len(families)} families" for reason, families in ordered[:40]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("families", nargs="*", help="names of captured families; all in the cache by default")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "rewrite-zoo", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", type=Path, default=None, metavar="FILE")
    chosen = parser.parse_args()
    captured = sorted(path.parent.name for path in chosen.cache.glob("*/model.onnx"))
    families = chosen.families or captured
    if not families:
        parser.error(f"{chosen.cache} holds no captures: run benchmarks/zoo.py --capture-only first")
    rows: list[Row] = []
    with concurrent.futures.ProcessPoolExecutor(chosen.jobs) as pool:
        waiting = {pool.submit(tried, family, chosen.cache): family for family in families}
        for done in concurrent.futures.as_completed(waiting):
            for row in done.result():
                rows.append(row)
                print(f"{row.family:24} {row.preset:30} {_cell(row)}  {row.verdict[:90]}", file=sys.stderr, flush=True)
            if chosen.docs is not None:
                chosen.docs.write_text(page(rows), encoding="utf-8")
    print(page(rows))
    return int(any(row.crash or row.decibels < 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
