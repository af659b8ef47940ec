"""The full study's figures beside lm.report's own, in its style; each returns an SVG text."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.isoflop.analysis import bent_loss
from lm.report.figures import COLOURS, GREY, INK, STYLE, WIDTH, log_axis, svg
from lm.report.notation import count, power
from lm.report.study import APPROACH_NAMES, TABLE_2, Study
from lm.scaling import RunTable

OURS, THEIRS = COLOURS["isoflop"], GREY


def exponents(study: Study, elsewhere: list[dict]) -> str:
    """a of every approach and corpus beside the published ones; 80 % thick, 95 % thin."""
    rows = [
        (APPROACH_NAMES[name], fit.a, fit.a_interval80, fit.a_interval95, COLOURS[name])
        for name, fit in study.fits.items()
    ]
    rows += [
        (row["name"], row["a"], row["interval80"], row["interval95"], INK)
        for row in elsewhere
        if row["a"] is not None
    ]
    rows += [(row.label, row.a, row.a_interval80, None, THEIRS) for row in TABLE_2]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.6 + 0.3 * len(rows)))
        axes = figure.subplots()
        for i, (_, a, within80, within95, colour) in enumerate(rows):
            for bounds, width in ((within95, 1.2), (within80, 4)):
                if bounds is not None:
                    axes.plot(bounds, (i, i), color=colour, lw=width, alpha=0.55)
            axes.plot(a, i, "o", color=colour, ms=6)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel="exponent a of N ~ Cᵃ")
        return svg(figure)


def ladder(rows: list[dict]) -> str:
    """Above: one of Kaplan's settings at a time. Below: all, and back, beside Porian et al."""
    with matplotlib.rc_context(STYLE):
        parts = [
            [row for row in rows if row["part"] == part] for part in ("one at a time", "together")
        ]
        figure = Figure(figsize=(WIDTH, 1.4 + 0.27 * len(rows)))
        panels = figure.subplots(2, 1, sharex=True, height_ratios=list(map(len, parts)))
        for axes, shown in zip(panels, parts, strict=True):
            for i, row in enumerate(shown):
                if row["a"] is not None:
                    axes.plot(row["interval95"], (i, i), color=OURS, lw=1.2, alpha=0.55)
                    axes.plot(row["interval80"], (i, i), color=OURS, lw=4, alpha=0.55)
                axes.plot(row["a"] or np.nan, i, "o", color=OURS, ms=6, label="" if i else "here")
                if row["porian2024"] is not None:
                    label = "" if i else "Porian et al. 2024"
                    axes.plot(row["porian2024"], i, "D", color=THEIRS, ms=6, label=label)
            for published in (0.5, 0.73):
                axes.axvline(published, color=THEIRS, lw=0.8, ls=":")
            axes.set_yticks(range(len(shown)), [row["rung"] for row in shown])
            axes.set(ylim=(len(shown) - 0.5, -0.5), title=shown[0]["part"].capitalize())
        panels[1].set(xlabel="exponent a of N ~ Cᵃ; dotted: 0.50 and Kaplan et al.'s 0.73")
        panels[1].legend(loc="upper left")
        return svg(figure)


def held_out(study: Study, foreseen: dict, bent: list[float]) -> str:
    """The top budget's runs and minimum, and what the budgets below it foresaw.

    ``bent``: constants of ``analysis.bent_loss``, of the budgets below as well.
    """
    profile = next(p for p in study.fits["isoflop"].profiles if p.flops > 0.9 * foreseen["flops"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8))
        axes = figure.subplots()
        axes.plot(profile.params, profile.loss, "o", color=OURS, ms=4.5, label="runs, not fitted")
        grid = np.geomspace(profile.params.min(), profile.params.max(), 200)
        axes.plot(grid, profile.curve(grid), color=OURS, lw=1.2, label="their parabola")
        axes.plot(profile.minimum.params, profile.minimum.loss, "D", color=OURS, ms=7)
        law, line = foreseen["parametric"], foreseen["isoflop"]
        E, A, B, alpha, beta = law["constants"]
        tokens = np.interp(
            np.log(grid), np.log(profile.params), np.log(profile.tokens)
        )  # between the runs' own
        tokens = np.exp(tokens)
        three, six = E + A / grid**alpha + B / tokens**beta, bent_loss(bent, grid, tokens)
        colour = COLOURS["parametric"]
        axes.plot(grid, three, color=colour, lw=1.4, ls="--", label="foreseen by Approach 3")
        axes.plot(grid, six, color=colour, lw=1.4, ls=":", label="and with a sixth constant")
        axes.plot(law["params"], law["loss"], "D", color=colour, ms=7)
        axes.axvspan(*line["interval80"], color=COLOURS["envelope"], alpha=0.13, lw=0)
        axes.axvline(line["params"], color=COLOURS["envelope"], label="foreseen by Approach 2")
        log_axis(axes.xaxis, count)
        axes.set(xlabel="parameters N", ylabel="loss, nats a token")
        axes.set_title(f"{power(foreseen['flops'])} FLOPs, from the budgets below")
        axes.legend()
        return svg(figure)


def over_training(rows: list[dict], table: RunTable, base: float) -> str:
    """Loss against FLOPs of an optimal model and smaller ones, up to the optimal one's loss."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4))
        axes = figure.subplots()
        sizes, curves = np.unique(table.params)[::-1], []
        for i, size in enumerate(sizes):
            of_size, colour = table.params == size, tuple(COLOURS.values())[i % len(COLOURS)]
            times, loss = table.flops[of_size] / base, table.loss[of_size]
            label = count(size) + (f", {sizes[0] / size:.1f} x smaller" if i else ", optimal")
            axes.plot(times, loss, "o", color=colour, ms=4, label=label)
            degree = min(2, len(np.unique(times)) - 1)
            curves.append(np.polyfit(np.log(times), np.log(loss), degree))
            along = np.geomspace(times.min(), times.max(), 50)
            smooth = np.exp(np.polyval(curves[-1], np.log(along)))
            axes.plot(along, smooth, color=colour, lw=1.2)
        target, dotted = np.exp(curves[0][-1]), {"color": GREY, "lw": 0.8, "ls": ":"}
        reached = [row["cost"] for row in rows if row["cost"]]
        axes.hlines(target, 1, max(reached, default=1), **dotted)
        axes.vlines(reached, axes.get_ylim()[0], target, **dotted)
        budgets = np.unique(np.round(table.flops / base, 1))
        axes.set_xscale("log")
        axes.set_xticks(budgets, [f"{x:g}" for x in budgets])
        axes.minorticks_off()
        axes.set(xlabel=f"FLOPs over {power(base)}", ylabel="loss, nats a token")
        axes.legend()
        return svg(figure)
