"""Leases: one holder, whoever else tries; free again when it is gone, whichever way it went."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lm.sweep import leases
from lm.sweep.files import Folder
from lm.sweep.leases import Leases

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker(tmp_path):
    def make(owner):
        return Leases(Folder(tmp_path), owner)

    return make


def seen(worker, run_id="a"):
    """What a newcomer sees."""
    newcomer = worker("newcomer")
    newcomer.look()
    return newcomer.state(run_id)


def test_of_many_at_once_one_gets_the_run(worker):
    for i in range(20):
        many = [worker(f"w{n}") for n in range(8)]
        barrier, got = threading.Barrier(8), []

        def claim(one, run_id=f"r{i}", barrier=barrier, got=got):
            barrier.wait()
            got.append(one.claim(run_id))

        threads = [threading.Thread(target=claim, args=(one,)) for one in many]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 7 + [True]


def test_a_run_goes_from_hand_to_hand_and_every_attempt_is_kept(worker, tmp_path):
    first, second = worker("first"), worker("second")
    assert seen(worker) == "waiting"
    assert first.claim("a") and not second.claim("a")
    assert seen(worker) == first.state("a") == second.state("a") == "running"
    first.end("a", "interrupted")
    assert seen(worker) == "waiting"
    assert second.claim("a") and not first.claim("a")
    second.end("a", "failed", "no room")
    first.look()
    assert first.state("a") == second.state("a") == seen(worker) == "failed"
    assert first.last("a").reason == "no room" and not first.claim("a")
    first.forgive("a")
    second.look()
    assert seen(worker) == "waiting" and second.claim("a")
    assert sorted(p.name for p in (tmp_path / "leases").iterdir()) == [
        f"a.{n}.json" for n in (1, 2, 3, 4)
    ]


def test_one_that_is_not_renewed_is_taken_over(worker, monkeypatch):
    first, second = worker("first"), worker("second")
    first.claim("a")
    now = time.time()
    monkeypatch.setattr(leases.time, "time", lambda: now + leases.SECONDS - 1)
    assert not second.claim("a")
    monkeypatch.setattr(leases.time, "time", lambda: now + leases.SECONDS + 1)
    assert second.claim("a")
    first.end("a", "died", "too late")  # it had been cut off, and says so in its own file only
    third = worker("third")
    third.look()
    assert third.state("a") == "running" and third.last("a").owner == "second"


def test_what_is_held_is_renewed_and_at_the_end_interrupted(worker, monkeypatch, tmp_path):
    monkeypatch.setattr(leases, "SECONDS", 0.4)
    first = worker("first")
    with first.kept():
        first.claim("a")
        first.claim("b")
        first.end("b", "failed")
        time.sleep(1.0)
        assert seen(worker) == "running" and seen(worker, "b") == "failed"
    assert seen(worker) == "waiting"
    assert json.loads((tmp_path / "leases/a.1.json").read_text())["end"] == "interrupted"


CLAIM = """
import os, sys
from lm.sweep.files import Folder
from lm.sweep.leases import Leases
assert Leases(Folder(sys.argv[1])).claim("a")
print("claimed", flush=True)
sys.stdin.read()
"""


def test_one_whose_process_was_killed_is_free_at_once(worker, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline()
    assert seen(worker) == "running" and not worker("second").claim("a")
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    assert seen(worker) == "waiting" and worker("second").claim("a")
    holder.communicate()


def test_one_of_an_earlier_process_of_the_same_name_is_free_at_once(worker):
    assert worker("ray-1").claim("a")
    assert not worker("ray-2").claim("a") and worker("ray-1").claim("a")


def test_without_a_name_no_two_have_the_same(worker):
    assert worker("").claim("a") and not worker("").claim("a")


def test_one_that_is_not_yet_written_is_a_lease(worker, tmp_path, monkeypatch):
    (tmp_path / "leases").mkdir()
    (tmp_path / "leases/a.1.json").touch()
    second = worker("second")
    second.look()
    assert second.state("a") == "running" and not second.claim("a")
    now = time.time()
    monkeypatch.setattr(leases.time, "time", lambda: now + leases.SECONDS + 1)
    assert second.claim("a")


def test_three_deaths_set_a_run_aside_until_it_is_forgiven(worker):
    for n in range(3):
        one = worker(f"w{n}")
        assert one.claim("a")
        one.end("a", "died", f"death {n}", ("a line", "the last"))
        assert seen(worker) == ("waiting" if n < 2 else "set aside")
        if n == 0:  # nor do other ends come between
            assert one.claim("a")
            one.end("a", "interrupted")
    one = worker("one")
    one.look()
    assert not one.claim("a")
    assert (one.last("a").reason, one.last("a").log_tail) == ("death 2", ("a line", "the last"))
    one.forgive("a")
    assert one.claim("a")


def test_a_failure_that_is_forgiven_forgives_no_deaths(worker):
    one = worker("one")
    for how in ("died", "died", "failed", "died"):
        assert one.claim("a")
        one.end("a", how)
        if how == "failed":
            one.forgive("a")
    assert one.state("a") == "set aside"


def test_one_that_ended_well_is_not_taken_before_its_result_can_be_seen(worker):
    first, second = worker("first"), worker("second")
    first.claim("a")
    first.end("a", "done")
    assert not second.claim("a") and seen(worker) == "running"


def test_a_renewal_tells_how_far_the_run_is(worker, monkeypatch):
    monkeypatch.setattr(leases, "SECONDS", 0.4)
    first, newcomer = worker("first"), worker("newcomer")
    assert first.claim("a")
    first.note("a", {"step": 7})
    with first.kept():
        for _ in range(200):
            newcomer.look()
            if newcomer.last("a").progress:
                break
            time.sleep(0.05)
        assert newcomer.last("a").progress == {"step": 7} and newcomer.state("a") == "running"
