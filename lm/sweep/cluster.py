"""Workers on other machines, started by Ray or SLURM. Each claims runs of the study by itself.

So the study's folder is all that workers share, and neither engine knows of runs: it has a number
of equal tasks, gives each its cores and accelerators, and starts one again that it lost. In every
task a process of its own trains, so that a run that kills it is told from a machine that is lost.
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from lm.command import PREEMPTED, BadInput
from lm.sweep.backends import Processes
from lm.sweep.launch import Study, launch
from lm.sweep.store import Store
from lm.sweep.worker import TRAINER

MINUTES = 1440  # that a SLURM job is given, unless an option says so
REQUEUES = 1_000_000  # of one whose time is over
SECONDS_BETWEEN_QUESTIONS = 5.0  # to SLURM


class Worker:
    """What an engine runs, wherever it does: trains runs until the study has none left.

    Args:
      workdir: the study's folder, which all machines see; absolute, or a URL.
      name: the same whenever the engine starts it again, so that it takes up its run at once.
    """

    def __init__(self, workdir: str, name: str, trainer: str = TRAINER):
        self._workdir, self._name, self._trainer = workdir, name, trainer
        self._folder = Path.cwd()  # a config's paths are relative to it

    def __call__(self) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if self._folder.is_dir():
            os.chdir(self._folder)
        store = Store(self._workdir, self._name)
        backend = Processes(1, store.workdir / "workers.log", self._trainer)
        try:
            launch(Study(store.config(), store), backend, _print, forgiven=())
        except KeyboardInterrupt:
            sys.exit(PREEMPTED)

    def checkpoint(self) -> Any:
        """What submitit queues again when the job's time is over: itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _print(study: Study, line: str) -> None:
    if line:
        print(line, flush=True)


class _Cluster:
    """A backend that takes no jobs, as its workers find them.

    Args:
      store: the study's.
      workers: how many.
      cpus, gpus: that one run has.
      options: more of the engine's own.

    Raises ``BadInput`` for what cannot be, and where the engine is not installed.
    """

    free = 0

    def __init__(
        self,
        store: Store,
        workers: int,
        cpus: int,
        gpus: int,
        options: dict[str, Any],
        trainer: str = TRAINER,
    ):
        if workers < 0 or cpus < 1 or gpus < 0:
            raise BadInput(
                f"--workers={workers} --cpus={cpus} --gpus={gpus}: must be at least 0, 1 and 0"
            )
        self.workers, self._place, self._trainer = workers, store.place, trainer
        self.trouble: set[str] = set()  # what the user should know at the end
        self._prepare(cpus, gpus, options, store.workdir)

    def _tasks(self) -> list[Worker]:
        name = f"{type(self).__name__.lower()}-{uuid.uuid4().hex[:6]}"
        return [Worker(self._place, f"{name}-{i}", self._trainer) for i in range(self.workers)]


class Ray(_Cluster):
    """Tasks of a Ray cluster: RAY_ADDRESS's, that of this machine, or one made for this call.

    ``workers`` of 0: as many as the cluster has room for now. ``options``: ``ray.remote``'s.
    """

    def _prepare(self, cpus, gpus, options, workdir) -> None:
        try:
            import ray
        except ImportError as error:
            raise BadInput("--backend=ray: needs `pip install 'lm-scaling[ray]'`") from error
        self._ray, self._needs = ray, {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        given = {
            "num_cpus": cpus,
            "num_gpus": gpus,
            "max_retries": -1,  # a task whose machine is lost starts again on another
            "scheduling_strategy": "SPREAD",
            **options,
        }
        try:
            self._call = ray.remote(Worker.__call__).options(**given)
        except (TypeError, ValueError) as error:
            raise BadInput(f"--engine_option: {error}") from error

    def start(self) -> "Ray":
        """Starts the workers."""
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, logging_level="warning")
        if not self.workers:
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self.workers = sum(
                min(int(node.get(name, 0) // n) for name, n in self._needs.items())
                for node in nodes
            )
        self._under_way = [self._call.remote(task) for task in self._tasks()]
        return self

    @property
    def alive(self) -> int:
        """Tasks that have not ended."""
        n = len(self._under_way)
        ended, self._under_way = self._ray.wait(self._under_way, num_returns=n, timeout=0)
        for task in ended:
            try:
                self._ray.get(task)
            except self._ray.exceptions.RayError as error:
                self.trouble.add(f"a worker failed: {str(error).strip().splitlines()[-1]}")
        return len(self._under_way)

    def close(self) -> None:
        """Ends all tasks."""
        self._ray.shutdown()


class Slurm(_Cluster):
    """A job array, by submitit, which SLURM goes on with when the launcher ends.

    Its scripts and logs are in the study's ``slurm``. ``options``: ``submitit.SlurmExecutor``'s.
    """

    def _prepare(self, cpus, gpus, options, workdir) -> None:
        if not self.workers:
            raise BadInput("--workers=0 with --backend=slurm: say how many jobs, as --workers=8")
        if "://" in self._place:
            raise BadInput(f"--workdir={self._place} with --backend=slurm: must be a folder")
        try:
            from submitit import SlurmExecutor
        except ImportError as error:
            raise BadInput("--backend=slurm: needs `pip install 'lm-scaling[slurm]'`") from error
        if not SlurmExecutor.affinity() > 0:
            raise BadInput("--backend=slurm: there is no SLURM here (no command srun)")
        self._executor = SlurmExecutor(workdir / "slurm", max_num_timeout=REQUEUES)
        given = {
            "job_name": "lm.sweep",
            "time": MINUTES,
            "cpus_per_task": cpus,
            "gpus_per_node": gpus or None,
            "additional_parameters": {"requeue": True},
            **options,
        }
        try:
            self._executor.update_parameters(**given)
        except ValueError as error:
            raise BadInput(f"--engine_option: {str(error).splitlines()[0]}") from error

    def start(self) -> "Slurm":
        """Queues the workers."""
        with self._executor.batch():
            jobs = [self._executor.submit(task) for task in self._tasks()]
        self._array, self._asked, self._alive = jobs[0].job_id.split("_")[0], 0.0, self.workers
        return self

    @property
    def alive(self) -> int:
        """Jobs that are in the queue or run."""
        if time.monotonic() - self._asked > SECONDS_BETWEEN_QUESTIONS:
            # Not submitit's own question, which only an accounting database answers.
            question = ["squeue", "--noheader", "--format=%i", "--array", f"--jobs={self._array}"]
            answer = subprocess.run(question, capture_output=True, text=True)
            if answer.returncode == 0 or "Invalid job id" in answer.stderr:  # else it is restarting
                self._alive = len(answer.stdout.split())
            self._asked = time.monotonic()
        return self._alive

    def close(self) -> None:
        """Leaves to SLURM what it still has."""
        self._asked = 0.0
        if self.alive:
            self.trouble.add(
                f"job array {self._array} is still in SLURM: its jobs end when they find nothing to"
                f" train; `scancel {self._array}` ends them now"
            )
