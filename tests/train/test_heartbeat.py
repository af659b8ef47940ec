"""A run's sign of life."""

import os
import time

from lm.train import heartbeat
from lm.train.heartbeat import Heartbeat, read_heartbeat


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_beats_while_the_main_thread_is_busy_and_once_more_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS", 0.01)
    assert read_heartbeat(tmp_path) == {}
    step, began = 0, time.time()
    with Heartbeat(tmp_path, lambda: {"step": step}):
        until(lambda: read_heartbeat(tmp_path))
        step = 7  # by a main thread that never calls the heartbeat
        until(lambda: read_heartbeat(tmp_path)["step"] == 7)
        monkeypatch.setattr(heartbeat, "SECONDS", 1000)
        time.sleep(0.1)
        step = 8
    found = read_heartbeat(tmp_path)
    assert found["step"] == 8 and found["pid"] == os.getpid()
    assert began <= found["time"] <= time.time()
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]  # no torn rest


def test_what_cannot_be_written_or_read_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with Heartbeat(tmp_path / "file", dict):
        pass
    for damaged in ('{"torn', "[1]"):
        (tmp_path / "heartbeat.json").write_text(damaged)
        assert read_heartbeat(tmp_path) == {}
