"""Where runs are trained: in this process, or in worker processes that share the machine's cores.

A backend takes jobs while ``free`` is above 0 and tells events (dicts with ``kind`` and
``run_id``): "progress", and as the last of a job "done", "failed", "died" or "interrupted".
``alive`` counts workers elsewhere, which find their runs by themselves (``lm.sweep.cluster``), and
``trouble`` tells the user of them at the end.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm import hosts
from lm.command import PREEMPTED, Preempted
from lm.sweep.worker import TRAINER, Runner

LINES_OF_LOG = 10  # that are kept of a worker that died
GRACE_SECONDS = 60.0  # in which a worker that is told to end saves its run
Tell = Callable[[dict[str, Any]], None]


class Inline:
    """One run after another in this process, on all devices; those of ``follow``ers too."""

    workers, alive, trouble = 1, 0, ()

    def __init__(self, trainer: str = TRAINER):
        self._trainer = trainer
        self._runner: Runner | None = None
        self._job: dict | None = None

    @property
    def free(self) -> int:
        """How many more jobs it can take now."""
        return int(self._job is None)

    def submit(self, job: dict) -> None:
        """Takes a job for the next ``wait``."""
        self._job = hosts.agree(lambda: job)

    def wait(self, tell: Tell) -> None:
        """Trains the job to its end."""
        # Made at the first run, so that a finished study is told without importing jax.
        self._runner = self._runner or Runner(self._trainer)
        job = self._job
        self._runner.run(
            job, lambda kind, **values: tell({"kind": kind, "run_id": job["run_id"], **values})
        )
        self._job = None

    def close(self) -> None:
        """Lets the followers end."""
        hosts.agree(lambda: None)


def follow(trainer: str = TRAINER) -> int | None:
    """What the other processes of ``hosts.joined`` do while process 0 has ``Inline``: the same.

    Returns the exit code.
    """
    runner = None
    while job := hosts.agree(lambda: None):  # process 0's word, not this
        runner = runner or Runner(trainer)
        try:
            runner.run(job, lambda kind, **values: None)
        except Preempted:  # as process 0, which closes
            hosts.agree(lambda: None)
            return PREEMPTED


class Processes:
    """Workers started fresh, each pinned to its share of the cores. A worker that dies is replaced.

    Args:
      workers: how many; no more than cores.
      log: the file for what workers print outside a run.
    """

    alive, trouble = 0, ()

    def __init__(self, workers: int, log: Path, trainer: str = TRAINER):
        self.workers, self._log, self._trainer = workers, log, trainer
        cores = sorted(_cores())
        self._shares = [cores[i::workers] for i in range(workers)]
        self._workers: list[_Worker | None] = [None] * workers
        self._events: queue.SimpleQueue = queue.SimpleQueue()

    @property
    def free(self) -> int:
        """How many more jobs it can take now."""
        return sum(worker is None or worker.job is None for worker in self._workers)

    def submit(self, job: dict) -> None:
        """Sends a job to the first idle worker, which is started where it is not there."""
        i = next(i for i, w in enumerate(self._workers) if w is None or w.job is None)
        if self._workers[i] is None:
            self._workers[i] = _Worker(self._shares[i], self._log, self._trainer, self._events)
        self._workers[i].send(job)

    def wait(self, tell: Tell) -> None:
        """Tells what happened; returns after at most half a second."""
        try:
            worker, event = self._events.get(timeout=0.5)
        except queue.Empty:
            return
        if event is None:
            self._workers[self._workers.index(worker)] = None
            if worker.job:
                tell({"run_id": worker.job["run_id"], **worker.last_words()})
        elif event["kind"] != "ready":
            event["run_id"] = worker.job["run_id"]
            if event["kind"] != "progress":
                worker.job = None
            tell(event)

    def close(self) -> None:
        """Ends all workers; what they train is saved where their runs have checkpoints."""
        for worker in filter(None, self._workers):
            worker.process.send_signal(hosts.STOP)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in filter(None, self._workers):
            try:
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


class _Worker:
    def __init__(self, cores: list[int], log: Path, trainer: str, events: queue.SimpleQueue):
        self.job: dict | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
        paths = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")  # an engine's task
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # is anywhere
        command = [sys.executable, "-m", "lm.sweep.worker", ",".join(map(str, cores)), trainer]
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is the launcher's to act on
            )
        self._outside_log = log

        def listen() -> None:
            for line in self.process.stdout:
                events.put((self, json.loads(line)))
            events.put((self, None))

        threading.Thread(target=listen, daemon=True).start()

    def send(self, job: dict) -> None:
        self.job = job
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the listener tells so

    def last_words(self) -> dict[str, Any]:
        """How the process ended, with the last line of its log, and the log's tail."""
        code = self.process.wait()
        # Whoever says SIGTERM wants the machine; a run kills its worker in other ways.
        stopped = code in (-signal.SIGTERM, -hosts.STOP, PREEMPTED)
        kind = "interrupted" if stopped else "died"
        reason = f"its worker ended by {signal.Signals(-code).name if code < 0 else f'exit {code}'}"
        for log in (Path(self.job["folder"]) / "log.txt", self._outside_log):
            lines = log.read_text(errors="replace").split("\n") if log.exists() else []
            said = [line.rstrip() for line in lines if line.strip()][-LINES_OF_LOG:]
            if said:
                return {"kind": kind, "reason": f"{reason}: {said[-1].strip()}", "log_tail": said}
        return {"kind": kind, "reason": reason}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(_cores())


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
