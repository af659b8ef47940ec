"""Hoffmann et al.'s points refitted: Besiroglu et al.'s optimum, its intervals, what moves it.

python -m experiments.chinchilla_refit.run
"""

import os
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import as_csv, save
from lm.command import write_atomically
from lm.scaling import (
    BESIROGLU2024,
    HOFFMANN2022,
    fit_isoflop,
    fit_parametric,
    leave_highest_out,
    percentile_interval,
    read_runs,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", HERE.parents[2] / "shared" / "data"))
BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21)
CHINCHILLA_FLOPS = 5.88e23


def epoch():
    """All 245 points of Hoffmann et al.'s Figure 4, as Epoch AI read them off it."""
    columns = {"params": "Model Size", "flops": "Training FLOP"}
    return read_runs(DATA / "epoch_chinchilla" / "svg_extracted_data.csv", columns=columns)


def notebook_resamples():
    """The 4,000 resamples of Besiroglu et al.'s notebook."""
    rng = np.random.RandomState(42)
    return np.stack([rng.choice(240, 240, replace=True) for _ in range(4000)])


def ratio(law, flops=CHINCHILLA_FLOPS):
    best = law.optimum(flops)
    return best.tokens / best.params


def tables(runs):
    """(name, rows of (quantity, published, ours)) of each result, and the fits to draw."""
    fit = fit_parametric(runs, drop_highest_loss=5, interval=notebook_resamples())
    residual = fit_parametric(runs, drop_highest_loss=5)
    law = fit.law
    constants = [("objective", 0.00101827403, fit.objective), ("a", 0.513, fit.a)]
    notebook = {"E": 1.81724, "A": 477.84, "B": 2143.86, "alpha": 0.347313, "beta": 0.367183}
    constants += [(name, value, getattr(law, name)) for name, value in notebook.items()]
    constants += [
        ("starts run to their end", 4500, fit.starts),
        ("of them, gradient norm < 1e-6", None, fit.converged),
        ("of them, at the lowest objective", None, fit.at_best),
        ("gradient norm", None, fit.gradient_norm),
    ]

    errors = [("sd a", 0.020, fit.allocation_draws[:, 0].std())]
    published = {"E": 0.026, "A": 124.52, "B": 1293.28, "alpha": 0.015, "beta": 0.021}
    for (name, value), sd in zip(published.items(), fit.draws.std(0), strict=True):
        errors.append((f"sd {name}", value, sd))
    errors.append(("width of a's 80 % interval", 0.051, np.ptp(fit.a_interval80)))
    errors.append(("the same, residual bootstrap", None, np.ptp(residual.a_interval80)))

    refit = partial(fit_parametric, bootstrap=0)
    published_a = {0: None, 1: None, 3: None, 5: 0.513, 8: None, 10: None}
    dropped = [
        (f"a without the {k} highest losses", published_a[k], f.a)
        for k, f in leave_highest_out(runs, refit, tuple(published_a))
    ]
    kept = runs.where(np.argsort(-runs.loss)[5:])
    least_squares = refit(kept, method="variable_projection")
    isoflop = fit_isoflop(kept, budgets=BUDGETS, window=10**0.6)
    top = kept.flops > 2e21
    below = refit(kept.where(~top))
    above = kept.where(top)
    errors_above = np.log(below.law.loss(above.params, above.tokens) / above.loss)
    others = [
        ("a, least squares of the loss itself", None, least_squares.a),
        ("a, isoFLOP profiles at nine budgets", 0.49, isoflop.a),
        ("a, the same, 95 % low", None, isoflop.a_interval95[0]),
        ("a, the same, 95 % high", None, isoflop.a_interval95[1]),
        ("runs above 2e21 FLOPs, held out", None, int(top.sum())),
        ("a without them", None, below.a),
        ("mean log error on them", None, errors_above.mean()),
        ("rms log error on them", None, np.sqrt((errors_above**2).mean())),
    ]
    rounded = type(law)(1.69, 406.4, 410.7, 0.34, 0.28)
    ratios = [
        ("tokens per parameter at 5.88e23: Hoffmann et al., unrounded", None, ratio(HOFFMANN2022)),
        ("Hoffmann et al., rounded as printed", None, ratio(rounded)),
        ("Besiroglu et al.'s headline constants", None, ratio(BESIROGLU2024)),
        ("this optimum", None, ratio(law)),
    ]
    named = {
        "constants": constants, "standard_errors": errors, "exclusions": dropped,
        "other_fits": others, "tokens_per_parameter": ratios,
    }  # fmt: skip
    return named, fit, residual


def figure(runs, fit, residual, path: Path) -> None:
    left, middle, right = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")[1]
    dropped = np.argsort(np.argsort(-runs.loss)) < 5
    error = runs.loss / fit.law.loss(runs.params, runs.tokens) - 1
    left.scatter(runs.flops[~dropped], 100 * error[~dropped], s=6)
    left.scatter(runs.flops[dropped], 100 * error[dropped], s=14, marker="x", color="C3")
    left.axhline(0, color="0.6", lw=0.8)
    left.set(xscale="log", xlabel="FLOPs", ylabel="loss above the fit, %", ylim=(-6, 20))
    left.set_title("residuals; x: the five left out, if in range", fontsize=9)

    bins = np.linspace(0.42, 0.62, 61)
    for draws, name in ((fit, "pairs"), (residual, "residual")):
        middle.hist(draws.allocation_draws[:, 0], bins, alpha=0.5, label=f"{name} bootstrap")
    middle.axvline(HOFFMANN2022.a, color="C3", label="Hoffmann et al.'s Approach 3")
    middle.set(xlabel="a, of N_opt ~ C^a", yticks=[])
    middle.legend(fontsize=7)

    flops = np.logspace(18, 26, 50)
    E, A, B, alpha, beta = (column[:, None] for column in fit.draws.T)
    best = type(fit.law)(E, A, B, alpha, beta).optimum(flops)
    low, high = np.array([percentile_interval(c, 0.8) for c in (best.tokens / best.params).T]).T
    right.fill_between(flops, low, high, alpha=0.3, label="80 %")
    right.plot(flops, ratio(fit.law, flops), label="this fit")
    right.plot(flops, ratio(HOFFMANN2022, flops), color="C3", label="Hoffmann et al.'s Approach 3")
    right.axhline(20, color="0.6", ls="--", lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="optimal tokens per parameter")
    right.legend(fontsize=7)
    save(plt.gcf(), path, dpi=100)


def main() -> None:
    runs = epoch()
    named, fit, residual = tables(runs)
    for name, rows in named.items():
        told = [("quantity", "published", "ours")]
        for quantity, published, ours in rows:
            told.append((quantity, "" if published is None else published, f"{ours:.7g}"))
        write_atomically(RESULTS / f"{name}.csv", as_csv(told))
        print(as_csv(told))
    figure(runs, fit, residual, RESULTS / "chinchilla_refit.png")


if __name__ == "__main__":
    main()
