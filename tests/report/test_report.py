"""A report survives JSON, reads well on the terminal, and makes one self-contained page that nothing escapes from."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_reports import approximated_report, bad_report, good_report

from rewrite.check.approximation import Histogram
from rewrite.check.diff import diff_models
from rewrite.check.faithful import AS_DECLARED, NOT_DECLARED
from rewrite.check.outliers import OutlierRow
from rewrite.check.plot import Change, Curve, Point, change_plot, error_plot, histogram_plot
from rewrite.errors import RequestError
from rewrite.report import Report, SiteRow, to_html, to_text, words
from rewrite.report.report import LayerRow


def test_json_round_trip():
    report = good_report()
    assert Report.from_json(report.to_json()) == report


def test_numbers_that_are_not_finite_survive_json_and_leave_it_valid():
    text = bad_report().to_json()
    row = Report.from_json(text).outputs[0]
    assert row.noise_ratio == math.inf
    assert row.sqnr_db == -math.inf
    assert math.isnan(row.error)
    assert row.top1 is None

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)


@given(st.builds(SiteRow, *[st.text()] * 8), st.lists(st.builds(LayerRow, st.text(), st.floats(), st.floats())))
def test_any_text_and_number_survives_json(site, layers):
    report = Report(source="s", verdict="v", sites=(site,), layers=tuple(layers))
    again = Report.from_json(report.to_json())
    assert again.sites == report.sites
    assert repr(again.layers) == repr(report.layers)  # NaN is not equal to itself


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 1, "nonsense": 2}', "null"])
def test_what_is_no_report_is_refused_in_one_line(text):
    with pytest.raises(RequestError, match="report") as caught:
        Report.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_record_in_plain_types_becomes_a_row():
    refused = SiteRow.of(
        {"pass": "fold-norm", "site": "ln", "outcome": "refused", "requirement": "R4", "text": "t", "node": "n",
         "operator": "Attention", "reason": "r"}
    )  # fmt: skip
    assert refused == SiteRow("fold-norm", "ln", "refused", "R4", "t", "n", "Attention", "r")
    applied = SiteRow.of(
        {"pass": "p", "site": "s", "outcome": "applied", "nodes": [], "changed": {}, "untied_bytes": 8, "notes": ["n"]}
    )
    assert (applied.untied_bytes, applied.notes) == (8, ("n",))


def test_terminal_text_says_what_happened():
    text = to_text(good_report(), width=200)
    for part in ("EQUAL(0.5 ulp)", "fold-norm", "an attention reads the norm", "within noise", "agree", "147.2 MiB"):
        assert part in text
    assert str(good_report()) == to_text(good_report())
    bad = to_text(bad_report(), width=200)
    assert "departs" in bad
    assert "not finite" in bad
    assert repr(good_report()) == "Report('checkpoints/gpt2': EQUAL(0.5 ulp); 13 applied, 13 refused; within noise)"


def test_an_empty_report_renders():
    report = Report(source="m.onnx", verdict="TESTED")
    assert "TESTED" in to_text(report)
    page = to_html(report)
    assert "<section>" not in page
    assert Report.from_json(report.to_json()) == report


class Page(HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("report", [good_report(), bad_report(), approximated_report()])
def test_page_is_well_formed_and_needs_nothing_from_elsewhere(report):
    text = to_html(report)
    page = Page(text)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name.startswith("on")]
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "action")]
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text)


def test_hostile_text_never_becomes_markup():
    text = to_html(bad_report())
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;&quot;" in text


def test_page_has_every_section():
    text = to_html(good_report())
    for title in (
        "Warnings",
        "Passes",
        "Left alone, and why",
        "Numerical check",
        "Layer by layer",
        "Time",
        "Environment",
    ):
        assert f"<h2>{title}</h2>" in text
    assert "prefers-color-scheme: dark" in text
    assert "12 places" in text  # twelve refusals for one reason are one row


def test_departure_is_named_on_the_page():
    assert "departs" not in to_html(replace(good_report(), layers=()))
    report = replace(good_report(), layers=(LayerRow("v", 0.1, 1e-7, True, "n", "MatMul", "fold-norm"),))
    assert "The first value that departs is <code>v</code>" in to_html(report)


@given(st.lists(st.tuples(st.floats(min_value=0), st.floats(min_value=0)), max_size=30))
def test_plot_is_valid_svg_for_any_errors(pairs):
    points = [Point(f"v{i} <&>", error, noise, i == 0) for i, (error, noise) in enumerate(pairs)]
    text = error_plot(points)
    if text:
        root = ElementTree.fromstring(text)
        circles = [item for item in root if item.tag.endswith("circle")]
        assert len(circles) == len(points)
        assert all(0 <= float(c.get("cy")) <= 280 and 0 <= float(c.get("cx")) <= 900 for c in circles)
    else:
        assert not any(0 < value < math.inf for pair in pairs for value in pair)


def test_a_numerical_check_fills_the_rows():
    text = """<ir_version: 10, opset_import: ["" : 23]>
    g (float[n,4] x) => (float[n,4] logits) { h = Exp(x) logits = Softmax(h) }"""
    model = ir.from_onnx_text(text)
    inputs = [{"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}]
    report = Report("m", "EQUAL(0 ulp)").with_difference(diff_models(model, model, inputs, layers=True), ["3 × 4"])
    assert report.numerical == "within noise"
    assert report.outputs[0].inputs == "3 × 4"
    assert report.outputs[0].top1 == 1.0
    assert [row.value for row in report.layers] == ["h", "logits"]
    assert report.worst_noise_ratio == report.outputs[0].noise_ratio
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("verdict", "numerical", "tone"),
    [
        ("BITWISE", "", words.GOOD),
        ("EQUAL(0.5 ulp)", "within noise", words.GOOD),
        ("EQUAL(0.5 ulp)", "unsettled", words.CAUTION),
        ("EQUAL(0.5 ulp)", "above noise", words.BAD),
        ("EQUAL_MODULO(3 sites)", "within noise", words.CAUTION),
        ("TESTED", "within noise", words.CAUTION),
        ("UNKNOWN(node, reason)", "within noise", words.CAUTION),
        ("REFUTED(x)", "within noise", words.BAD),
        ("NOT EQUAL", "within noise", words.CAUTION),
    ],
)
def test_only_what_is_proved_and_not_contradicted_is_good(verdict, numerical, tone):
    assert words.tone(verdict, numerical) == tone


def outliers() -> tuple[OutlierRow, ...]:
    few = math.nan
    first = OutlierRow("h.<0>", "activation", "hadamard-0", 192, 40, 30.0, 3.1, 90.0, 6.0, few, few, 0.9, 1.0)
    other = OutlierRow("w", "weight", "hadamard-0", 192, 400, 4.0, 3.0, 9.0, 6.0, -2.0, -1.5, 0.5, 0.6)
    return first, other


def test_outliers_survive_json_and_stand_on_the_page_and_the_terminal():
    report = good_report().with_outliers(outliers())
    assert repr(Report.from_json(report.to_json()).outliers) == repr(report.outliers)
    page = to_html(report)
    assert "h.&lt;0&gt;" in page
    assert "90.00 → 6.00" in page
    assert "−2.00 → −1.50" in page
    assert page.count("<svg") == to_html(good_report()).count("<svg") + 2
    assert "1 activation: 90.00 → 6.00; of 1 weight: 9.00 → 6.00" in to_text(report, 200)
    assert "Outliers" not in to_html(good_report())
    assert "Outliers" not in to_text(good_report())


def test_a_report_from_before_outliers_were_measured_is_read():
    data = json.loads(good_report().to_json())
    del data["outliers"]
    assert Report.from_json(json.dumps(data)) == good_report()


def test_the_plot_of_a_change_is_well_formed_and_leaves_out_what_has_no_logarithm():
    plot = change_plot([Change("a", 3.0, 4.0), Change("<b>", math.nan, 1.0), Change("c", 0.0, 2.0)], "peak")
    root = ElementTree.fromstring(plot)
    assert len([e for e in root.iter() if e.tag.endswith("circle")]) == 2
    assert change_plot([Change("a", math.nan, 1.0)], "peak") == ""
    assert change_plot([], "peak") == ""
    assert change_plot([Change("a", 5.0, 5.0)], "peak").startswith("<svg")
    assert change_plot([Change("a", 1e-3, 1e6)], "peak").count("<line") < 12


def test_an_approximation_survives_json_and_stands_on_the_page_and_the_terminal():
    report = approximated_report()
    assert report.numerical == AS_DECLARED
    assert Report.from_json(report.to_json()) == report
    assert report.approximation is not None
    page = to_html(report)
    for said in (
        "bits a weight",
        "33.2 dB, error 2.0e-02",
        "98.44 %",
        "not measured",
        "int8 per channel; × uint8 dynamic",
    ):
        assert said in page
        assert said in to_text(report, 200)
    assert "3 of 4,096 codes flip with rounding" in page
    assert page.count("<svg") == to_html(good_report()).count("<svg") + 2
    assert "6 sites more" in page, "rows beyond the first are folded"
    assert "2 declared sites" in page
    assert "0.001 … 0.02" in page
    assert "of each input" in page
    text = to_text(report, 200)
    assert "and 18 sites more in report.json" in text
    assert "1 weight (3.9 KiB) in floating point: rows of it are looked up: embeddings" in text
    assert "Quantization" not in to_html(good_report())
    assert "Quantization" not in to_text(good_report())


def test_what_the_numbers_of_an_approximation_are_called():
    wrong = approximated_report(NOT_DECLARED)
    assert (wrong.numerical, words.tone(wrong.verdict, wrong.numerical)) == (NOT_DECLARED, words.BAD)
    found = approximated_report().approximation
    assert found is not None
    assert bad_report().with_approximation(found).numerical == "different", "the erased network comes first"
    assert good_report().with_approximation(replace(found, runtime=None)).numerical == "within noise"


def test_a_report_from_before_there_were_approximations_is_read():
    data = json.loads(good_report().to_json())
    del data["approximation"]
    assert Report.from_json(json.dumps(data)) == good_report()


def test_hostile_names_of_sites_stay_text():
    hostile = "<script>alert('&')</script>\""
    found = approximated_report().approximation
    assert found is not None
    site = replace(found.sites[0], name=hostile, format=hostile, activations=hostile, operator=hostile)
    kept = replace(found.kept[0], name=hostile, reason=hostile)
    output = replace(found.outputs[0], output=hostile)
    assert found.runtime is not None
    declared = dict.fromkeys(("name", "node", "kind", "format", "saturation"), hostile)
    changed = replace(
        found, sites=(site,), kept=(kept,), outputs=(output,), declared=(declared,),
        runtime=replace(found.runtime, reason=hostile),
    )  # fmt: skip
    page = to_html(good_report().with_approximation(changed))
    assert "<script" not in page
    assert not Page(page).open
    to_text(good_report().with_approximation(changed))


def test_the_plot_of_histograms_is_well_formed():
    shown = Histogram.of(np.array([-1.0, 0.0, 0.0, 5.0]))
    assert shown is not None
    curves = [Curve("<a>", shown.low, shown.high, shown.counts, kind) for kind in (0, 1, 2)]
    plot = histogram_plot(curves, "weight & <more>")
    root = ElementTree.fromstring(plot)
    assert len([e for e in root.iter() if e.tag.endswith("path")]) == 3
    assert plot.count('stroke-dasharray="4 3"') == 1
    assert histogram_plot([], "nothing") == ""
    assert histogram_plot([Curve("empty", 0, 1, (0, 0))], "nothing") == ""
    ElementTree.fromstring(histogram_plot([Curve("one value", 2, 2, (0, 5))], "flat"))
