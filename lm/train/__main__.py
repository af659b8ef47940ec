"""Trains one run; the same command again resumes it.

python -m lm.train --config=configs/tiny.py --workdir=runs/tiny [--config.model.n_layers=4 ...]

On many hosts, the same command on each, with a workdir that they share: srun and TPU pods say which
host is which, elsewhere LM_COORDINATOR=HOST:PORT (process 0's host), LM_PROCESSES and LM_PROCESS.
"""

import contextlib
import sys

from absl import flags

from lm import command, hosts
from lm.command import BadInput
from lm.config import Config
from lm.config_file import config_from_flags, define_config_flag

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=FLAGS)
flags.DEFINE_bool(
    "force", False, "Continue a folder begun under another config.", flag_values=FLAGS
)


def main() -> int | None:
    config = config_from_flags(FLAGS)
    if FLAGS.workdir is None:
        raise BadInput("--workdir is missing; as --workdir=runs/tiny")

    try:
        with hosts.joined(), contextlib.suppress(command.Preempted):  # all processes leave together
            _train(config)
            return None
    except KeyboardInterrupt:
        pass
    if hosts.is_first():
        print("interrupted; the same command goes on from the newest checkpoint")
    return command.PREEMPTED


def _train(config: Config) -> None:
    # Imported after the flags were read, so that a mistyped one is told at once.
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from lm.train.device import keep_compiled
    from lm.train.loop import train

    keep_compiled()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not hosts.is_first()) as bar:
        task = bar.add_task("preparing", total=None)

        def progress(at) -> None:
            speed = f"{at.tokens_per_second:,.0f} tokens/s"
            told = f"step {at.step}/{at.n_steps}  loss {at.loss:.3f}  {speed}"
            bar.update(task, total=at.n_steps, completed=at.step, description=told)

        result = train(config, FLAGS.workdir, progress=progress, force=FLAGS.force)
    if not hosts.is_first():
        return
    print(
        f"{result['status']}: loss {result['loss']:.4f} nats a token,"
        f" perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits a byte;"
        f" {result['params']:,} parameters, {result['tokens']:,} tokens,"
        f" {result['flops']:.3e} FLOPs in {result['wall_seconds']:.0f} s"
        if result["loss"] is not None
        else f"{result['status']} after {result['tokens']:,} tokens"
    )


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
