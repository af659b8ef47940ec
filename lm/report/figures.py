"""The report's figures, in one style. Each takes fits and tables, and returns an SVG text.

The text in them stays text: a page can be searched, and its own typeface is used.
"""

import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lm.report.expert_loads import FULL_LOAD, ExpertLoads
from lm.report.notation import count, power
from lm.report.study import APPROACH_NAMES
from lm.scaling import AllocationFit, CurveTable, EnvelopeFit, IsoflopFit, ParametricFit, RunTable
from lm.scaling.published import named_law

INK, GREY, PALE = "#1c2330", "#7b8494", "#e3e6eb"
COLOURS = {"envelope": "#0b7a75", "isoflop": "#2f4b9f", "parametric": "#c4512d"}
PUBLISHED_LINES = (
    ("hoffmann2022:envelope", "Hoffmann 1", (0, (1, 1.2))),
    ("hoffmann2022:isoflop", "Hoffmann 2", (0, (4, 1.5))),
    ("hoffmann2022:parametric", "Hoffmann 3", (0, (7, 2))),
    ("kaplan2020", "Kaplan", (0, (6, 1.5, 1, 1.5))),
)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.4,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "lm",
    "path.simplify_threshold": 0.3,
}
_FONTS = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
MOST_LABELS = 12  # budgets named in the isoFLOP figure
WIDTH = 9.4  # inches at 72 points; the page shows it at its own width


def figures(
    fits: dict[str, AllocationFit],
    runs: RunTable,
    curves: CurveTable | None,
    experts: ExpertLoads | None = None,
) -> dict[str, str]:
    """Every figure that the fits allow, SVG by name."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        if "isoflop" in fits:
            drawn["isoflop"] = svg(isoflop(fits["isoflop"]))
        drawn["allocation"] = svg(allocation(fits))
        if "envelope" in fits and curves is not None:
            drawn["envelope"] = svg(envelope(fits["envelope"], curves))
        if "parametric" in fits:
            drawn["parametric"] = svg(parametric(fits["parametric"], runs))
        if experts is not None:
            drawn["experts"] = svg(expert_loads(experts))
    return drawn


def isoflop(fit: IsoflopFit) -> Figure:
    """Loss against parameters at each budget, with the fitted curve and its minimum."""
    figure, axes = _figure(4.3)
    minima = [p.minimum for p in fit.profiles if not p.reason]
    if minima:
        axes.plot(
            [m.params for m in minima], [m.loss for m in minima], color=GREY, lw=0.8, zorder=1
        )
    shown = [p for p in fit.profiles if not p.reason or p.coefficients.size]
    labelled = shown[:: max(1, -(-len(shown) // MOST_LABELS))]
    colours = matplotlib.cm.ScalarMappable(_log_norm([p.flops for p in fit.profiles]), _COLOUR_MAP)
    losses = np.concatenate([p.loss[p.used] for p in fit.profiles])
    # A few runs far off, or outside the window, must not flatten all curves.
    top = 1.01 * min(losses.max(), np.quantile(losses, 0.9) + np.ptp(losses) * 0.25)
    for profile in fit.profiles:
        used, refused, colour = profile.used, bool(profile.reason), colours.to_rgba(profile.flops)
        axes.plot(
            profile.params[used],
            profile.loss[used],
            "o",
            ms=4.2,
            color=colour,
            mew=0,
            alpha=0.3 if refused else 1,
        )
        axes.plot(profile.params[~used], profile.loss[~used], "o", ms=4.2, mfc="white", mec=colour)
        if any(profile is p for p in shown):
            grid = np.geomspace(profile.params[used].min(), profile.params[used].max(), 200)
            axes.plot(grid, profile.curve(grid), color=colour, lw=1.3, ls=":" if refused else "-")
        if profile.minimum and not refused:
            minimum = profile.minimum
            axes.plot(minimum.params, minimum.loss, "D", ms=6.5, color=colour, mec="white", mew=1)
            height = float(profile.curve(np.array([profile.akima]))[0])
            axes.plot(profile.akima, height, "|", ms=13, mew=1.2, color=colour)
        if any(profile is p for p in labelled):
            right = np.flatnonzero(used & (profile.loss < top))[-1]
            axes.annotate(
                power(profile.flops) + (" (not used)" if refused else ""),
                (profile.params[right], profile.loss[right]),
                (7, 0),
                textcoords="offset points",
                va="center",
                color=colour,
                fontsize=8.5,
            )
    axes.set_ylim(None, top)
    for marker, label in (
        ("o", "run"),
        ("D", "minimum of the fitted curve"),
        ("|", "Akima minimum"),
    ):
        axes.plot([], [], marker, color=GREY, ms=5 if marker != "|" else 9, label=label)
    if not all(p.used.all() for p in fit.profiles):
        axes.plot([], [], "o", mfc="white", mec=GREY, ms=5, label="run outside the window")
    log_axis(axes.xaxis, count)
    axes.margins(x=0.09)
    axes.set(xlabel="parameters N", ylabel="loss, nats a token")
    axes.legend(loc="upper center", ncol=4, bbox_to_anchor=(0.5, -0.13))
    return figure


def allocation(fits: dict[str, AllocationFit]) -> Figure:
    """N_opt and D_opt against C, with 80 % bands and the published lines."""
    low = min(fit.flops_range[0] for fit in fits.values()) / 4
    high = max(fit.flops_range[1] for fit in fits.values()) * 4
    flops = np.geomspace(low, high, 60)
    figure, panels = _figure(4.2, columns=2)
    for name, label, dashes in PUBLISHED_LINES:
        law = named_law(name)
        best = law.law.optimum(flops)
        outside = high < law.flops_range[0] or low > law.flops_range[1]
        label += " (extrapolated)" if outside else ""
        for axes, line in zip(panels, (best.params, best.tokens), strict=True):
            axes.plot(flops, line, color=GREY, lw=1.1, ls=dashes, label=label, zorder=1)
    for name, fit in fits.items():
        colour = COLOURS[name]
        draws = fit.allocation_draws
        for panel, axes in enumerate(panels):
            line = (fit.optimal_params, fit.optimal_tokens)[panel](flops)
            if len(draws) > 1:
                paths = draws[:, 2 + panel, None] + draws[:, panel, None] * np.log(flops)
                band = np.exp(np.quantile(paths, [0.1, 0.9], axis=0))
                axes.fill_between(flops, *band, color=colour, alpha=0.13, lw=0)
            axes.plot(flops, line, color=colour, lw=1.6, label=APPROACH_NAMES[name])
            if name != "parametric":
                _optima(axes, fit, colour, panel, small=name == "envelope")
    for axes, quantity in zip(panels, ("parameters N", "tokens D"), strict=True):
        log_axis(axes.xaxis, power)
        log_axis(axes.yaxis, count)
        axes.set(xlabel="training FLOPs C", xlim=(low, high), title=f"Optimal {quantity}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4)
    return figure


def _optima(axes, fit, colour, panel, small) -> None:
    points = fit.optima[:: max(1, len(fit.optima) // 120)] if small else fit.optima
    heights = [(point.params, point.tokens)[panel] for point in points]
    at = [point.flops for point in points]
    axes.plot(
        at,
        heights,
        "o" if small else "D",
        ms=2 if small else 6,
        color=colour,
        mec="white",
        mew=0 if small else 0.9,
        zorder=3,
    )
    if isinstance(fit, IsoflopFit):
        spread = np.exp(1.28 * np.array([p.log_params_sd for p in fit.profiles if not p.reason]))
        axes.vlines(at, heights / spread, heights * spread, color=colour, lw=1.2)


def envelope(fit: EnvelopeFit, curves: CurveTable) -> Figure:
    """Training curves over their FLOPs, coloured by size, with the points of the envelope."""
    figure, axes = _figure(4.3)
    shade = matplotlib.cm.ScalarMappable(_log_norm(curves.params), _COLOUR_MAP)
    ends, losses = [], []
    for run in dict.fromkeys(curves.run_id):
        rows, loss = _logged_loss(curves, run)
        if rows.size:
            colour = shade.to_rgba(curves.params[rows[0]])
            axes.plot(curves.flops[rows], loss, lw=0.8, color=colour)
            ends.append((curves.flops[rows[-1]], loss[-1]))
            losses.append(loss.min())
    axes.plot(
        [o.flops for o in fit.optima],
        [o.loss for o in fit.optima],
        ".",
        color=INK,
        ms=2.6,
        label="envelope: the lowest loss at each C",
    )
    # The first steps of a curve fall from ln V and would flatten all that matters.
    flops, final = np.array(ends).T
    low, high = min(losses), max(*final, *(o.loss for o in fit.optima))
    axes.set_ylim(low - 0.04 * (high - low), high + 0.45 * (high - low))
    below = np.fmin(curves.train_loss, curves.validation_loss) < axes.get_ylim()[1]
    axes.set_xlim(curves.flops[below].min() / 1.5, flops.max() * 1.3)
    log_axis(axes.xaxis, power)
    bar = figure.colorbar(shade, ax=axes, pad=0.01, aspect=34)
    log_axis(bar.ax.yaxis, count)
    bar.set_label("parameters N")
    bar.outline.set_visible(False)
    axes.set(xlabel="training FLOPs C", ylabel="loss, nats a token")
    axes.legend(loc="upper right", markerscale=3)
    return figure


def parametric(fit: ParametricFit, runs: RunTable) -> Figure:
    """Left: contours of L(N, D) with the runs and the frontier. Right: residuals of every run."""
    figure, (left, right) = _figure(4.2, columns=2)
    colours = matplotlib.cm.ScalarMappable(_log_norm(runs.flops), _COLOUR_MAP).to_rgba(runs.flops)

    tokens = np.geomspace(runs.tokens.min() / 2, runs.tokens.max() * 2, 80)
    params = np.geomspace(runs.params.min() / 2, runs.params.max() * 2, 80)
    surface = fit.law.loss(params[:, None], tokens[None])
    levels = np.unique(np.quantile(surface, np.linspace(0.04, 0.92, 11)).round(3))
    contours = left.contour(tokens, params, surface, levels, colors="#b3bac6", linewidths=0.8)
    left.clabel(contours, fmt="%.2f", fontsize=7, colors=GREY)
    left.scatter(runs.tokens, runs.params, s=17, c=colours, linewidths=0)
    flops = np.array([runs.flops.min() / 3, runs.flops.max() * 3])
    left.plot(
        fit.optimal_tokens(flops),
        fit.optimal_params(flops),
        color=COLOURS["parametric"],
        lw=1.6,
        label=f"compute-optimal: N ~ D^{fit.a / fit.b:.2f}",
    )
    left.set(
        xlim=(tokens[0], tokens[-1]),
        ylim=(params[0], params[-1]),
        xlabel="tokens D",
        ylabel="parameters N",
        title="Fitted loss L(N, D)",
    )
    log_axis(left.xaxis, count)
    log_axis(left.yaxis, count)
    left.grid(False)
    left.legend(loc="upper left")

    residual = 100 * fit.residuals
    ratio = runs.tokens / runs.params
    right.axhline(0, color=GREY, lw=0.8)
    right.scatter(ratio, residual, s=17, c=colours, linewidths=0)
    typical = np.median(np.abs(residual)) * 1.4826
    for i in np.argsort(-np.abs(residual))[:3]:
        if abs(residual[i]) > 3 * typical:
            right.annotate(
                str(runs.run_id[i]),
                (ratio[i], residual[i]),
                (5, 0),
                fontsize=7.5,
                textcoords="offset points",
                va="center",
                color=GREY,
            )
    log_axis(right.xaxis, count)
    right.set(
        xlabel="tokens a parameter D/N", ylabel="observed over fitted loss, %", title="Residuals"
    )
    return figure


_COLOUR_MAP = matplotlib.colors.LinearSegmentedColormap.from_list(
    "budgets", ["#3b1f6b", "#2f4b9f", "#1f7fb0", "#1aa28c", "#7fb83a", "#d9a514"]
)


def expert_loads(loads: ExpertLoads) -> Figure:
    """A heat map of load over fair share: experts, layer under layer, against tokens."""
    n_layers, n_experts = loads.load_PLE.shape[1:]
    figure, axes = _figure(min(1.2 + 0.09 * n_layers * n_experts, 7.0))
    image = axes.pcolormesh(
        np.append(0, loads.tokens_P),
        np.arange(n_layers * n_experts + 1),
        loads.load_PLE.reshape(len(loads.tokens_P), -1).T * n_experts,
        norm=matplotlib.colors.TwoSlopeNorm(1.0, 0.0, FULL_LOAD),
        cmap="RdBu_r",
        rasterized=True,
    )
    for i in range(1, n_layers):
        axes.axhline(i * n_experts, color="white", lw=1.5)
    axes.set_yticks((np.arange(n_layers) + 0.5) * n_experts, loads.layers_L)
    axes.grid(False)
    axes.invert_yaxis()
    axes.set(xlabel="tokens", ylabel=f"layer, its {n_experts} experts")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=34)
    bar.set_label("load over fair share")
    bar.outline.set_visible(False)
    return figure


def _log_norm(values):
    return matplotlib.colors.LogNorm(np.min(values), np.max(values) * 1.0001)


def _logged_loss(curves: CurveTable, run: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows, losses) of one curve as Approach 1 reads it: validation if logged, else training."""
    rows = np.flatnonzero(curves.run_id == run)
    rows = rows[np.argsort(curves.flops[rows], kind="stable")]
    several = np.isfinite(curves.validation_loss[rows]).sum() >= 2
    loss = (curves.validation_loss if several else curves.train_loss)[rows]
    return rows[np.isfinite(loss)], loss[np.isfinite(loss)]


def _figure(height: float, columns: int = 1):
    figure = Figure(figsize=(WIDTH, height))
    figure.get_layout_engine().set(wspace=0.05)
    return figure, figure.subplots(1, columns)


def log_axis(axis, write) -> None:
    """A log axis with labels 1, 2 and 5 a decade where it spans little, one a decade otherwise."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(10, subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda x, _: write(x)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def svg(figure: Figure) -> str:
    """The figure as an <svg> element: no prolog, no ids that another figure also has."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", _FONTS)
    svg = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
