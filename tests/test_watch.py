"""The test plays the parents of several watches."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from lm import watch

HOST = socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start():
    """Starts the watch of process ``index``; all of them are ended with the test."""
    port, started = free_port(), []

    def start(index, n):
        arguments = [sys.executable, "-I", watch.__file__, str(index), str(n), "localhost", port]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(list(map(str, arguments)), text=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def three(start):
    watches = [start(i, 3) for i in range(3)]
    for process in watches:
        assert heard(process) == {"ready": True}
    return watches


def heard(process):
    return json.loads(process.stdout.readline())


def say(process, **word):
    process.stdin.write(json.dumps(word) + "\n")
    process.stdin.flush()


def ended(process):
    """What the watch told a parent that obeys it: the exit code, and what it printed."""
    code = heard(process)["end"]
    process.stdin.close()
    error = process.stderr.read()
    assert process.wait(timeout=10) == 0
    return code, error.strip()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_dead_process_is_named_to_all_others(three, victim):
    started = time.monotonic()
    three[victim].stdin.close()  # as its parent's death does
    for process in three:
        if process is not three[victim]:
            assert ended(process) == (1, f"error: process {victim} ({HOST}) died")
    assert time.monotonic() - started < 2 * watch.GRACE_SECONDS


@pytest.mark.parametrize("victim", [0, 2])
def test_a_dead_watch_is_a_dead_host(three, victim):
    three[victim].kill()
    for process in three:
        if process is not three[victim]:
            assert ended(process) == (1, f"error: process {victim} ({HOST}) died")


def test_another_that_falls_over_a_death_is_not_blamed(three):
    """jax aborts in all processes when process 0 dies, before they hear of it."""
    three[1].stdin.close()
    time.sleep(0.5)
    three[0].stdin.close()
    assert ended(three[2]) == (1, f"error: process 0 ({HOST}) died")


def test_a_failure_is_told_with_its_code_and_once_by_its_own(three):
    say(three[1], failed=[75, "process 1 (there): interrupted"])
    assert ended(three[1]) == (75, "")
    for process in (three[0], three[2]):
        assert ended(process) == (75, "error: process 1 (there): interrupted")


def test_a_parent_that_does_not_end_is_killed(start):
    watch_file, port = watch.__file__, free_port()
    stubborn = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-I', {watch_file!r}, '1', '2', 'localhost', '{port}'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE);"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", stubborn], stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(
        [sys.executable, "-I", watch_file, "0", "2", "localhost", str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert heard(first) == {"ready": True}
    first.stdin.close()
    assert parent.wait(timeout=20) == -signal.SIGKILL
    assert f"process 0 ({HOST}) died" in parent.stderr.read()
    first.wait()


def test_what_process_0_says_all_others_hear_in_order(three):
    values = [{"value": "x" * 100_000}, {"refused": "no"}]
    for value in values:
        say(three[0], agreed=value)
    for process in three[1:]:
        assert [heard(process)["agreed"] for _ in values] == values


def test_who_waits_is_told_to_process_0_alone(three):
    for process, index in ((three[2], 2), (three[1], 1)):
        say(process, here=index)
        assert heard(three[0]) == {"here": index}
    say(three[0], agreed=None)
    assert [heard(process) for process in three[1:]] == [{"agreed": None}] * 2


def test_ready_is_the_first_word(start):
    first, second = start(0, 2), start(1, 2)
    assert heard(first) == {"ready": True}
    say(first, agreed=1)
    assert [heard(second), heard(second)] == [{"ready": True}, {"agreed": 1}]


def test_who_has_left_may_end(three):
    for index in (1, 0, 2):
        say(three[index], left=True)
        assert three[index].wait(timeout=10) == 0
        time.sleep(0.5)  # for the news to be misread in
    for process in three:
        assert (process.stdout.read(), process.stderr.read()) == ("", "")


def test_strangers_and_wrong_counts(start):
    first = start(0, 2)
    address = SimpleNamespace(port=int(first.args[-1]))
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"hello": 3}\n'):
        connect(address.port, words)
    second = start(1, 2)
    assert heard(first) == heard(second) == {"ready": True}


def connect(port, words):
    for _ in range(100):
        try:
            with socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(words)
            return
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise AssertionError("nobody listens")


def test_processes_that_count_differently_are_told_so(start):
    first, second = start(0, 3), start(1, 2)
    told = f"process 0 ({HOST}) is one of 3 processes, but process 1 ({HOST}) one of 2"
    other = f"process 1 ({HOST}) is one of 2 processes, but process 0 ({HOST}) one of 3"
    for process in (first, second):
        code, error = ended(process)
        assert code == 1 and error.removeprefix("error: ") in (told, other)


def test_two_of_one_number_are_told_so(start):
    first = start(0, 3)
    start(1, 3)
    start(1, 3)
    assert ended(first) == (1, f"error: process 1 ({HOST}): another process has that number too")


def test_a_taken_port_is_told(start):
    first = start(0, 2)
    connect(int(first.args[-1]), b"")
    code, error = ended(start(0, 2))
    assert code == 1 and f"cannot listen on port {first.args[-1]}" in error


def test_who_does_not_come_is_named(start, tmp_path, monkeypatch):
    """With a copy of the file that waits a second instead of five minutes."""
    copy = tmp_path / "watch.py"
    with open(watch.__file__) as file:
        copy.write_text(file.read().replace("JOINING_SECONDS = 300.0", "JOINING_SECONDS = 1.5"))
    monkeypatch.setattr(watch, "__file__", str(copy))
    first, second = start(0, 4), start(2, 4)
    port = first.args[-1]
    told = f"of 4 processes came to localhost:{port}"
    assert ended(first)[1] in (f"error: not process 1, 3 {told}", f"error: not all {told}")
    assert ended(second)[0] == 1


def test_a_silent_host_is_lost(start, tmp_path, monkeypatch):
    """Power loss closes no connection. Seconds made a tenth."""
    copy = tmp_path / "watch.py"
    with open(watch.__file__) as file:
        text = file.read().replace("= 5.0, 30.0", "= 0.2, 1.5")
    copy.write_text(text)
    monkeypatch.setattr(watch, "__file__", str(copy))
    first, second = start(0, 2), start(1, 2)
    assert heard(first) == heard(second) == {"ready": True}
    time.sleep(2)
    assert not select.select([first.stdout, second.stdout], [], [], 0)[0]  # pings are words
    os.kill(second.pid, signal.SIGSTOP)
    code, error = ended(first)
    assert code == 1 and error.startswith(f"error: process 1 ({HOST}) was silent for")
