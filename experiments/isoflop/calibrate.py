"""Learning rate, batch and depth of the IsoFLOP studies on CPU, before any exponent is fitted.

    python -m experiments.isoflop.calibrate --part=noise --workdir=runs/calibration
    python -m experiments.isoflop.calibrate --part=rates --workdir=runs/calibration
    python -m experiments.isoflop.calibrate --part=depths --workdir=runs/calibration
    python -m experiments.isoflop.calibrate --part=corners --workdir=runs/calibration

``noise``: six recipes of one size, eight seeds each: how far the loss depends on the seed.
``rates``: two shapes, two tokens-per-parameter ratios, five rates and three batches. ``depths``:
four depths of one size at two budgets, two seeds each. ``corners``, after the study: the rates and
batches of ``rates`` where its sizes are largest and smallest for their FLOPs. Five, fifteen, ten
and fifteen minutes of one core; the same command again goes on. Writes
``results/calibration_<part>.csv`` and prints it.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments.results import as_csv
from lm import arithmetic, command
from lm.command import BadInput, one_of, write_atomically
from lm.config import Config, SweepConfig, replace, to_dict
from lm.config_file import load
from lm.sweep.grid import ladder

FLAGS = flags.FlagValues()
flags.DEFINE_string("part", None, "noise, rates, depths or corners.", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "Where the runs go.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", "data", "Where lm.data put the corpus.", flag_values=FLAGS)
CONFIG = Path(__file__).parents[2] / "configs" / "isoflop_cpu.py"
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "recipe flops d_model n_layers params tokens batch_tokens rate_at_width_32 batch_scale seed"
    " loss"
).split()
# (tied embedding, base of RoPE, weight decay); the last is the studies' own.
RECIPES = {
    "untied": (False, 10_000.0, 0.0),
    "untied, decay": (False, 10_000.0, 0.1),
    "tied": (True, 10_000.0, 0.0),
    "tied, base 100": (True, 100.0, 0.0),
    "tied, decay": (True, 10_000.0, 0.1),
    "tied, base 100, decay": (True, 100.0, 0.1),
}
CHOSEN = "tied, base 100, decay"
RATES = ((0.01, 0.25), (0.005, 0.25), (0.02, 0.25), (0.0025, 0.25), (0.04, 0.25))
BATCHES = ((0.01, 0.125), (0.01, 0.5))


class Trial(NamedTuple):
    """One run."""

    flops: float
    d_model: int
    n_layers: int
    rate: float = 0.01  # of matrices at width 32
    batch: float = 0.25  # the scale of Step Law's rule
    seed: int = 0
    recipe: str = CHOSEN


def _noise(study: Config) -> list[Trial]:
    return [
        Trial(3e11, 32, 2, seed=seed, recipe=recipe) for recipe in RECIPES for seed in range(1, 9)
    ]


def _rates(study: Config) -> list[Trial]:
    grid = itertools.product(((32, 2), (64, 3)), (8, 40), RATES + BATCHES)
    return [Trial(_flops(study, *shape, ratio), *shape, *recipe) for shape, ratio, recipe in grid]


def _depths(study: Config) -> list[Trial]:
    shapes = {
        3e11: ((40, 1), (32, 2), (24, 3), (24, 4)),
        3e12: ((80, 2), (64, 3), (56, 4), (48, 6)),
    }
    return [
        Trial(flops, *shape, seed=seed)
        for flops in shapes
        for shape in shapes[flops]
        for seed in (1, 2)
    ]


def _corners(study: Config) -> list[Trial]:
    shapes = ((3e11, 64, 3), (1e12, 72, 4), (3e11, 8, 2), (1e12, 16, 2))
    return [Trial(*shape, *recipe) for shape, recipe in itertools.product(shapes, RATES + BATCHES)]


PARTS = {"noise": _noise, "rates": _rates, "depths": _depths, "corners": _corners}


def trials(study: Config, part: str) -> list[Trial]:
    """The runs of a part, cheapest first."""
    return sorted(PARTS[part](study), key=lambda trial: trial.flops)


def _model(study: Config, width: int, depth: int):
    family = replace(study, sweep={"min_layers": depth, "aspect": 1e6, "sizes": 1})
    return next(rung for rung in ladder(family) if rung.model.d_model == width).model


def as_config(study: Config, trial: Trial) -> Config:
    """The run of a trial."""
    tied, rope_base, decay = RECIPES[trial.recipe]
    model = to_dict(_model(study, trial.d_model, trial.n_layers))
    run = replace(
        study,
        model={**model, "tied": tied, "rope_base": rope_base},
        optimizer={"learning_rate": trial.rate, "weight_decay": decay},
        train={"flops": trial.flops, "batch_tokens": trial.batch, "seed": trial.seed},
    )
    return dataclasses.replace(run, sweep=SweepConfig())


def _flops(study: Config, width: int, depth: int, tokens_per_parameter: float) -> float:
    """Of a run over so many tokens a parameter, to two digits."""
    model, seq_len = _model(study, width, depth), study.data.seq_len
    tokens = tokens_per_parameter * arithmetic.parameters(model, seq_len).blocks_and_head
    return float(f"{arithmetic.training_flops(model, seq_len, tokens):.1e}")


def main() -> None:
    one_of("--part", FLAGS.part, list(PARTS))
    if FLAGS.workdir is None:
        raise BadInput("--workdir is missing; as --workdir=runs/calibration")
    from lm.train.device import keep_compiled
    from lm.train.loop import train

    keep_compiled()
    study = replace(load(f"{CONFIG}:full"), data={"data_dir": FLAGS.data_dir})
    programs, rows = {}, []
    for trial in trials(study, FLAGS.part):
        name = "c{:.1e}-d{}-l{}-r{}-b{}-s{}-{}".format(*trial[:6], trial.recipe.replace(", ", "-"))
        name = name.replace("+", "").replace(" ", "")
        run = train(as_config(study, trial), Path(FLAGS.workdir) / name, programs=programs)
        loss = None if run["loss"] is None else round(run["loss"], 4)
        size = run["params"], run["tokens"], run["batch_tokens"]
        rows.append((trial.recipe, *trial[:3], *size, *trial[3:6], loss))
        print(*rows[-1], sep=",", flush=True)
    write_atomically(RESULTS / f"calibration_{FLAGS.part}.csv", as_csv([COLUMNS, *rows]))


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
