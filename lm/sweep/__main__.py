r"""Trains all runs of a study: budgets x sizes. The same command again trains only what is missing.

    python -m lm.sweep --config=configs/isoflop_cpu.py:quick --workdir=runs/isoflop_cpu \
        --backend=processes
    python -m lm.sweep --workdir=runs/isoflop_cpu --status

Writes runs.csv and curves.csv into the workdir, for ``python -m lm.fit --runs=WORKDIR``.
With --backend=inline on many hosts, the same command on each (see lm.train), a run has all of them.

Any number of these commands may share a workdir that all see: a folder, or a URL that fsspec knows.
Each takes runs that no other has, and those of one that died. Ray or SLURM start workers elsewhere:

    python -m lm.sweep --config=FILE --workdir=DIR --backend=ray --gpus=4
    python -m lm.sweep --config=FILE --workdir=DIR --backend=slurm --workers=16 --gpus=8 \
        --engine_option=partition=long
"""

import ast
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import flags
from rich.console import Console

from lm import command, hosts
from lm.command import DONE, FAILED, PREEMPTED, BadInput
from lm.config import check_vocabulary
from lm.config_file import config_from_flags, define_config_flag
from lm.sweep import grid
from lm.sweep.backends import Inline, Processes, available_cores, follow
from lm.sweep.cluster import Ray, Slurm
from lm.sweep.display import Display, accounting_line, budgets_table, summary, told
from lm.sweep.launch import Study, account, cannot_start, launch, refuse_more_workers
from lm.sweep.store import Store
from lm.train.display import duration
from lm.train.metrics import check_trackers

FLAGS = flags.FlagValues()
define_config_flag(FLAGS)
flags.DEFINE_string("workdir", None, "The study's folder, or gs://, s3://.", flag_values=FLAGS)
flags.DEFINE_enum(
    "backend",
    "inline",
    ["inline", "processes", "ray", "slurm"],
    "inline: one run at a time on all devices; processes: workers, each with a share of the cores;"
    " ray, slurm: workers on a cluster whose machines all see the workdir and the data.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "workers",
    0,
    "How many (0: one a core with --backend=processes, all there is room for with ray).",
    flag_values=FLAGS,
)
flags.DEFINE_integer("cpus", 1, "Cores of a run on a cluster.", flag_values=FLAGS)
flags.DEFINE_integer("gpus", 0, "Accelerators of a run on a cluster.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "engine_option",
    [],
    "More for ray.remote or submitit, as --engine_option=resources={'TPU':4}, =partition=long.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("retry", False, "Try the runs again that were set aside.", flag_values=FLAGS)
flags.DEFINE_bool("status", False, "Show how the study stands, and end.", flag_values=FLAGS)


def main() -> int | None:
    together = FLAGS.backend == "inline" and not FLAGS.status
    with hosts.joined() if together else contextlib.nullcontext():
        return _sweep() if hosts.is_first() else follow()


def _sweep() -> int | None:
    started = time.monotonic()
    command.check_folder("--workdir", FLAGS.workdir, "runs/isoflop_cpu")
    store = Store(FLAGS.workdir)
    console = Console(highlight=False, soft_wrap=True)
    if FLAGS.status:
        return _show_status(Study(store.config(), store), console)
    config = config_from_flags(FLAGS)
    grid.plan(config, {})
    check_trackers(config.train)
    if config.sweep.branches and "://" in store.place:
        raise BadInput(
            "sweep.branches with a --workdir that is a URL: checkpoints are not kept there"
        )
    engine = _engine(store)

    # Once, before workers race for it; and what is wrong with the data is said before a run starts.
    from lm.data import open_dataset

    check_vocabulary(config, open_dataset(config.data).vocab_size)
    store.claim(config)
    return run(Study(config, store, started=started), engine(), console, FLAGS.retry)


def _engine(store: Store) -> Callable[[], Any]:
    """What starts the backend. Raises ``BadInput`` where it could not."""
    if FLAGS.backend in ("inline", "processes"):
        workers = refuse_more_workers(FLAGS.workers, available_cores())
        if FLAGS.backend == "inline":
            return Inline
        return lambda: Processes(workers, store.workdir / "workers.log")
    options = {}
    for option in FLAGS.engine_option:
        name, equals, value = option.partition("=")
        if not equals:
            raise BadInput(f"--engine_option={option}: must be written NAME=VALUE")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    engine = {"ray": Ray, "slurm": Slurm}[FLAGS.backend]
    return engine(store, FLAGS.workers, FLAGS.cpus, FLAGS.gpus, options).start


def run(study: Study, backend, console: Console, retry: bool = False) -> int:
    """Launches the study, prints how it went, returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    try:
        with Display(console) as display:
            launch(study, backend, display, ("failed", *(["set aside"] if retry else [])))
    except KeyboardInterrupt:
        interrupted = True
    for line in sorted(backend.trouble):
        console.print(line, markup=False)
    if interrupted:
        console.print(f"interrupted: {summary(study)}; the same command goes on", markup=False)
        return PREEMPTED
    console.print(budgets_table(study))
    if study.trained or study.done_at_start == set(study.store.losses()):
        wall_seconds = time.monotonic() - study.started
        accounted = account(study, backend.workers, wall_seconds)
        console.print(accounting_line(accounted), markup=False)
    console.print(f"{summary(study)}; {study.store.workdir / 'runs.csv'}", markup=False)
    _show_failed(study, console)
    if waiting := cannot_start(study):
        told = ", ".join(f"{flops:.3g}" for flops in waiting)
        are = "wait for these; the same command tries again" if study.failed else "are left"
        console.print(f"runs at {told} FLOPs {are}")
    return FAILED if study.failed or waiting else DONE


def _show_status(study: Study, console: Console) -> int:
    study.refresh()
    console.print(budgets_table(study))
    total, done = study.total_flops(), study.done_flops()
    left, goodput = study.seconds_left_elsewhere(), study.goodput()
    console.print(
        f"{100 * done / total:.0f} % of {total:.3g} FLOPs done"
        + (f", {duration(left)} left" if left is not None else "")
        + (f", goodput {100 * goodput:.0f} %" if goodput is not None else "")
    )
    for run_id, at in study.progress.items():
        owner = study.store.leases.last(run_id).owner
        console.print(f"running: {run_id} ({owner})  {told(at)}".rstrip(), markup=False)
    _show_failed(study, console)
    return DONE


def _show_failed(study: Study, console: Console) -> None:
    for run_id, reason in sorted(study.failed.items()):
        log = study.store.folder(run_id) / "log.txt"
        console.print(f"{study.states[run_id]}: {run_id}: {reason} ({log})", markup=False)
        if study.states[run_id] == "set aside":
            for line in study.store.leases.last(run_id).log_tail:
                console.print(f"    {line}", markup=False)
    if study.where("set aside"):
        console.print("set aside: killed its worker three times; --retry tries again")


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
