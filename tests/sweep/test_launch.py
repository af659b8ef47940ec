"""Launching: everything once, only what is missing, whatever fails, dies or is interrupted."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lm.config import Config, SweepConfig, TrainConfig
from lm.sweep import __main__ as command_line
from lm.sweep import grid, launch
from lm.sweep.backends import Inline, Processes
from lm.sweep.store import Store

FAKE = "fake_trainer:train"
BUDGETS = (1e9, 3e9, 1e10)


@pytest.fixture(autouse=True)
def fake_trainer(monkeypatch):
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)  # for this process, and the next for workers
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, str(Path(folder).parents[1])]))


@pytest.fixture
def config():
    sweep = SweepConfig(budgets=BUDGETS, sizes=5, spread=4.0, widths=tuple(range(8, 129, 8)))
    return Config(sweep=sweep, train=TrainConfig(batch_tokens=1024.0))


def inline(workdir):
    return Inline(FAKE)


def processes(workdir, workers=2):
    return Processes(workers, workdir / "workers.log", FAKE)


def run(config, workdir, backend=inline, **more):
    """(the study, its exit code, what was printed)"""
    store = Store(workdir)
    store.claim(config)
    study = launch.Study(config, store)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    code = command_line.run(study, backend(workdir), console, **more)
    return study, code, console.export_text()


def rows(workdir):
    """runs.csv without what depends on times."""
    with (workdir / "runs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    sys.path.insert(0, str(Path(__file__).parent))
    sweep = SweepConfig(budgets=BUDGETS, sizes=5, spread=4.0, widths=tuple(range(8, 129, 8)))
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(Config(sweep=sweep, train=TrainConfig(batch_tokens=1024.0)), workdir)
    return rows(workdir)


def test_inline_trains_everything_once_and_then_nothing(config, tmp_path):
    study, code, printed = run(config, tmp_path)
    assert code == 0 and not study.failed
    table = rows(tmp_path)
    assert len(table) == len(BUDGETS) * 5 and {float(r["budget"]) for r in table} == set(BUDGETS)
    assert [r["run_id"] for r in table] == sorted(r["run_id"] for r in table)
    assert "15/15 runs, 100 % of" in printed and "1 workers x" in printed

    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    _, code, printed = run(config, tmp_path)
    assert code == 0 and "nothing was trained" in printed
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}


def test_processes_give_the_same_table(config, tmp_path, undisturbed):
    children = set(_children())
    _, code, printed = run(config, tmp_path, processes)
    assert code == 0 and rows(tmp_path) == undisturbed
    assert set(_children()) == children
    assert "2 workers x" in printed


def _children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def first_id(config):
    return grid.in_order(grid.plan(config, {}))[0].run_id


@pytest.mark.parametrize("backend", [inline, processes])
def test_a_failed_run_is_told_kept_apart_and_tried_again(config, tmp_path, undisturbed, backend):
    failing = first_id(config)
    (tmp_path / f"fail-{failing}").touch()
    study, code, printed = run(config, tmp_path, backend)
    assert code == 1
    assert study.failed == {failing: "RuntimeError: the disk is on fire"}
    assert f"failed: {failing}: RuntimeError: the disk is on fire" in printed
    assert "runs at 3e+09, 1e+10 FLOPs wait for these" in printed
    assert "Traceback" in (tmp_path / "runs" / failing / "log.txt").read_text()
    assert len(rows(tmp_path)) == 4  # the others of its budget

    _, code, _ = run(config, tmp_path, backend)
    assert code == 0 and rows(tmp_path) == undisturbed


def test_a_killed_worker_is_replaced_and_its_run_done(config, tmp_path, undisturbed):
    killing = first_id(config)
    (tmp_path / f"kill-{killing}").touch()
    _, code, printed = run(config, tmp_path, processes)
    assert f"{killing}: its worker ended by SIGKILL: about to kill; trying again" in printed
    assert code == 0 and rows(tmp_path) == undisturbed


def test_a_worker_that_is_told_to_end_does_not_count(config, tmp_path, undisturbed):
    ended = first_id(config)
    for i in range(3):
        (tmp_path / f"end-{ended}-{i}").touch()
        (tmp_path / f"preempt-{ended}-{i}").touch()
    _, code, printed = run(config, tmp_path, processes)
    assert printed.count("its worker ended by SIGTERM: about to end; trying again") == 3
    assert printed.count("its worker ended by exit 75: about to preempt; trying again") == 3
    assert code == 0 and rows(tmp_path) == undisturbed


def test_a_run_that_kills_its_worker_three_times_is_set_aside(config, tmp_path, undisturbed):
    killing = first_id(config)
    for i in range(3):
        (tmp_path / f"kill-{killing}-{i}").touch()
    study, code, printed = run(config, tmp_path, processes)
    assert code == 1 and printed.count("trying again") == 2
    assert study.failed == {killing: "its worker ended by SIGKILL: about to kill"}
    assert study.where("set aside") == [killing]
    assert f"set aside: {killing}: its worker ended by SIGKILL: about to kill" in printed
    assert len(rows(tmp_path)) == 4

    _, code, printed = run(config, tmp_path)
    assert code == 1 and "nothing was trained" in printed
    _, code, _ = run(config, tmp_path, retry=True)
    assert code == 0 and rows(tmp_path) == undisturbed


def test_a_diverged_run_is_finished(config, tmp_path):
    diverging = first_id(config)
    lowered = grid.in_order(grid.plan(config, {}))[1].run_id
    (tmp_path / f"diverge-{diverging}").touch()
    (tmp_path / f"roll_back-{lowered}").touch()
    _, code, printed = run(config, tmp_path)
    assert code == 0 and f"{diverging}: diverged, 2 s" in printed
    assert re.search(rf"{lowered}: loss \d\.\d{{4}}, rollbacks: 2, 2 s", printed)
    row = next(r for r in rows(tmp_path) if r["run_id"] == diverging)
    assert (row["status"], row["loss"]) == ("diverged", "")
    assert len(rows(tmp_path)) == 15
    _, _, printed = run(config, tmp_path)
    assert "nothing was trained" in printed


def test_an_interrupt_leaves_what_is_done(config, tmp_path, undisturbed):
    interrupted = grid.in_order(grid.plan(config, {}))[2].run_id
    (tmp_path / f"interrupt-{interrupted}").touch()
    _, code, printed = run(config, tmp_path)
    assert code == 75 and "the same command goes on" in printed
    assert len(rows(tmp_path)) == 2
    _, code, _ = run(config, tmp_path)
    assert code == 0 and rows(tmp_path) == undisturbed


LAUNCHER = """
import os, sys
from rich.console import Console
from lm.sweep import __main__ as command_line
from lm.sweep.backends import Processes
from lm.sweep.launch import Study
from lm.sweep.store import Store
store = Store(sys.argv[1])
backend = Processes(1, store.workdir / "workers.log", "fake_trainer:train")
sys.exit(command_line.run(Study(store.config(), store), backend, Console()))
"""


def test_launchers_at_once_share_the_runs(config, tmp_path, undisturbed):
    Store(tmp_path).claim(config)
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path)]
    launchers = [subprocess.Popen(command) for _ in range(2)]
    assert [launcher.wait() for launcher in launchers] == [0, 0]
    assert rows(tmp_path) == undisturbed
    attempts = [json.loads(p.read_text()) for p in tmp_path.glob("leases/*.json")]
    assert [attempt["end"] for attempt in attempts] == ["done"] * len(undisturbed)
    assert len({attempt["owner"] for attempt in attempts}) == 2
