"""The self-contained report.html of a study: no script, no network, everything in one file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from lm.report import html
from lm.report.expert_loads import FULL_LOAD
from lm.report.html import cell
from lm.report.notation import (
    MISSING,
    count,
    decimal,
    interval,
    percent,
    power,
    significant,
    significant_places,
)
from lm.report.study import APPROACH_NAMES, NOT_GIVEN, TABLE_2, Study, held_out_errors
from lm.scaling import EnvelopeFit, IsoflopFit, ParametricFit, RunTable

APPROACHES = {
    "envelope": "Approach 1 (envelope)",
    "isoflop": "Approach 2 (IsoFLOP)",
    "parametric": "Approach 3 (parametric)",
}
FLAG_TEXTS = {
    "profiles_excluded": "budgets without a usable minimum are not in the line; see below",
    "two_budgets": "a line through two points: its error cannot be seen",
    "less_than_a_decade_of_flops": "too short a lever for an exponent",
    "minima_scatter_beyond_noise": "the minima scatter about the line by more than the noise of the"
    " losses explains, and the interval is widened for it; look at the shapes and the tuning",
    "akima_disagrees": "half of the Akima minima are more than 1.5 times off those of the fitted"
    " curve: the form of the curve decides the exponent",
    "levelled_budgets": "runs of one budget differ in FLOPs by more than 10 % and were brought to"
    " one value along a parametric law of the table",
    "uneven_budgets": "runs of one budget differ in FLOPs by more than 10 %",
    "few_sizes_on_the_envelope": "three sizes or fewer are ever the best: the line is coarse",
    "envelope_has_gaps": "at most FLOP values the best run is of the smallest or largest size on"
    " offer, or none is near its end",
    "few_points": "fewer than three runs a constant: the interval says little",
    "nearly_collinear_design": "tokens nearly follow parameters, so that the two terms are hard to"
    " tell apart; vary tokens per parameter",
    "flops_are_not_6nd": "the FLOPs of the table are not 6 N D, and a, b and the optima are under"
    " the FLOPs of the table; β / (α + β) of the constants alone would be the exponent under 6 N D",
    "not_converged": "the best start did not reach a gradient norm of 1e-6",
    "refused_draws": "more than 5 % of the bootstrap draws gave no fit and are not in the interval",
    "E_at_zero": "the irreducible loss was driven to zero: the range of losses does not show it",
}
CHECKLIST_NAMES = {
    "law_form": "form of the law",
    "params_convention": "what N counts",
    "flops_convention": "what C counts",
    "corpus": "data",
    "seed": "seeds",
    "batch_tokens": "batch, tokens",
}
RANGES = {"params_range": count, "tokens_range": count, "flops_range": power}
MOST_SIZES = 16  # columns of the run table on the page; beyond, neighbouring sizes share one
OPT = "<sub>opt</sub>"


def page(study: Study, figures: dict[str, str], more: Sequence[str] = ()) -> str:
    """The whole document; `figures` are SVG texts by name, `more` sections of the caller's own."""
    sections = (
        _heading(study),
        _exponents(study),
        _doubts(study),
        _isoflop(study, figures),
        _allocation(figures),
        _envelope(study, figures),
        _parametric(study, figures),
        _experts(study, figures),
        _accounting(study),
        _held_out(study),
        _comparison(study),
        *more,
        _runs(study),
        _checklist(study),
    )
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Scaling law: N ~ C^{study.headline.a:.2f}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"\n<style>\n{css}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + '\n<footer class="note">Written by <code>python -m lm.fit</code>; law.json,'
        " written with it, holds its numbers.</footer>\n</body></html>\n"
    )


def _heading(study: Study) -> str:
    fit, runs, top = study.headline, study.runs, study.top_flops
    params, tokens = float(fit.optimal_params(top)), float(fit.optimal_tokens(top))
    facts = [
        f"{len(runs)} runs of {count(runs.params.min())} to {count(runs.params.max())} parameters",
        f"{power(runs.flops.min())} to {power(runs.flops.max())} training FLOPs",
    ]
    checklist = study.checklist()
    facts += [html.said(checklist[k]) for k in ("corpus", "tokenizer") if checklist[k] != NOT_GIVEN]
    low, high = fit.params_interval(top)
    within = f" (80 % interval {count(low)} to {count(high)})" if np.isfinite(low) else ""
    interval80 = interval(fit.a_interval80)
    lead = (
        f"{APPROACHES[fit.approach]} gives a = {decimal(fit.a)}"
        + (f" with an 80 % interval of {interval80}" if interval80 != MISSING else "")
        + f". At {power(top)} FLOPs, the largest budget fitted, the optimum is {count(params)}"
        f" parameters{within} on {count(tokens)} tokens: {tokens / params:.3g} tokens a parameter."
        f" {_against_published(fit)}"
    )
    return (
        '<p class="kicker">Compute-optimal scaling law</p>'
        f"\n<h1>Parameters grow as C<sup>{fit.a:.2f}</sup>, tokens as C<sup>{fit.b:.2f}</sup></h1>"
        f'\n<p class="sub">{" · ".join(facts)}</p>\n<p class="lead">{lead}</p>'
    )


def _against_published(fit) -> str:
    low, high = fit.a_interval95
    if not np.isfinite(low):
        return ""
    chinchilla, kaplan = ("inside" if low <= a <= high else "outside" for a in (0.49, 0.73))
    return (
        f"Chinchilla’s 0.49 (IsoFLOP) lies {chinchilla} the 95 % interval {interval((low, high))},"
        f" Kaplan’s 0.73 {kaplan}."
    )


def _exponents(study: Study) -> str:
    values = [x for fit in study.fits.values() for x in (fit.a, *fit.a_interval95)]
    values = [x for x in values if np.isfinite(x)] + [published.a for published in TABLE_2]
    # A wild interval must not squeeze the rest: the axis ends at 0 and 1.2, and bars are cut there.
    low = max(0.0, np.floor(10 * min(values) - 0.2) / 10)
    high = min(1.2, np.ceil(10 * max(values) + 0.2) / 10)
    rows = []
    for name, label in APPROACH_NAMES.items():
        if name in study.fits:
            fit = study.fits[name]
            plot = html.interval_plot(low, high, fit, html.INK)
            rows.append(_exponent_row(label, fit, fit.a_interval95, plot, "ours"))
        elif name in study.refused:
            reason = f'<td class="text" colspan="6">{escape(study.refused[name])}</td>'
            rows.append(html.row([cell(label), reason], "refused"))
    for published in TABLE_2:
        plot = html.interval_plot(low, high, published, html.GREY)
        kind = "rule" if published is TABLE_2[0] else ""
        rows.append(_exponent_row(published.label, published, None, plot, kind))
    axis = html.interval_axis(low, high)
    a, b = "a, of N ~ C<sup>a</sup>", "b, of D ~ C<sup>b</sup>"
    return (
        "<h2>The exponents, beside Chinchilla’s Table 2 and Kaplan’s</h2>"
        + html.table(("", a, "80 %", "95 %", axis, b, "80 %"), rows)
        + '<p class="note">Published rows: Hoffmann et al. 2022, Table 2 (10th and 90th percentile'
        " of 100 resamples; the third is printed with an interval that leaves out its own rounded"
        " value), and its row of Kaplan et al. 2020. Bars: 80 % thick, 95 % thin.</p>"
    )


def _exponent_row(label, fit, interval95, plot, kind) -> str:
    places = 3 if kind == "ours" else 2
    cells = [
        cell(label),
        cell(decimal(fit.a, places)),
        cell(interval(fit.a_interval80), "light"),
        cell(interval(interval95), "light"),
        f'<td class="plot">{plot}</td>',
        cell(decimal(fit.b, places)),
        cell(interval(fit.b_interval80), "light"),
    ]
    return html.row(cells, kind)


def _doubts(study: Study) -> str:
    """Everything a reader must know before using a number of the page."""
    doubts = [(f"{APPROACHES[name]} refused", why) for name, why in study.refused.items()]
    for name, fit in study.fits.items():
        for flag in fit.flags:
            text = FLAG_TEXTS.get(flag, "")
            doubts.append((f"{APPROACHES[name]}, {flag.replace('_', ' ')}", text))
    if isinstance(fit := study.fits.get("isoflop"), IsoflopFit):
        for reason, flops in _unused_budgets(fit).items():
            named = ", ".join(map(power, flops[:6])) + (", ..." if len(flops) > 6 else "")
            budgets = f"Budget {named}" if len(flops) == 1 else f"{len(flops)} budgets ({named})"
            doubts.append((f"{budgets} not used", reason))
    doubts += _disagreements(list(study.fits.values()))
    if excluded := study.runs.excluded:
        more = f" and {len(excluded) - 3} more, named with the runs" if len(excluded) > 3 else ""
        runs = f"{len(excluded)} run{'s' * (len(excluded) > 1)} left out"
        doubts.append((runs, "; ".join(excluded[:3]) + more))
    items = "".join(
        f"<li><b>{escape(what)}</b>{': ' + escape(why) if why else ''}</li>" for what, why in doubts
    )
    decades = np.log10(study.runs.flops.max() / study.runs.flops.min())
    items += (
        f'<li class="fact"><b>Range</b>: the runs span {decades:.1f} decades of compute; outside of'
        " them every line is an extrapolation</li>"
    )
    return f'<h2>Before using these numbers</h2>\n<ul class="flags">{items}</ul>'


def _disagreements(fits) -> list[tuple[str, str]]:
    found = []
    for i, one in enumerate(fits):
        for other in fits[i + 1 :]:
            first, second = one.a_interval95, other.a_interval95
            if first[1] < second[0] or second[1] < first[0]:
                what = f"{APPROACHES[one.approach]} and {APPROACHES[other.approach]} disagree"
                why = "the 95 % intervals of a do not overlap"
                found.append((what, f"{why}: {interval(first)} and {interval(second)}"))
    return found


def _unused_budgets(fit: IsoflopFit) -> dict[str, list[float]]:
    """Reason, without its figures -> the budgets left out for it."""
    found: dict[str, list[float]] = {}
    for profile in fit.profiles:
        if profile.reason:
            found.setdefault(profile.reason.split(" (")[0], []).append(profile.flops)
    return found


def _isoflop(study: Study, figures: dict[str, str]) -> str:
    fit = study.fits.get("isoflop")
    if not isinstance(fit, IsoflopFit):
        return ""
    rows = []
    for profile in (p for p in fit.profiles if not p.reason):
        best = profile.minimum
        cells = [
            cell(power(profile.flops)),
            cell(f"{profile.used.sum()} of {len(profile.used)}"),
            cell(count(best.params)),
            cell(f"±{100 * profile.log_params_sd:.0f} %", "light"),
            cell(count(profile.akima)),
            cell(count(best.tokens)),
            cell(f"{best.tokens / best.params:.3g}"),
            cell(decimal(best.loss)),
        ]
        rows.append(html.row(cells))
    head = (
        "budget, FLOPs",
        "runs used",
        f"N{OPT}",
        "standard error",
        f"N{OPT} by Akima",
        f"D{OPT}",
        f"D{OPT} / N{OPT}",
        "loss there",
    )
    return (
        "<h2>Approach 2: loss at equal FLOPs</h2>"
        + html.figure(
            figures["isoflop"],
            "The final loss of every run against its parameters, one colour a budget, with the"
            f" fitted {fit.estimator} (in log N) and its minimum. The upright tick is the minimum"
            " of an Akima interpolation through the same points: where the two part, the form of"
            " the curve decides.",
        )
        + html.table(head, rows)
        + _goodness(fit)
    )


def _allocation(figures: dict[str, str]) -> str:
    return "<h2>Optimal parameters and tokens against compute</h2>" + html.figure(
        figures["allocation"],
        "Fitted lines with their 80 % bands; diamonds are the IsoFLOP minima with 80 % bars, dots"
        " the envelope. Grey: Hoffmann et al. 2022, lines through Tables 3 and A3, and equation 10;"
        " Kaplan et al. 2020, of non-embedding parameters. The published lines were fitted to other"
        " data and tokenizers, Hoffmann’s between 6×10¹⁸ and 3×10²¹ FLOPs.",
    )


def _envelope(study: Study, figures: dict[str, str]) -> str:
    fit = study.fits.get("envelope")
    if not isinstance(fit, EnvelopeFit):
        return ""
    return (
        "<h2>Approach 1: training curves and their envelope</h2>"
        + html.figure(
            figures["envelope"],
            "Loss along every run, coloured by its parameters. The envelope is the lowest loss at"
            f" each of {fit.n_points} values of C where a size between the smallest and the largest"
            f" has it. It lies on {len(set(fit.run_of_optimum))} of the runs, at a median of"
            f" {np.median(fit.progress):.0%} of the way through them.",
        )
        + _goodness(fit)
    )


def _parametric(study: Study, figures: dict[str, str]) -> str:
    fit = study.fits.get("parametric")
    if not isinstance(fit, ParametricFit):
        return ""
    rows = []
    for name in ("E", "A", "B", "alpha", "beta"):
        value = getattr(fit.law, name)
        places = significant_places(value)
        bounds = [interval(fit.interval(name, level), places) for level in (0.80, 0.95)]
        cells = [cell(name), cell(significant(value)), *(cell(text, "light") for text in bounds)]
        rows.append(html.row(cells))
    ended = (
        f"{fit.converged:,} of {fit.starts:,} starts ended with a gradient norm below 1e-6;"
        f" {fit.at_best:,} reached the best objective, {fit.objective:.6g}. "
    )
    return (
        "<h2>Approach 3: L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup></h2>"
        + html.figure(
            figures["parametric"],
            "Left: contours of the fitted loss, the runs, and the compute-optimal line."
            " Right: what the fit leaves of each run; a trend across tokens a parameter"
            " would mean that the form is wrong there. Colour: the FLOPs of the run.",
        )
        + html.table(("constant", "fitted", "80 %", "95 %"), rows)
        + _goodness(fit, ended)
    )


def _experts(study: Study, figures: dict[str, str]) -> str:
    loads = study.experts
    if loads is None:
        return ""
    last_LE = loads.load_PLE[-1]
    return "<h2>Load of the experts</h2>" + html.figure(
        figures["experts"],
        f"Run {escape(loads.run_id)}, the best of the highest budget. White is an expert with its"
        f" fair share of the tokens, blue fewer, red more (full at {FULL_LOAD:g} times). At the end"
        f" the busiest expert of a layer had {last_LE.max() * last_LE.shape[1]:.2f} times its"
        f" share, experts without any token: {(last_LE == 0).sum()}, and"
        f" {loads.dropped_PL[-1].mean():.1%} of the choices were dropped for want of room.",
    )


def _goodness(fit, before: str = "") -> str:
    figures = ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in fit.goodness.items())
    return f'<p class="note">{escape(before + figures)}.</p>'


def _accounting(study: Study) -> str:
    heading = "<h2>The exponent under each accounting</h2>"
    if not study.exponents:
        return f'{heading}<p class="note">Not computed: {escape(study.no_exponents)}.</p>'
    rows = []
    for found in study.exponents:
        cells = [cell(found["params"].replace("_", " ")), cell(found["flops"], "text")]
        if found["reason"]:
            cells.append(f'<td class="text" colspan="3">{escape(found["reason"])}</td>')
        else:
            cells.append(cell(decimal(found["a"])))
            cells.append(cell(interval(found["a_interval80"]), "light"))
            cells.append(cell(interval(found["a_interval95"]), "light"))
        rows.append(html.row(cells))
    head = ("N counts", '<th class="text">C counts</th>', "a", "80 %", "95 %")
    return (
        f"{heading}<p>The same runs and losses, by {APPROACHES[study.exponents_by]}; only what is"
        " counted as N and C differs.</p>" + html.table(head, rows)
    )


def _held_out(study: Study) -> str:
    text = ""
    ks = sorted({k for fits in study.highest_out.values() for k, _ in fits})
    if ks:
        rows = []
        for name, fits in study.highest_out.items():
            found = {k: decimal(fit.a) for k, fit in fits}
            cells = [APPROACH_NAMES[name], *(found.get(k, MISSING) for k in ks)]
            rows.append(html.row(map(cell, cells)))
        head = ("a without the k highest losses", *(f"k = {k}" for k in ks))
        text += html.table(head, rows)
    rows = []
    for name, held in study.held_out.items():
        errors = held_out_errors(held)
        cells = (
            APPROACH_NAMES[name],
            power(errors["top_budget_flops"]),
            decimal(errors["a"]),
            percent(errors["log_params_error"], 1),
            percent(errors["mean_log_loss_error"]),
            percent(errors["rms_log_loss_error"]).lstrip("+"),
        )
        rows.append(html.row(map(cell, cells)))
    if rows:
        head = ("fitted below the top budget", "top budget", "a", f"N{OPT} there", "error of loss")
        text += html.table((*head, "rms"), rows)
        text += (
            f'<p class="note">N{OPT} there: as foreseen from the budgets below, against the fit on'
            " all runs. Error of loss: predicted over observed, mean and root mean square of the"
            " runs held out.</p>"
        )
    for what, reason in study.unchecked.items():
        text += f'<p class="note">{escape(what)}: {escape(reason)}</p>'
    return f"<h2>Does it hold on runs it has not seen?</h2>{text}" if text else ""


def _comparison(study: Study) -> str:
    found = study.comparison
    if not found:
        return ""
    rows = []
    for compared in found["rows"]:
        exponent = compared["quantity"] in ("a", "b")
        write, places = (decimal, 3) if exponent else (count, 2)
        label = f"{APPROACH_NAMES[compared['approach']]}, {compared['quantity']}"
        difference = compared["difference"]
        cells = [
            cell(label if exponent else f"{label} at {power(found['flops'])}"),
            cell(write(compared["this"])),
            cell(write(compared["other"])),
            cell(decimal(difference, 3, "+") if exponent else f"×{difference:.2f}"),
            cell(interval(compared["interval80"], places), "light"),
            cell(interval(compared["interval95"], places), "light"),
        ]
        rows.append(html.row(cells))
    text = html.table(("", "this study", "the other", "difference", "80 %", "95 %"), rows)
    multiplier = found.get("multiplier", {})
    if "value" in multiplier:
        text += (
            f"<p>To reach the loss that the other reaches with {power(multiplier['flops'])} FLOPs,"
            f" this recipe needs {multiplier['value']:.2f} times as much"
            f" (80 % interval {interval(multiplier['interval80'], 2)}).</p>"
        )
    elif multiplier:
        text += f'<p class="note">No compute multiplier: {escape(multiplier["reason"])}.</p>'
    return (
        f"<h2>Beside {escape(found['with'])}</h2>{text}"
        '<p class="note">Intervals of the difference from the draws of both bootstraps, paired at'
        " random; a dash where one of the two laws holds no draws.</p>"
    )


def _runs(study: Study) -> str:
    """Budgets x sizes, the final loss in each cell, the lowest of a budget in bold."""
    runs, sizes, rows = study.runs, _merged_sizes(study.runs), []
    for budget, members in _budgets(study):
        cells, lowest = [cell(power(budget))], runs.loss[members].min()
        for low, high in sizes:
            inside = [i for i in members if low <= runs.params[i] <= high]
            loss = min((runs.loss[i] for i in inside), default=None)
            several = f"<sup>{len(inside)}</sup>" if len(inside) > 1 else ""
            kind = "best" if loss == lowest else "" if inside else "light"
            cells.append(f'<td class="{kind}">{decimal(loss)}{several}</td>')
        cells.append(cell(len(members), "light"))
        rows.append(html.row(cells))
    head = ("FLOPs", *(count(np.sqrt(low * high), 2) for low, high in sizes), "runs")
    left_out = "".join(f"<li>{escape(text)}</li>" for text in runs.excluded)
    if left_out:
        left_out = f'<p class="note">Left out, and why:</p><ul class="note runs">{left_out}</ul>'
    table = html.table(head, rows, "grid")
    return (
        f'<h2>The runs: budgets by sizes</h2><div class="wide">{table}</div>'
        '<p class="note">Final loss in nats a token, the lowest of each budget in bold; a raised'
        " number counts the runs of a cell, of which the best is shown. Columns are parameters.</p>"
        + left_out
    )


def _budgets(study: Study) -> list[tuple[float, list[int]]]:
    """(budget, rows of its runs): Approach 2's own, else at most a dozen equal steps of log C."""
    runs = study.runs
    if isinstance(fit := study.fits.get("isoflop"), IsoflopFit):
        centers = np.log([profile.flops for profile in fit.profiles])
    else:
        centers = np.linspace(*np.log([runs.flops.min(), runs.flops.max()]), min(12, len(runs)))
    nearest = np.argmin(np.abs(np.log(runs.flops)[:, None] - centers), axis=1)
    groups = [(float(np.exp(c)), np.flatnonzero(nearest == i)) for i, c in enumerate(centers)]
    return [(budget, members.tolist()) for budget, members in groups if members.size]


def _merged_sizes(runs: RunTable) -> list[tuple[float, float]]:
    """(smallest, largest) parameters of each column: one a size, or equal steps of log N."""
    sizes = np.unique(runs.params)
    if len(sizes) <= MOST_SIZES:
        return [(size, size) for size in sizes]
    edges = np.linspace(np.log(sizes[0]), np.log(sizes[-1]) + 1e-9, MOST_SIZES + 1)
    step = np.digitize(np.log(sizes), edges)
    return [(sizes[step == i].min(), sizes[step == i].max()) for i in np.unique(step)]


def _checklist(study: Study) -> str:
    rows = []
    for key, value in study.checklist().items():
        write = RANGES.get(key)
        text = " to ".join(map(write, value)) if write else html.said(value)
        name = CHECKLIST_NAMES.get(key, key.replace("_", " "))
        rows.append(html.row([cell(name), f'<td class="text">{text}</td>']))
    return (
        "<h2>Checklist</h2><p>What decides whether the fits can be trusted, and repeated.</p>"
        + html.table(("", ""), rows, "checklist")
    )
