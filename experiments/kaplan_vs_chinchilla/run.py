"""From Kaplan's 0.73 to Chinchilla's 0.50: Porian's five steps and Pearce & Song's. -> results/."""

import csv
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import as_csv, save
from lm.command import write_atomically
from lm.scaling import BESIROGLU2024, HOFFMANN2022, NonEmbeddingView, RunTable, fit_isoflop

HERE = Path(__file__).parent
DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", HERE.parents[2] / "shared" / "data"))
# Step, then hparams, warmup, decay, param_count in their table; the paper's a on RefinedWeb and
# OpenWebText2 (bootstrap_weighted in their fits; Porian et al. 2024, Figure 1).
STEPS = (
    ("Kaplan's: no head, long warmup", ("base", "long", "kaplan", "kaplan"), 0.835, 0.864),
    ("+ count the head", ("base", "long", "kaplan", "standard"), 0.706, 0.699),
    ("+ short warmup", ("base", "short", "kaplan", "standard"), 0.602, 0.603),
    ("+ decay matched to D", ("base", "short", "chinchilla", "standard"), 0.571, 0.574),
    ("+ tuned, no decay", ("tuned", "short", "const", "standard"), 0.497, 0.518),
)
DATASETS = ("rw", "owt2")


def porian() -> list[tuple]:
    """(dataset, step, the paper's a, Akima's, its 95 % interval, windowed parabola's)."""
    with (DATA / "porian2024" / "isoflop_points.csv").open() as file:
        points = list(csv.DictReader(file))
    rows = []
    for column, dataset in enumerate(DATASETS):
        for step, chosen, *published in STEPS:
            wanted = (dataset, *chosen)
            names = ("dataset", "hparams", "warmup", "decay", "param_count")
            own = [p for p in points if tuple(p[name] for name in names) == wanted]
            flops, params, tokens, loss = (
                np.array([float(p[name]) for p in own]) for name in ("flops", "N", "D", "loss")
            )
            runs = RunTable.from_arrays(
                loss=loss, params=params, tokens=tokens, flops=flops, budget=flops
            )
            akima = fit_isoflop(runs, estimator="akima", bootstrap=1000)
            parabola = fit_isoflop(runs, estimator="parabola", window=6.0, bootstrap=0)
            rows.append(
                (dataset, step, published[column], akima.a, *akima.a_interval95, parabola.a)
            )
    return rows


def pearce_and_song() -> list[tuple]:
    """(law, what is fitted, the paper's exponent, ours)."""
    rows = []
    for law, name, local, total in (
        (BESIROGLU2024, "Epoch", 0.78, 0.51),
        (HOFFMANN2022, "Chinchilla", 0.74, 0.46),
    ):
        view = NonEmbeddingView(law)
        small, large = view.exponent_limits()
        rows += [
            (name, "N_E against C_E, 768 to 1.5e9 parameters", local, view.fitted_exponent()),
            (name, "N_T against C_T, the same models", total, view.fitted_exponent(total=True)),
            (name, "limit of small models", {"Epoch": 0.759, "Chinchilla": 0.716}[name], small),
            (name, "limit of large models", {"Epoch": 0.513, "Chinchilla": 0.457}[name], large),
            (name, "L against C_E", {"Epoch": -0.069, "Chinchilla": -0.066}[name],
             view.fitted_loss_exponent()),
        ]  # fmt: skip
    return rows


def figure(path: Path, steps: list[tuple]) -> None:
    left, right = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")[1]
    names = [step for step, *_ in STEPS]
    for k, (dataset, label) in enumerate(
        zip(DATASETS, ("RefinedWeb", "OpenWebText2"), strict=True)
    ):
        own = [row for row in steps if row[0] == dataset]
        y = np.arange(len(own)) + 0.15 * (k - 0.5)
        a, low, high = (np.array([row[i] for row in own]) for i in (3, 4, 5))
        left.errorbar(a, y, xerr=[a - low, high - a], fmt="o", ms=4, color=f"C{k}", label=label)
        left.plot([row[2] for row in own], y, "x", color="k", label="published" if k else None)
        left.plot([row[6] for row in own], y, ".", ms=3, color="0.6",
                  label="parabola within a factor 6" if k else None)  # fmt: skip
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.axvline(0.5, color="0.8", lw=0.8)
    left.set(xlabel="a in N ~ C^a", title="Porian et al.: five steps")
    left.legend(fontsize=7)
    sizes = np.logspace(2.9, 13, 200)
    for law, name in ((BESIROGLU2024, "Epoch"), (HOFFMANN2022, "Chinchilla")):
        (line,) = right.plot(sizes, NonEmbeddingView(law).local_exponent(sizes), label=name)
        right.axhline(law.a, color=line.get_color(), ls=":", lw=0.8)
    right.axhline(0.73, color="0.5", ls="--", lw=0.8, label="Kaplan, 0.73")
    right.axvspan(768, 1.5e9, color="0.95")
    right.set(xscale="log", xlabel="non-embedding parameters",
              ylabel="local exponent", title="Pearce & Song: what Kaplan would see")  # fmt: skip
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.title.set_fontsize(9)
    save(plt.gcf(), path)


def main() -> None:
    steps, reconciled = porian(), pearce_and_song()
    header = ("dataset", "step", "paper_a", "akima_a", "low95", "high95", "parabola_a")
    reconciled_header = ("law", "fitted", "paper", "ours")
    for name, rows in (
        ("porian.csv", [header, *steps]),
        ("pearce_song.csv", [reconciled_header, *reconciled]),
    ):
        text = as_csv([f"{x:.3f}" if isinstance(x, float) else x for x in row] for row in rows)
        write_atomically(HERE / "results" / name, text)
        print(text)
    figure(HERE / "results" / "kaplan_vs_chinchilla.png", steps)


if __name__ == "__main__":
    main()
