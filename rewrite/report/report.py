"""What one run produced, as plain rows that survive JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rewrite.check.approximation import Approximation
from rewrite.check.compare import WITHIN
from rewrite.check.diff import Difference
from rewrite.check.localize import Localization
from rewrite.check.outliers import OutlierRow
from rewrite.errors import RequestError

FORMAT = 1
"""The version of the JSON; a reader refuses others."""

APPLIED, REFUSED = "applied", "refused"


@dataclass(frozen=True)
class SiteRow:
    """One place where a pass was applied or refused.

    A refusal has the requirement's id and text, and the node, operator and reason; an application may have notes.
    """

    pass_name: str
    site: str
    outcome: str
    requirement: str = ""
    text: str = ""
    node: str = ""
    operator: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()
    untied_bytes: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> SiteRow:
        """The row of a pass's record in plain types (its `to_json()`), with the pass under "pass"."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in record.items() if key in known}
        return cls(**{**values, "pass_name": record["pass"], "notes": tuple(record.get("notes", ()))})


@dataclass(frozen=True)
class OutputRow:
    """One output on one set of inputs, against the float64 reference; errors are relative, over norms.

    `error_f64` is that of the rewritten graph in float64, `error` that of the artifact as it ran; logits have the
    last four.
    """

    output: str
    inputs: str
    verdict: str
    noise_ratio: float
    error_f64: float
    error: float
    max_abs: float
    ulps: float
    cosine: float
    sqnr_db: float
    reason: str = ""
    kl_max: float | None = None
    top1: float | None = None
    topk: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One compared value on the way: relative error and noise, and the node and pass behind it."""

    value: str
    error: float
    noise: float
    departs: bool = False
    node: str = ""
    operator: str = ""
    made_by: str = ""
    relation: str = "identity"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the captured weights, of the written artifact, and of weights that had to be copied to be changed."""

    before: int = 0
    after: int = 0
    untied: int = 0


@dataclass(frozen=True)
class Report:
    """Everything one run produced.

    `verdict` is the proof's, such as "EQUAL(0.5 ulp)"; `numerical` the check's, empty where it did not run; `proof`
    further facts of the certificate by name; `timings_s` seconds per stage in order; `environment` versions and the
    machine; `skipped` how many values could not be compared, by reason; `outliers` what a change of basis did to them.
    `approximation` is what was measured of declared sites, None where there is none.
    """

    source: str
    verdict: str
    target: str = ""
    detail: str = ""
    numerical: str = ""
    sites: tuple[SiteRow, ...] = ()
    outputs: tuple[OutputRow, ...] = ()
    layers: tuple[LayerRow, ...] = ()
    skipped: dict[str, int] = field(default_factory=dict)
    outliers: tuple[OutlierRow, ...] = ()
    approximation: Approximation | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    sizes: Sizes = Sizes()
    warnings: tuple[str, ...] = ()
    proof: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def applied(self) -> tuple[SiteRow, ...]:
        """The sites that were rewritten."""
        return tuple(row for row in self.sites if row.outcome == APPLIED)

    @property
    def refused(self) -> tuple[SiteRow, ...]:
        """The sites that were left alone."""
        return tuple(row for row in self.sites if row.outcome == REFUSED)

    @property
    def first_departure(self) -> LayerRow | None:
        """The first value whose error is above the noise."""
        return next((row for row in self.layers if row.departs), None)

    @property
    def worst_noise_ratio(self) -> float | None:
        """The largest noise ratio of any output; None where none was measured."""
        measured = [row.noise_ratio for row in self.outputs if not math.isnan(row.noise_ratio)]
        return max(measured, default=None)

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(self.timings_s.values())

    def with_difference(self, difference: Difference, inputs: Iterable[str] = ()) -> Report:
        """This report with a numerical check's rows; `inputs` names the sets of inputs in their order."""
        names = list(inputs)
        rows = tuple(_output_row(row, names) for row in difference.rows)
        checked = replace(self, numerical=difference.verdict, outputs=rows)
        return checked if difference.layers is None else checked.with_layers(difference.layers)

    def with_layers(self, found: Localization) -> Report:
        """This report with the errors of the values on the way."""
        rows = tuple(
            LayerRow(r.name, r.relative, r.noise, r.departs, r.node, r.operator, r.made_by, r.relation)
            for r in found.rows
        )
        return replace(self, layers=rows, skipped=dict(found.skipped))

    def with_outliers(self, found: Iterable[OutlierRow]) -> Report:
        """This report with the outliers of what is in another basis."""
        return replace(self, outliers=tuple(found))

    def with_approximation(self, found: Approximation) -> Report:
        """This report, which has the erased network's rows already, with what was measured of its declared sites.

        Its numbers are "approximate as declared" where the erased network is within the noise and the runtime computes
        what the graph says; else what is not so of the two, the erased network before all.
        """
        erased = self.numerical in ("", WITHIN)
        return replace(
            self, approximation=found, numerical=found.verdict if erased and found.verdict else self.numerical
        )

    def to_json(self, indent: int | None = 2) -> str:
        """All of it as JSON; a number that is not finite is the string "nan", "inf" or "-inf"."""
        return json.dumps(_plain({"format": FORMAT, **asdict(self)}), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises `RequestError` for anything else, one line."""
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise RequestError("has another format", where="report", remedy="write it again with this version")
            return cls(
                **{
                    **data,
                    "sites": tuple(SiteRow(**{**row, "notes": tuple(row["notes"])}) for row in data["sites"]),
                    "outputs": tuple(OutputRow(**_numbers(row, OutputRow)) for row in data["outputs"]),
                    "layers": tuple(LayerRow(**_numbers(row, LayerRow)) for row in data["layers"]),
                    "outliers": tuple(OutlierRow(**_numbers(row, OutlierRow)) for row in data.get("outliers", ())),
                    "approximation": Approximation.from_dict(found) if (found := data.get("approximation")) else None,
                    "sizes": Sizes(**data["sizes"]),
                    "warnings": tuple(data["warnings"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"is no report: {error}", where="report", remedy="give a report.json") from error

    def __str__(self) -> str:
        from rewrite.report.terminal import to_text

        return to_text(self)

    def __repr__(self) -> str:
        numbers = f"{len(self.applied)} applied, {len(self.refused)} refused"
        return f"Report({self.source!r}: {self.verdict}; {numbers}{f'; {self.numerical}' if self.numerical else ''})"


def _output_row(row: Any, names: list[str]) -> OutputRow:
    judged = row.run or row.exact
    logits = judged.logits
    return OutputRow(
        output=row.output,
        inputs=names[row.inputs] if row.inputs < len(names) else str(row.inputs),
        verdict=row.verdict,
        noise_ratio=judged.noise_ratio,
        error_f64=row.exact.relative,
        error=judged.relative,
        max_abs=judged.max_abs,
        ulps=judged.ulps,
        cosine=judged.cosine,
        sqnr_db=judged.sqnr_db,
        reason=row.reason,
        kl_max=logits.kl_max if logits else None,
        top1=logits.top1 if logits else None,
        topk=logits.topk if logits else None,
        margin=logits.margin if logits else None,
    )


def _plain(value: Any) -> Any:
    """`value` with tuples as lists and non-finite numbers as strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _numbers(row: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """`row` with the strings of its number fields read back."""
    numbers = {f.name for f in fields(cls) if str(f.type).startswith("float")}
    return {key: float(value) if key in numbers and value is not None else value for key, value in row.items()}
