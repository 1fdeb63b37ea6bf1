"""The page: one file, well formed, whose bars are as long as their figures, and which names nothing as markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from measured import whole

from elm_mlx.bench import tables
from elm_mlx.bench.results import Row, Speeds
from elm_mlx.train import metrics, run_report

VOID = {"meta", "line", "rect", "br"}


class Checked(HTMLParser):
    """Every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)


def test_it_is_whole_and_needs_nothing() -> None:
    text = tables.page(whole())
    found = Checked(text)
    assert found.open == [] and found.seen.count("svg") == 2 and "script" not in found.seen
    assert not re.search(r"https?://|src=|@import", text)
    assert "&lt;b&gt;" in text and "<b>" not in text


def test_bars_are_as_long_as_their_medians() -> None:
    prompt, decode = re.findall(r"<svg.*?</svg>", tables.page(whole()), re.S)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', prompt)]
    assert widths[0] / widths[1] == pytest.approx(667 / 500, rel=0.01)
    # The roof of a step is at 95 / 0.195: too far above the bars of a prompt, at 667 / 0.152.
    roofs = [re.findall(r'class="cross" x1="([\d.]+)"', chart) for chart in (prompt, decode)]
    assert roofs[0] == [] and len(roofs[1]) == 0


def test_a_near_roof_is_drawn_where_it_is() -> None:
    made = whole()
    made.speeds = Speeds({"float32": 1e6 / 4}, 2e6)
    prompt, _ = re.findall(r"<svg.*?</svg>", tables.page(made), re.S)
    (roof,) = re.findall(r'class="cross" x1="([\d.]+)"', prompt)
    width = float(re.findall(r'<rect [^>]*width="([\d.]+)"', prompt)[0])
    assert float(roof) / width == pytest.approx(1 / (4 * 2280 / 1e6 / 0.015), rel=0.01)


def test_many_cases_have_an_overview() -> None:
    made = whole()
    made.rows = [
        replace(row, case=replace(row.case, model="OpenELM-3B", batch=batch))
        for batch in (1, 2, 4)
        for row in made.rows
    ]
    titles = re.findall(r"<h3>(.*?)</h3>", tables.page(made))
    assert len(titles) == 3 + 6 and titles[2] == "elm-mlx: memory, GB"
    assert tables.page(made).count(">3B bfloat16, 10 + 5, 4 at once<") == 3


def test_a_benchmark_without_results_is_a_page_too() -> None:
    made = whole()
    made.rows, made.norms = [Row(made.rows[0].case, skipped={"ours": "too <large>"})], []
    text = tables.page(made)
    assert "too &lt;large&gt;" in text and "<svg" not in text and Checked(text).open == []


def test_all_pages_look_alike() -> None:
    style, run = "--c0: #0072b2;", metrics.RunMetrics("a", Path("a"))
    assert style in tables.page(whole()) and style in run_report.page([run])
