"""What the full study's tables say, as pure functions: run tables in, rows and numbers out."""

import numpy as np

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
    ("C: the head's FLOPs not counted", "accounting", ("blocks_and_head", "kaplan")),
    ("N and C: both", "accounting", ("non_embedding", "kaplan")),
    ("warmup: fixed and long", "warmup", AS_COUNTED),
    ("cosine: far longer than the run", "cosine", AS_COUNTED),
    ("batch: fixed", "batch", AS_COUNTED),
    ("rate: Kaplan's rule", "rate", AS_COUNTED),
)
# With Porian et al. 2024, Figure 1, RefinedWeb, beside each.
TOGETHER = (
    ("all of Kaplan's", "kaplan", ("non_embedding", "kaplan"), 0.835),
    ("+ count the head", "with_head", AS_COUNTED, 0.706),
    ("+ short warmup", "short_warmup", AS_COUNTED, 0.602),
    ("+ cosine as long as the run", "matched_cosine", AS_COUNTED, 0.571),
    ("+ tuned batch and rate: the main study", "main", AS_COUNTED, 0.497),
)
WINDOW = 6.0  # times the size of each budget's best run: badly tuned profiles are no parabolas
FEWER_STARTS = 50  # one in so many of Hoffmann's 4,500: all of them end alike
GRID = 400  # points of a curve in which a crossing is looked for


def exponent(table: RunTable, conventions: tuple[str, str], bootstrap: int) -> dict:
    """Approach 2's a with intervals, and by Akima; or why there is none."""
    params, flops = conventions
    row = {"params": params, "flops": flops, "runs": len(table)}
    counted = recount(table, params=params, flops=flops)
    try:
        fitted = fit_isoflop(counted, window=WINDOW, bootstrap=bootstrap)
        akima = fit_isoflop(counted, window=WINDOW, estimator="akima", bootstrap=0).a
    except CannotFit as error:
        return row | {"a": None, "akima": None, "reason": str(error)}
    left_out = {f"{p.flops:.3g}": p.reason for p in fitted.profiles if p.reason}
    return row | {
        "a": fitted.a,
        "akima": akima,
        "interval80": fitted.a_interval80,
        "interval95": fitted.a_interval95,
        "optima": [(o.flops, o.params, o.tokens, o.loss) for o in fitted.optima],
        "budgets_left_out": left_out,
        "flags": fitted.flags,
    }


def ladder(tables: dict[str, RunTable], budgets: tuple[float, ...], bootstrap: int) -> list[dict]:
    """From Chinchilla's settings one step towards Kaplan's at a time, then from Kaplan's down.

    ``tables`` by kind; of the main study the runs at ``budgets``, as the others have them.
    """
    tables = tables | {"main": at_budgets(tables["main"], budgets)}
    alone = [("one at a time", *rung, None) for rung in ONE_AT_A_TIME]
    together = [("together", *rung) for rung in TOGETHER]
    return [
        {"part": part, "rung": rung, "kind": kind, "porian2024": published}
        | exponent(tables[kind], counted, bootstrap)
        for part, rung, kind, counted, published in alone + together
    ]


def at_budgets(table: RunTable, budgets: tuple[float, ...]) -> RunTable:
    """The runs of these budgets."""
    return table.where(np.isin(table.columns["budget"], budgets))


def without_repeats(table: RunTable) -> RunTable:
    """The runs that saw no token twice."""
    return table.where(table.columns["epochs"] <= 1)


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
        "observed": {"params": observed.minimum.params, "loss": observed.minimum.loss},
        "isoflop": {
            "params": float(line.optimal_params(top)),
            "interval80": line.params_interval(top),
            "ratio": float(line.optimal_params(top)) / observed.minimum.params,
            "a": line.a,
        },
        "parametric": {
            "params": params,
            "ratio": params / observed.minimum.params,
            "loss": float(law.law.loss(params, tokens)),
            "loss_interval80": percentile_interval(losses, 0.8),
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
        rows.append(
            {
                "params": float(size),
                "times_smaller": float(sizes[0] / size),
                "base_flops": base,
                "cost": float(observed[i]),
                "interval95": percentile_interval(draws[np.isfinite(draws[:, i]), i], 0.95),
                "draws_beyond_the_runs": float(np.mean(~np.isfinite(draws[:, i]))),
                "cost_by_the_law": tokens * float(per_token[size]) / base,
            }
        )
    return rows
