"""How many steps a dispatch takes, on a clock that the test moves."""

import pytest

from lm.train import pace
from lm.train.clock import Clock


@pytest.fixture
def measured(monkeypatch):
    """A call: dispatches of these seconds have ended -> the steps of the next one after each."""

    def measured(*seconds, most=16):
        now = 0.0
        monkeypatch.setattr(pace.time, "perf_counter", lambda: now)
        paced = pace.Pace(most, Clock(now=lambda: now))
        paced.start()
        found = []
        for took in seconds:
            now += took
            assert paced.lap(paced.steps) == pytest.approx(took)
            found.append(paced.steps)
        return found

    return measured


def test_as_many_as_fit(measured):
    assert measured(0.1, 0.2, 0.4, 0.8, 1.6) == [2, 4, 8, 16, 16]
    assert measured(1.0, 2.0, 4.0, 5.0) == [2, 4, 5, 5]
    assert measured(0.1, 0.2, 8.0, 5.0) == [2, 4, 2, 2]
    assert measured(100.0, 100.0) == [1, 1]


def test_one_that_seems_to_take_no_time_makes_the_next_no_more_than_twice_as_long(measured):
    """After a slow reading, during which it ended; or as another program was compiled beside it."""
    assert measured(1.5, 3.0, 6.0, 1e-6, 8.0) == [2, 3, 2, 4, 2]
