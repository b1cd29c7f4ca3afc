"""Whether what runs computes what the quantized graph says, up to rounding and the codes that rounding flips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from rewrite.check.compare import UNSETTLED
from rewrite.check.noise import NOISE_LIMIT, comparable, norm, ulp, unit_roundoff
from rewrite.check.places import Rounding, roundings, without_activation_rounding
from rewrite.check.reference import evaluate, storage_dtype, values_of
from rewrite.check.runtime import Session, unoptimized
from rewrite.errors import UnsupportedOperatorError

Inputs = Mapping[str, np.ndarray]

AS_DECLARED, NOT_DECLARED = "approximate as declared", "not what the graph says"
"""What an artifact with declared sites can be; `UNSETTLED` where flipped codes hide what is asked."""

FEW_FLIPS = 64
"""Flipped codes up to which they may lie in few rows, one the cause of others; more are like those of any run."""


@dataclass(frozen=True)
class RuntimeCheck:
    """Whether what runs is what the graph says, of the worst output; distances are relative, over norms.

    `distance` is that of the artifact from the quantized graph in float64, `unoptimized` that of a session without
    optimizations, `imitated` that of the reference in float32, `limit` the largest that is accepted. Of `codes` codes
    of activations, the imitation flips `flips`, and `undecided` lie so near to a tie that any rounding may.
    """

    verdict: str
    reason: str
    output: str
    distance: float
    unoptimized: float
    imitated: float
    limit: float
    codes: int
    flips: int
    undecided: int
    sets: int

    @property
    def sqnr_db(self) -> float:
        """Of what runs, about what the graph says."""
        return -20 * math.log10(self.distance) if self.distance > 0 else math.inf


def judge_runtime(quantized: ir.Model, sets: Sequence[Inputs], session: Session) -> RuntimeCheck:
    """Whether `session` computes what `quantized` says, up to rounding, over all of `sets`.

    Rounding is what the reference does in the type of the network, float32 unless it is half: d₃₂ is the distance of
    that imitation from the float64 reference, and `NOISE_LIMIT`·d₃₂ is accepted. Where no activations are rounded a
    session without optimizations may stand for it (if itself within `NOISE_LIMIT`·d₃₂); where they are it is not
    believed, since a kernel that saturates does so with optimizations and without.

    A code that lies near a tie flips with the last bit of what is rounded, and one flip is worth far more than that
    bit. d₃₂ holds the flips of the imitation; where these are fewer than `FEW_FLIPS` they say little of those of
    another run. Then the float64 reference is evaluated again with every undecided code flipped: those within τ of a
    tie, τ being `NOISE_LIMIT`² times the deviation of the imitation (its median there, at least one rounding of the
    quotient), in steps. Flips may cancel in part, so twice that distance is accepted; entries that they do not reach
    (other rows, other sets) are held to rounding, and d₃₂ is that of these. Where they reach most entries, and come to
    more than half of what rounding the activations does at all, a kernel that rounds otherwise could hide behind them,
    and nothing is settled.
    """
    seen = _Evaluations(quantized, sets, session)
    worst: RuntimeCheck | None = None
    flipped: dict[str, list[np.ndarray]] | None = None
    for name, reference in seen.exact.items():
        if reference[0].dtype.kind != "f":
            if not seen.codes and any(not np.array_equal(a, b) for a, b in zip(reference, seen.runs[name])):
                return seen.row(NOT_DECLARED, f"{name} holds other integers", name, math.inf, 0.0)
            continue
        distance, plainly, imitated = (_distance(x[name], reference) for x in (seen.runs, seen.plain, seen.narrow))
        spacing = math.sqrt(sum(norm(ulp(x[np.isfinite(x)], seen.dtype)) ** 2 for x in reference))
        if 0 < seen.flips < FEW_FLIPS:
            flipped = flipped or seen.flipped()
            imitated = min(imitated, _noise_besides(seen.narrow[name], flipped[name], reference))
        noise = max(imitated, spacing)
        believed = not seen.codes and plainly <= NOISE_LIMIT * noise
        limit = NOISE_LIMIT * (max(noise, plainly) if believed else noise)
        verdict, reason = AS_DECLARED, ""
        if not distance <= limit:
            size = math.sqrt(sum(squares(x, x)[1] for x in reference)) or 1.0
            verdict, reason = NOT_DECLARED, f"{name} is {distance / size:.1e} from what the graph says"
            if plainly > limit:
                reason += ", and so it is without optimizations"
            if seen.undecided and seen.flips < FEW_FLIPS:
                flipped = flipped or seen.flipped()
                entries = sum(x.size for x in reference)
                quiet, count = _quiet(seen.runs[name], flipped[name], reference, noise / math.sqrt(entries))
                allowed = max(limit, 2 * _distance(flipped[name], reference))
                if quiet <= limit and distance <= (limit := allowed):
                    verdict, reason = AS_DECLARED, ""
                    if 2 * count <= entries and not limit <= seen.effect_of_rounding(name) / 2:
                        verdict = UNSETTLED
                        reason = f"{name} is off by what a few flipped codes may explain, as they may a wrong kernel"
        row = seen.row(verdict, reason, name, distance, limit)
        if worst is None or _order(row) > _order(worst):
            worst = row
    return worst or seen.row(UNSETTLED, "no output is in floating point", "", 0.0, 0.0)


class _Evaluations:
    """Outputs over all sets: of the reference in float64 and float32, of a session without optimizations, of what runs.

    `codes` activations are rounded, `flips` of them otherwise in float32, and `undecided` lie near a tie.
    """

    def __init__(self, quantized: ir.Model, sets: Sequence[Inputs], session: Session) -> None:
        self._model, self._sets = quantized, sets
        half = storage_dtype(quantized) == np.float16
        self.dtype = np.float16 if half else np.float32
        self._rounded = {each.name: each for each in roundings(list(quantized.graph))}
        self._names = [value.name or "" for value in quantized.graph.outputs]
        self._near: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        self._unrounded: dict[str, list[np.ndarray]] | None = None
        self.codes = self.flips = self.undecided = 0
        self.exact, self.narrow, self.plain, self.runs = (
            {name: list[np.ndarray]() for name in self._names} for _ in range(4)
        )
        with Session(quantized, unoptimized()) as plain:
            for one in sets:
                self._walk(one)
                for kept, found in ((self.plain, plain.run(one)), (self.runs, session.run(one))):
                    for name in self._names:
                        kept[name].append(found[name])

    def _walk(self, one: Inputs) -> None:
        self._near.append({})
        pairs = zip(
            values_of(self._model, one), values_of(self._model, one, precision=self.dtype), strict=True
        )  # fmt: skip
        for (name, value), (_, imitated) in pairs:
            if name in self._rounded and value.size:
                self._look(self._rounded[name], np.asarray(value, np.float64), imitated)
            if name in self._names:
                self.exact[name].append(value)
                self.narrow[name].append(imitated)

    def _look(self, rounding: Rounding, value: np.ndarray, imitated: np.ndarray) -> None:
        (first, back), (second, _) = (rounding.codes(x) for x in (value, imitated))
        first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
        self.codes += first.size
        self.flips += int(np.count_nonzero(first != second))
        steps = np.broadcast_to(rounding.step(value), value.shape)
        quotient, code, apart = (
            np.divide(x, steps, out=np.zeros(value.shape), where=steps > 0) for x in (value, back, imitated - value)
        )
        rounded = unit_roundoff(self.dtype) * np.maximum(1.0, np.abs(quotient))
        # Off by NOISE_LIMIT in norm is what a run may be; single entries of it have tails as far again.
        near = NOISE_LIMIT**2 * np.maximum(float(np.median(np.abs(apart))), rounded)
        near = np.minimum(near, 0.25)
        beyond = quotient - np.rint(code)  # of the code that was chosen, which at a tie is not the nearest in float64
        undecided = np.abs(np.abs(beyond) - 0.5) <= near  # what is clipped lies further off
        self.undecided += int(np.count_nonzero(undecided))
        # As far behind the tie as it may be before it, in steps.
        behind = (quotient + np.sign(beyond) * 2 * near)[undecided]
        self._near[-1][rounding.name] = (undecided, behind)

    def flipped(self) -> dict[str, list[np.ndarray]]:
        """The outputs in float64 with every undecided code on the other side of its tie."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in self._names}
        for one, near in zip(self._sets, self._near):
            for name, value in values_of(self._model, {key: np.array(array) for key, array in one.items()}):
                if name in near and value.flags.writeable:
                    undecided, behind = near[name]
                    # Steps are those of now: flips further up may have changed a dynamic scale.
                    value[undecided] = behind * np.broadcast_to(self._rounded[name].step(value), value.shape)[undecided]
                if name in found:
                    found[name].append(value)
        return found

    def effect_of_rounding(self, name: str) -> float:
        """How far the output is from that of activations left as they come; infinite where that is not defined."""
        if self._unrounded is None:
            try:
                model = without_activation_rounding(self._model)
                found = [evaluate(model, one) for one in self._sets]
            except UnsupportedOperatorError:
                return math.inf
            self._unrounded = {key: [outputs[key] for outputs in found] for key in self._names}
        return _distance(self._unrounded[name], self.exact[name])

    def row(self, verdict: str, reason: str, name: str, distance: float, limit: float) -> RuntimeCheck:
        reference = self.exact.get(name, [])
        size = math.sqrt(sum(squares(x, x)[1] for x in reference if x.dtype.kind == "f")) or 1.0
        others = [_distance(kept[name], reference) if name in kept else 0.0 for kept in (self.plain, self.narrow)]
        return RuntimeCheck(
            verdict=verdict,
            reason=reason,
            output=name,
            distance=distance / size,
            unoptimized=others[0] / size,
            imitated=others[1] / size,
            limit=limit / size,
            codes=self.codes,
            flips=self.flips,
            undecided=self.undecided,
            sets=len(self._sets),
        )


def _order(row: RuntimeCheck) -> tuple[int, float]:
    return (AS_DECLARED, UNSETTLED, NOT_DECLARED).index(row.verdict), row.distance / row.limit if row.limit else 0.0


def _distance(given: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """‖given − reference‖ over all sets."""
    return math.sqrt(sum(squares(a, b)[0] for a, b in zip(given, reference)))


def _noise_besides(
    narrow: Sequence[np.ndarray], flipped: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> float:
    """‖narrow − reference‖ over entries that flips do not reach, as if so everywhere; ∞ where they reach all."""
    errors = np.concatenate([np.ravel(np.abs(a - b)) for a, b in zip(narrow, reference)])
    middle = float(np.nanmedian(errors)) if errors.size else 0.0
    distance, count = _quiet(narrow, flipped, reference, middle)
    return distance * math.sqrt(errors.size / count) if count else math.inf


def _quiet(
    given: Sequence[np.ndarray], flipped: Sequence[np.ndarray], reference: Sequence[np.ndarray], noise: float
) -> tuple[float, int]:
    """‖given − reference‖ over entries that flips leave within `NOISE_LIMIT` times `noise`; and how many these are."""
    total, count = 0.0, 0
    for run, other, exact in zip(given, flipped, reference):
        where = np.abs(other - exact) <= NOISE_LIMIT * noise
        total += squares(np.asarray(run)[where], exact[where])[0]
        count += int(np.count_nonzero(where))
    return math.sqrt(total), count


def squares(candidate: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Σ error², Σ reference² and the largest error, over entries that are finite and no masks in the reference."""
    if candidate.shape != reference.shape:
        return math.inf, norm(np.asarray(reference, np.float64)) ** 2, math.inf
    where = comparable(reference, np.float32) & np.isfinite(reference)
    exact, given = np.asarray(reference, np.float64)[where], np.asarray(candidate, np.float64)[where]
    error = given - exact
    if not np.isfinite(error).all():
        return math.inf, float(exact @ exact), math.inf
    return float(error @ error), float(exact @ exact), float(np.abs(error).max(initial=0.0))
