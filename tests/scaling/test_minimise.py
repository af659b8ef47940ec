import numpy as np
import pytest
from scipy.optimize import minimize, rosen, rosen_der

from lm.scaling.minimise import minimise


def rosenbrock(theta, rows):
    x, y = theta.T
    value = 100 * (y - x**2) ** 2 + (1 - x) ** 2
    return value, np.stack([-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)], axis=1)


def test_every_row_ends_where_scipy_ends():
    starts = np.random.default_rng(0).uniform(-2, 2, (40, 2))
    ends = minimise(rosenbrock, starts, points=1, tolerance=1e-9)
    assert (ends.gradient_norm < 1e-9).all()
    scipys_evaluations = 0
    for start, end in zip(starts[:4], ends.theta[:4], strict=True):
        alone = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B", options={"gtol": 1e-9})
        np.testing.assert_allclose(end, alone.x, atol=1e-4)
        scipys_evaluations += alone.nfev
    # As good a search as scipy's: within twice its evaluations.
    assert minimise(rosenbrock, starts[:4], points=1).evaluations < 2 * scipys_evaluations


def test_rows_do_not_know_of_each_other():
    starts = np.random.default_rng(1).uniform(-2, 2, (30, 2))
    together = minimise(rosenbrock, starts, points=1)
    for i in (0, 7, 29):
        alone = minimise(rosenbrock, starts[i : i + 1], points=1)
        np.testing.assert_array_equal(alone.theta[0], together.theta[i])


def test_chunks_and_threads_change_nothing():
    starts = np.random.default_rng(2).uniform(-2, 2, (100, 2))
    whole = minimise(rosenbrock, starts, points=1)
    pieces = minimise(rosenbrock, starts, points=10_000)  # six rows a chunk
    np.testing.assert_array_equal(whole.theta, pieces.theta)


def test_rows_have_their_own_objective():
    centers = np.arange(8.0)

    def bowl(theta, rows):
        away = theta - centers[rows, None]
        return (away**2).sum(1), 2 * away

    ends = minimise(bowl, np.zeros((8, 3)), points=1)
    np.testing.assert_allclose(ends.theta, np.repeat(centers[:, None], 3, axis=1), atol=1e-6)


def test_a_search_without_a_minimum_is_not_called_converged():
    def slope(theta, rows):
        return theta.sum(1), np.ones_like(theta)

    ends = minimise(slope, np.zeros((2, 2)), points=1, iterations=20)
    assert ends.gradient_norm == pytest.approx(np.sqrt(2))
