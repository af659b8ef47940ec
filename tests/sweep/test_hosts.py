"""A study by several processes: each run on the devices of all, as one process would train it."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lm.config import Config
from lm.config_file import load
from lm.sweep import backends
from lm.sweep.grid import in_order, plan
from lm.sweep.store import Store

ROOT = Path(__file__).parents[2]
FILE = """
from lm.config import Config, to_config_dict

def get_config():
    config = to_config_dict(Config())
    config.data.corpus = "text"
    config.data.files = "{files}"
    config.data.data_dir = "{data}"
    config.data.seq_len = 64
    config.data.validation_tokens = 1024
    config.train.batch_tokens = 512.0
    config.train.checkpoint_every = -1
    config.train.tensorboard = False
    config.sweep.budgets = (2e8,)
    config.sweep.sizes = 2
    config.sweep.widths = (8, 16)
    config.sweep.first_optimum = 10_000.0
    config.sweep.spread = 2.0
    return config
"""


def start(config_file, workdir, n, *more, command=("-m", "lm.sweep")):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    arguments = [f"--config={config_file}", f"--workdir={workdir}", *more]
    return [
        subprocess.Popen(
            [sys.executable, *command, *arguments],
            env=os.environ
            | {
                "LM_COORDINATOR": f"localhost:{port}",
                "LM_PROCESSES": str(n),
                "LM_PROCESS": str(i),
                "JAX_NUM_CPU_DEVICES": str(4 // n),
                "JAX_COMPILATION_CACHE_DIR": str(config_file.parent / "compiled"),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(n)
    ]


def rows(workdir):
    store = Store(workdir)
    store.scan()
    return store.rows()


@pytest.fixture
def config_file(tmp_path, text_data):
    path = tmp_path / "study.py"
    path.write_text(FILE.format(files=text_data.files, data=text_data.data_dir))
    return path


@pytest.mark.slow
def test_two_processes_train_the_study_of_one(config_file, tmp_path):
    found = {}
    for n in (2, 1):
        processes = start(config_file, tmp_path / str(n), n)
        said = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * n, said
        assert all("runs" not in text for text in said[1:])  # process 0 alone speaks
        found[n] = rows(tmp_path / str(n))
    assert len(found[1]) == 2
    for one, two in zip(found[1], found[2], strict=True):
        assert one["run_id"] == two["run_id"] and two["device"] == "cpu x 4"
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
def test_what_process_0_refuses_ends_all(config_file, tmp_path):
    processes = start(config_file, tmp_path / "out", 2, "--config.sweep.sizes=9")
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("only 2 shapes" in text for text in said), said


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_waited_for(config_file, tmp_path):
    store = Store(tmp_path / "out")
    folder = store.folder(planned(config_file)[0])
    folder.mkdir(parents=True)
    with open(folder / "lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        processes = start(config_file, tmp_path / "out", 2)
        assert any("waiting: " in line for line in processes[0].stdout)
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(rows(tmp_path / "out")) == 2


FAILING = """
import os, sys
from lm import command, hosts
from lm.sweep import __main__ as sweep
from lm.train import loop
name, where, steps = sys.argv[1], sys.argv[2].split(), loop._Run._steps
def failing(run):
    if run.config.name == name and os.environ["LM_PROCESS"] in where:
        raise MemoryError("no room")
    return steps(run)
loop._Run._steps, hosts.FAILING_SECONDS = failing, 3.0
argv = ["lm.sweep", *sys.argv[3:]]
sys.exit(command.run(sweep.main, sweep.FLAGS, sweep.__doc__, argv))
"""


def planned(config_file):
    """The names of the runs, in their order."""
    return [run.run_id for run in in_order(plan(load(str(config_file)), {}))]


def failing(config_file, workdir, run_id, where):
    command = "-c", FAILING, run_id, where
    processes = start(config_file, workdir, 2, command=command)
    said = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_a_run_that_fails_in_all_processes_is_told_and_the_others_are_trained(
    config_file, tmp_path
):
    first, second = planned(config_file)
    codes, said = failing(config_file, tmp_path / "out", first, "0 1")
    assert codes == [1, 0], said
    assert f"failed: {first}: MemoryError: no room" in said[0]
    assert [row["run_id"] for row in rows(tmp_path / "out")] == [second]


@pytest.mark.slow
def test_a_run_that_fails_in_one_process_ends_all_and_is_tried_last_by_the_next_call(
    config_file, tmp_path
):
    first, second = planned(config_file)
    for done in ([], [second]):
        codes, said = failing(config_file, tmp_path / "out", first, "1")
        assert codes == [1, 1] and "): MemoryError: no room" in said[0], said
        assert [row["run_id"] for row in rows(tmp_path / "out")] == done
    leases = Store(tmp_path / "out").leases
    leases.look()
    assert leases.deaths(first) == 2 and "MemoryError: no room" in leases.last(first).reason


def test_alone_nobody_is_waited_for(monkeypatch):
    seen = []

    class Runner:
        def __init__(self, trainer):
            pass

        def run(self, job, tell):
            seen.append(job)
            tell("done")

    monkeypatch.setattr(backends, "Runner", Runner)
    backend = backends.Inline()
    backend.submit({"run_id": "a", "config": Config().name})
    assert backend.free == 0
    backend.wait(lambda event: seen.append(event["kind"]))
    backend.close()
    assert seen == [{"run_id": "a", "config": "base"}, "done"]
