"""Numbers and verdicts as the terminal and the page both print them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rewrite.check.approximation import Approximation, SiteQuality
from rewrite.check.compare import WITHIN
from rewrite.check.faithful import AS_DECLARED, NOT_DECLARED, RuntimeCheck
from rewrite.report.report import Report, SiteRow

GOOD, CAUTION, BAD = "good", "caution", "bad"

_PROVED = ("BITWISE", "EQUAL(")
_REFUTED = ("REFUTED", "DIFFERENT")


def tone(verdict: str, numerical: str = "") -> str:
    """How a verdict reads: good where it is proved and no number contradicts, bad where it is refuted.

    >>> tone("EQUAL(0.5 ulp)"), tone("TESTED"), tone("REFUTED(input 0)"), tone("EQUAL(1 ulp)", "different")
    ('good', 'caution', 'bad', 'bad')
    >>> tone("EQUAL_MODULO(sites)", "approximate as declared"), tone("EQUAL_MODULO(sites)", "not what the graph says")
    ('caution', 'bad')
    """
    if verdict.upper().startswith(_REFUTED) or numerical in ("different", "above noise", NOT_DECLARED):
        return BAD
    proved = verdict.upper().startswith(_PROVED) or verdict.upper() == "EQUAL"
    return GOOD if proved and numerical in ("", WITHIN) else CAUTION


def row_tone(verdict: str) -> str:
    """How one output's verdict reads."""
    return {WITHIN: GOOD, AS_DECLARED: GOOD, "unsettled": CAUTION}.get(verdict, BAD)


def small(value: float | None) -> str:
    """An error or a share, in two digits; nothing measured is a dash.

    >>> small(1.234e-7), small(0.0), small(None), small(float("inf"))
    ('1.2e-07', '0', '–', '∞')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return "0" if value == 0 else f"{value:.1e}"


def ratio(value: float | None) -> str:
    """A noise ratio or a count of ulps.

    >>> ratio(0.9876), ratio(28590.2), ratio(float("nan"))
    ('0.99', '28,590', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def nats(value: float, signed: bool = False) -> str:
    """A difference of logarithms.

    >>> nats(-0.123), nats(0.5, signed=True), nats(float("nan"))
    ('−0.12', '+0.50', '–')
    """
    if math.isnan(value):
        return "–"
    return (f"{value:+.2f}" if signed else f"{value:.2f}").replace("-", "−")


def percent(value: float | None) -> str:
    """A share in percent, a full one without digits behind the point.

    >>> percent(1.0), percent(0.98765)
    ('100 %', '98.77 %')
    """
    return "–" if value is None else "100 %" if value == 1 else f"{100 * value:.2f} %"


def decibel(value: float) -> str:
    """A ratio in dB; an exact result has infinitely many."""
    return "–" if math.isnan(value) else f"{value:.1f}" if math.isfinite(value) else "∞" if value > 0 else "−∞"


def bits(value: float) -> str:
    """Bits a weight; NaN where there is no weight.

    >>> bits(4.5), bits(float("nan"))
    ('4.50', '–')
    """
    return "–" if math.isnan(value) else f"{value:.2f}"


def share(value: float | None) -> str:
    """A part of the error, or that no run was made for it.

    >>> share(0.1234), share(None)
    ('12.3 %', 'not measured')
    """
    return "not measured" if value is None else f"{100 * value:.1f} %"


def formats(row: SiteQuality) -> str:
    """How a site's weight and its activations are stored."""
    return "; ".join(part for part in (row.format, row.activations and f"× {row.activations}") if part) or "–"


def approximation(found: Approximation) -> list[str]:
    """What was measured of an approximation as a whole, a phrase each."""
    phrases, main = [], found.main
    if main is not None:
        phrases.append(f"{main.output} {decibel(main.sqnr_db)} dB, error {small(main.relative)}")
        if main.top1 is not None:
            phrases.append(f"KL {small(main.kl_mean)} in the mean and {small(main.kl_max)} at most")
            phrases.append(f"top-1 {percent(main.top1)}, top-5 {percent(main.top5)}")
        if found.data:
            phrases.append(f"measured on {main.sets} set{'s' * (main.sets != 1)} of {found.data}")
    phrases.append(f"{size(found.bytes_before)} → {size(found.bytes_after)} of constants")
    phrases.append(f"{bits(found.bits_per_weight)} bits a weight")
    return phrases


def runtime(found: RuntimeCheck) -> str:
    """How far what runs is from what the graph says."""
    flips = f", {found.flips:,} of {found.codes:,} codes flip with rounding" if found.codes else ""
    return (
        f"What runs is {small(found.distance)} from what the graph says, rounding explains {small(found.limit)}{flips}"
        f"{found.reason and f': {found.reason}'}."
    )


def kept(found: Approximation) -> list[tuple[str, list[str], int]]:
    """Weights that stayed in floating point: (reason, names, bytes), the largest first."""
    groups: dict[str, list] = {}
    for row in found.kept:
        groups.setdefault(row.reason or "no pass took it", []).append(row)
    rows = [(reason, [row.name for row in each], sum(row.bytes for row in each)) for reason, each in groups.items()]
    return sorted(rows, key=lambda row: -row[2])


def size(count: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point.

    >>> size(512), size(1536), size(4_700_000_000)
    ('512 B', '1.5 KiB', '4.4 GiB')
    """
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time.

    >>> duration(0.0123), duration(4.26), duration(75)
    ('12 ms', '4.3 s', '1 min 15 s')
    """
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {round(seconds) % 60} s"


@dataclass(frozen=True)
class Refusals:
    """Refusals of one pass for one reason: the requirement, and the places."""

    pass_name: str
    requirement: str
    text: str
    reason: str
    operator: str
    rows: tuple[SiteRow, ...]


def refusals(report: Report) -> list[Refusals]:
    """The refused sites grouped by pass, requirement, operator and reason, in the order they were met."""
    groups: dict[tuple[str, str, str, str, str], list[SiteRow]] = {}
    for row in report.refused:
        groups.setdefault((row.pass_name, row.requirement, row.text, row.reason, row.operator), []).append(row)
    return [
        Refusals(rule, requirement, text, reason, operator, tuple(rows))
        for (rule, requirement, text, reason, operator), rows in groups.items()
    ]


def passes(report: Report) -> list[tuple[str, int, int]]:
    """(pass, sites applied, sites refused) in the order they ran."""
    applied, refused = (Counter(row.pass_name for row in rows) for rows in (report.applied, report.refused))
    return [(name, applied[name], refused[name]) for name in dict.fromkeys(row.pass_name for row in report.sites)]


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "site"), plural(3, "site")
    ('1 site', '3 sites')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def joined(items: Iterable[str], most: int = 3) -> str:
    """The first few items, and how many more there are.

    >>> joined(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    items = list(items)
    head = ", ".join(items[:most])
    return head if len(items) <= most else f"{head} and {len(items) - most} more"
