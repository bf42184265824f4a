"""Reports: self-contained pages."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from shared import reports
from shared.metrics import Estimate
from shared.reports import Section

VOID = {"meta", "img", "circle", "polyline", "br"}


class Balanced(HTMLParser):
    """Collects text, and fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href", "action", "data") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_page_shows_everything_and_escapes_it(tmp_path):
    metrics = {"energy_distance": Estimate(0.125, 10, 0.1, math.nan)}
    sections = [
        Section("Metrics", reports.metrics(metrics)),
        Section("Failures", reports.failures({"<b>": 1, "torn": 3}, 8)),
        Section("Settings", reports.code("a: <script>alert(1)</script>")),
        Section("Nothing", reports.table(("a",), [])),
    ]
    file = reports.write(tmp_path / "new" / "report.html", "A & B", {"n": 8}, sections)
    page = file.read_text()
    text = " ".join(Balanced(page).words)
    for word in ("A & B", "energy distance", "0.125", "0.1 to –", "<b>", "37.5%", "<script>"):
        assert word in text
    assert text.index("torn") < text.index("<b>")  # most frequent first
    assert "Nothing" not in text
    assert "<script" not in page
    assert page.startswith("<!doctype html>")


def test_a_page_loads_nothing():
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
    small = reports.page("t", {}, [Section("curve", reports.curve([(0, 1.0), (1, 2.0)], "loss"))])
    large = reports.page("t", {}, [Section("figures", reports.figures([figure, figure]))])
    assert len(small) < 10_000
    assert len(large) > 1_000_000
    assert Balanced(small).links == []
    assert not re.search(r"<script[^>]+src=|<link |@import|url\(\s*['\"]?http", large)
    assert large.count("Plotly.newPlot(") >= 2
    assert reports.figures([]) == ""


def test_curves():
    points = [(0, 100.0), (1, 10.0), (2, 1.0), (3, math.nan)]
    drawn = re.search(r'points="([^"]+)"', reports.curve(points, "loss <a>")).group(1).split()
    assert len(drawn) == 3
    y = [float(p.split(",")[1]) for p in drawn]
    assert y[1] - y[0] == pytest.approx(y[2] - y[1])  # logarithmic
    assert "<a>" not in reports.curve(points, "loss <a>")
    signed = re.search(r'points="([^"]+)"', reports.curve([(0, -1.0), (1, 1.0)], "x")).group(1)
    assert len(signed.split()) == 2
    assert reports.curve([(0, 1.0)], "x") == ""
    assert "polyline" in reports.curve([(0, 1.0), (1, 1.0)], "flat")
