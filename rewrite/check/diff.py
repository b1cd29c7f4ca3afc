"""The difference of two models over the same inputs, judged by the first one's own rounding.

Three numbers per output: the difference in float64 (weights as stored), the same with unrounded weights where the
second model still holds them as expressions, and the error of its run in ONNX Runtime over that of the first's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from rewrite.check.compare import DIFFERENT, SEVERITY, WITHIN, Comparison, compare
from rewrite.check.localize import Localization, Step, localize
from rewrite.check.noise import Noise, TwoPrecisions, norm, two_precisions, typical, unit_roundoff
from rewrite.check.plot import Point, error_plot
from rewrite.check.reference import evaluate, storage_dtype
from rewrite.check.runtime import Session, is_runnable, unoptimized
from rewrite.ir.weights import (
    Concat,
    ConvertedTensor,
    MaterializedTensor,
    Reshape,
    Slice,
    Source,
    Stack,
    Transpose,
    Weight,
)

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class OutputRow:
    """One output on one set of inputs.

    `exact` judges b in float64, `run` judges b as ONNX Runtime runs it (None where it cannot), both against a in
    float64; `precisions` is the bug test with unrounded weights (None where b has none).
    """

    output: str
    inputs: int
    exact: Comparison
    run: Comparison | None
    precisions: TwoPrecisions | None

    @property
    def verdict(self) -> str:
        """The worst of the three judgements."""
        verdicts = [self.exact.verdict] + ([self.run.verdict] if self.run else [])
        if self.precisions is not None and self.precisions.is_bug:
            verdicts.append(DIFFERENT)
        return max(verdicts, key=SEVERITY.index)

    @property
    def reason(self) -> str:
        """Why the verdict is not "within noise"."""
        if self.precisions is not None and self.precisions.is_bug:
            return str(self.precisions)
        worst = [c for c in (self.exact, self.run) if c is not None and c.verdict == self.verdict]
        return worst[0].reason if worst else ""


@dataclass(frozen=True)
class Difference:
    """Rows per output and set of inputs, and with `layers` the values compared on the way (of the first set)."""

    rows: tuple[OutputRow, ...]
    layers: Localization | None = None

    @property
    def verdict(self) -> str:
        """The worst row's verdict."""
        return max((row.verdict for row in self.rows), key=SEVERITY.index, default=DIFFERENT)

    @property
    def equal(self) -> bool:
        """Whether every output is within the noise."""
        return self.verdict == WITHIN

    def plot(self) -> str:
        """The per-layer errors as SVG text; empty without `layers`."""
        rows = self.layers.rows if self.layers else ()
        return error_plot([Point(row.name, row.relative, row.noise, row.departs) for row in rows])

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        rows = [
            {
                "output": row.output,
                "inputs": row.inputs,
                "verdict": row.verdict,
                "reason": row.reason,
                "relative_error_float64": row.exact.relative,
                "noise_ratio_float64": row.exact.noise_ratio,
                "noise_ratio_run": row.run.noise_ratio if row.run else None,
                "relative_error_run": row.run.relative if row.run else None,
            }
            for row in self.rows
        ]
        layers = None
        if self.layers is not None:
            first = self.layers.first
            layers = {"compared": len(self.layers.rows), "first": vars(first) if first else None}
        return {"verdict": self.verdict, "equal": self.equal, "outputs": rows, "layers": layers}

    def __str__(self) -> str:
        width = max([len(row.output) for row in self.rows] + [6])
        lines = [f"{'output':<{width}}  inputs  float64 error  ratio (float64)  ratio (run)  verdict"]
        for row in self.rows:
            run = f"{row.run.noise_ratio:11.2f}" if row.run else f"{'–':>11}"
            reason = f": {row.reason}" if row.reason else ""
            lines.append(
                f"{row.output:<{width}}  {row.inputs:>6}  {row.exact.relative:>13.1e}  {row.exact.noise_ratio:>15.2f}"
                f"  {run}  {row.verdict}{reason}"
            )
        if self.layers is not None:
            lines.append(str(self.layers))
        lines.append(self.verdict)
        return "\n".join(lines)


def diff_models(
    a: ir.Model,
    b: ir.Model,
    inputs: Sequence[Mapping[str, np.ndarray]],
    *,
    relations: Mapping[str, Mapping] | None = None,
    transforms: Mapping[str, Step] | None = None,
    layers: bool = False,
    run: bool = True,
    artifact: str | Path | None = None,
    options: onnxruntime.SessionOptions | None = None,
) -> Difference:
    """Compare `b` with `a` on every set of inputs.

    The noise is a's own error, run unoptimized in ONNX Runtime; without `run`, or where ONNX Runtime has no kernels for
    the type, that of a float32 evaluation scaled to the storage type. b runs with `options` (unoptimized where None)
    and from the file `artifact` where that is given, so that what is deployed is what is judged. Outputs pair by name,
    or by position where no name is shared. `relations` and `transforms` are those of `localize`.
    """
    pairs = _paired_outputs(a, b)
    unrounded = any(_is_computed(v.const_value) for v in b.graph.initializers.values())
    references = [evaluate(a, one) for one in inputs]
    run = run and is_runnable(a) and is_runnable(b)
    dtype = storage_dtype(a)
    runs_a = _runs(a, inputs) if run else [_imitated(a, *pair, dtype) for pair in zip(inputs, references)]
    runs_b = _runs(b if artifact is None else artifact, inputs, options) if run else None
    noises = _noises(references, runs_a, None if run else dtype)
    rows = []
    for index, one in enumerate(inputs):
        exact = evaluate(b, one)
        free = (evaluate(a, one, unrounded=True), evaluate(b, one, unrounded=True)) if unrounded else None
        for name, other in pairs:
            reference, noise = references[index][name], noises[index].get(name)
            if other is None:
                rows.append(OutputRow(name, index, Comparison(DIFFERENT, "missing"), None, None))
                continue
            noise = Noise.floor(reference, dtype) if noise is None else noise
            logits = name == "logits"
            judged = compare(exact[other], reference, reference.dtype, noise)
            ran = None
            if runs_b is not None:
                ran = compare(runs_b[index][other], reference, runs_a[index][name].dtype, noise, classes=logits)
            precisions = None
            if free is not None and reference.dtype.kind == "f" and (ran or judged).verdict != DIFFERENT:
                error = _relative(free[1][other], free[0][name], noise)
                precisions = two_precisions(error, max((ran or judged).relative, noise.relative), noise.dtype)
            rows.append(OutputRow(name, index, judged, ran, precisions))
    located = localize(a, b, inputs[0], relations=relations, transforms=transforms) if layers and inputs else None
    return Difference(tuple(rows), located)


def _is_computed(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor stands for numbers that were not rounded yet: its expression does more than lay out others."""
    if not isinstance(tensor, MaterializedTensor) or isinstance(tensor, ConvertedTensor):
        return False
    parts: list[Weight] = [tensor.weight]
    while parts:
        part = parts.pop()
        if isinstance(part, Concat | Stack):
            parts += part.parts
        elif isinstance(part, Transpose | Reshape | Slice):
            parts.append(part.inner)
        elif not isinstance(part, Source) or _is_computed(part.tensor):
            return True
    return False


def _paired_outputs(a: ir.Model, b: ir.Model) -> list[tuple[str, str | None]]:
    names_a, names_b = ([value.name or "" for value in model.graph.outputs] for model in (a, b))
    if not set(names_a) & set(names_b) and len(names_a) == len(names_b):
        return list(zip(names_a, names_b))
    return [(name, name if name in names_b else None) for name in names_a]


def _runs(
    model: ir.Model | str | Path,
    inputs: Sequence[Mapping[str, np.ndarray]],
    options: onnxruntime.SessionOptions | None = None,
) -> list[dict[str, np.ndarray]]:
    with Session(model, unoptimized() if options is None else options) as session:
        return [session.run(one) for one in inputs]


def _imitated(model: ir.Model, inputs: Mapping, reference: Mapping, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What a run in `dtype` may give: the reference plus the error of a float32 evaluation, scaled by the roundoffs."""
    scale = unit_roundoff(dtype) / unit_roundoff(np.float32)
    narrow = evaluate(model, inputs, precision=np.float32)
    return {
        name: exact + scale * (narrow[name] - exact) if exact.dtype.kind == "f" else exact
        for name, exact in reference.items()
    }


def _noises(references: Sequence[Mapping], runs: Sequence[Mapping], dtype: np.dtype | None) -> list[dict[str, Noise]]:
    """The noise of every floating output per set of inputs, raised to the typical share over the sets.

    `dtype` is the storage type, that of the run's outputs where None.
    """
    noises = [
        {
            name: Noise.of(runs[i][name], reference, dtype)
            for name, reference in outputs.items()
            if reference.dtype.kind == "f" and runs[i][name].shape == reference.shape
        }
        for i, outputs in enumerate(references)
    ]
    for name in {name for found in noises for name in found}:
        share = typical([found[name] for found in noises if name in found])
        for i, found in enumerate(noises):
            if name in found and found[name].is_rounding:
                found[name] = found[name].at_least(*share, references[i][name])
    return noises


def _relative(candidate: np.ndarray, reference: np.ndarray, noise: Noise) -> float:
    where = slice(None) if noise.where is None else noise.where
    if candidate.shape != reference.shape or not np.isfinite(candidate[where]).all():
        return math.inf
    error, size = norm(candidate[where] - reference[where]), norm(reference[where])
    return 0.0 if error == 0 else error / size if size else math.inf
