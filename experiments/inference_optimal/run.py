"""Sardana & Frankle's cases, recomputed; their 47 runs refitted. Writes results/."""

import csv
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import as_csv, save
from lm.command import write_atomically
from lm.scaling import (
    HOFFMANN2022,
    SARDANA2024,
    RunTable,
    fit_parametric,
    flops_for_loss,
    lifetime_optimum,
    overtrain,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", HERE.parents[2] / "shared" / "data"))


def cases() -> list[tuple[str, str, float, float | None]]:
    """(case, quantity, ours, the paper's or None)."""
    rows = []
    law = SARDANA2024

    def chinchilla_of(params):
        return law.optimum((params / law.k_N) ** (1 / law.a))

    def compare(case, usual, served, paper):
        best = lifetime_optimum(law, usual.loss, served)
        usual_cost = usual.flops + 2 * usual.params * served
        ours = {
            "parameters": best.params,
            "tokens": best.tokens,
            "parameters, % of compute-optimal": 100 * best.params / usual.params,
            "tokens, %": 100 * best.tokens / usual.tokens,
            "lifetime FLOPs, %": 100 * best.lifetime_flops / usual_cost,
            "FLOPs saved": usual_cost - best.lifetime_flops,
        }
        for quantity, value in ours.items():
            rows.append((case, quantity, float(value), paper.get(quantity)))

    compare(
        "loss 1.947, 2e12 tokens served (their README)",
        law.optimum(flops_for_loss(law, 1.947)),
        2e12,
        {
            "parameters": 2.418e10,
            "tokens": 2.657e12,
            "parameters, % of compute-optimal": 70.96,
            "tokens, %": 146.77,
            "lifetime FLOPs, %": 95.22,
        },
    )
    compare(
        "13B, 2e12 served (Figure 1)",
        chinchilla_of(13e9),
        2e12,
        {"parameters": 7e9, "FLOPs saved": 1.7e22},
    )
    usual = chinchilla_of(30e9)
    for quantity, ours, paper in (
        ("tokens", usual.tokens, 1.556e12),
        ("loss", usual.loss, 1.958253),
        ("training FLOPs", usual.flops, 2.801e23),
    ):
        rows.append(("30B, compute-optimal", quantity, float(ours), paper))
    compare("30B, 1e13 served", usual, 1e13, {})
    return rows


def extrapolation() -> list[tuple[float, int, float, float, float]]:
    """Their 47 runs, fitted up to a number of tokens a parameter and read beyond it.

    (cap, runs fitted, a, mean |log error| of those, mean log error of the runs beyond).
    """
    with (DATA / "sardana2024" / "trainingresults.csv").open() as file:
        rows = list(csv.DictReader(file))
    params, ratio, tokens, loss = (
        np.array([float(row[name]) for row in rows])
        for name in ("Parameters", "Tokens/Params", "Tokens", "Smoothed Loss")
    )
    runs = RunTable.from_arrays(loss=loss, params=params, tokens=tokens)
    fits = []
    for cap in (100, 1000, 10_000):
        fit = fit_parametric(runs.where(ratio <= cap), bootstrap=0)
        error = np.log(fit.law.loss(params, tokens) / loss)
        inside, beyond = error[ratio <= cap], error[ratio > cap]
        beyond_mean = float(beyond.mean()) if beyond.size else float("nan")
        fits.append((cap, inside.size, fit.a, float(np.abs(inside).mean()), beyond_mean))
    return fits


def figure(path: Path) -> None:
    left, right = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")[1]
    served = np.logspace(9, 15, 100)
    for loss, colour in ((2.4, "C0"), (2.1, "C1"), (1.9, "C2")):
        usual = SARDANA2024.optimum(flops_for_loss(SARDANA2024, loss))
        best = lifetime_optimum(SARDANA2024, loss, served)
        left.plot(served, best.params / usual.params, color=colour, label=f"loss {loss}")
        left.plot(served, best.tokens / usual.tokens, color=colour, ls="--")
    left.set(xscale="log", yscale="log", xlabel="tokens served",
             ylabel="against compute-optimal")  # fmt: skip
    left.set_title("parameters (solid), training tokens (dashed)", fontsize=9)
    left.legend(fontsize=8)
    factor = np.logspace(np.log10(0.15), 0, 100)
    for law, name in ((HOFFMANN2022, "Hoffmann"), (SARDANA2024, "Sardana & Frankle's rounding")):
        small = overtrain(law, 1e22, factor)
        right.plot(factor, small.flops / 1e22 - 1, label=name)
    right.set(yscale="log", ylim=(1e-3, 10),
              xlabel="size / compute-optimal size", ylabel="extra training FLOPs")  # fmt: skip
    right.set_title("over-training to the loss of 1e22 FLOPs", fontsize=9)
    right.legend(fontsize=8)
    save(plt.gcf(), path)


def main() -> None:
    rows = [("case", "quantity", "ours", "paper")]
    for case, quantity, ours, paper in cases():
        rows.append((case, quantity, f"{ours:.5g}", "" if paper is None else f"{paper:.7g}"))
    fits = [("tokens_per_parameter_up_to", "runs", "a", "mean_abs_log_error",
             "mean_log_error_beyond")]  # fmt: skip
    for cap, size, a, inside, beyond in extrapolation():
        rest = "" if np.isnan(beyond) else f"{beyond:+.4f}"
        fits.append((cap, size, f"{a:.3f}", f"{inside:.4f}", rest))
    cases_text, fits_text = as_csv(rows), as_csv(fits)
    write_atomically(RESULTS / "cases.csv", cases_text)
    write_atomically(RESULTS / "extrapolation.csv", fits_text)
    figure(RESULTS / "inference_optimal.png")
    print(cases_text, fits_text, sep="\n", end="")


if __name__ == "__main__":
    main()
