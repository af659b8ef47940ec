import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest

from lm.report import figures

SVG = "{http://www.w3.org/2000/svg}"


def test_one_figure_a_fit_and_the_allocation(drawn, study):
    assert set(drawn) == {"isoflop", "allocation", "envelope", "parametric"}
    without = figures.figures({"isoflop": study.fits["isoflop"]}, study.runs, None)
    assert set(without) == {"isoflop", "allocation"}


def test_figures_are_inline_svg_with_searchable_text(drawn):
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        assert root.tag == SVG + "svg", name
        words = " ".join("".join(text.itertext()) for text in root.iter(SVG + "text"))
        assert any(word in words for word in ("parameters N", "training FLOPs C")), name
        assert "http://" not in svg.replace("http://www.w3.org", "")


def test_figures_are_the_same_each_time(drawn, study):
    again = figures.figures(study.fits, study.runs, study.curves)
    assert again == drawn


def test_the_isoflop_figure_shows_every_run_and_every_minimum(study):
    fitted = study.fits["isoflop"]
    with matplotlib.rc_context(figures.STYLE):
        (axes,) = figures.isoflop(fitted).axes
    points = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert sum(len(line.get_xdata()) for line in points) == len(study.runs)
    minima = [line for line in axes.lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [float(line.get_xdata()[0]) for line in minima] == pytest.approx(
        [profile.minimum.params for profile in fitted.profiles]
    )


def test_the_published_lines_pass_through_their_papers_points(study):
    """Hoffmann's Table 3: 400M at 1.92e19; Kaplan: 1.3e9 at one PF-day."""
    with matplotlib.rc_context(figures.STYLE):
        left, right = figures.allocation(study.fits).axes
    lines = {line.get_label().split(" (")[0]: line for line in left.lines}

    def at(name, flops):
        x, y = np.log(lines[name].get_xdata()), np.log(lines[name].get_ydata())
        slope, height = np.polyfit(x, y, 1)
        return np.exp(height + slope * np.log(flops))

    assert at("Hoffmann 1", 1.92e19) == pytest.approx(4e8, rel=0.02)
    assert at("Kaplan", 8.64e19) == pytest.approx(1.3e9, rel=1e-6)
    assert all(
        "extrapolated" in line.get_label() for line in left.lines if "Hoffmann" in line.get_label()
    )


def test_residuals_are_drawn_in_percent_at_each_runs_ratio(study):
    fitted = study.fits["parametric"]
    with matplotlib.rc_context(figures.STYLE):
        right = figures.parametric(fitted, study.runs).axes[1]
    offsets = np.asarray(right.collections[0].get_offsets())
    assert offsets[:, 0] == pytest.approx(study.runs.tokens / study.runs.params)
    assert offsets[:, 1] == pytest.approx(100 * fitted.residuals)
