"""What Approach 3 minimises, from where, and its bootstrap: all rows of a batch at once.

theta is log A, log B, log E, alpha, beta, the paper's a, b, e, alpha, beta (equation 3).
"""

import itertools

import numpy as np

from lm.scaling.intervals import corrected_residuals, multinomial_counts
from lm.scaling.minimise import minimise

GRADIENT_TOLERANCE = 1e-6
OBJECTIVES = {
    "lbfgs": "sum of Huber(log predicted - log observed), delta {delta:g}, "
    "over-estimates weighed {penalty:g}",
    "variable_projection": "sum of squared errors of the loss",
    "variable_projection_relative": "sum of squared relative errors of the loss",
}

# Hoffmann et al., appendix D.2: 5 alphas x 5 betas x 5 es x 6 as x 6 bs.
HOFFMANN_STARTS = np.array(
    [
        (a, b, e, alpha, beta)
        for alpha, beta, e, a, b in itertools.product(
            (0.0, 0.5, 1.0, 1.5, 2.0),
            (0.0, 0.5, 1.0, 1.5, 2.0),
            (-1.0, -0.5, 0.0, 0.5, 1.0),
            (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
            (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        )
    ]
)


class Problem:
    """One table and one objective, of which it evaluates many theta at once.

    Inside, theta is centred on the table (log A - alpha mean(log N) stands for log A, log B alike),
    where the minimum is well conditioned; theta that go in and come out are not.
    """

    def __init__(self, runs, method, delta, overestimate_penalty):
        log_params, log_tokens = np.log(runs.params), np.log(runs.tokens)
        self.centers = np.array([log_params.mean(), log_tokens.mean()])
        self.x = log_params - self.centers[0]
        self.y = log_tokens - self.centers[1]
        self.log_loss = np.log(runs.loss)
        self.method, self.delta, self.penalty = method, delta, overestimate_penalty

    def minimise(self, starts, log_loss=None, weights=None):
        """Minima from `starts` (m, 5), each with its own log_loss or weights (m, n) if given."""
        centred = np.array(starts, float)
        centred[:, :2] -= centred[:, 3:] * self.centers

        def objective(theta, rows):
            z = self.log_loss if log_loss is None else log_loss[rows]
            return self.value_and_gradient(theta, z, 1.0 if weights is None else weights[rows])

        # The tolerance leaves room for the way back to uncentred coordinates (factors of about 20).
        ends = minimise(objective, centred, points=len(self.x), tolerance=GRADIENT_TOLERANCE / 100)
        _, gradient = objective(ends.theta, np.arange(len(centred)))
        theta = ends.theta
        theta[:, :2] += theta[:, 3:] * self.centers
        norm = np.linalg.norm(self.uncentred(gradient), axis=1)
        return ends._replace(theta=theta, gradient_norm=norm)

    def uncentred(self, gradient):
        """Gradients (m, 5) with respect to theta, from those with respect to centred theta."""
        constants, exponents = gradient[:, :3], gradient[:, 3:]
        return np.concatenate([constants, exponents - self.centers * constants[:, :2]], axis=1)

    def terms(self, centred):
        """A / N^alpha, B / D^beta (m, n), E (m, 1); clipped, as some starts are far off."""
        a, b, e, alpha, beta = (column[:, None] for column in centred.T)
        size = np.multiply(alpha, -self.x)
        data = np.multiply(beta, -self.y)
        for exponent, constant in ((size, a), (data, b)):
            exponent += constant
            np.minimum(exponent, 300, out=exponent)
            np.exp(exponent, out=exponent)
        return size, data, np.exp(np.minimum(e, 300))

    def value_and_gradient(self, centred, log_loss, weights):
        """(m,) and (m, 5), of centred theta (m, 5); log_loss and weights (n,) or (m, n)."""
        size, data, floor = self.terms(centred)
        total = size + data
        total += floor
        if self.method == "lbfgs":
            residual = np.log(total) - log_loss
            slope = np.clip(residual, -self.delta, self.delta)
            value = slope * (residual - 0.5 * slope)
            if self.penalty != 1:
                weights = weights * np.where(residual > 0, self.penalty, 1.0)
            slope = slope / total
        else:
            loss = np.exp(log_loss)
            slope = total - loss
            if self.method == "variable_projection_relative":
                weights = weights / loss**2
            value = slope**2
            slope = 2 * slope
        value = value * weights
        slope = slope * weights
        size *= slope
        data *= slope
        by_constants = [size.sum(1), data.sum(1), floor[:, 0] * slope.sum(1)]
        by_exponents = [-(size @ self.x), -(data @ self.y)]
        return value.sum(1), np.stack(by_constants + by_exponents, axis=1)

    def log_predicted(self, theta):
        """log predicted loss (n,), and its derivatives (n, 5) with respect to centred theta."""
        centred = np.array(theta, float)
        centred[:2] -= centred[3:] * self.centers
        size, data, floor = self.terms(centred[None])
        total = size + data + floor
        shares = [size / total, data / total, floor / total]
        jacobian = np.concatenate([*shares, -shares[0] * self.x, -shares[1] * self.y]).T
        return np.log(total[0]), jacobian


def variable_projection(problem: Problem) -> np.ndarray:
    """theta near the least squares: E, A, B >= 0 solved for over a grid of alpha, beta."""
    exponents = np.geomspace(0.02, 2.5, 28)
    loss = np.exp(problem.log_loss)
    scale = 1 / loss if problem.method == "variable_projection_relative" else np.ones_like(loss)
    size = np.exp(-exponents[:, None] * problem.x) * scale
    data = np.exp(-exponents[:, None] * problem.y) * scale
    target = loss * scale
    normal = np.empty((len(exponents), len(exponents), 3, 3))
    normal[..., 0, 0] = scale @ scale
    normal[..., 0, 1] = normal[..., 1, 0] = (size @ scale)[:, None]
    normal[..., 0, 2] = normal[..., 2, 0] = data @ scale
    normal[..., 1, 1] = (size**2).sum(1)[:, None]
    normal[..., 1, 2] = normal[..., 2, 1] = size @ data.T
    normal[..., 2, 2] = (data**2).sum(1)
    right = np.empty(normal.shape[:3])
    right[..., 0] = scale @ target
    right[..., 1] = (size @ target)[:, None]
    right[..., 2] = data @ target
    error = np.full(normal.shape[:2], np.inf)
    solution = np.zeros_like(right)
    for support in itertools.product((True, False), repeat=3):  # which of E, A, B are above zero
        on = np.array(support)
        block = np.where(on[:, None] & on, normal, np.eye(3))
        x = np.linalg.solve(block, np.where(on, right, 0)[..., None])[..., 0]
        reduced = target @ target - (x * right).sum(-1)
        better = (x >= 0).all(-1) & (reduced < error)
        error = np.where(better, reduced, error)
        solution = np.where(better[..., None], x, solution)
    i, j = np.unravel_index(np.argmin(error), error.shape)
    E, A, B = np.log(np.maximum(solution[i, j], 1e-9))
    alpha, beta = exponents[i], exponents[j]
    return np.array([A + alpha * problem.centers[0], B + beta * problem.centers[1], E, alpha, beta])


def bootstrap_constants(problem: Problem, theta, n_draws, interval, seed):
    """((draws, 5): E, A, B, alpha, beta; how many draws were refused)."""
    rng = np.random.default_rng(seed)
    n = len(problem.x)
    if isinstance(interval, np.ndarray):
        n_draws = len(interval)
        weights = np.stack([np.bincount(rows, minlength=n) for rows in interval]).astype(float)
    elif interval == "pairs":
        weights = multinomial_counts(rng, n_draws, n)
    if n_draws == 0:
        return np.empty((0, 5)), 0
    start = np.tile(theta, (n_draws, 1))
    if isinstance(interval, str) and interval == "residual":
        fitted, jacobian = problem.log_predicted(theta)
        delta = problem.delta if problem.method == "lbfgs" else np.inf
        errors = corrected_residuals(problem.log_loss - fitted, jacobian, delta)
        ends = problem.minimise(start, log_loss=fitted + rng.choice(errors, (n_draws, n)))
    else:
        ends = problem.minimise(start, weights=weights)
    sound = (ends.gradient_norm < GRADIENT_TOLERANCE) & (ends.theta[:, 3:] > 0).all(1)
    sound &= (ends.theta[:, :3] < 100).all(1)
    return constants(ends.theta[sound]), int(n_draws - sound.sum())


def constants(theta: np.ndarray) -> np.ndarray:
    """E, A, B, alpha, beta of theta, (..., 5) both."""
    theta = np.asarray(theta)
    return np.concatenate([np.exp(theta[..., [2, 0, 1]]), theta[..., 3:]], axis=-1)
