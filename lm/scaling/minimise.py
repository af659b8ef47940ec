"""L-BFGS for thousands of small problems at once: each row its own start, line search and memory.

Laws have five parameters and are fitted from thousands of starts or to thousands of bootstrap
tables. One evaluation of all rows is a handful of array passes, so that the cost of Python and of
scipy's one-by-one calls disappears; rows that have converged leave the batch.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

MEMORY = 10
ARMIJO, WOLFE = 1e-4, 0.9
LONGEST_STEP = 3.0  # per coordinate: exp() of a longer one leaves every basin of interest
CHUNK_ELEMENTS = 60_000  # rows x points evaluated together: the temporaries stay in the L2 cache


class Minima(NamedTuple):
    """The end of every start: theta (n, p), value (n,), gradient_norm (n,), evaluations in all."""

    theta: np.ndarray
    value: np.ndarray
    gradient_norm: np.ndarray
    evaluations: int


def minimise(
    objective: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    theta: np.ndarray,
    *,
    points: int,
    tolerance: float = 1e-6,
    iterations: int = 1000,
) -> Minima:
    """Runs L-BFGS (Nocedal & Wright, algorithm 7.4; weak Wolfe line search) from each row of theta.

    objective(theta (m, p), rows (m,)) -> (value (m,), gradient (m, p)); `rows` are the indices of
    the starts, for objectives that differ by row. `points` is how many data points one row costs,
    for chunking. A row ends when its gradient norm is below `tolerance`, when no step along a
    descent direction lowers its value any more, or after `iterations`.
    """
    theta = np.array(theta, float)
    chunk = max(1, CHUNK_ELEMENTS // points)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def evaluate(x, rows):
            pieces = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
            if len(pieces) == 1:
                return objective(x, rows)
            parts = pool.map(lambda piece: objective(x[piece], rows[piece]), pieces)
            values, gradients = zip(*parts, strict=True)
            return np.concatenate(values), np.concatenate(gradients)

        return _minimise(evaluate, theta, tolerance, iterations)


def _minimise(evaluate, theta, tolerance, iterations) -> Minima:
    n, p = theta.shape
    rows, x = np.arange(n), theta.copy()
    f, g = evaluate(x, rows)
    evaluations = n
    end_f, end_norm = f.copy(), np.linalg.norm(g, axis=1)
    steps = np.zeros((n, MEMORY, p))
    changes = np.zeros((n, MEMORY, p))
    curvature = np.zeros((n, MEMORY))  # 1 / (step . change); 0 marks an empty slot
    d = _direction(g, steps, changes, curvature)
    t, low, high = _first_step(d), np.zeros(n), np.full(n, np.inf)

    for _ in range(iterations):
        slope = (g * d).sum(1)
        trial_x = x + t[:, None] * d
        trial_f, trial_g = evaluate(trial_x, rows)
        evaluations += len(rows)

        # The slack is what rounding of f alone can do: without it the last steps to a small
        # gradient are refused.
        lower = trial_f <= f + ARMIJO * t * slope + 1e-15 * np.abs(f)
        flatter = (trial_g * d).sum(1) >= WOLFE * slope
        high = np.where(lower, high, t)
        low = np.where(lower & ~flatter, t, low)
        t = np.where(np.isinf(high), 2 * t, (low + high) / 2)

        done = np.flatnonzero(lower & flatter)  # rows whose line search ends here
        step, change = trial_x[done] - x[done], trial_g[done] - g[done]
        product = (step * change).sum(1)
        for memory, newest in ((steps, step), (changes, change)):
            memory[done, :-1] = memory[done, 1:]
            memory[done, -1] = newest
        curvature[done, :-1] = curvature[done, 1:]
        curvature[done, -1] = np.where(product > 0, 1 / np.where(product > 0, product, 1), 0)
        x[done], f[done], g[done] = trial_x[done], trial_f[done], trial_g[done]
        d[done] = _direction(g[done], steps[done], changes[done], curvature[done])
        t[done], low[done], high[done] = _first_step(d[done]), 0, np.inf

        norm = np.linalg.norm(g, axis=1)
        theta[rows], end_f[rows], end_norm[rows] = x, f, norm
        stuck = (high - low < 1e-14) | ((g * d).sum(1) >= 0) | ~np.isfinite(f)
        go_on = (norm >= tolerance) & ~stuck
        if not go_on.all():
            state = (rows, x, f, g, steps, changes, curvature, d, t, low, high)
            rows, x, f, g, steps, changes, curvature, d, t, low, high = (s[go_on] for s in state)
        if not rows.size:
            break
    return Minima(theta, end_f, end_norm, evaluations)


def _direction(g, steps, changes, curvature):
    """The two-loop recursion: minus the inverse Hessian that the memory implies, times g."""
    q, weights = -g, []
    for k in reversed(range(MEMORY)):
        weights.append(curvature[:, k] * (steps[:, k] * q).sum(1))
        q = q - weights[-1][:, None] * changes[:, k]
    newest = curvature[:, -1] * (changes[:, -1] ** 2).sum(1)
    norm = np.maximum(np.linalg.norm(g, axis=1), 1e-300)
    q = q / np.where(newest > 0, newest, norm)[:, None]
    for k in range(MEMORY):
        correction = weights.pop() - curvature[:, k] * (changes[:, k] * q).sum(1)
        q = q + correction[:, None] * steps[:, k]
    return q


def _first_step(d):
    return np.minimum(1, LONGEST_STEP / np.maximum(np.abs(d).max(1), 1e-300))
