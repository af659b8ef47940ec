"""A worker process: trains the runs that come as JSON lines, and answers likewise.

Started by ``lm.sweep.backends.Processes``; it pins itself to its cores before jax is imported, so
that XLA makes no more threads than they are, and ends when its launcher does.
"""

import contextlib
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.command import PREEMPTED, InUse, Preempted
from lm.config import from_config_dict

TRAINER = "lm.train.loop:train"
SECONDS_BETWEEN_TELLING = 0.5
SECONDS_BETWEEN_TRIES = 1.0  # at a folder where another process trains


class Runner:
    """Trains runs one after another, with one cache of compiled programs and one open dataset."""

    def __init__(self, trainer: str = TRAINER):
        module, _, name = trainer.partition(":")
        self._train = getattr(importlib.import_module(module), name)
        self._open_dataset = None
        if trainer == TRAINER:
            from lm.data import open_dataset
            from lm.train.device import keep_compiled

            keep_compiled()
            self._open_dataset = open_dataset
        self._dataset: Any = None
        self._programs: dict = {}

    def run(self, job: dict, tell: Callable[..., None]) -> None:
        """Trains ``job`` (run_id, config, folder, start_from).

        Tells "progress" now and then, and at the end "done" or "failed" (the traceback is then in
        the run's ``log.txt``). Where a process that has lost its lease trains there still, waits
        for its end, and takes its result or goes on from where it died.
        """
        told = time.monotonic()

        def progress(at) -> None:
            nonlocal told
            if time.monotonic() - told > SECONDS_BETWEEN_TELLING:
                told = time.monotonic()
                names = "step", "n_steps", "flops", "loss", "seconds_left"
                tell("progress", **{name: getattr(at, name, None) for name in names})

        try:
            config = from_config_dict(job["config"])
            if self._open_dataset and not self._dataset:
                self._dataset = self._open_dataset(config.data)
            while True:
                try:
                    self._train(
                        config,
                        job["folder"],
                        programs=self._programs,
                        dataset=self._dataset,
                        progress=progress,
                        start_from=job["start_from"],
                    )
                    break
                except InUse as error:
                    print(f"waiting: {error}", flush=True)
                    time.sleep(SECONDS_BETWEEN_TRIES)
        except Exception as error:
            with contextlib.suppress(OSError), (Path(job["folder"]) / "log.txt").open("a") as log:
                traceback.print_exc(file=log)
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            tell("failed", reason=reason)
        else:
            tell("done")


def main(cores: str, trainer: str) -> None:
    """Serves standard input until it ends."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM's to all processes, for the launcher
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, map(int, cores.split(",")))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    outside = os.dup(2)
    os.dup2(2, 1)  # what training prints goes to a log, not into the answers
    jobs: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def receive() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        os._exit(0)  # the launcher has gone: nobody would hear of this run's end

    threading.Thread(target=receive, daemon=True).start()
    runner = Runner(trainer)

    def tell(kind: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, **values}), file=answers)

    tell("ready")
    while True:
        job = jobs.get()
        try:
            with (Path(job["folder"]) / "log.txt").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        except OSError as error:  # a full disk is no death of the worker, which would count
            tell("failed", reason=f"{type(error).__name__}: {error}")
            continue
        try:
            runner.run(job, tell)
        except Preempted:
            sys.exit(PREEMPTED)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os.dup2(outside, 1)
        os.dup2(outside, 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
