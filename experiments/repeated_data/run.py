"""Muennighoff et al.'s 182 runs: their point, the optimum, the profile. Writes results/."""

import csv
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import save
from lm.command import write_atomically
from lm.scaling import MUENNIGHOFF2023, percentile_interval

HERE = Path(__file__).parent
DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", HERE.parents[2] / "shared" / "data"))
DRAWS = 200


def read_runs() -> list[np.ndarray]:
    """params, tokens, unique tokens, loss of the 182 runs behind the published constants."""
    with (DATA / "muennighoff2023_datablations" / "fit_set_182.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[key]) for row in rows]) for key in ("N", "D", "U_D", "loss")]


def measure(runs) -> tuple[dict, np.ndarray, np.ndarray]:
    law = MUENNIGHOFF2023
    fit = law.fit(*runs)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(0, len(runs[0]), len(runs[0]))
        drawn = law.fit(*(column[chosen] for column in runs), points=24).law
        draws.append((drawn.r_tokens, drawn.r_params))
    r_tokens, r_params = np.array(draws).T
    flat = fit.profile_objective < 1.001 * fit.objective
    plans = {}
    for name, chosen in (("published", law), ("best", fit.law)):
        best = chosen.optimum(1e21, 1e9)
        plans[name] = {"params": float(best.params), "epochs": float(best.tokens / 1e9),
                       "loss": float(best.loss)}  # fmt: skip
    result = {
        "runs": len(runs[0]),
        "published": {"r_tokens": law.r_tokens, "r_params": law.r_params,
                      "objective_here": law.objective(*runs), "objective_in_paper": 0.0158259},
        "best": {"r_tokens": fit.law.r_tokens, "r_params": fit.law.r_params,
                 "objective": fit.objective},
        "r_tokens_within_0.1_percent_of_the_best":
            [float(fit.profile_r_tokens[flat].min()), float(fit.profile_r_tokens[flat].max())],
        "pairs_bootstrap_draws": DRAWS,
        "r_tokens_interval80": percentile_interval(r_tokens, 0.8),
        "r_params_interval80": percentile_interval(r_params, 0.8),
        "optimum_at_1e21_flops_and_1e9_unique_tokens": plans,
    }  # fmt: skip
    return result, fit.profile_r_tokens, fit.profile_objective


def figure(path: Path, result: dict, r_tokens, objective) -> None:
    left, right = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")[1]
    left.plot(r_tokens, objective, color="C0")
    left.plot(15.387756, result["published"]["objective_here"], "o", color="C3", label="published")
    left.plot(result["best"]["r_tokens"], result["best"]["objective"], "*", ms=10, color="C2",
              label="optimum")  # fmt: skip
    left.set(xscale="log", ylim=(0.0157, 0.0168), xlabel="$R_D^*$",
             ylabel="objective, best over $R_N^*$")  # fmt: skip
    left.legend(fontsize=8)
    left.set_title("182 runs: a flat profile", fontsize=9)
    epochs = np.logspace(0, 3, 100)
    for r, label in ((15.387756, "published"), (result["best"]["r_tokens"], "optimum")):
        right.plot(
            epochs, 1 + r * -np.expm1(-(epochs - 1) / r), label=f"$R_D^*$ = {r:.3g}, {label}"
        )
    right.plot(epochs, epochs, color="0.6", ls=":", label="fresh tokens")
    right.set(xscale="log", yscale="log", xlabel="epochs", ylabel="worth in epochs of fresh tokens")
    right.legend(fontsize=8)
    right.set_title("what repeating is worth", fontsize=9)
    save(plt.gcf(), path)


def main() -> None:
    result, r_tokens, objective = measure(read_runs())
    text = json.dumps(result, indent=2) + "\n"
    write_atomically(HERE / "results" / "fit.json", text)
    figure(HERE / "results" / "repeated_data.png", result, r_tokens, objective)
    print(text, end="")


if __name__ == "__main__":
    main()
