"""Dense decoders against mixtures of experts at equal training FLOPs, and the router's collapse.

    python experiments/moe_isoflop/run.py --workdir=runs/moe_isoflop [--norun]

Trains what is missing (resumes), then writes ``results/``. ``--norun`` only analyses what is there.
"""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
from absl import flags

from lm import command
from lm.command import BadInput, write_atomically
from lm.scaling import (
    CLARK_S_BASE,
    KRAJEWSKI2024,
    KRAJEWSKI2024_DENSE,
    LUDZIEJEWSKI2025,
    CannotFit,
    RunTable,
    compute_multiplier,
    fit_isoflop,
    fit_parametric,
    flops_for_loss,
    percentile_interval,
)
from lm.train.metrics import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
KINDS = ("dense", "top1", "fine", "top2")
NAMES = {
    "dense": "dense", "top1": "8 experts, top-1", "fine": "16 half experts, top-2",
    "top2": "8 experts, top-2",
}  # fmt: skip
BALANCES = {"none": "no balancing", "loss": "loss, 1e-2", "bias": "bias, 1e-3"}
SEEDS = (0, 1)
COLOURS = dict(zip((*KINDS, *BALANCES), ("0.3", "C0", "C1", "C2", "C3", "C0", "C2"), strict=True))
DRAWS = 2_000
COMPARED_FLOPS = 1e11  # of the mixture of experts
KEPT = "run_id kind seed budget flops params active_params tokens loss d_model wall_seconds".split()

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the runs", flag_values=FLAGS)
flags.DEFINE_bool("run", True, "train what is missing", flag_values=FLAGS)
flags.DEFINE_integer("workers", 2, "runs at once", 1, flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "where lm.data put the corpus", flag_values=FLAGS)


def train(workdir: Path) -> None:
    """Every run that is missing, by the commands' own resuming."""
    study = "--config=experiments/moe_isoflop/study.py:"
    data = f"--config.data.data_dir={FLAGS.data_dir}"
    commands = [
        ["lm.sweep", study + kind, f"--workdir={workdir / kind}", data,
         "--backend=processes", f"--workers={FLAGS.workers}"]
        for kind in KINDS
    ] + [
        ["lm.train", f"{study}collapse_{name}", f"--workdir={workdir / f'collapse_{name}-s{seed}'}",
         data, f"--config.train.seed={seed}"]
        for seed in SEEDS for name in BALANCES
    ]  # fmt: skip
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    for arguments in commands:
        subprocess.run(
            [sys.executable, "-m", *arguments], check=True, cwd=HERE.parents[1], env=environment
        )


def read_rows(workdir: Path) -> list[dict]:
    """The finished runs of all kinds, ``KEPT`` columns, numbers as numbers."""
    rows = []
    for kind in KINDS:
        path = workdir / kind / "runs.csv"
        if not path.exists():
            raise BadInput(f"{path} is missing: run without --norun first")
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                row = row | {"kind": kind, "run_id": f"{kind}-{row['run_id']}"}
                rows.append({k: row[k] if k in KEPT[:2] else float(row[k]) for k in KEPT})
    return rows


def of_kind(rows: list[dict], kind: str) -> RunTable:
    """The runs of a kind with N = active parameters."""
    rows = [row for row in rows if row["kind"] == kind]
    columns = {name: np.array([row[name] for row in rows]) for name in KEPT[2:]}
    columns["params"] = columns.pop("active_params")
    names = ("loss", "params", "tokens", "flops", "budget", "seed")
    table = {name: columns[name] for name in names}
    return RunTable.from_arrays(run_id=[row["run_id"] for row in rows], **table)


def minima(table: RunTable, losses=None) -> dict[float, tuple[float, float]]:
    """budget -> (active parameters, loss): the parabola's vertex, else the best mean of seeds.

    ``losses`` stand for the table's.
    """
    found, losses = {}, table.loss if losses is None else losses
    for budget in np.unique(table.columns["budget"]):
        rows = table.columns["budget"] == budget
        sizes = np.unique(table.params[rows])
        loss = np.array([losses[rows & (table.params == n)].mean() for n in sizes])
        x, best = np.log(table.params[rows]), int(np.argmin(loss))
        a, b, c = np.polyfit(x - x.mean(), losses[rows], 2)
        vertex = x.mean() - b / (2 * a) if a > 0 else np.nan
        if np.log(sizes[0]) < vertex < np.log(sizes[-1]):
            found[budget] = (float(np.exp(vertex)), float(c - b * b / (4 * a)))
        else:
            found[budget] = (float(sizes[best]), float(loss[best]))
    return found


def dense_flops_at(loss: float, dense: dict[float, tuple[float, float]]) -> float:
    """FLOPs at which the dense minima come to ``loss``: a power law between neighbouring budgets,
    and its nearest piece beyond the ends."""
    flops = np.array(list(dense))
    losses = np.array([found[1] for found in dense.values()])
    i = int(np.clip(np.searchsorted(-losses, -loss), 1, len(flops) - 1))
    slope = np.log(flops[i] / flops[i - 1]) / np.log(losses[i] / losses[i - 1])
    return float(flops[i - 1] * (loss / losses[i - 1]) ** slope)


def resampled(table: RunTable, rng) -> np.ndarray:
    """Losses of a bootstrap: each size's mean of seeds, with scatter drawn from all pairs."""
    cells = table.columns["budget"] + 1j * table.params
    mean, scatter = table.loss.copy(), []
    for cell in np.unique(cells):
        rows = cells == cell
        mean[rows] = table.loss[rows].mean()
        if rows.sum() > 1:  # what is left of n deviations from their own mean
            scatter += list(
                (table.loss[rows] - mean[rows]) * np.sqrt(rows.sum() / (rows.sum() - 1))
            )
    return mean + rng.choice(scatter, len(mean))


def multipliers(rows: list[dict]) -> dict:
    """C_dense / C_experts at equal loss, off the minima and off parametric laws."""
    rng, dense = np.random.default_rng(0), of_kind(rows, "dense")
    draws = [minima(dense, resampled(dense, rng)) for _ in range(DRAWS)]
    result, laws = {}, {}
    for kind in KINDS:
        try:
            laws[kind] = fit_parametric(of_kind(rows, kind), bootstrap=400)
        except CannotFit as error:
            result.setdefault("no_parametric_law", {})[kind] = str(error)
    for kind in KINDS[1:]:
        table, found = of_kind(rows, kind), {}
        found_minima = minima(table)
        resampled_minima = [minima(table, resampled(table, rng)) for _ in range(DRAWS)]
        for flops, (params, loss) in found_minima.items():
            ratios = [
                dense_flops_at(theirs[flops][1], ours) / flops
                for theirs, ours in zip(resampled_minima, draws, strict=True)
            ]
            found[f"{flops:.0e}"] = {
                "active_params": round(params), "loss": round(loss, 4),
                "multiplier": round(dense_flops_at(loss, minima(dense)) / flops, 3),
                "interval80": [round(x, 3) for x in percentile_interval(np.array(ratios), 0.8)],
            }  # fmt: skip
        result[kind] = {"minima": found}
        if kind in laws and "dense" in laws:
            fits = laws["dense"], laws[kind]
            m = compute_multiplier(
                fits[0].law, fits[1].law, flops=COMPARED_FLOPS,
                draws_a=fits[0].draws, draws_b=fits[1].draws,
            )  # fmt: skip
            result[kind]["parametric"] = {
                "multiplier": round(m.value, 3),
                "interval80": [round(x, 3) for x in m.interval80],
                "dense_never_reaches_it": m.unreachable,
            }
    return result


def predictions() -> list[dict]:
    """What published laws say of eight experts (Krajewski's: of 64 times the weights)."""
    rows = []
    for flops in (COMPARED_FLOPS, 1e20):
        optimum = LUDZIEJEWSKI2025.optimum(flops, 8)
        dense = flops_for_loss(LUDZIEJEWSKI2025.at_experts(1), optimum.loss)
        rows.append({"law": "Ludziejewski et al. 2025, 8 experts", "flops": flops,
                     "multiplier": float(dense / flops)})  # fmt: skip
        for grain in (1, 2):
            optimum, _ = KRAJEWSKI2024.optimum(flops, grain)
            dense = flops_for_loss(KRAJEWSKI2024_DENSE, float(optimum.loss))
            name = f"Krajewski et al. 2024, 64 x the weights, granularity {grain}"
            rows.append({"law": name, "flops": flops, "multiplier": float(dense / flops)})
    for params in (2e4, 1e9):
        ratio = float(CLARK_S_BASE.effective_dense_params(params, 8) / params)
        name = (
            f"Clark et al. 2022, S-BASE, 8 experts at N = {params:.0e} (parameters, equal tokens)"
        )
        rows.append({"law": name, "flops": None, "multiplier": ratio})
    return [row | {"multiplier": float(f"{row['multiplier']:.3g}")} for row in rows]


def collapse_rows(workdir: Path) -> list[dict]:
    """The load's entropy over ln E, mean over layers, at every line of the logs."""
    rows = []
    for name in BALANCES:
        for seed in SEEDS:
            folder = workdir / f"collapse_{name}-s{seed}"
            for line in read_metrics(folder):
                load_LE = np.array(line["expert_load"])
                entropy_L = -np.sum(load_LE * np.log(np.maximum(load_LE, 1e-12)), 1)
                rows.append({
                    "balance": name, "seed": seed, "tokens": line["tokens"],
                    "load_entropy": round(float(entropy_L.mean() / np.log(load_LE.shape[1])), 4),
                    "dropped_share": round(float(np.mean(line["dropped_share"])), 4),
                    "load_max_over_mean": round(float(np.mean(line["load_max_over_mean"])), 3),
                    "train_loss": round(line["train_loss"], 4),
                    "validation_loss": line.get("validation_loss", ""),
                })  # fmt: skip
    return rows


def draw_losses(rows: list[dict], path: Path) -> None:
    """Loss against active parameters, a panel a budget, and the minima against FLOPs."""
    budgets = sorted({row["budget"] for row in rows})
    figure, axes = plt.subplots(
        1, len(budgets) + 1, figsize=(3.4 * (len(budgets) + 1), 3.6), layout="constrained"
    )
    for kind in KINDS:
        table = of_kind(rows, kind)
        found = minima(table)
        for panel, budget in zip(axes, budgets, strict=False):
            here = table.columns["budget"] == budget
            panel.plot(table.params[here], table.loss[here], ".", color=COLOURS[kind], ms=5)
            sizes = np.unique(table.params[here])
            means = [table.loss[here & (table.params == n)].mean() for n in sizes]
            panel.plot(sizes, means, color=COLOURS[kind], lw=1, label=NAMES[kind])
            if budget in found:
                panel.plot(*found[budget], "D", color=COLOURS[kind], ms=5, mec="white")
            panel.set(xscale="log", xlabel="active parameters", title=f"{budget:.0e} FLOPs")
            panel.set_xticks([5e3, 1e4, 2e4, 5e4, 1e5], ["5k", "10k", "20k", "50k", "100k"])
            panel.minorticks_off()
        losses = [loss for _, loss in found.values()]
        axes[-1].plot(list(found), losses, "D-", color=COLOURS[kind], ms=4, lw=1)
    axes[0].set_ylabel("validation loss, nats a byte")
    axes[0].legend(fontsize=7)
    axes[-1].set(xscale="log", yscale="log", xlabel="training FLOPs", title="minima")
    axes[-1].set_xticks(budgets, [f"{budget:.0e}" for budget in budgets])
    axes[-1].set_xticks([], minor=True)
    axes[-1].yaxis.set_major_formatter("{x:.1f}")
    axes[-1].yaxis.set_minor_formatter("{x:.1f}")
    _save(figure, path)


def draw_collapse(rows: list[dict], path: Path) -> None:
    """The load's entropy over training."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, label in BALANCES.items():
        for seed in SEEDS:
            run = [row for row in rows if row["balance"] == name and row["seed"] == seed]
            axes.plot(
                [row["tokens"] for row in run],
                [row["load_entropy"] for row in run],
                color=COLOURS[name], lw=1, ls="-" if seed == 0 else "--",
                label=label if seed == 0 else None,
            )  # fmt: skip
    axes.set(
        xlabel="tokens",
        ylabel="entropy of the load / ln 8",
        title="8 experts, top-1, four layers (dashed: second seed)",
    )
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _csv(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main() -> None:
    if not FLAGS.workdir:
        raise BadInput("--workdir must be given, e.g. --workdir=runs/moe_isoflop")
    workdir, results = Path(FLAGS.workdir).resolve(), HERE / "results"
    if FLAGS.run:
        train(workdir)
    rows, collapse = read_rows(workdir), collapse_rows(workdir)
    summary = {
        "schema": 1,
        "runs": len(rows),
        "step_and_compile_hours": round(sum(row["wall_seconds"] for row in rows) / 3600, 3),
        "seed_scatter": {},
        "minima": {},
        "exponent_of_active_params": {},
    }
    for kind in KINDS:
        table = of_kind(rows, kind)
        summary["minima"][kind] = {
            f"{flops:.0e}": {"active_params": round(n), "loss": round(loss, 4)}
            for flops, (n, loss) in minima(table).items()
        }
        pairs = table.columns["budget"] + 1j * table.params
        variances = [np.var(table.loss[pairs == cell], ddof=1) for cell in np.unique(pairs)]
        summary["seed_scatter"][kind] = round(float(np.sqrt(np.nanmean(variances))), 4)
        try:
            fit = fit_isoflop(table, bootstrap=1_000)
            found = {"a": round(fit.a, 3), "interval80": [round(x, 3) for x in fit.a_interval80]}
        except CannotFit as error:
            found = str(error)
        summary["exponent_of_active_params"][kind] = found
    summary["multipliers"] = multipliers(rows)
    summary["predictions"] = predictions()
    summary["collapse"] = {
        name: {
            "load_entropy": [row["load_entropy"] for row in ends],
            "dropped_share": [row["dropped_share"] for row in ends],
            "validation_loss": [round(float(row["validation_loss"]), 4) for row in ends],
        }
        for name in BALANCES
        for ends in [[r for r in collapse if r["balance"] == name and r["validation_loss"] != ""]]
    }
    write_atomically(results / "runs.csv", _csv(rows))
    write_atomically(results / "collapse.csv", _csv(collapse))
    text = json.dumps(summary, indent=1) + "\n"
    write_atomically(results / "summary.json", text)
    draw_losses(rows, results / "losses.png")
    draw_collapse(collapse, results / "collapse.png")
    print(text, end="")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
