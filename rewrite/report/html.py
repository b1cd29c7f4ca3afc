"""A report as one self-contained HTML page: no script, no font, no image from anywhere else.

Every piece of text that comes from a model is escaped where it enters the page, by `_text` or `_code`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources

from rewrite.check.approximation import EXACT, ORIGINAL, STORED, Approximation, SiteQuality
from rewrite.check.outliers import OutlierRow
from rewrite.check.plot import Change, Curve, Point, change_plot, error_plot, histogram_plot
from rewrite.report import words
from rewrite.report.report import LayerRow, OutputRow, Report

_WORST_SHOWN, _SITES_SHOWN = 8, 24
_KINDS = {ORIGINAL: 0, EXACT: 1, STORED: 2}


def to_html(report: Report) -> str:
    """The whole page."""
    style = resources.files("rewrite.report").joinpath("style.css").read_text(encoding="utf-8")
    tone = words.tone(report.verdict, report.numerical)
    sections = (
        _warnings,
        _sites,
        _refusals,
        _outputs,
        _quantization,
        _layers,
        _outliers,
        _timings,
        _proof,
        _environment,
    )
    body = "\n".join(part for section in sections if (part := section(report)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(report.verdict)} · {_text(report.source)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{_banner(report, tone)}
{_facts(report)}
{body}
<footer>Written by rewrite. The numbers are those of report.json beside this page.</footer>
</main>
</body>
</html>
"""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _tag(text: str, tone: str) -> str:
    return f'<span class="tag {tone}">{_text(text)}</span>'


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of ready-made cells; a column whose name ends in "#" holds numbers."""
    attributes = [' class="number"' if column.endswith("#") else "" for column in columns]

    def cells(kind: str, contents: Sequence[str]) -> str:
        pairs = zip(attributes, contents)
        return "".join(f"<{kind}{attribute}>{content}</{kind}>" for attribute, content in pairs)

    head = cells("th", [_text(column.removesuffix("#").strip()) for column in columns])
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="card"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _section(title: str, note: str, content: str) -> str:
    paragraph = f'<p class="about">{_text(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{_text(title)}</h2>\n{paragraph}{content}\n</section>"


def _banner(report: Report, tone: str) -> str:
    path = f"{_code(report.source)} → {_code(report.target)}" if report.target else _code(report.source)
    detail = f'<p class="detail">{_text(report.detail)}</p>' if report.detail else ""
    numbers = f" {_tag(f'numbers: {report.numerical}', words.row_tone(report.numerical))}" if report.numerical else ""
    return (
        f'<header class="banner {tone}">\n<h1 class="verdict">{_text(report.verdict)}{numbers}</h1>\n'
        f'<p class="path">{path}</p>\n{detail}</header>'
    )


def _facts(report: Report) -> str:
    facts = []
    if report.sites:
        facts.append((f"{len(report.applied):,}", "sites rewritten"))
        facts.append((f"{len(report.refused):,}", "left alone"))
    if report.numerical:
        facts.append((words.ratio(report.worst_noise_ratio), f"worst noise ratio · {report.numerical}"))
    if report.approximation is not None:
        facts.append((words.bits(report.approximation.bits_per_weight), "bits a weight"))
        if (main := report.approximation.main) is not None:
            facts.append((f"{words.decibel(main.sqnr_db)} dB", f"SQNR of {main.output}"))
    if report.sizes.before or report.sizes.after:
        facts.append((words.size(report.sizes.after), f"written, from {words.size(report.sizes.before)}"))
    if report.sizes.untied:
        facts.append((words.size(report.sizes.untied), "of shared weights copied"))
    if report.timings_s:
        facts.append((words.duration(report.seconds), "in all"))
    cards = "\n".join(f'<div class="fact"><b>{_text(a)}</b><span>{_text(b)}</span></div>' for a, b in facts)
    return f'<div class="facts">\n{cards}\n</div>' if facts else ""


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    notes = "\n".join(f'<p class="note caution">{_text(warning)}</p>' for warning in report.warnings)
    return f"<section>\n<h2>Warnings</h2>\n{notes}\n</section>"


def _places(labels: Sequence[str]) -> str:
    """A list of places, folded away where it is long."""
    if not labels:
        return "–"
    if len(labels) == 1:
        return _code(labels[0])
    items = "".join(f"<li>{_code(label)}</li>" for label in labels)
    return f"<details><summary>{_text(words.plural(len(labels), 'place'))}</summary><ul>{items}</ul></details>"


def _sites(report: Report) -> str:
    if not report.sites:
        return ""
    rows = []
    for name, applied, refused in words.passes(report):
        done = [row for row in report.applied if row.pass_name == name]
        notes = dict.fromkeys(note for row in done for note in row.notes)
        told = "".join(f'<span class="why">{_text(note)}</span>' for note in list(notes)[:3])
        rows.append([_code(name), str(applied or "–"), str(refused or "–"), _places([row.site for row in done]) + told])
    return _section("Passes", "In the order they ran.", _table(["pass", "rewritten#", "left alone#", "where"], rows))


def _refusals(report: Report) -> str:
    groups = words.refusals(report)
    if not groups:
        return ""
    rows = []
    for group in groups:
        requirement = f"{_tag(group.requirement, words.CAUTION)} {_text(group.text)}" if group.requirement else ""
        places = _places([f"{row.operator} {row.node}".strip() or row.site for row in group.rows])
        rows.append([_code(group.pass_name), requirement, _text(group.reason), places])
    note = "A site is left as it was at the first requirement that does not hold there."
    return _section("Left alone, and why", note, _table(["pass", "requirement", "found", "where"], rows))


def _outputs(report: Report) -> str:
    if not report.outputs:
        return ""
    logits = any(row.top1 is not None for row in report.outputs)
    columns = ["output", "inputs", "verdict", "noise ratio#", "error#", "in float64#", "ulps#", "SQNR dB#"]
    columns += ["KL#", "top-1#"] if logits else []
    note = (
        "Against the original in float64. The noise ratio is the error of what runs over the original's own rounding "
        "error: about 1 is as good as the original. Errors are relative, over norms."
    )
    rows = [_output_cells(row, logits) for row in report.outputs]
    return _section("Numerical check", note, _table(columns, rows))


def _output_cells(row: OutputRow, logits: bool) -> list[str]:
    why = f'<span class="why">{_text(row.reason)}</span>' if row.reason else ""
    cells = [_code(row.output), _text(row.inputs), _tag(row.verdict, words.row_tone(row.verdict)) + why]
    cells += [words.ratio(row.noise_ratio), words.small(row.error), words.small(row.error_f64)]
    cells += [words.ratio(row.ulps), words.decibel(row.sqnr_db)]
    return [*cells, words.small(row.kl_max), words.percent(row.top1)] if logits else cells


def _quantization(report: Report) -> str:
    found = report.approximation
    if found is None:
        return ""
    note = (
        "SQNR in dB: of each weight as stored, of the activations as they are rounded, of the product with exact "
        "inputs, and of the same value at the end of all that comes before it. The share is that of the squared error "
        "of the outputs with this site alone quantized. Worst first."
    )
    parts = [f'<p class="about">{_text("; ".join(words.approximation(found)))}.</p>']
    if found.runtime is not None:
        parts.append(
            f'<p class="note {words.row_tone(found.runtime.verdict)}">{_text(words.runtime(found.runtime))}</p>'
        )
    rows = [_site_cells(row) for row in found.sites]
    columns = ["site", *(f"{of}#" for of in ("weight", "activation", "product", "end to end", "bits", "size", "share"))]
    if rows:
        parts.append(f'<div class="wide">{_table(columns, rows[:_SITES_SHOWN])}</div>')
    if rest := rows[_SITES_SHOWN:]:
        summary = f"<summary>{_text(words.plural(len(rest), 'site'))} more</summary>"
        parts.append(f'<details>{summary}<div class="wide">{_table(columns, rest)}</div></details>')
    parts += _histograms(found)
    if found.kept:
        rows = [
            [_places(names), words.size(count), _text(reason)] for reason, names, count in words.kept(found)
        ]  # fmt: skip
        parts.append(_table(["stayed in floating point", "size#", "why"], rows))
    if found.declared:
        parts.append(_declared(found))
    return _section("Quantization", note, "\n".join(parts))


def _site_cells(row: SiteQuality) -> list[str]:
    numbers = (row.weight_sqnr_db, row.activation_sqnr_db, row.product_sqnr_db, row.end_to_end_sqnr_db)
    bar = "" if row.share is None else f'<i class="share" style="width:{100 * row.share:.1f}%"></i>'
    return [
        f'{_code(row.name)}<span class="why">{_text(words.formats(row))} · {_text(row.operator)}</span>',
        *map(words.decibel, numbers),
        words.bits(row.bits_per_weight),
        words.size(row.bytes),
        f"{words.share(row.share)}{bar}",
    ]


def _histograms(found: Approximation) -> list[str]:
    """What the transforms and the codes made of weights and activations: the worst sites in sight, the rest folded."""
    cards = []
    for row in found.sites:
        plots = ""
        for kind, title in ((row.weight, "weight"), (row.activation, "activation")):
            curves = [
                Curve(name, each.low, each.high, each.counts, _KINDS[name], f"max / median {words.ratio(each.peak)}")
                for name, each in kind.items()
            ]
            peaks = " → ".join(words.ratio(each.peak) for each in kind.values())
            plots += histogram_plot(curves, f"{title}: {' → '.join(kind)}; max / median {peaks}")
        if plots:
            cards.append(f'<div class="card histograms"><p>{_code(row.name)}</p>{plots}</div>')
    if not cards:
        return []
    legend = (
        '<div class="legend"><span><i style="border-color:var(--plot-noise);border-top-style:dashed"></i>original, '
        'before the transforms</span><span><i style="border-color:var(--plot-error)"></i>rewritten, after them</span>'
        '<span><i style="border-color:var(--plot-stored)"></i>what the codes stand for</span>'
        "<span>heights are logarithmic</span></div>"
    )
    shown, rest = cards[:_WORST_SHOWN], cards[_WORST_SHOWN:]
    folded = (
        f"<details><summary>{_text(words.plural(len(rest), 'site'))} more</summary>"
        f'<div class="grid">{"".join(rest)}</div></details>'
    )
    return [legend, f'<div class="grid">{"".join(shown)}</div>', *([folded] if rest else [])]


def _declared(found: Approximation) -> str:
    columns = ["declared", "kind", "format", "scale#", "error in steps#", "relative error#", "saturation"]
    rows = []
    for site in found.declared:
        scale = site.get("scale")
        ends = scale if isinstance(scale, list | tuple) else [] if scale is None else [scale]
        rows.append(
            [
                f'{_code(site.get("name", ""))}<span class="why">{_text(site.get("node", ""))}</span>',
                _text(site.get("kind", "")),
                _text(site.get("format", "")),
                " … ".join(f"{end:.3g}" for end in ends) or "of each input",
                *("–" if (value := site.get(part)) is None else f"{value:.3g}" for part in _ERRORS),
                _text(site.get("saturation", "")),
            ]
        )
    count = words.plural(len(rows), "declared site")
    return f"<details><summary>{_text(count)}</summary>{_table(columns, rows)}</details>"


_ERRORS = ("error_steps", "error_relative")


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    plot = error_plot([Point(row.value, row.error, row.noise, row.departs) for row in report.layers])
    legend = (
        '<div class="legend"><span><i style="border-color:var(--plot-error)"></i>error of the rewritten network</span>'
        '<span><i style="border-color:var(--plot-noise);border-top-style:dashed"></i>rounding of the original in its '
        'own type</span><span><i class="dot"></i>departs</span></div>'
    )
    first = report.first_departure
    told = _departure(first) if first else ""
    worst = sorted(report.layers, key=lambda row: -(row.error / row.noise if row.noise else row.error))[:_WORST_SHOWN]
    rows = [
        [
            _code(row.value),
            f"{_text(row.operator)} {_code(row.node)}",
            _text(row.made_by or "–"),
            _text(row.relation),
            words.small(row.error),
            words.small(row.noise),
        ]
        for row in worst
    ]
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items()))
    note = (
        f"{words.plural(len(report.layers), 'value')} in the order they are computed, each compared with the "
        f"original's value through its change of basis{f' (not compared: {skipped})' if skipped else ''}."
    )
    table = _table(["largest errors over noise", "node", "pass", "relation", "error#", "noise#"], rows)
    card = f'<div class="card plot">{legend}{plot}</div>' if plot else ""
    return _section("Layer by layer", note, told + card + table)


def _departure(row: LayerRow) -> str:
    made = f", made by {_code(row.made_by)}" if row.made_by else ""
    return (
        f'<p class="note bad">The first value that departs is {_code(row.value)}: error {words.small(row.error)}, '
        f"noise {words.small(row.noise)}, at {_text(row.operator)} {_code(row.node)}{made}.</p>"
    )


def _outliers(report: Report) -> str:
    if not report.outliers:
        return ""
    values = [row for row in report.outliers if row.kind == "activation"]
    parts = []
    for measure, changes in (
        ("max / median", [Change(row.name, row.peak_before, row.peak_after) for row in values]),
        ("kurtosis", [Change(row.name, row.kurtosis_before, row.kurtosis_after) for row in values]),
    ):
        if plot := change_plot(changes, measure):
            parts.append(f'<div class="card plot">{_before_and_after(f"{measure} of activations")}{plot}</div>')
    columns = [
        "largest outliers before",
        "transform",
        "max / median#",
        "kurtosis#",
        "ln QSUR / d#",
        "gain#",
        "at best#",
    ]
    for kind in ("activation", "weight"):
        rows = sorted((row for row in report.outliers if row.kind == kind), key=lambda row: -_size(row.peak_before))
        if rows:
            head = [f"{words.plural(len(rows), kind)}, {columns[0]}", *columns[1:]]
            parts.append(_table(head, [_outlier_cells(row) for row in rows[:_WORST_SHOWN]]))
    note = (
        "What the changes of basis did to outliers, before → after. Kurtosis is 3 for a normal distribution. QSUR is "
        "the share of a quantization grid that a normal distribution of the same covariance uses; its gain, and the "
        "gain of the best rotation, are known even where there are fewer rows than channels."
    )
    return _section("Outliers", note, "\n".join(parts))


def _size(value: float) -> float:
    return value if value == value else -1.0


def _before_and_after(title: str) -> str:
    return (
        f'<div class="legend"><b>{_text(title)}</b><span><i style="border-color:var(--plot-noise);'
        'border-top-style:dashed"></i>before</span><span><i style="border-color:var(--plot-error)"></i>after</span>'
        "</div>"
    )


def _outlier_cells(row: OutlierRow) -> list[str]:
    return [
        _code(row.name),
        _text(row.transform),
        f"{words.ratio(row.peak_before)} → {words.ratio(row.peak_after)}",
        f"{words.ratio(row.kurtosis_before)} → {words.ratio(row.kurtosis_after)}",
        f"{words.nats(row.qsur_before)} → {words.nats(row.qsur_after)}" if row.qsur_before == row.qsur_before else "–",
        words.nats(row.qsur_gain, signed=True),
        words.nats(row.qsur_possible, signed=True),
    ]


def _timings(report: Report) -> str:
    if not report.timings_s:
        return ""
    longest = max(report.timings_s.values()) or 1.0
    bars = "\n".join(
        f'<span>{_text(name)}</span><span><i style="width:{100 * seconds / longest:.1f}%"></i></span>'
        f"<b>{words.duration(seconds)}</b>"
        for name, seconds in report.timings_s.items()
    )
    return _section("Time", "", f'<div class="card bars">\n{bars}\n</div>')


def _listing(title: str, facts: dict[str, str]) -> str:
    if not facts:
        return ""
    items = "\n".join(f"<dt>{_text(name)}</dt><dd>{_code(value)}</dd>" for name, value in facts.items())
    return _section(title, "", f'<div class="card"><dl class="environment">\n{items}\n</dl></div>')


def _proof(report: Report) -> str:
    return _listing("Proof", report.proof)


def _environment(report: Report) -> str:
    return _listing("Environment", report.environment)
