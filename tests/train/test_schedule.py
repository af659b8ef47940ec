import numpy as np
import pytest

from lm.train.schedule import Schedule, learning_rate

SCHEDULE = Schedule(
    peak=0.5, matrix_scale=1.0, warmup=10, decay_start=10, decay_steps=90, final_fraction=0.1
)


def rates(kind, schedule=SCHEDULE, n=101):
    return np.array([float(learning_rate(schedule, step, kind)) for step in range(n)])


def test_warmup_is_linear_and_reaches_the_peak():
    np.testing.assert_allclose(rates("cosine")[:10], 0.05 * np.arange(1, 11), rtol=1e-6)


def test_cosine_follows_its_closed_form():
    steps = np.arange(10, 101)
    shape = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 90))
    np.testing.assert_allclose(rates("cosine")[10:], 0.5 * shape, rtol=1e-5)


def test_wsd_is_stable_then_linear():
    wsd = rates("wsd", SCHEDULE._replace(decay_start=80, decay_steps=20, final_fraction=0.0))
    np.testing.assert_allclose(wsd[10:81], 0.5, rtol=1e-6)
    np.testing.assert_allclose(wsd[80:101], 0.5 * np.linspace(1, 0, 21), atol=1e-7)


def test_constant_stays():
    np.testing.assert_allclose(rates("constant")[10:], 0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_steps_beyond_the_end_hold_the_final_rate(kind):
    assert float(learning_rate(SCHEDULE, 500, kind)) == pytest.approx(0.05)
