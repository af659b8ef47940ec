"""Learning rate and batch of the IsoFLOP study on CPU: two widths, two budgets, five recipes.

    python experiments/isoflop/calibrate.py --workdir=runs/calibration

Twenty runs, about ten minutes on one core; the same command again goes on. Writes
``results/calibration.csv`` and prints it. What is compared is the loss of single runs, which
scatter by about 0.02 nats from seed to seed.
"""

import csv
import io
import sys
from pathlib import Path

from absl import flags

from lm import command
from lm.command import BadInput, write_atomically
from lm.config import replace
from lm.config_file import load
from lm.sweep.grid import ladder

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Where the runs go.", flag_values=FLAGS)
WIDTHS = (32, 64)
BUDGETS = (3e11, 3e12)
RECIPES = ((0.01, 0.25), (0.005, 0.25), (0.02, 0.25), (0.01, 0.125), (0.01, 0.5))
COLUMNS = ("flops", "d_model", "params", "tokens", "batch_tokens", "rate_at_width_32", "loss")
RESULTS = Path(__file__).parent / "results" / "calibration.csv"


def main() -> None:
    if FLAGS.workdir is None:
        raise BadInput("--workdir is missing; as --workdir=runs/calibration")
    from lm.train.device import keep_compiled
    from lm.train.loop import train

    keep_compiled()
    study = load(str(Path(__file__).parents[2] / "configs" / "isoflop_cpu.py") + ":quick")
    shapes = {rung.model.d_model: rung.model for rung in ladder(study)}
    programs, rows = {}, []
    for flops in BUDGETS:
        for width in WIDTHS:
            for rate, batch in RECIPES:
                config = replace(
                    study,
                    model=vars(shapes[width]),
                    optimizer={"learning_rate": rate},
                    train={"flops": flops, "batch_tokens": batch},
                    sweep={"budgets": ()},
                )
                name = f"c{flops:.0e}-d{width}-r{rate}-b{batch}".replace("+", "")
                run = train(config, Path(FLAGS.workdir) / name, programs=programs)
                values = flops, width, run["params"], run["tokens"], run["batch_tokens"], rate
                rows.append((*values, round(run["loss"], 4)))
                print(*rows[-1], flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_atomically(RESULTS, text.getvalue())


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
