"""How good an approximated network is, site by site, and whether the runtime computes what its graph says.

The exact network E and the quantized one Q share the names of their values (`places.py`). Four questions:

* *quality*       the artifact as it runs against E as ONNX Runtime runs it, over all sets of inputs
* *runtime*       the artifact as it runs against Q in the float64 reference, on the first sets (`judge_runtime`)
* *local error*   of every site: its weight against what is stored; its products in Q's nodes that read what E computes
                  (teacher-forced); and the same value at the end of all that comes before it (end to end)
* *share*         ‖error of the outputs with this site alone quantized‖² over the sum of these. The sum is that of
                  independent errors: what sites do to each other is not in it.

Local errors and shares are of float32 runs of one switched session (`switched.py`), so those beyond 120 dB are
rounding. Sets are streamed: one at a time is held.

SQNR is 10·log₁₀(Σ exact² / Σ error²) in dB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from rewrite.check.compare import logit_agreement
from rewrite.check.faithful import RuntimeCheck, judge_runtime, squares
from rewrite.check.places import (
    ApproximateSite,
    Place,
    exact_matrix,
    find_sites,
    held_format,
    original_matrix,
    roundings,
    stored_matrix,
)
from rewrite.check.reference import values_of
from rewrite.check.runtime import Session, unoptimized
from rewrite.check.switched import Switched
from rewrite.errors import RequestError

if TYPE_CHECKING:
    import onnxruntime

BINS = 64
"""Of a histogram."""

LOCAL_SETS = 4
"""Sets of inputs that local errors and shares are taken over."""

JUDGED_SETS = 2
"""Sets of inputs that are evaluated in float64, to judge the runtime and for histograms."""

LEAST_ELEMENTS = 256
"""Constants of fewer entries are no weights."""

ORIGINAL, EXACT, STORED = "original", "rewritten", "stored"
"""Of what a histogram is: before the transforms, after them, and what the codes stand for."""

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Histogram:
    """How often entries fall into equal parts of low … high; `peak` is max |x| / median |x|."""

    low: float
    high: float
    counts: tuple[int, ...]
    peak: float

    @classmethod
    def of(cls, values: np.ndarray) -> Histogram | None:
        """Of all finite entries; None where there is none."""
        flat = np.asarray(values).ravel()
        flat = flat[np.isfinite(flat)]
        if not flat.size:
            return None
        low, high = float(flat.min()), float(flat.max())
        counts, _ = np.histogram(flat, BINS, (low, high) if high > low else (low - 1, low + 1))
        middle = float(np.median(np.abs(flat)))
        top = max(abs(low), abs(high))
        return cls(low, high, tuple(int(n) for n in counts), top / middle if middle else math.inf if top else 1.0)


@dataclass(frozen=True)
class OutputQuality:
    """One output of the artifact against the exact network, over all sets; `relative` is over norms.

    Logits have the rest: KL(exact ‖ approximate) in nats a row, and the shares of rows with the same first class and
    of common classes among the first five.
    """

    output: str
    sets: int
    sqnr_db: float
    max_abs: float
    relative: float
    rows: int = 0
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class SiteQuality:
    """One site. NaN or None is what was not measured.

    `name` is the exact weight's name (the value's, where activations alone are rounded), `values` what it computes,
    `codes` the stored tensors. SQNRs in dB: of the weight, of the rounded activations as they arrive, of the product
    with exact inputs, and of the same value in the whole quantized network. `error` is the squared relative error of
    the outputs with this site alone, `share` its part of the sum. `weight` and `activation` are histograms by what
    they are of.
    """

    name: str
    values: tuple[str, ...]
    codes: tuple[str, ...]
    operator: str
    format: str
    activations: str
    elements: int
    bytes: int
    weight_sqnr_db: float = math.nan
    activation_sqnr_db: float = math.nan
    product_sqnr_db: float = math.nan
    end_to_end_sqnr_db: float = math.nan
    error: float | None = None
    share: float | None = None
    weight: dict[str, Histogram] = field(default_factory=dict)
    activation: dict[str, Histogram] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Scales, zero points and corrections counted; NaN without a weight."""
        return 8 * self.bytes / self.elements if self.elements else math.nan


@dataclass(frozen=True)
class FloatWeight:
    """A weight that stayed in floating point, and why."""

    name: str
    elements: int
    bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Approximation:
    """All of it; `sites` worst first. `declared` are the proof's sites in plain types, `data` says what it is measured
    on."""

    outputs: tuple[OutputQuality, ...]
    runtime: RuntimeCheck | None
    sites: tuple[SiteQuality, ...]
    kept: tuple[FloatWeight, ...]
    bytes_before: int
    bytes_after: int
    declared: tuple[dict[str, Any], ...] = ()
    data: str = ""

    @property
    def verdict(self) -> str:
        """The runtime's; empty where nothing was run."""
        return "" if self.runtime is None else self.runtime.verdict

    @property
    def main(self) -> OutputQuality | None:
        """The logits, or the worst output."""
        logits = [row for row in self.outputs if row.top1 is not None]
        return min(logits or self.outputs, key=lambda row: row.sqnr_db, default=None)

    @property
    def elements(self) -> int:
        """Of all weights, approximated or not; one that is stored in both ways counts once."""
        known = {row.name for row in self.sites}
        return sum(row.elements for row in (*self.sites, *(row for row in self.kept if row.name not in known)))

    @property
    def bits_per_weight(self) -> float:
        """Of all weights, those that stayed in floating point too."""
        stored = sum(row.bytes for row in (*(site for site in self.sites if site.elements), *self.kept))
        return 8 * stored / self.elements if self.elements else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite is a string."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Approximation:
        """What `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""
        sites = [
            {
                **row,
                "values": tuple(row["values"]),
                "codes": tuple(row["codes"]),
                **{
                    kind: {name: _histogram(found) for name, found in row[kind].items()}
                    for kind in ("weight", "activation")
                },
            }
            for row in data["sites"]
        ]
        runtime = data["runtime"]
        return cls(
            outputs=tuple(_row(OutputQuality, row) for row in data["outputs"]),
            runtime=None if runtime is None else _row(RuntimeCheck, runtime),
            sites=tuple(_row(SiteQuality, row) for row in sites),
            kept=tuple(_row(FloatWeight, row) for row in data["kept"]),
            bytes_before=data["bytes_before"],
            bytes_after=data["bytes_after"],
            declared=tuple(dict(row) for row in data["declared"]),
            data=str(data["data"]),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Approximation:
        """Raises RequestError for what `to_json` did not write."""
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"is no approximation: {error}", remedy="give what to_json wrote") from error

    def __str__(self) -> str:
        lines = [] if self.runtime is None else [f"{self.verdict}{self.runtime.reason and f': {self.runtime.reason}'}"]
        for row in self.outputs:
            tail = "" if row.top1 is None else f", KL {row.kl_mean:.2e}, top-1 {100 * row.top1:.2f} %"
            lines.append(f"{row.output}: SQNR {row.sqnr_db:.1f} dB, relative error {row.relative:.1e}{tail}")
        lines.append(f"{self.bytes_before:,} → {self.bytes_after:,} bytes, {self.bits_per_weight:.2f} bits a weight")
        for site in self.sites:
            share = "not measured" if site.share is None else f"{100 * site.share:.1f} %"
            lines.append(
                f"  {site.name}  {site.format}  weight {site.weight_sqnr_db:.1f} dB, product "
                f"{site.product_sqnr_db:.1f} dB, end to end {site.end_to_end_sqnr_db:.1f} dB, share {share}"
            )
        lines += [f"  {row.name}  float: {row.reason or 'no pass took it'}" for row in self.kept]
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(cls: Any, data: Mapping[str, Any]) -> Any:
    numbers = {f.name for f in fields(cls) if str(f.type).startswith("float")}
    return cls(**{k: float(v) if k in numbers and v is not None else v for k, v in data.items()})


def _histogram(data: Mapping[str, Any]) -> Histogram:
    return _row(Histogram, {**data, "counts": tuple(data["counts"])})


# ── The whole of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def measure_approximation(
    exact: ir.Model,
    quantized: ir.Model,
    sets: Sequence[Inputs],
    *,
    original: ir.Model | None = None,
    artifact: str | Path | None = None,
    options: onnxruntime.SessionOptions | None = None,
    reasons: Mapping[str, str] | None = None,
    declared: Iterable[Any] = (),
    max_sites: int = 128,
    judged: Sequence[Inputs] | None = None,
    data: str = "",
) -> Approximation:
    """Measure `quantized`, whose sites erased it is `exact`, on `sets` of inputs.

    `artifact` runs with `options` (the quantized graph itself, unoptimized, where absent). `original` is the network
    before its transforms, for histograms of activations. `reasons` says by a weight's name why it stayed in floating
    point, `declared` are the proof's sites. Shares are measured of at most `max_sites` sites, those of the largest
    local error. The runtime is judged on the first `JUDGED_SETS` of `judged`, or of `sets`. `data` says what these are.
    """
    found = find_sites(exact, quantized)
    ran = quantized if artifact is None else artifact
    with Session(ran, unoptimized() if options is None else options) as session, Switched(exact, found) as switched:
        outputs = _quality(exact, switched, session, sets)
        local, errors = _sensitivity(exact, switched, found, sets[:LOCAL_SETS], max_sites)
        faithful = (sets if judged is None else judged)[:JUDGED_SETS]
        runtime = judge_runtime(quantized, faithful, session) if faithful else None
    walk = _Walk(exact, quantized, original, found, sets[:JUDGED_SETS])
    total = sum(error for error in errors if error is not None)
    rows = [
        _site_row(site, local[i], errors[i], total, walk) for i, site in enumerate(found)
    ]  # fmt: skip
    return Approximation(
        outputs=outputs,
        runtime=runtime,
        sites=tuple(sorted(rows, key=_badness)),
        kept=_kept(exact, quantized, reasons or {}),
        bytes_before=_stored_bytes(exact),
        bytes_after=_stored_bytes(quantized),
        declared=tuple(dict(site) if isinstance(site, Mapping) else site.to_json() for site in declared),
        data=data,
    )


def site_sensitivities(
    exact: ir.Model, quantized: ir.Model, sets: Sequence[Inputs], sites: Iterable[str] | None = None
) -> dict[str, float]:
    """What each site alone does to the outputs: its squared relative error (Σ error² / Σ exact², over all sets).

    Sites are named by the exact weight, by a tensor of codes or by a value they compute; all of them, under the exact
    weight's name, where `sites` is None. Of several outputs, logits count alone where there are any, else their mean.
    Raises RequestError for a name that no site has.
    """
    found = find_sites(exact, quantized)
    named = {name: i for i, site in reversed(list(enumerate(found))) for name in _names(site)}
    wanted = [site.name for site in found] if sites is None else list(sites)
    unknown = [name for name in wanted if name not in named]
    if unknown:
        raise RequestError(f"no site {unknown[0]}", remedy=f"one of {', '.join(site.name for site in found[:8])}")
    chosen = list(dict.fromkeys(named[name] for name in wanted))
    with Switched(exact, [found[i] for i in chosen]) as switched:
        errors = _alone(exact, switched, sets, range(len(chosen)))
    return {name: errors[chosen.index(named[name])] for name in wanted}


def _names(site: ApproximateSite) -> Iterator[str]:
    yield site.name
    yield from (value.name or "" for value in site.weights)
    for place in site.places:
        yield place.result.name or ""
        yield from (value.name or "" for value in place.constants)


def _badness(row: SiteQuality) -> tuple[float, float]:
    """Measured shares first, the largest before; then by what is known of the product."""
    known = row.product_sqnr_db if row.product_sqnr_db == row.product_sqnr_db else math.inf
    return (math.inf if row.share is None else -row.share, known)


def _stored_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _kept(exact: ir.Model, quantized: ir.Model, reasons: Mapping[str, str]) -> tuple[FloatWeight, ...]:
    rows = []
    for name, value in quantized.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or name not in exact.graph.initializers or not tensor.dtype.is_floating_point():
            continue
        if len(tensor.shape) > 1 and tensor.size >= LEAST_ELEMENTS:
            rows.append(FloatWeight(name, tensor.size, tensor.nbytes, reasons.get(name, "")))
    return tuple(sorted(rows, key=lambda row: -row.bytes))


# ── Quality and shares ──────────────────────────────────────────────────────────────────────────────────────────────


def _is_logits(name: str) -> bool:
    return name == "logits"


def _decibel(error: float, size: float) -> float:
    """Of two sums of squares."""
    return 10 * math.log10(size / error) if error > 0 and size > 0 else math.inf if error == 0 else -math.inf


def _floating(outputs: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind == "f"]


@dataclass
class _Agreement:
    """Logit metrics over sets, weighted by rows."""

    rows: int = 0
    kl: float = 0.0
    kl_max: float = 0.0
    top1: float = 0.0
    topk: float = 0.0

    def add(self, candidate: np.ndarray, reference: np.ndarray) -> None:
        found = logit_agreement(np.asarray(candidate, np.float64), np.asarray(reference, np.float64))
        if found is None:
            return
        count = int(np.prod(reference.shape[:-1]))
        self.rows += count
        self.kl += count * found.kl_mean
        self.kl_max = max(self.kl_max, found.kl_max)
        self.top1 += count * found.top1
        self.topk += count * found.topk


def _quality(
    exact: ir.Model, switched: Switched, session: Session, sets: Iterable[Inputs]
) -> tuple[OutputQuality, ...]:
    sums: dict[str, np.ndarray] = {}
    peaks: dict[str, float] = {}
    agreements: dict[str, _Agreement] = {}
    count = 0
    for one in sets:
        count += 1
        reference, given = switched.run(one), session.run(one)
        for name in _floating(reference):
            error, size, peak = squares(given[name], reference[name])
            sums[name] = sums.get(name, np.zeros(2)) + np.array([error, size])
            peaks[name] = max(peaks.get(name, 0.0), peak)
            if _is_logits(name) and reference[name].ndim and given[name].shape == reference[name].shape:
                agreements.setdefault(name, _Agreement()).add(given[name], reference[name])
    rows = []
    for name, (error, size) in sums.items():
        relative = math.sqrt(error / size) if size else math.inf if error else 0.0
        row = OutputQuality(name, count, _decibel(error, size), peaks[name], relative)
        if (found := agreements.get(name)) and found.rows:
            shares = {"kl_mean": found.kl, "top1": found.top1, "top5": found.topk}
            means = {key: float(value / found.rows) for key, value in shares.items()}
            row = OutputQuality(**{**vars(row), **means, "rows": found.rows, "kl_max": found.kl_max})
        rows.append(row)
    return tuple(rows)


def _output_error(names: Sequence[str], sums: Mapping[str, np.ndarray]) -> float:
    """The squared relative error: of the logits, or the mean over the outputs."""
    chosen = [name for name in names if _is_logits(name)] or list(names)
    parts = [sums[name][0] / sums[name][1] if sums[name][1] else 0.0 for name in chosen]
    return float(np.mean(parts)) if parts else 0.0


def _alone(exact: ir.Model, switched: Switched, sets: Iterable[Inputs], wanted: Iterable[int]) -> dict[int, float]:
    wanted = list(wanted)
    sums: dict[int, dict[str, np.ndarray]] = {i: {} for i in wanted}
    for one in sets:
        reference = switched.run(one)
        for i in wanted:
            given = switched.run(one, [i])
            for name in _floating(reference):
                error, size, _ = squares(given[name], reference[name])
                sums[i][name] = sums[i].get(name, np.zeros(2)) + np.array([error, size])
    return {i: _output_error(list(found), found) for i, found in sums.items()}


def _sensitivity(
    exact: ir.Model, switched: Switched, found: Sequence[ApproximateSite], sets: Sequence[Inputs], most: int
) -> tuple[np.ndarray, list[float | None]]:
    """Per site: (Σ error², Σ size²) of its values with exact inputs, (n, 2); and what it alone does to the outputs."""
    local = np.zeros((len(found), 2))
    for one in sets:
        _, error, size = switched.measure(one)
        local += np.stack([error, size], axis=1)
    relative = np.divide(local[:, 0], local[:, 1], out=np.zeros(len(found)), where=local[:, 1] > 0)
    chosen = np.argsort(-relative, kind="stable")[:most].tolist()
    errors = _alone(exact, switched, sets, chosen) if sets else {}
    return local, [errors.get(i) for i in range(len(found))]


# ── One site ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Walk:
    """What the float64 reference says of values on the way: end-to-end errors, rounded activations, histograms."""

    def __init__(
        self,
        exact: ir.Model,
        quantized: ir.Model,
        original: ir.Model | None,
        found: Sequence[ApproximateSite],
        sets: Sequence[Inputs],
    ) -> None:
        places = [place for site in found for place in site.places]
        results = {place.result.name or "" for place in places}
        self._read = {_activation(place) for place in places}
        self._rounded = {each.name: each for place in places for each in roundings(place.nodes)}
        self.errors: dict[str, np.ndarray] = {}
        self.roundings: dict[str, np.ndarray] = {}
        self.histograms: dict[str, dict[str, Histogram]] = {}
        for index, one in enumerate(sets):
            partners = _Partners(self._seen(exact, one, EXACT, index == 0), results)
            for name, value in values_of(quantized, one):
                if name in self._rounded and value.size:
                    _, back = self._rounded[name].codes(value)
                    sums = squares(back, np.asarray(value, np.float64))[:2]
                    self.roundings[name] = self.roundings.get(name, np.zeros(2)) + sums
                if name in results and (partner := partners.take(name)) is not None:
                    self.errors[name] = self.errors.get(name, np.zeros(2)) + squares(value, partner)[:2]
            partners.finish()
        if original is not None and sets:
            for _ in self._seen(original, sets[0], ORIGINAL, True):
                pass

    def _seen(
        self, model: ir.Model, one: Inputs, what: str, first: bool
    ) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
        for name, value in values_of(model, one):
            if first and name in self._read and value.dtype.kind == "f" and (shown := Histogram.of(value)) is not None:
                self.histograms.setdefault(name, {})[what] = shown
            yield name, value


class _Partners:
    """Exact values by name, computed no further than asked."""

    def __init__(self, values: Iterator[tuple[str, np.ndarray]], wanted: set[str]) -> None:
        self._values, self._wanted = values, wanted
        self._held: dict[str, np.ndarray] = {}

    def take(self, name: str) -> np.ndarray | None:
        while name not in self._held:
            found = next(self._values, None)
            if found is None:
                return None
            if found[0] in self._wanted:
                self._held[found[0]] = found[1]
        return self._held.pop(name)

    def finish(self) -> None:
        """Walk to the end, for what is looked at on the way."""
        for _ in self._values:
            pass


def _activation(place: Place) -> str:
    """The value that is multiplied: the first input that is a number in floating point."""
    floats = [value for value in place.inputs if value.dtype is None or value.dtype.is_floating_point()]
    return (floats or list(place.inputs))[0].name or "" if place.inputs else ""


def _site_row(
    site: ApproximateSite,
    local: np.ndarray,
    error: float | None,
    total: float,
    walk: _Walk,
) -> SiteQuality:
    first = site.places[0]
    matrix, stored = exact_matrix(first), stored_matrix(first)
    weight_db, shown = math.nan, dict[str, np.ndarray | None]()
    if matrix is not None:
        shown[ORIGINAL] = original_matrix(first)
        shown[EXACT] = matrix
        if stored is not None and stored.shape == matrix.shape:
            shown[STORED] = stored
            weight_db = _decibel(*squares(stored, matrix)[:2])
    histograms = {what: found for what, array in shown.items() if array is not None and (found := Histogram.of(array))}
    seen = walk.histograms.get(_activation(first), {})
    rounded = [each for place in site.places for each in roundings(place.nodes)]
    arrived = sum((walk.roundings.get(name, np.zeros(2)) for name in {each.name for each in rounded}), np.zeros(2))
    values = tuple(place.result.name or "" for place in site.places)
    end = sum((walk.errors.get(name, np.zeros(2)) for name in values), np.zeros(2))
    return SiteQuality(
        name=site.name,
        values=values,
        codes=tuple(dict.fromkeys(value.name or "" for place in site.places for value in place.constants)),
        operator=" + ".join(dict.fromkeys(node.op_type for node in first.nodes)),
        format=held_format(first),
        activations=" + ".join(dict.fromkeys(each.format for each in rounded)),
        elements=site.elements,
        bytes=site.bytes,
        weight_sqnr_db=weight_db,
        activation_sqnr_db=_decibel(*arrived) if rounded and arrived[1] else math.nan,
        product_sqnr_db=_decibel(*local) if local[1] else math.nan,
        end_to_end_sqnr_db=_decibel(*end) if end[1] else math.nan,
        error=error,
        share=None if error is None else error / total if total else 0.0,
        weight=histograms,
        activation={what: seen[what] for what in (ORIGINAL, EXACT) if what in seen},
    )


__all__ = [
    "Approximation",
    "FloatWeight",
    "Histogram",
    "OutputQuality",
    "RuntimeCheck",
    "SiteQuality",
    "judge_runtime",
    "measure_approximation",
    "site_sensitivities",
]
