"""Loss at positions up to 2,048 of decoders trained at 128, and after a short fine-tune at 512.

    python -m experiments.rope_extrapolation.run --workdir=runs/rope_extrapolation [--norun]

Trains and measures what is missing, then writes ``results/``; ``--norun`` reads what is there.
"""

import dataclasses
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments.results import as_csv, save
from experiments.rope_extrapolation.study import (
    FACTOR,
    FINE_TUNES,
    POSITIONS,
    TRAINED,
    TUNED,
    WANTED,
    scaling,
)
from lm import command
from lm.checkpoint import load_config, load_params
from lm.command import BadInput, write_atomically
from lm.config import RopeScalingConfig, from_config_dict
from lm.config_file import load
from lm.data import Batch, open_dataset, open_tokenizer
from lm.evaluate import Scorer
from lm.model import Decoder, head_cross_entropy, rotary
from lm.sharding import make_mesh
from lm.train.device import keep_compiled
from lm.train.loop import train

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1)
ROWS = 2  # windows that are computed at a time
GENERATIONS, CHILDREN, PARENTS = 6, 16, 4  # of the search for LongRoPE's factors
SEARCH_WINDOWS = 8


class Variant(NamedTuple):
    """How a trained model is read beyond its positions."""

    run: str  # the kind in study.py
    scaling: str = ""  # of RoPE, where it is not the run's own
    window: int = 0  # of attention


VARIANTS = {
    **{name: Variant(name) for name in ("sinusoidal", "learned")},
    "rope": Variant("rope"),
    **{name: Variant("rope", name) for name in ("linear", "ntk", "yarn", "llama3", "longrope")},
    "window": Variant("rope", window=TRAINED),
    **{f"tuned_{name}": Variant(f"tuned_{name}") for name in FINE_TUNES},
}
NAMES = {
    "sinusoidal": "sinusoidal", "learned": "learned, last row repeated", "rope": "RoPE",
    "linear": "linear interpolation", "ntk": "NTK-aware", "yarn": "YaRN", "llama3": "Llama 3",
    "longrope": "LongRoPE", "window": "RoPE, attention within 128",
    "tuned_none": "RoPE", "tuned_linear": "linear interpolation", "tuned_ntk": "NTK-aware",
    "tuned_yarn": "YaRN",
}  # fmt: skip
RANGES = ((1, 128), (129, 256), (257, 512), (513, 1024), (1025, 2048))  # of the table

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the runs", flag_values=FLAGS)
flags.DEFINE_bool("run", True, "train and measure what is missing", flag_values=FLAGS)
flags.DEFINE_integer("windows", 64, "windows of the test", 2, flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "where lm.data put the corpus", flag_values=FLAGS)
flags.DEFINE_string("results", str(HERE / "results"), "where results go", flag_values=FLAGS)
flags.DEFINE_multi_string("override", [], "of all runs, as train.tokens=1e5", flag_values=FLAGS)


def train_all(workdir: Path) -> None:
    """Every run that is missing, each going on from its newest checkpoint."""
    programs: dict = {}
    for kind in (*POSITIONS, *(f"tuned_{name}" for name in FINE_TUNES)):
        for seed in SEEDS:
            settings = [f"data.data_dir={FLAGS.data_dir}", f"train.seed={seed}", *FLAGS.override]
            if kind not in POSITIONS:
                settings.append(f"train.init_from={workdir / f'rope-s{seed}'}")
            config = load(f"{HERE / 'study.py'}:{kind}", settings)
            folder = workdir / f"{kind}-s{seed}"
            print(folder.name, train(config, folder, programs=programs)["loss"], flush=True)


def section(kind: str, factors: list[float] | None = None) -> RopeScalingConfig:
    """The scaling of a kind; LongRoPE's with the ``factors`` for long texts."""
    found = from_config_dict(scaling(kind), RopeScalingConfig)
    if kind != "longrope":
        return found
    ones = (1.0,) * len(factors)
    return dataclasses.replace(found, short_factors=ones, long_factors=tuple(factors))


def scorer(folder: Path, variant: Variant, factors: list[float]) -> Scorer:
    """The model of a run's folder, read as ``variant`` says at 2,048 positions."""
    config = load_config(folder)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = load_params(folder, config, mesh)
    if config.model.position == "learned":
        last = np.minimum(np.arange(WANTED), config.data.seq_len - 1)
        params = params | {"positions": params["positions"][last]}
    model = config.model
    if variant.scaling:
        model = dataclasses.replace(model, rope_scaling=section(variant.scaling, factors))
    model = dataclasses.replace(model, sliding_window=variant.window)
    data = dataclasses.replace(config.data, seq_len=WANTED)
    config = dataclasses.replace(config, model=model, data=data)
    return Scorer(config, params, open_tokenizer(config.data), mesh)


def windows(folder: Path, n: int, split: str) -> np.ndarray:
    """Tokens of ``n`` windows of 2,048 and one more, of the text of a run's folder.

    Of training text those of the first batch of seed 0.
    """
    data = load_config(folder).data
    data = dataclasses.replace(data, seq_len=WANTED, validation_tokens=n * WANTED)
    dataset = open_dataset(data)
    batch = dataset.batch(0, 0, n) if split == "train" else next(dataset.validation(n))
    return np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], 1)


def nats(judge: Scorer, tokens_WT: np.ndarray) -> np.ndarray:
    """Loss at every position of every window, (W, 2048)."""
    found = [
        judge.judge(Batch(rows[:, :-1], rows[:, 1:])).log_p_BT
        for rows in np.split(tokens_WT, range(ROWS, len(tokens_WT), ROWS))
    ]
    return -np.concatenate([np.asarray(x, np.float32) for x in found])


def search(folder: Path) -> dict:
    """Factors of LongRoPE for the model of a folder, by the protocol's evolution."""
    config = load_config(folder)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params = load_params(folder, config, mesh)
    width, base = config.model.head_width, config.model.rope_base
    ones = [1.0] * (width // 2)
    model = dataclasses.replace(config.model, rope_scaling=section("longrope", ones))
    decoder, tokens_WT = Decoder(model, WANTED), windows(folder, SEARCH_WINDOWS, "train")

    @jax.jit
    def total(frequency_h, params, tokens_BT):
        # Traced, so that one program judges all candidates.
        with mock.patch.object(rotary, "frequencies", lambda *_: frequency_h):
            apply = partial(decoder.apply, {"params": params})
            x_BTD, _ = apply(tokens_BT[:, :-1], method="hidden")
        return head_cross_entropy(x_BTD, apply(method="unembedding"), tokens_BT[:, 1:])

    plain_h = rotary.frequencies(width, base)

    def loss(factor_h):
        parts = np.split(tokens_WT, range(ROWS, len(tokens_WT), ROWS))
        frequency_h = (plain_h / factor_h).astype(np.float32)
        return sum(float(total(frequency_h, params, rows)) for rows in parts) / (
            len(tokens_WT) * WANTED
        )

    rng, found = np.random.default_rng(0), []
    for kind in ("linear", "ntk", "yarn"):
        factor_h = plain_h / rotary.frequencies(width, base, section(kind))
        found.append((loss(factor_h), factor_h.tolist()))
    history = [min(found)[0]]
    for _ in range(GENERATIONS):
        parents = sorted(found)[:PARENTS]
        for _ in range(CHILDREN):
            factor_h = np.array(parents[rng.integers(len(parents))][1])
            jitter_h = np.exp(0.2 * rng.standard_normal(width // 2))
            factor_h *= np.where(rng.random(width // 2) < 0.3, jitter_h, 1)
            factor_h = np.sort(np.clip(factor_h, 1, FACTOR))
            found.append((loss(factor_h), factor_h.tolist()))
        history.append(min(found)[0])
    return {"factors": [round(x, 4) for x in min(found)[1]],
            "training_loss_by_generation": [round(x, 4) for x in history]}  # fmt: skip


def measured(workdir: Path) -> tuple[dict[str, list[np.ndarray]], dict]:
    """name -> loss (W, 2048) of each seed, and what the search found; kept in the workdir."""
    folder, tokens_WT = workdir / "losses", None
    path = workdir / "longrope.json"
    if not path.exists():
        if not FLAGS.run:
            raise BadInput(f"{path} is missing: run without --norun first")
        write_atomically(path, json.dumps(search(workdir / f"rope-s{SEEDS[0]}"), indent=1))
    searched = json.loads(path.read_text())
    result = {}
    for name, variant in VARIANTS.items():
        result[name] = []
        for seed in SEEDS:
            path = folder / f"{name}-s{seed}.npy"
            if not path.exists():
                if not FLAGS.run:
                    raise BadInput(f"{path} is missing: run without --norun first")
                run = workdir / f"{variant.run}-s{seed}"
                if tokens_WT is None:
                    tokens_WT = windows(run, FLAGS.windows, "validation")
                found = nats(scorer(run, variant, searched["factors"]), tokens_WT)
                content = io.BytesIO()
                np.save(content, found)
                write_atomically(path, content.getvalue())
            result[name].append(np.load(path))
    return result, searched


def bins(per_doubling: int = 14) -> list[slice]:
    """Positions, from 0, in bins of one and then of 5 %; every power of two ends one."""
    stops = np.unique(np.round(2 ** (np.arange(200) / per_doubling)).astype(int))
    stops = stops[stops <= WANTED].tolist()
    return [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]


def mean_and_error(loss_WT: np.ndarray, part: slice) -> tuple[float, float]:
    """Over windows, of each window's mean over a part of its positions."""
    means = loss_WT[:, part].mean(1, dtype=np.float64)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def draw(losses: dict[str, list[np.ndarray]], path: Path) -> None:
    """Loss against position: the three kinds, RoPE's scalings, and the fine-tunes."""
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), sharey=True, layout="constrained")
    scalings = ("rope", "linear", "ntk", "yarn", "llama3", "longrope", "window")
    panels = {
        "trained at 128": ("rope", "sinusoidal", "learned"),
        "RoPE scaled by 16, as it is": scalings,
        "after a fine-tune at 512": [n for n in VARIANTS if n.startswith("tuned")] + ["window"],
    }
    colours = dict(zip(scalings, ("0.15", "C0", "C1", "C2", "C4", "C5", "0.6"), strict=True))
    colours |= {"sinusoidal": "C3", "learned": "C8", "tuned_none": colours["rope"]}
    colours |= {f"tuned_{name}": colours[name] for name in ("linear", "ntk", "yarn")}
    parts = [part for part in bins(6) if part.start >= 8]
    at = np.array([(part.start + part.stop + 1) / 2 for part in parts])
    for panel, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            loss_WT = np.mean(losses[name], 0)
            mean, error = np.array([mean_and_error(loss_WT, part) for part in parts]).T
            solid = at <= (TRAINED if name == "learned" else WANTED * (name != "window"))
            style = {"color": colours[name], "lw": 1.4}
            panel.plot(at, np.where(solid, mean, np.nan), label=NAMES[name], **style)
            if not solid.all():
                panel.plot(at, np.where(solid, np.nan, mean), "--", **style)
            panel.fill_between(at, mean - error, mean + error, alpha=0.25, lw=0, fc=colours[name])
        ends = [TRAINED] if "tune" not in title else [TRAINED, TUNED]
        for end in ends:
            panel.axvline(end, color="0.5", lw=0.8, ls=":")
        panel.set(xscale="log", xlim=(8, WANTED), ylim=(1.2, 5), xlabel="position", title=title)
        panel.set_xticks([8, 32, 128, 512, 2048], ["8", "32", "128", "512", "2,048"])
        panel.minorticks_off()
        panel.legend(fontsize=8, loc="upper center", ncol=2, framealpha=1)
    axes[0].set_ylabel("loss, nats a byte")
    save(figure, path)


def by_position(losses: dict[str, list[np.ndarray]]) -> str:
    """The figure's numbers: a row a variant, seed and bin."""
    rows = [("variant", "seed", "first_position", "last_position", "loss", "standard_error")]
    for name, seeds in losses.items():
        for seed, loss_WT in zip(SEEDS, seeds, strict=True):
            for part in bins():
                mean, error = mean_and_error(loss_WT, part)
                rows.append((name, seed, part.start + 1, part.stop, f"{mean:.4f}", f"{error:.4f}"))
    return as_csv(rows)


def table(losses: dict[str, list[np.ndarray]]) -> str:
    """Markdown: loss over ranges of positions, the seeds' mean and both."""
    head = " | ".join(f"{a:,} - {b:,}" for a, b in RANGES)
    lines = [f"| | {head} |", "|---|" + "---|" * len(RANGES)]
    for name, seeds in losses.items():
        cells = []
        for first, last in RANGES:
            each = [mean_and_error(loss_WT, slice(first - 1, last))[0] for loss_WT in seeds]
            told = ", ".join(f"{x:.2f}" for x in each)
            cells.append(f"{np.mean(each):.3f} ({told})")
        title = NAMES[name] + (", fine-tuned" if name.startswith("tuned") else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if not FLAGS.workdir:
        raise BadInput("--workdir must be given, e.g. --workdir=runs/rope_extrapolation")
    workdir, results = Path(FLAGS.workdir).resolve(), Path(FLAGS.results)
    keep_compiled()
    if FLAGS.run:
        train_all(workdir)
    losses, searched = measured(workdir)
    write_atomically(results / "by_position.csv", by_position(losses))
    write_atomically(results / "longrope.json", json.dumps(searched, indent=1) + "\n")
    write_atomically(results / "table.md", table(losses))
    draw(losses, results / "rope_extrapolation.png")
    print(table(losses), end="")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
