"""A worker: what is no run's fault doesn't end it."""

import time
from pathlib import Path

import pytest

from lm.command import InUse
from lm.config import Config, to_dict
from lm.sweep import worker
from lm.sweep.backends import Processes
from lm.sweep.worker import Runner

tries = []


def held_by_another_twice(config, folder, **_):
    tries.append(folder)
    if len(tries) < 3:
        raise InUse(f"{folder}: process 1 of node0 is training there")


def job(folder):
    folder.mkdir(exist_ok=True)
    config = to_dict(Config())
    return {"run_id": folder.name, "config": config, "folder": str(folder), "start_from": None}


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_TRIES", 0.01)
    tries.clear()
    told = []
    runner = Runner()
    runner._train, runner._open_dataset = held_by_another_twice, None
    runner.run(job(tmp_path), lambda kind, **_: told.append(kind))
    assert told == ["done"] and tries == [str(tmp_path)] * 3
    assert capsys.readouterr().out.count("waiting: ") == 2


def test_a_log_that_cannot_be_written_fails_the_run_and_spares_the_worker(tmp_path, monkeypatch):
    """As on a full disk: a worker that died three times would set the run aside."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    backend = Processes(1, tmp_path / "workers.log", "fake_trainer:train")
    events = []
    try:
        for name in ("first", "second"):
            folder = tmp_path / "runs" / name
            (folder / "log.txt").mkdir(parents=True)
            backend.submit(job(folder))
            deadline = time.monotonic() + 60
            while not backend.free and time.monotonic() < deadline:
                backend.wait(events.append)
    finally:
        backend.close()
    assert [(event["kind"], event["run_id"]) for event in events] == [
        ("failed", "first"),
        ("failed", "second"),
    ]
    assert "IsADirectoryError" in events[0]["reason"]


@pytest.mark.parametrize("log", ["log.txt", "elsewhere"])
def test_a_run_that_fails_is_told_though_its_log_cannot_be(tmp_path, log):
    (tmp_path / log).mkdir()
    told = {}
    runner = Runner()
    runner._open_dataset = None

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    runner._train = fail
    runner.run(job(tmp_path), lambda kind, **values: told.update(kind=kind, **values))
    assert told == {"kind": "failed", "reason": "OSError: [Errno 28] No space left on device"}
    assert (tmp_path / "log.txt").is_dir() == (log == "log.txt")
