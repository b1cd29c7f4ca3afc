"""The evidence of one run: a `Report` that everything else only renders.

`OUT/report.json` holds it whole; the terminal and the HTML page show the same rows. A report states what was proved
and what was measured in the words the proof and the check used, and computes nothing of its own.
"""

from rewrite.report.html import to_html
from rewrite.report.report import LayerRow, OutputRow, Report, SiteRow, Sizes
from rewrite.report.terminal import print_report, print_sites, to_text

__all__ = ["LayerRow", "OutputRow", "Report", "SiteRow", "Sizes", "print_report", "print_sites", "to_html", "to_text"]
