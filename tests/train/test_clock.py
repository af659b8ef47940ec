"""Time by a clock that the test moves."""

import pytest

from lm.train.clock import COMPILE, DATA, LOST, OTHER, PARTS, START, STEP, Clock, goodput, timeless


class Time:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def time():
    return Time()


def spend(clock, time, **seconds):
    for part, n in seconds.items():
        with clock.on(part):
            time.now += n


def test_parts_sum_to_the_wall_time_and_an_inner_one_is_not_counted_twice(time):
    clock = Clock(now=time)
    time.now += 1
    with clock.on(STEP):
        time.now += 10
        with clock.on(COMPILE):
            time.now += 5
            assert clock.part == COMPILE and clock.seconds()[COMPILE] == 5
        with pytest.raises(KeyError), clock.on(DATA):
            time.now += 2
            raise KeyError
        time.now += 20
    time.now += 3
    found = clock.seconds()
    assert found == dict.fromkeys(PARTS, 0.0) | {STEP: 30, COMPILE: 5, DATA: 2, OTHER: 4}
    assert sum(found.values()) == time.now - 100
    assert goodput(found) == 30 / 41 and goodput(Clock(now=time).seconds()) is None


def test_what_was_done_after_the_checkpoint_is_lost_with_a_kill(time):
    first = Clock(now=time)
    spend(first, time, start=3, compile=7, step=40, evaluate=5)
    saved = first.seconds()
    spend(first, time, checkpoint=1, step=20, evaluate=5, compile=2)
    last_seen = first.seconds()

    time.now += 1000  # nobody trains
    second = Clock(last_seen, time)
    spend(second, time, start=4)
    assert second.seconds() == last_seen | {START: 3 + 4}  # what a kill here would leave
    second.go_on(saved)
    spend(second, time, step=22)
    found = second.seconds()
    assert found[STEP] == 40 + 22 and found["evaluate"] == 5
    assert found[LOST] == 20 + 5  # all that is done again
    assert found[COMPILE] == 7 + 2 and found[START] == 3 + 4 and found["checkpoint"] == 1
    assert sum(found.values()) == 83 + 26  # both pieces, and nothing of the thousand
    assert second.work() == 22


def test_without_a_checkpoint_all_work_is_lost_and_an_old_sign_of_life_is_nothing(time):
    first = Clock(now=time)
    spend(first, time, compile=7, step=40)
    second = Clock(first.seconds(), time)
    second.go_on({})
    assert second.seconds() == dict.fromkeys(PARTS, 0.0) | {COMPILE: 7, LOST: 40}

    old = first.seconds()
    spend(first, time, step=1)
    third = Clock(old, time)
    spend(third, time, start=2)
    third.go_on(first.seconds())
    assert third.seconds() == first.seconds() | {START: 2} and third.work() == 0


def test_a_rollback_loses_the_work_since_its_checkpoint(time):
    clock = Clock(now=time)
    spend(clock, time, step=10)
    saved = clock.seconds()
    for _ in range(2):
        spend(clock, time, step=6, data=1, start=2)
        clock.roll_back(saved)
        assert clock.work() == 10
    found = clock.seconds()
    assert (found[STEP], found[LOST], found[START]) == (10, 14, 4)
    assert sum(found.values()) == time.now - 100


def test_after_a_rollback_to_before_this_piece_its_work_counts_from_there(time):
    first = Clock(now=time)
    spend(first, time, step=10)
    second = Clock(first.seconds(), time)
    second.go_on(first.seconds())
    spend(second, time, step=5)
    assert second.work() == 5
    second.roll_back({})
    assert second.work() == 0
    spend(second, time, step=3)
    assert second.work() == 3 and second.seconds()[LOST] == 15


def test_timeless_leaves_what_a_run_is():
    record = {"step": 3, "loss": 2.0, "wall_seconds": 1.0, "tokens_per_second": 5.0, "goodput": 0.5}
    assert timeless(record | {"mfu": 0.1, "memory_bytes": 7, "device": "cpu"}) == {
        "step": 3, "loss": 2.0,
    }  # fmt: skip
