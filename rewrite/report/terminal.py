"""A report on the terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rewrite.report import words
from rewrite.report.report import APPLIED, Report, SiteRow

SITES_SHOWN = 12
"""Rows of declared sites on the terminal; the report holds all."""

_STYLES = {words.GOOD: "green", words.CAUTION: "yellow", words.BAD: "red"}


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report on `console` (stdout where absent)."""
    (console or Console()).print(render(report))


def to_text(report: Report, width: int = 100) -> str:
    """The report as plain text, without colours."""
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, color_system=None, force_terminal=False))
    return stream.getvalue().rstrip()


def print_sites(sites: Sequence[SiteRow], console: Console | None = None) -> None:
    """One row a site: what a pass does there, or the requirement in the way, at which node, and why."""
    table = _table("", "pass", "site", "answer", "reason", "where")
    for row in sites:
        applied = row.outcome == APPLIED
        answer = Text("applies", style="green") if applied else Text(f"{row.requirement} {row.text}", style="yellow")
        reason = words.joined(row.notes) if applied else row.reason
        where = "" if applied else f"{row.operator} {row.node}".strip()
        table.add_row(row.pass_name, escape(row.site), answer, escape(reason), escape(where))
    (console or Console()).print(table if sites else Text("no pass has a site here"))


def render(report: Report) -> RenderableType:
    """The parts that have something to say, top to bottom."""
    parts = [
        _banner(report),
        _sites(report),
        _refusals(report),
        _outputs(report),
        _departure(report),
        _quantization(report),
        _outliers(report),
        _warnings(report),
        _costs(report),
    ]
    return Group(*(part for part in parts if part is not None))


def _banner(report: Report) -> RenderableType:
    style = _STYLES[words.tone(report.verdict, report.numerical)]
    head = Text(report.verdict, style=f"bold {style}")
    if report.numerical:
        head.append(f"   numbers: {report.numerical}", style=style)
    lines = [head, Text(f"{report.source} → {report.target}" if report.target else report.source, style="dim")]
    if report.detail:
        lines.append(Text(report.detail))
    return Panel(Group(*lines), border_style=style, expand=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for column in columns:
        left = column in (
            "pass",
            "site",
            "answer",
            "requirement",
            "reason",
            "output",
            "verdict",
            "where",
            "inputs",
            "format",
        )
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _sites(report: Report) -> RenderableType | None:
    if not report.sites:
        return None
    table = _table("\nPasses", "pass", "applied", "refused", "site")
    for name, applied, refused in words.passes(report):
        sites = words.joined(row.site for row in report.applied if row.pass_name == name)
        table.add_row(name, str(applied or "–"), str(refused or "–"), escape(sites))
    return table


def _refusals(report: Report) -> RenderableType | None:
    groups = words.refusals(report)
    if not groups:
        return None
    table = _table("\nLeft alone, and why", "pass", "sites", "requirement", "reason", "where")
    for group in groups:
        where = words.joined((f"{row.operator} {row.node}".strip() for row in group.rows), 2)
        requirement = f"{group.requirement} {group.text}".strip()
        table.add_row(group.pass_name, str(len(group.rows)), escape(requirement), escape(group.reason), escape(where))
    return table


def _outputs(report: Report) -> RenderableType | None:
    if not report.outputs:
        return None
    columns = ["output", "inputs", "noise ratio", "float64 error", "error", "SQNR dB"]
    logits = any(row.top1 is not None for row in report.outputs)
    table = _table("\nNumbers, against the float64 reference", *columns, *(["top-1"] if logits else []), "verdict")
    for row in report.outputs:
        cells = [escape(row.output), escape(row.inputs), words.ratio(row.noise_ratio), words.small(row.error_f64)]
        cells += [words.small(row.error), words.decibel(row.sqnr_db), *([words.percent(row.top1)] if logits else [])]
        reason = f": {row.reason}" if row.reason else ""
        table.add_row(*cells, Text(f"{row.verdict}{reason}", style=_STYLES[words.row_tone(row.verdict)]))
    return table


def _departure(report: Report) -> RenderableType | None:
    if not report.layers:
        return None
    first, skipped = report.first_departure, sum(report.skipped.values())
    tail = f" ({skipped} without a partner)" if skipped else ""
    if first is None:
        return Text(f"\nAll {words.plural(len(report.layers), 'value')} on the way agree{tail}.", style="green")
    made = f", made by {first.made_by}" if first.made_by else ""
    return Text(
        f"\nThe first value that departs is {first.value}: error {words.small(first.error)}, noise "
        f"{words.small(first.noise)}, at {first.operator} {first.node}{made}{tail}.",
        style="red",
    )


def _quantization(report: Report) -> RenderableType | None:
    found = report.approximation
    if found is None:
        return None
    parts: list[RenderableType] = [Text("\nQuantization, worst first", style="bold")]
    parts.append(Text("; ".join(words.approximation(found)) + "."))
    if found.runtime is not None:
        tone = _STYLES[words.row_tone(found.runtime.verdict)]
        parts.append(Text(words.runtime(found.runtime), style=tone))
    formats = Counter(words.formats(row) for row in found.sites)
    columns = ["weight", "activation", "product", "end to end", "bits", "share"]
    table = _table("", "site", *(["format"] if len(formats) > 1 else []), *columns)
    table.columns[0].min_width = 34
    for row in found.sites[:SITES_SHOWN]:
        decibels = [row.weight_sqnr_db, row.activation_sqnr_db, row.product_sqnr_db, row.end_to_end_sqnr_db]
        stored = [escape(words.formats(row))] if len(formats) > 1 else []
        numbers = [*map(words.decibel, decibels), words.bits(row.bits_per_weight), words.share(row.share)]
        table.add_row(escape(row.name), *stored, *numbers)
    if found.sites:
        parts.append(Text(f"SQNR in dB{f' of {next(iter(formats))}' if len(formats) == 1 else ''}:"))
        parts.append(table)
    if (rest := len(found.sites) - SITES_SHOWN) > 0:
        parts.append(Text(f"and {words.plural(rest, 'site')} more in report.json", style="dim"))
    for reason, names, count in words.kept(found):
        label = f"{words.plural(len(names), 'weight')} ({words.size(count)}) in floating point: {reason}"
        parts.append(Text(f"{label}: {words.joined(names, 2)}", style="dim"))
    return Group(*parts)


def _outliers(report: Report) -> RenderableType | None:
    parts = []
    for kind in ("activation", "weight"):
        rows = [row for row in report.outliers if row.kind == kind]
        if rows:
            before, after = (median(getattr(row, f"peak_{when}") for row in rows) for when in ("before", "after"))
            parts.append(f"{words.plural(len(rows), kind)}: {words.ratio(before)} → {words.ratio(after)}")
    return Text(f"\nOutliers, max / median in the middle of {'; of '.join(parts)}.") if parts else None


def _warnings(report: Report) -> RenderableType | None:
    if not report.warnings:
        return None
    return Group(Text(), *(Text(f"warning: {warning}", style="yellow") for warning in report.warnings))


def _costs(report: Report) -> RenderableType | None:
    parts = []
    if report.sizes.before or report.sizes.after:
        parts.append(f"{words.size(report.sizes.before)} → {words.size(report.sizes.after)}")
    if report.sizes.untied:
        parts.append(f"{words.size(report.sizes.untied)} untied")
    if report.timings_s:
        stages = ", ".join(f"{name} {words.duration(seconds)}" for name, seconds in report.timings_s.items())
        parts.append(f"{words.duration(report.seconds)} ({stages})")
    return Text("\n" + "; ".join(parts), style="dim") if parts else None
