"""Learning rate, batch and depth of the IsoFLOP studies on CPU, before any exponent is fitted.

    python experiments/isoflop/calibrate.py --study=quick --workdir=runs/calibration_quick
    python experiments/isoflop/calibrate.py --study=full --workdir=runs/calibration_full

``quick``: two widths, two budgets, five recipes. ``full``: two sizes, two tokens-per-parameter
ratios, five rates and three batches, then four depths of one size at two budgets, two seeds each.
Ten minutes and half an hour of two cores; the same command again goes on. Writes
``results/calibration.csv`` or ``results/full/calibration.csv`` and prints it. What is compared is
the loss of single runs, which scatter by about 0.02 nats from seed to seed.
"""

import csv
import io
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

from absl import flags

from lm import arithmetic, command
from lm.command import BadInput, one_of, write_atomically
from lm.config import Config, replace, to_dict
from lm.config_file import load
from lm.sweep.grid import ladder

FLAGS = flags.FlagValues()
flags.DEFINE_string("study", "quick", "quick or full.", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "Where the runs go.", flag_values=FLAGS)
RECIPES = ((0.01, 0.25), (0.005, 0.25), (0.02, 0.25), (0.01, 0.125), (0.01, 0.5))
MORE_RECIPES = (*RECIPES, (0.0025, 0.25), (0.04, 0.25))
COLUMNS = (
    "flops d_model n_layers params tokens batch_tokens rate_at_width_32 batch_scale seed loss"
).split()
RESULTS = Path(__file__).parent / "results"
TABLES = {"quick": RESULTS / "calibration.csv", "full": RESULTS / "full" / "calibration.csv"}


class Trial(NamedTuple):
    """One run."""

    flops: float
    d_model: int
    n_layers: int
    rate: float  # of matrices at width 32
    batch: float  # the scale of Step Law's rule
    seed: int = 0


def trials(study: Config, name: str) -> list[Trial]:
    """The runs of a calibration, cheapest first."""
    if name == "quick":
        grid = itertools.product((3e11, 3e12), (32, 64), RECIPES)
        return [Trial(flops, width, 2, *recipe) for flops, width, recipe in grid]
    recipes = [
        Trial(_flops(study, width, depth, ratio), width, depth, *recipe)
        for (width, depth), ratio, recipe in itertools.product(
            ((32, 2), (64, 3)), (8, 40), MORE_RECIPES
        )
    ]
    depths = [
        Trial(flops, width, depth, *RECIPES[0], seed)
        for flops, shapes in (
            (3e11, ((40, 1), (32, 2), (24, 3), (24, 4))),
            (3e12, ((80, 2), (64, 3), (56, 4), (48, 6))),
        )
        for width, depth in shapes
        for seed in (1, 2)
    ]
    return sorted((*recipes, *depths), key=lambda trial: trial.flops)


def _model(study: Config, width: int, depth: int):
    family = replace(study, sweep={"min_layers": depth, "aspect": 1e6, "sizes": 1})
    return next(rung for rung in ladder(family) if rung.model.d_model == width).model


def as_config(study: Config, trial: Trial) -> Config:
    """The run of a trial."""
    return replace(
        study,
        model=to_dict(_model(study, trial.d_model, trial.n_layers)),
        optimizer={"learning_rate": trial.rate},
        train={"flops": trial.flops, "batch_tokens": trial.batch, "seed": trial.seed},
        sweep={"budgets": ()},
    )


def _flops(study: Config, width: int, depth: int, tokens_per_parameter: float) -> float:
    """Of a run over so many tokens a parameter, to two digits."""
    model, seq_len = _model(study, width, depth), study.data.seq_len
    tokens = tokens_per_parameter * arithmetic.parameters(model, seq_len).blocks_and_head
    return float(f"{arithmetic.training_flops(model, seq_len, tokens):.1e}")


def main() -> None:
    one_of("--study", FLAGS.study, list(TABLES))
    if FLAGS.workdir is None:
        raise BadInput(f"--workdir is missing; as --workdir=runs/calibration_{FLAGS.study}")
    from lm.train.device import keep_compiled
    from lm.train.loop import train

    keep_compiled()
    config_file = Path(__file__).parents[2] / "configs" / "isoflop_cpu.py"
    study = load(f"{config_file}:{FLAGS.study}")
    programs, rows = {}, []
    for trial in trials(study, FLAGS.study):
        name = "c{:.1e}-d{}-l{}-r{}-b{}-s{}".format(*trial).replace("+", "")
        run = train(as_config(study, trial), Path(FLAGS.workdir) / name, programs=programs)
        loss = None if run["loss"] is None else round(run["loss"], 4)
        size = run["params"], run["tokens"], run["batch_tokens"]
        rows.append((*trial[:3], *size, *trial[3:], loss))
        print(*rows[-1], flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    TABLES[FLAGS.study].parent.mkdir(parents=True, exist_ok=True)
    write_atomically(TABLES[FLAGS.study], text.getvalue())


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
