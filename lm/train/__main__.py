"""Trains one run; the same command again resumes it.

python -m lm.train --config=configs/tiny.py --workdir=runs/tiny [--config.model.n_layers=4 ...]

On many hosts, the same command on each, with a workdir that they share: srun and TPU pods say which
host is which, elsewhere LM_COORDINATOR=HOST:PORT (process 0's host), LM_PROCESSES and LM_PROCESS.
"""

import contextlib
import sys
from pathlib import Path

from absl import flags

from lm import command, hosts
from lm.command import BadInput
from lm.config import Config
from lm.config_file import config_from_flags, define_config_flag
from lm.train.profile import profile_range

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=FLAGS)
flags.DEFINE_bool(
    "force", False, "Continue a folder begun under another config.", flag_values=FLAGS
)
flags.DEFINE_string(
    "profile",
    None,
    "Trace the devices between two steps, as 10:20, into WORKDIR/profile, for XProf.",
    flag_values=FLAGS,
)


def main() -> int | None:
    config = config_from_flags(FLAGS)
    command.check_folder("--workdir", FLAGS.workdir, "runs/tiny")
    if "://" in FLAGS.workdir:
        raise BadInput(
            f"--workdir={FLAGS.workdir}: a run's folder is a path of a file system (lm.sweep takes"
            " object stores)"
        )
    profiled = profile_range(FLAGS.profile) if FLAGS.profile is not None else None

    try:
        with hosts.joined(), contextlib.suppress(command.Preempted):  # all processes leave together
            _train(config, profiled)
            return None
    except KeyboardInterrupt:
        pass
    if hosts.is_first():
        print("interrupted; the same command goes on from the newest checkpoint")
    return command.PREEMPTED


def _train(config: Config, profiled: tuple[int, int] | None) -> None:
    # Imported after the flags were read, so that a mistyped one is told at once.
    from lm.train.clock import PARTS
    from lm.train.device import keep_compiled
    from lm.train.display import Display, shares
    from lm.train.loop import train

    keep_compiled()
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Display(config)) if hosts.is_first() else None
        result = train(config, FLAGS.workdir, progress=display, force=FLAGS.force, profile=profiled)
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
    if last_good := result.get("last_good_loss"):
        print(f"last good loss {last_good:.4f} nats a token, at step {result['last_good_step']:,}")
    seconds = {part: result.get(f"{part}_seconds", 0.0) for part in PARTS}
    if result.get("goodput"):
        told = shares(seconds, result["wall_seconds"])
        print(f"goodput {100 * result['goodput']:.1f} % ({told})")
    if profiled and Path(FLAGS.workdir, "profile").exists():  # not of a run that was done before
        print(f"trace of steps {FLAGS.profile}: xprof --logdir={FLAGS.workdir}/profile")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
