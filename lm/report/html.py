"""Pieces of the page: tables, figures, one row of a forest plot, and values in words."""

from html import escape

import numpy as np

from lm.report.notation import MISSING, power

INK, GREY, PALE = "#2f4b9f", "#7b8494", "#e3e6eb"
PLOT_WIDTH = 300


def figure(svg: str, caption: str) -> str:
    """Both are HTML already."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def table(head, rows, kind: str = "") -> str:
    """`head` and `rows` are HTML already; a heading may bring its own <th>."""
    headings = "".join(text if text.startswith("<th") else f"<th>{text}</th>" for text in head)
    return (
        f'<table class="{kind}"><thead><tr>{headings}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def row(cells, kind: str = "") -> str:
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def cell(text, kind: str = "") -> str:
    """A table cell of any text, escaped."""
    return f'<td class="{kind}">{escape(str(text))}</td>'


def said(value, between: str = "<br>") -> str:
    """A value of the checklist as a reader would write it; escaped."""
    if isinstance(value, dict):
        items = [f"{escape(str(k).replace('_', ' '))}: {said(v, ', ')}" for k, v in value.items()]
        return between.join(items) or MISSING
    if isinstance(value, list | tuple):
        numeric = len(value) == 2 and all(isinstance(x, int | float) for x in value)
        return " to ".join(map(said, value)) if numeric else "; ".join(map(said, value)) or "none"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return MISSING if value is None else escape(str(value))
    number = float(value)
    if abs(number) >= 1e9:
        return power(number, 3)
    return f"{number:,.0f}" if number == int(number) else f"{number:.4g}"


def interval_plot(low, high, fit, colour) -> str:
    """One row of a forest plot over a in [low, high], as a small <svg>; 80 % thick, 95 % thin."""

    def x(a):
        return round(float(np.clip((a - low) / (high - low), 0, 1)) * PLOT_WIDTH, 1)

    drawn = [
        f'<line x1="{x(tick)}" x2="{x(tick)}" y1="0" y2="30" stroke="{PALE}"/>'
        for tick in _tenths(low, high)
    ]
    for bounds, width in ((getattr(fit, "a_interval95", None), 1.2), (fit.a_interval80, 4)):
        if bounds and np.all(np.isfinite(bounds)):
            drawn.append(
                f'<line x1="{x(bounds[0])}" x2="{x(bounds[1])}" y1="15" y2="15"'
                f' stroke="{colour}" stroke-width="{width}" stroke-opacity="0.55"/>'
            )
    drawn.append(f'<circle cx="{x(fit.a)}" cy="15" r="4.2" fill="{colour}"/>')
    return f'<svg width="{PLOT_WIDTH}" height="30" aria-hidden="true">{"".join(drawn)}</svg>'


def interval_axis(low, high) -> str:
    """The heading over that plot: its axis, every tenth but the ends."""
    labels = "".join(
        f'<text x="{PLOT_WIDTH * (tick - low) / (high - low):.1f}" y="13" text-anchor="middle"'
        f' font-size="12.5" fill="{GREY}">{tick:.1f}</text>'
        for tick in _tenths(low, high)[1:-1]
    )
    svg = f'<svg width="{PLOT_WIDTH}" height="16" aria-hidden="true">{labels}</svg>'
    return f'<th class="plot">{svg}</th>'


def _tenths(low, high) -> np.ndarray:
    return np.linspace(low, high, round((high - low) / 0.1) + 1)
