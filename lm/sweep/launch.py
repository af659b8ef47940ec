"""The loop between plan and backend: starts what is ready, hears what ends, writes the tables."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lm.command import BadInput
from lm.config import Config, to_dict
from lm.sweep import grid
from lm.sweep.store import SCHEMA, Store

ATTEMPTS = 3  # of a run whose worker dies, in one call
ACCOUNT = ("step", "compile", "evaluate", "data")  # of a run's seconds, as its result tells


@dataclass
class Study:
    """How a study stands; what displays show."""

    config: Config
    store: Store
    budgets: tuple[grid.Budget, ...] = ()
    running: dict[str, dict] = field(default_factory=dict)  # run_id -> its last progress
    failed: dict[str, str] = field(default_factory=dict)  # run_id -> reason
    done_at_start: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    def refresh(self) -> None:
        """Looks at what is done, and plans anew from it."""
        self.store.scan()
        self.budgets = grid.plan(self.config, self.store.losses())

    @property
    def runs(self) -> dict[str, grid.Run]:
        """All runs that are planned by now."""
        return {run.run_id: run for budget in self.budgets for run in budget.runs}

    def done_flops(self, since_start: bool = False) -> float:
        """Training FLOPs of finished and, as far as told, of running runs."""
        done = set(self.store.losses()) - (self.done_at_start if since_start else set())
        finished = sum(run.flops for run_id, run in self.runs.items() if run_id in done)
        return finished + sum(at.get("flops", 0.0) for at in self.running.values())

    def total_flops(self) -> float:
        """Of the whole study, as far as it is known."""
        return grid.total_flops(self.config, self.budgets)

    def seconds_left(self) -> float | None:
        """At the FLOP/s of this call; None before there are any."""
        done = self.done_flops(since_start=True)
        if not done:
            return None
        elapsed = time.monotonic() - self.started
        return elapsed * (self.total_flops() - self.done_flops()) / done

    def minima(self) -> list[grid.Minimum | None]:
        """Of each planned budget, from all of its finished runs."""
        losses = self.store.losses()
        found = []
        for budget in self.budgets:
            done = [run for run in budget.runs if run.run_id in losses]
            params = np.array([run.params for run in done], float)
            found.append(grid.find_minimum(params, np.array([losses[r.run_id] for r in done])))
        return found


def launch(study: Study, backend, show: Callable[[Study, str], None]) -> None:
    """Trains every run that is not done and can be; the tables are up to date whenever this ends.

    ``show(study, line)`` is called after every event, ``line`` saying what ended ("" for progress).
    A run that fails is left for the next call, and so are the budgets whose sizes it would tell.
    """
    attempts: dict[str, int] = {}
    store = study.store
    study.refresh()
    study.done_at_start = set(store.losses())

    def tell(event: dict) -> None:
        run_id, kind = event["run_id"], event["kind"]
        if kind == "progress":
            study.running[run_id] = event
            return show(study, "")
        del study.running[run_id]
        if kind == "done":
            study.refresh()
            store.write_tables()
            loss = store.losses()[run_id]
            said = "diverged" if math.isnan(loss) else f"loss {loss:.4f}"
            show(study, f"{run_id}: {said}, {event['seconds']:.0f} s")
        elif kind == "died" and attempts[run_id] < ATTEMPTS:
            show(study, f"{run_id}: {event['reason']}; trying again")
        else:
            study.failed[run_id] = event["reason"]
            store.set_failure(run_id, event["reason"])
            show(study, f"{run_id}: failed, {event['reason']}")

    try:
        while True:
            for run in ready(study)[: backend.free]:
                attempts[run.run_id] = attempts.get(run.run_id, 0) + 1
                study.running[run.run_id] = {}
                store.set_failure(run.run_id, None)
                backend.submit(_job(store, run))
            if not study.running:
                break
            backend.wait(tell)
            show(study, "")
    finally:
        backend.close()
        store.write_tables()


def ready(study: Study) -> list[grid.Run]:
    """Runs that can start now, in the order in which they should."""
    done = study.store.losses()
    return [
        run
        for run in grid.in_order(study.budgets)
        if run.run_id not in done
        and run.run_id not in study.running
        and run.run_id not in study.failed
        and (run.parent is None or run.parent in done)
    ]


def _job(store: Store, run: grid.Run) -> dict:
    folder = store.folder(run.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "run_id": run.run_id,
        "config": to_dict(run.config),
        "folder": str(folder),
        "start_from": str(store.folder(run.parent)) if run.parent else None,
    }


def account(study: Study, workers: int, wall_seconds: float) -> dict:
    """Where the time of this call went: ``overhead`` is workers x wall / sum of step seconds.

    A worker stands for its share of the machine, so this is cores x wall over cores x step time.
    None where nothing was trained. Also appended to the study's ``calls.jsonl``.
    """
    rows = [r for r in study.store.rows() if r["run_id"] not in study.done_at_start]
    seconds = {name: sum(r[f"{name}_seconds"] for r in rows) for name in ACCOUNT}
    in_runs = sum(r["wall_seconds"] for r in rows)
    seconds["other in runs"] = in_runs - sum(seconds.values())
    seconds["start-up and idle"] = workers * wall_seconds - in_runs
    result = {
        "schema": SCHEMA,
        "runs": len(rows),
        "workers": workers,
        "wall_seconds": wall_seconds,
        "overhead": workers * wall_seconds / seconds["step"] if seconds["step"] else None,
        "seconds": seconds,
    }
    if rows:
        with (study.store.workdir / "calls.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
    return result


def cannot_start(study: Study) -> list[float]:
    """Budgets with runs that wait for a failed one."""
    done = study.store.losses()
    waiting = {
        run.flops
        for run in study.runs.values()
        if run.run_id not in done and run.run_id not in study.failed
    }
    return sorted(waiting | set(study.config.sweep.budgets[len(study.budgets) :]))


def refuse_more_workers(workers: int, cores: int) -> int:
    """``workers``, or one a core for 0. Raises ``BadInput`` where there are not enough cores."""
    if not 0 <= workers <= cores:
        raise BadInput(f"--workers={workers}: must be at most {cores}, one a core (0: that many)")
    return workers or cores
