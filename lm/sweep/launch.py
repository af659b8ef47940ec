"""The loop between plan and backend: starts what is ready, hears what ends, writes the tables."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lm import hosts
from lm.command import PREEMPTED, BadInput
from lm.config import Config, to_dict
from lm.sweep import grid
from lm.sweep.store import SCHEMA, Store
from lm.train.clock import PARTS

SECONDS_BETWEEN_LOOKS = 1.0  # at what other launchers do, while this one could take a run


@dataclass
class Study:
    """How a study stands; what displays show."""

    config: Config
    store: Store
    budgets: tuple[grid.Budget, ...] = ()
    states: dict[str, str] = field(default_factory=dict)  # run_id -> done or as Leases.state
    running: dict[str, dict] = field(default_factory=dict)  # here: run_id -> its last progress
    trained: set[str] = field(default_factory=set)  # by this launcher
    done_at_start: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.monotonic)

    def refresh(self) -> None:
        """Looks at what is done and under way, and plans anew from it."""
        self.store.scan()
        losses = self.store.losses()
        self.budgets = grid.plan(self.config, losses)
        self.store.leases.look(losses)
        state = self.store.leases.state
        self.states = {i: "done" if i in losses else state(i) for i in self.runs}

    def where(self, *states: str) -> list[str]:
        """The planned runs that are in one of ``states``."""
        return [run_id for run_id, state in self.states.items() if state in states]

    @property
    def failed(self) -> dict[str, str]:
        """Reasons of the runs that failed or were set aside."""
        last = self.store.leases.last
        return {run_id: last(run_id).reason for run_id in self.where("failed", "set aside")}

    @property
    def runs(self) -> dict[str, grid.Run]:
        """All runs that are planned by now."""
        return {run.run_id: run for budget in self.budgets for run in budget.runs}

    @property
    def progress(self) -> dict[str, dict]:
        """The last that is known of the runs under way, here and elsewhere; empty at first."""
        last = self.store.leases.last
        return {i: self.running.get(i) or last(i).progress for i in self.where("running")}

    def done_flops(self, since_start: bool = False) -> float:
        """Training FLOPs of finished and, as far as told, of running runs."""
        done = set(self.store.losses()) - (self.done_at_start if since_start else set())
        finished = sum(run.flops for run_id, run in self.runs.items() if run_id in done)
        running = self.running if since_start else self.progress
        return finished + sum(at.get("flops", 0.0) for at in running.values())

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

    def seconds_left_elsewhere(self) -> float | None:
        """With the runs under way now, at their FLOP/s; None where nothing tells these.

        A run that has not told its own is taken for as fast as those that finished.
        """
        rows, progress = self.store.rows(), self.progress
        seconds = sum(row["wall_seconds"] or 0.0 for row in rows)
        rate = sum(row["flops"] for row in rows) / seconds if seconds else 0.0
        rates, longest = [], 0.0
        for run_id, at in progress.items():
            own = at.get("seconds_left")
            rates.append((self.runs[run_id].flops - at["flops"]) / own if own else rate)
            longest = max(longest, own or 0.0)
        if not sum(rates):
            return None
        return max(longest, (self.total_flops() - self.done_flops()) / sum(rates))

    def goodput(self) -> float | None:
        """The share of the finished runs' wall time that useful steps had; None where unknown."""
        rows = [row for row in self.store.rows() if row["step_seconds"]]
        if not rows:
            return None
        return sum(row["step_seconds"] for row in rows) / sum(row["wall_seconds"] for row in rows)

    def minima(self) -> list[grid.Minimum | None]:
        """Of each planned budget, from all of its finished runs."""
        losses = self.store.losses()
        found = []
        for budget in self.budgets:
            done = [run for run in budget.runs if run.run_id in losses]
            params = np.array([run.params for run in done], float)
            found.append(grid.find_minimum(params, np.array([losses[r.run_id] for r in done])))
        return found


def launch(
    study: Study,
    backend,
    show: Callable[[Study, str], None],
    forgiven: tuple[str, ...] = ("failed",),
) -> None:
    """Trains every run that is not done and can be; the tables are up to date whenever this ends.

    Any number of launchers may do so at once. ``show(study, line)`` is called after every event,
    ``line`` saying what ended ("" for progress). A run that fails is left for the next call, and so
    are the budgets whose sizes it would tell. ``forgiven``: states of runs that are tried again.
    """
    store, leases = study.store, study.store.leases
    study.refresh()
    study.done_at_start = set(store.losses())
    for run_id in study.where(*forgiven):
        leases.forgive(run_id)
        study.states[run_id] = leases.state(run_id)
    looked = time.monotonic()

    def look() -> None:
        nonlocal looked
        known = set(store.losses())
        study.refresh()
        looked = time.monotonic()
        for row in store.rows():
            if row["run_id"] not in known:
                said = "diverged" if row["status"] == "diverged" else f"loss {row['loss']:.4f}"
                if n := row["rollbacks"]:
                    said += f", rollbacks: {n}"
                show(study, f"{row['run_id']}: {said}, {row['wall_seconds']:.0f} s")

    def tell(event: dict) -> None:
        run_id, kind = event["run_id"], event["kind"]
        if kind == "progress":
            study.running[run_id] = event
            leases.note(run_id, {k: v for k, v in event.items() if k not in ("kind", "run_id")})
            return show(study, "")
        del study.running[run_id]
        store.publish(run_id)
        leases.end(run_id, kind, event.get("reason", ""), tuple(event.get("log_tail", ())))
        study.states[run_id] = leases.state(run_id)
        if kind == "done":
            study.trained.add(run_id)
            look()
            store.write_tables()
        elif study.states[run_id] == "waiting":
            show(study, f"{run_id}: {event['reason']}; trying again")
        else:
            show(study, f"{run_id}: {study.states[run_id]}, {event['reason']}")

    def ended(code: int, reason: str) -> None:
        for run_id in list(study.running):
            leases.end(run_id, "interrupted" if code == PREEMPTED else "died", reason)

    hosts.at_end(ended)
    with leases.kept():
        try:
            while True:
                while backend.free and (waiting := ready(study)):
                    run = waiting[0]
                    if leases.claim(run.run_id):
                        study.running[run.run_id] = {}
                        backend.submit(_job(store, run))
                    study.states[run.run_id] = leases.state(run.run_id)
                elsewhere = set(study.where("running")) - set(study.running)
                elsewhere = elsewhere or ready(study) and backend.alive
                if study.running:
                    backend.wait(tell)
                elif elsewhere:  # whoever trains there may die
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                else:
                    look()
                    break
                show(study, "")
                idle = backend.free or not study.running
                if elsewhere and idle and time.monotonic() - looked > SECONDS_BETWEEN_LOOKS:
                    look()
        finally:
            backend.close()
            store.write_tables()


def ready(study: Study) -> list[grid.Run]:
    """Runs that can start now, in the order in which they should; last those that kill workers."""
    found = [
        run
        for run in grid.in_order(study.budgets)
        if study.states[run.run_id] == "waiting"
        and (run.parent is None or study.states.get(run.parent) == "done")
    ]
    return sorted(found, key=lambda run: study.store.leases.deaths(run.run_id))


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

    A worker stands for its share of the machine, so this is cores x wall over cores x step time,
    and 1 / goodput. None where nothing was trained. Also appended to the study's ``calls.jsonl``.
    """
    rows = [r for r in study.store.rows() if r["run_id"] in study.trained]
    seconds = {part: sum(r[f"{part}_seconds"] or 0.0 for r in rows) for part in PARTS}
    in_runs = sum(r["wall_seconds"] for r in rows)
    seconds["other"] = in_runs - sum(seconds[part] for part in PARTS if part != "other")
    seconds["between runs"] = workers * wall_seconds - in_runs
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
    waiting = {study.runs[run_id].flops for run_id in study.where("waiting")}
    return sorted(waiting | set(study.config.sweep.budgets[len(study.budgets) :]))


def refuse_more_workers(workers: int, cores: int) -> int:
    """``workers``, or one a core for 0. Raises ``BadInput`` where there are not enough cores."""
    if not 0 <= workers <= cores:
        raise BadInput(f"--workers={workers}: must be at most {cores}, one a core (0: that many)")
    return workers or cores
