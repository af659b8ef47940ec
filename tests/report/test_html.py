import re
from types import SimpleNamespace

import pytest

from lm.report import html


def test_cells_escape_what_they_are_given():
    assert html.cell("<b>&") == '<td class="">&lt;b&gt;&amp;</td>'


@pytest.mark.parametrize(
    "value, text",
    [
        ("a<b", "a&lt;b"),
        (None, "–"),
        ([0.001, 0.016], "0.001 to 0.016"),
        (["cosine", "wsd"], "cosine; wsd"),
        ([], "none"),
        (4500, "4,500"),
        (1e13, "10¹³"),
        (
            {"isoflop": {"a": 0.5, "rms_error": None}, "x": 1},
            "isoflop: a: 0.5, rms error: –<br>x: 1",
        ),
    ],
)
def test_values_of_the_checklist_in_words(value, text):
    assert html.said(value) == text


def test_intervals_are_drawn_to_scale_and_cut_at_the_axis():
    fit = SimpleNamespace(a=0.5, a_interval80=(0.45, 0.55), a_interval95=(-3.0, 0.6))
    svg = html.interval_plot(0.4, 0.8, fit, "#000")
    assert 'cx="75.0"' in svg  # a quarter of 300
    bars = re.findall(r'x1="([\d.]+)" x2="([\d.]+)" y1="15"', svg)
    assert bars == [("0.0", "150.0"), ("37.5", "112.5")]
