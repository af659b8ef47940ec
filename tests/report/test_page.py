import dataclasses
import re
from html.parser import HTMLParser

from lm.report.page import page

VOID = {"meta", "br", "hr"}


class Checker(HTMLParser):
    """Collects text and attributes; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    return checker, " ".join(" ".join(checker.text).split())


def test_one_file_that_needs_nothing_else(study, drawn):
    html = page(study, drawn)
    checker, _ = read(html)
    assert "<script" not in html
    for name, value in checker.attributes:
        assert name not in ("src", "onload", "onclick")
        if name in ("href", "xlink:href"):
            assert value.startswith(("#", "data:"))
    assert not re.search(r"url\((?!#)|@import", html)


def test_the_page_shows_the_fits_beside_the_published(study, drawn):
    _, text = read(page(study, drawn))
    for fitted in study.fits.values():
        assert f"{fitted.a:.3f}" in text
    for published in ("(0.462, 0.534)", "(0.454, 0.455)", "Kaplan et al. 2020", "0.73"):
        assert published in text
    for run in study.runs.excluded:
        assert run in text
    assert "flops convention" not in text and "what C counts" in text
    assert "non embedding" in text  # the accounting table


def test_refusals_and_flags_are_not_hidden(study, drawn):
    isoflop = dataclasses.replace(study.fits["isoflop"], flags=("few_budgets",))
    doubtful = dataclasses.replace(
        study, fits={"isoflop": isoflop}, refused={"parametric": "collinear_design: D = 20 N"}
    )
    _, text = read(page(doubtful, drawn))
    assert "Approach 3 (parametric) refused" in text and "collinear_design: D = 20 N" in text
    assert "few budgets" in text


def test_names_from_a_table_cannot_break_the_page(study, drawn):
    runs = dataclasses.replace(study.runs, excluded=("<script>alert(1)</script>: diverged",))
    html = page(dataclasses.replace(study, runs=runs), drawn)
    assert "<script>" not in html and "&lt;script&gt;" in html
    read(html)


def test_every_run_is_in_the_budgets_by_sizes_table(study, drawn):
    html = page(study, drawn)
    table = re.search(r'<table class="grid">.*?</table>', html).group()
    counts = [int(n) for n in re.findall(r'<td class="light">(\d+)</td></tr>', table)]
    assert sum(counts) == len(study.runs)
    assert table.count('class="best"') == len(counts)
