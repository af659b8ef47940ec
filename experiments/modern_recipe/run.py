"""Today's decoder against 2017's, one component at a time, at equal FLOPs and parameters.

    python -m experiments.modern_recipe.run --workdir=runs/modern_recipe [--norun]

Some hundred runs of 1e12 FLOPs. The same command again goes on; ``--norun`` reads what is there,
and leaves out variants that are not complete.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib import pyplot as plt
from scipy import stats

from experiments.results import as_csv, save
from lm import arithmetic, command
from lm.command import BadInput, write_atomically
from lm.config import Config, ModelConfig, SweepConfig, replace
from lm.config_file import load
from lm.train.device import keep_compiled
from lm.train.loop import train

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "isoflop_cpu.py"
FLOPS = 1e12
RATES = (0.005, 0.01, 0.02)  # of matrices at width 32
CHOOSING_SEED, SEEDS = 0, (1, 2, 3)
MODERN = {
    **{"d_model": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 8, "head_width": 8, "d_ff": 172},
    **{"norm": "rms", "norm_position": "pre", "position": "rope", "feed_forward": "swiglu"},
}
POST_LAYER_NORM = {"norm": "layer", "norm_position": "post"}
# What differs from MODERN, 2017's parts first; d_ff follows, so that N does not.
VARIANTS = {
    "modern": {},
    "2017": {**POST_LAYER_NORM, "position": "sinusoidal", "feed_forward": "relu"},
    "post-LayerNorm": POST_LAYER_NORM,
    "sinusoidal": {"position": "sinusoidal"},
    "ReLU": {"feed_forward": "relu"},
    "post-RMSNorm": {"norm_position": "post"},
    "LayerNorm": {"norm": "layer"},
    "GELU": {"feed_forward": "gelu"},
    "learned positions": {"position": "learned"},
    "no positions": {"position": "none"},
    "GQA, 2 KV heads": {"n_kv_heads": 2},
    "MQA": {"n_kv_heads": 1},
    "1 layer of 88": {"n_layers": 1, "d_model": 88, "n_heads": 11, "n_kv_heads": 11},
    "3 layers of 56": {"n_layers": 3, "d_model": 56, "n_heads": 7, "n_kv_heads": 7},
    "4 layers of 48": {"n_layers": 4, "d_model": 48, "n_heads": 6, "n_kv_heads": 6},
    "6 layers of 40": {"n_layers": 6, "d_model": 40, "n_heads": 5, "n_kv_heads": 5},
    "untied head": {"tied": False},
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the runs", flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "where lm.data put the corpus", flag_values=FLAGS)
flags.DEFINE_bool("run", True, "train what is missing", flag_values=FLAGS)
flags.DEFINE_string("results", str(HERE / "results"), "where results go", flag_values=FLAGS)


class Trial(NamedTuple):
    """One run."""

    variant: str
    rate: float
    seed: int


class Difference(NamedTuple):
    """A variant's loss less the modern one's, nats a byte."""

    variant: str
    rate: float
    loss: float  # mean of seeds
    difference: float
    low: float  # of the 95 % interval
    high: float
    pooled: bool  # whether its interval is from the scatter of all
    each: list[float]  # by seed


def _params(model: ModelConfig, seq_len: int) -> int:
    return arithmetic.parameters(model, seq_len).blocks_and_head


def as_config(study: Config, trial: Trial) -> Config:
    """The run of a trial: its d_ff the multiple of 4 that brings N nearest the modern one's."""
    seq_len, change = study.data.seq_len, VARIANTS[trial.variant]

    def params(**changed):
        return _params(replace(study, model={**MODERN, **changed}).model, seq_len)

    least, step = params(**change, d_ff=4), params(**change, d_ff=8) - params(**change, d_ff=4)
    d_ff = 4 + 4 * math.ceil((params() - least) / step - 0.5)  # of two as near, the smaller
    config = replace(
        study,
        name=f"modern_recipe_{trial.variant}",
        model={**MODERN, **change, "d_ff": d_ff},
        optimizer={"learning_rate": trial.rate},
        train={"flops": FLOPS, "seed": trial.seed},
    )
    return dataclasses.replace(config, sweep=SweepConfig())


def of_variant(variant: str, run: Callable[[Trial], dict]) -> list[dict]:
    """The rows of a variant: one seed chooses the rate, from as many as it takes for the best to
    have a worse one on either side; the other seeds are for the comparison."""
    tried, wanted, rows = {}, list(RATES), []

    def measure(rate: float, seed: int) -> float:
        found = run(Trial(variant, rate, seed))
        loss = np.nan if found["loss"] is None else round(found["loss"], 4)
        size = {name: found[name] for name in ("params", "tokens", "batch_tokens")}
        use = "choice" if seed == CHOOSING_SEED else "comparison"
        trial = {"variant": variant, "use": use, "rate_at_width_32": rate, "seed": seed}
        rows.append({**trial, **size, "loss": loss})
        return np.inf if np.isnan(loss) else loss

    while wanted:
        for rate in wanted:
            tried[rate] = measure(rate, CHOOSING_SEED)
        best = min(tried, key=tried.get)
        wanted = [rate for rate in (best / 2, 2 * best) if not min(tried) <= rate <= max(tried)]
    for seed in SEEDS:
        measure(best, seed)
    return rows


def compare(rows: list[dict]) -> tuple[list[Difference], float]:
    """Differences from the first variant, and the scatter of a single run.

    Seeds are blocks: the runs of one seed read the same batches. loss = variant + seed + residual,
    and the residual's standard deviation is pooled over variants, (V - 1)(S - 1) degrees of
    freedom. One that scatters more than the rest has an interval by its own paired differences
    instead. A variant of which a run of the comparison diverged is left out; raises ``BadInput``
    where that leaves nothing to compare with the first.
    """
    rows = [row for row in rows if row["use"] == "comparison"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    of = {(row["variant"], row["seed"]): row for row in rows}
    loss_VS = np.array([[of[v, s]["loss"] for s in SEEDS] for v in variants])
    kept = np.isfinite(loss_VS).all(1)
    if not kept[0] or kept.sum() < 2:
        raise BadInput(f"runs of {variants[0]} or of all others diverged: nothing to compare")
    variants, loss_VS = list(itertools.compress(variants, kept)), loss_VS[kept]
    difference_VS = loss_VS - loss_VS[0]
    alike_V = np.array([True, *scatter_alike(difference_VS[1:])])
    alike_VS, n_seeds = loss_VS[alike_V], len(SEEDS)
    residual_VS = alike_VS - alike_VS.mean(1, keepdims=True) - alike_VS.mean(0) + alike_VS.mean()
    freedom = (len(alike_VS) - 1) * (n_seeds - 1)
    scatter = np.sqrt(np.sum(residual_VS**2) / freedom)
    pooled = stats.t.ppf(0.975, freedom) * scatter * np.sqrt(2 / n_seeds)
    own_V = stats.t.ppf(0.975, n_seeds - 1) * difference_VS.std(1, ddof=1) / np.sqrt(n_seeds)
    half_V = np.where(alike_V, pooled, own_V)
    half_V[0] = 0
    return [
        Difference(
            variants[v],
            of[variants[v], SEEDS[0]]["rate_at_width_32"],
            loss_VS[v].mean(),
            each.mean(),
            each.mean() - half_V[v],
            each.mean() + half_V[v],
            bool(alike_V[v]),
            each.tolist(),
        )
        for v, each in enumerate(difference_VS)
    ], float(scatter)


def scatter_alike(difference_VS: np.ndarray) -> np.ndarray:
    """Which variants vary alike over seeds: while the largest variance is too large a share of all
    (Cochran 1941, C test at 1 %), its variant is set aside."""
    variance_V, freedom = difference_VS.var(1, ddof=1), difference_VS.shape[1] - 1
    alike_V = np.full(len(variance_V), True)
    while (n := alike_V.sum()) > 1:
        largest = np.argmax(np.where(alike_V, variance_V, -1))
        f = stats.f.ppf(1 - 0.01 / n, freedom, (n - 1) * freedom)
        if variance_V[largest] <= variance_V[alike_V].sum() / (1 + (n - 1) / f):
            break
        alike_V[largest] = False
    return alike_V


def table(differences: list[Difference]) -> str:
    """Markdown."""
    lines = ["| | rate | loss | difference (95 %) | by seed |", "|---|---|---|---|---|"]
    for d in differences:
        told = f"{d.difference:+.4f} ({d.low:+.4f} to {d.high:+.4f})"
        if d.low > 0 or d.high < 0:
            told = f"**{told}**"
        told += "" if d.pooled else ", by its own seeds"
        cells = [d.variant, f"{d.rate:g}", f"{d.loss:.4f}", told]
        cells.append(", ".join(f"{x:+.3f}" for x in d.each))
        if d.each == [0] * len(d.each):
            cells[3:] = "", ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(differences: list[Difference], path: Path) -> None:
    """A line a variant: its difference with the interval, and each seed's."""
    shown = differences[1:]
    figure, panel = plt.subplots(figsize=(8, 1 + 0.32 * len(shown)), layout="constrained")
    for y, d in enumerate(shown):
        clear = d.low > 0 or d.high < 0
        colour = ("C3" if d.difference > 0 else "C2") if clear else "0.5"
        panel.plot([d.low, d.high], [y, y], color=colour, lw=2.2, solid_capstyle="butt")
        panel.plot(d.difference, y, "o", color=colour, ms=6)
        panel.plot(d.each, [y + 0.22] * len(d.each), "|", color="0.3", ms=5)
    panel.axvline(0, color="0.2", lw=0.8)
    panel.set_yticks(range(len(shown)), [d.variant for d in shown])
    panel.set_ylim(len(shown) - 0.4, -0.6)
    panel.set_xlabel("loss less the modern recipe's, nats a byte (ticks: seeds)")
    save(figure, path)
    plt.close(figure)


def main() -> None:
    if not FLAGS.workdir:
        raise BadInput("--workdir must be given, e.g. --workdir=runs/modern_recipe")
    keep_compiled()
    study = replace(load(f"{CONFIG}:full"), data={"data_dir": FLAGS.data_dir})
    programs: dict = {}

    def run(trial: Trial) -> dict:
        name = "{}-r{}-s{}".format(*trial).replace(",", "").replace(" ", "_")
        folder = Path(FLAGS.workdir).resolve() / name
        if not FLAGS.run:
            return json.loads((folder / "result.json").read_text())
        found = train(as_config(study, trial), folder, programs=programs)
        print(name, found["loss"], flush=True)
        return found

    rows = []
    for variant in VARIANTS:
        try:
            rows += of_variant(variant, run)
        except FileNotFoundError as error:
            print(f"{variant} is left out: {error.filename} is missing", file=sys.stderr)
    if len({row["variant"] for row in rows}) < 2 or rows[0]["variant"] != "modern":
        raise BadInput("the runs of modern and of another variant are missing: run without --norun")
    differences, scatter = compare(rows)
    results = Path(FLAGS.results)
    write_atomically(results / "runs.csv", as_csv(rows))
    rounded = [
        {**d._asdict(), **{name: round(getattr(d, name), 5) for name in d._fields[2:6]}}
        for d in differences
    ]
    for row in rounded:
        row["each"] = " ".join(f"{x:.4f}" for x in row["each"])
    write_atomically(results / "differences.csv", as_csv(rounded))
    write_atomically(results / "table.md", table(differences))
    draw(differences, results / "differences.png")
    print(table(differences), f"scatter of a single run: {scatter:.4f} nats", sep="\n")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
