"""What the full study's tables say, as pure functions: run tables in, rows and numbers out."""

import numpy as np
from scipy.optimize import least_squares

from lm.report.study import Study
from lm.scaling import (
    CannotFit,
    ParametricFit,
    RunTable,
    fit_isoflop,
    fit_parametric,
    percentile_interval,
    recount,
    tokens_for_loss,
)
from lm.scaling.parametric import HOFFMANN_STARTS

AS_COUNTED = ("blocks_and_head", "exact")
# (rung, the kind whose runs it is fitted on, how N and C are counted)
ONE_AT_A_TIME = (
    ("none: tuned, all counted", "main", AS_COUNTED),
    ("N: non-embedding", "main", ("non_embedding", "exact")),
    ("C: the head's FLOPs not counted", "head", ("blocks_and_head", "exact_blocks")),
    ("N and C: both", "head", ("non_embedding", "exact_blocks")),
    ("C: nor attention's", "accounting", ("blocks_and_head", "kaplan")),
    ("N and C: all three", "accounting", ("non_embedding", "kaplan")),
    ("warmup: fixed and long", "warmup", AS_COUNTED),
    ("cosine: far longer than the run", "cosine", AS_COUNTED),
    ("batch: fixed", "batch", AS_COUNTED),
    ("rate: Kaplan's rule", "rate", AS_COUNTED),
)
# With Porian et al. 2024, Figure 1, RefinedWeb, beside each.
TOGETHER = (
    ("all of Kaplan's", "kaplan", ("non_embedding", "kaplan"), 0.835),
    ("+ count head and attention", "with_head", AS_COUNTED, 0.706),
    ("+ short warmup", "short_warmup", AS_COUNTED, 0.602),
    ("+ cosine as long as the run", "matched_cosine", AS_COUNTED, 0.571),
    ("+ tuned batch and rate: the main study", "main", AS_COUNTED, 0.497),
)
WINDOW = 6.0  # times the size of each budget's best run: badly tuned profiles are no parabolas
FEWER_STARTS = 50  # one in so many of Hoffmann's 4,500: all of them end alike
NEAR = 3.0  # times the line's N_opt
FORM_STARTS = 24
GRID = 400  # points of a curve in which a crossing is looked for


def exponent(table: RunTable, conventions: tuple[str, str], bootstrap: int) -> dict:
    """Approach 2's a with intervals, and by Akima; or why there is none."""
    params, flops = conventions
    counted = recount(table, params=params, flops=flops)
    try:
        fitted = fit_isoflop(counted, window=WINDOW, bootstrap=bootstrap)
        akima = fit_isoflop(counted, window=WINDOW, estimator="akima", bootstrap=0).a
    except CannotFit as error:
        return none(conventions, len(table), str(error))
    left_out = {f"{p.flops:.3g}": p.reason for p in fitted.profiles if p.reason}
    return {
        "params": params,
        "flops": flops,
        "runs": len(table),
        "a": fitted.a,
        "akima": akima,
        "interval80": fitted.a_interval80,
        "interval95": fitted.a_interval95,
        "optima": [(o.flops, o.params, o.tokens, o.loss) for o in fitted.optima],
        "budgets_left_out": left_out,
        "flags": fitted.flags,
    }


def none(conventions: tuple[str, str], runs: int = 0, reason: str = "not run") -> dict:
    """The row of an exponent that is not there."""
    params, flops = conventions
    row = {"params": params, "flops": flops, "runs": runs}
    return row | {"a": None, "akima": None, "reason": reason}


def ladder(tables: dict[str, RunTable], budgets: tuple[float, ...], bootstrap: int) -> list[dict]:
    """From Chinchilla's settings one step towards Kaplan's at a time, then from Kaplan's down.

    ``tables`` by kind; of the main study the runs at ``budgets``, as the others have them. Rungs
    of kinds that are missing say so. ``a_upper`` is a without the lowest budget, ``a_once`` without
    the runs that saw some of their corpus again.
    """
    tables = tables | {"main": at_budgets(tables["main"], budgets)}
    alone = [("one at a time", *rung, None) for rung in ONE_AT_A_TIME]
    together = [("together", *rung) for rung in TOGETHER]
    rows = []
    for part, rung, kind, counted, published in alone + together:
        row = {"part": part, "rung": rung, "kind": kind, "porian2024": published}
        if kind in tables:
            table = tables[kind]
            row |= exponent(table, counted, bootstrap)
            row["a_upper"] = exponent(at_budgets(table, budgets[1:]), counted, 0)["a"]
            row["a_once"] = exponent(without_repeats(table), counted, 0)["a"]
        else:
            row |= none(counted) | {"a_upper": None, "a_once": None}
        rows.append(row)
    return rows


def at_budgets(table: RunTable, budgets: tuple[float, ...]) -> RunTable:
    """The runs of these budgets."""
    return table.where(np.isin(table.columns["budget"], budgets))


def without_repeats(table: RunTable) -> RunTable:
    """The runs that saw no token twice."""
    return table.where(table.columns["epochs"] <= 1)


def without_each_budget(table: RunTable) -> dict[str, float]:
    """Approach 2's a without one of the budgets, by that."""
    budgets = table.columns["budget"]
    return {
        f"{budget:g}": fit_isoflop(table.where(budgets != budget), bootstrap=0).a
        for budget in np.unique(budgets)
    }


def estimators(table: RunTable, bootstrap: int) -> list[dict]:
    """a by other ways to find the minima, other windows, and other intervals of Approach 3."""

    def isoflop(**settings):
        return fit_isoflop(table, bootstrap=bootstrap, **settings)

    def parametric(**settings):
        starts = HOFFMANN_STARTS[::FEWER_STARTS]
        return fit_parametric(table, starts=starts, bootstrap=bootstrap, **settings)

    fits = {
        "2 IsoFLOP: parabolas, all runs, residuals resampled": isoflop(),
        "2, N within a factor 6 of each budget's best run": isoflop(window=6.0),
        "2, within a factor 3": isoflop(window=3.0),
        "2, Akima's minima": isoflop(estimator="akima"),
        "3 Parametric: residuals resampled": parametric(),
        "3, runs resampled": parametric(interval="pairs"),
    }
    return [
        {"fit": name, "a": f.a, "interval80": f.a_interval80, "interval95": f.a_interval95}
        for name, f in fits.items()
    ]


def repeated(table: RunTable) -> list[str]:
    """Run ids of more than one epoch."""
    return [str(run_id) for run_id in table.run_id[table.columns["epochs"] > 1]]


def seed_scatter(table: RunTable) -> dict[str, float]:
    """Standard deviation of log loss between runs that differ in their seed alone, by size."""
    cells = np.unique(np.stack([table.columns["budget"], table.params]), axis=1).T
    squares = {"below 50,000": [0.0, 0], "above": [0.0, 0]}
    for budget, params in cells:
        logs = np.log(table.loss[(table.columns["budget"] == budget) & (table.params == params)])
        found = squares["below 50,000" if params < 50_000 else "above"]
        found[0] += float(((logs - logs.mean()) ** 2).sum())
        found[1] += len(logs) - 1
    pooled = {"all": [sum(s[i] for s in squares.values()) for i in (0, 1)], **squares}
    return {name: float(np.sqrt(ss / n)) for name, (ss, n) in pooled.items() if n}


def held_out(study: Study, bootstrap: int) -> dict:
    """The top budget as foreseen from the budgets below it, beside what was observed there."""
    budget = study.runs.columns["budget"]
    top = float(budget.max())
    below = study.runs.where(budget < top)
    line = fit_isoflop(below, bootstrap=bootstrap)
    law = fit_parametric(below, starts=HOFFMANN_STARTS[::FEWER_STARTS], bootstrap=bootstrap)
    observed = next(p for p in study.fits["isoflop"].profiles if p.flops > 0.9 * top)
    params, tokens = float(law.optimal_params(top)), float(law.optimal_tokens(top))
    E, A, B, alpha, beta = law.draws.T
    _, _, log_k_N, log_k_D = law.allocation_draws.T
    at = np.log(top)
    drawn_params = np.exp(log_k_N + law.allocation_draws[:, 0] * at)
    drawn_tokens = np.exp(log_k_D + law.allocation_draws[:, 1] * at)
    losses = E + A / drawn_params**alpha + B / drawn_tokens**beta
    return {
        "flops": top,
        "observed": {
            "params": observed.minimum.params,
            "akima_params": observed.akima,
            "loss": observed.minimum.loss,
        },
        "isoflop": {
            "params": float(line.optimal_params(top)),
            "interval80": line.params_interval(top),
            "interval95": line.params_interval(top, 0.95),
            "ratio": float(line.optimal_params(top)) / observed.minimum.params,
            "a": line.a,
        },
        "parametric": {
            "params": params,
            "ratio": params / observed.minimum.params,
            "loss": float(law.law.loss(params, tokens)),
            "loss_interval80": percentile_interval(losses, 0.8),
            "loss_interval95": percentile_interval(losses, 0.95),
            "loss_error": float(law.law.loss(params, tokens)) / observed.minimum.loss - 1,
            "a": law.a,
            "constants": [law.law.E, law.law.A, law.law.B, law.law.alpha, law.law.beta],
        },
    }


def over_training(
    table: RunTable, law: ParametricFit, base: float, bootstrap: int, seed: int = 0
) -> list[dict]:
    """What smaller models cost at the loss that the largest of ``table`` has at ``base`` FLOPs.

    Each size's loss is a parabola in log C through its runs; where it crosses the largest's loss at
    ``base`` FLOPs is what the size costs. Beside it the law's own answer for the same sizes and
    FLOPs a token. Intervals: residuals resampled, 95 %.
    """
    sizes = np.unique(table.params)[::-1]
    rng = np.random.default_rng(seed)
    fitted, residuals = {}, []
    for size in sizes:
        rows = table.params == size
        x, y = np.log(table.flops[rows] / base), np.log(table.loss[rows])
        design = np.vander(x, 3)
        smooth = design @ np.linalg.lstsq(design, y, rcond=None)[0]
        fitted[size] = x, design, smooth
        residuals.extend((y - smooth) * np.sqrt(len(x) / (len(x) - 3)))

    def costs(noise) -> np.ndarray:
        """FLOPs over ``base`` at which each size reaches the largest's loss."""
        crossings, target = [], None
        for size in sizes:
            x, design, smooth = fitted[size]
            curve = np.linalg.lstsq(design, smooth + noise(len(x)), rcond=None)[0]
            target = curve[2] if target is None else target
            grid = np.linspace(x.min(), x.max(), GRID)
            heights = np.polyval(curve, grid)
            crosses = heights.min() <= target <= heights.max()
            crossings.append(np.exp(np.interp(-target, -heights, grid)) if crosses else np.nan)
        return np.array(crossings)

    observed = costs(np.zeros)
    draws = np.array([costs(lambda n: rng.choice(residuals, n)) for _ in range(bootstrap)])
    flops_per_token = table.flops / table.tokens
    per_token = {size: flops_per_token[table.params == size].mean() for size in sizes}
    loss = float(law.law.loss(sizes[0], base / per_token[sizes[0]]))
    rows = []
    for i, size in enumerate(sizes[1:], 1):
        tokens = float(tokens_for_loss(law.law, loss, size))
        crossed = draws[np.isfinite(draws[:, i]), i]
        seen = len(crossed) > 0.975 * len(draws)  # else an end of the interval is not known
        rows.append(
            {
                "params": float(size),
                "times_smaller": float(sizes[0] / size),
                "base_flops": base,
                "cost": float(observed[i]),
                "interval95": percentile_interval(crossed, 0.95) if seen else None,
                "draws_beyond_the_runs": float(np.mean(~np.isfinite(draws[:, i]))),
                "cost_by_the_law": tokens * float(per_token[size]) / base,
            }
        )
    return rows


def bent_loss(constants: np.ndarray, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """E + (A / N^alpha + B / D^beta)^gamma of (log E, log A, alpha, log B, beta[, log gamma]).

    Hoffmann et al.'s law with gamma = 1, Kaplan et al.'s equation 1.5 with E = 0 and beta = 1.
    The optimum lies where it lies with gamma = 1.
    """
    log_E, log_A, alpha, log_B, beta, *log_gamma = constants
    of_N, of_D = log_A - alpha * np.log(params), log_B - beta * np.log(tokens)
    gamma = np.exp(log_gamma[0]) if log_gamma else 1.0
    return np.exp(log_E) + np.exp(gamma * np.logaddexp(of_N, of_D))


def forms(study: Study, seed: int = 0) -> list[dict]:
    """Whether it is the noise or the form of the law that Approach 3's residuals are of.

    Least squares on log loss of Hoffmann et al.'s five constants: on all runs, and on those near
    the line of Approach 2. Then with a sixth, gamma. Each also without the top budget: by how much,
    in the mean, it foresees the losses of that one's runs too high.
    """
    runs, line = study.runs, study.fits["isoflop"]
    top = runs.columns["budget"] == runs.columns["budget"].max()
    near = abs(np.log(runs.params / line.optimal_params(runs.flops))) < np.log(NEAR)
    all_runs, rng = np.full(len(runs), True), np.random.default_rng(seed)
    low, high = (-1.0, 2.0, 0.2, 2.0, 0.2, -1.0), (0.3, 6.0, 0.8, 9.0, 0.8, 0.3)
    starts = rng.uniform(low, high, (FORM_STARTS, 6))

    def fitted(n: int, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Constants, and log residuals of all runs."""

        def residuals(constants, rows):
            found = bent_loss(constants, runs.params[rows], runs.tokens[rows])
            return np.log(found) - np.log(runs.loss[rows])

        bounds = np.array([(-8, -20, 0.01, -20, 0.01, -3), (2, 60, 3, 60, 3, 3)])[:, :n]
        found = [
            least_squares(residuals, start[:n], bounds=bounds, x_scale="jac", args=(kept,))
            for start in starts
        ]
        best = min(found, key=lambda each: each.cost).x
        return best, residuals(best, all_runs)

    rows = []
    for name, n, kept in (
        ("E + A / N^α + B / D^β", 5, all_runs),
        (f"the same, N within a factor {NEAR:g} of N_opt", 5, near),
        ("E + (A / N^α + B / D^β)^γ", 6, all_runs),
    ):
        constants, residuals = fitted(n, kept)
        below, beyond = fitted(n, kept & ~top)
        rows.append(
            {
                "form": name,
                "runs": int(kept.sum()),
                "rms_log_residual": float(np.sqrt(np.mean(residuals[kept] ** 2))),
                "a": float(constants[4] / (constants[2] + constants[4])),
                "gamma": float(np.exp(constants[5])) if n == 6 else 1.0,
                "E": float(np.exp(constants[0])),
                "constants_below_top": below.tolist(),
                "top_budget": float(np.mean(beyond[kept & top])),
            }
        )
    return rows
