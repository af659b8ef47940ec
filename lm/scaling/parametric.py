"""Approach 3 (Hoffmann et al. 2022, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta."""

import itertools
from dataclasses import dataclass

import numpy as np

from lm.command import one_of
from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.intervals import corrected_residuals, multinomial_counts, percentile_interval
from lm.scaling.minimise import minimise
from lm.scaling.table import RunTable

METHODS = ("lbfgs", "variable_projection", "variable_projection_relative")
INTERVALS = ("residual", "pairs")
GRADIENT_TOLERANCE = 1e-6
FEWEST_RUNS = 8


@dataclass(frozen=True)
class ParametricLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta in nats per token, and its optimum under C = 6 N D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    source: str = ""

    @property
    def a(self) -> float:
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    @property
    def G(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    @property
    def k_N(self) -> float:
        return self.G / 6**self.a

    @property
    def k_D(self) -> float:
        return 1 / (self.G * 6**self.b)

    def loss(self, params, tokens):
        """Loss in nats per token of `params` parameters trained on `tokens` tokens (or arrays)."""
        return (
            self.E
            + self.A / np.asarray(params, float) ** self.alpha
            + self.B / np.asarray(tokens, float) ** self.beta
        )

    def optimum(self, flops) -> Optimum:
        """The point of lowest loss with 6 N D = `flops` (number or array; equation 4)."""
        flops = np.asarray(flops, float)
        params, tokens = self.k_N * flops**self.a, self.k_D * flops**self.b
        return Optimum(flops, params, tokens, self.loss(params, tokens))


# Unrounded, as Besiroglu et al. read them in the paper's TeX source: the rounded 1.69, 406.4, 410.7,
# .34, .28 move the optimal tokens per parameter at 5.88e23 FLOPs from 59 to 93.
HOFFMANN2022 = ParametricLaw(
    E=float(np.exp(0.5267228)),
    A=float(np.exp(6.0073404)),
    B=float(np.exp(6.0179186)),
    alpha=0.33917084,
    beta=0.2849083,
    source="Hoffmann et al. 2022, equation 10, unrounded",
)
BESIROGLU2024 = ParametricLaw(
    E=1.81686,
    A=482.00572,
    B=2085.43420,
    alpha=0.34781303,
    beta=0.36585412,
    source="Besiroglu et al. 2024",
)

# Hoffmann et al., appendix D.2: 5 alphas x 5 betas x 5 es x 6 as x 6 bs, as rows log A, log B, log E, alpha, beta.
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


@dataclass(frozen=True, kw_only=True)
class ParametricFit(AllocationFit):
    """The fitted law, its bootstrap, and how the search for it ended.

    `draws` is (n, 5): E, A, B, alpha, beta, refused draws left out and counted in `refused_draws`.
    `residuals` are log observed minus log predicted loss, in the order of the runs fitted.
    `starts` says how many starts were run, `converged` how many of them ended with a gradient norm
    below 1e-6 (with respect to log A, log B, log E, alpha, beta), `at_best` how many at the best objective.
    """

    law: ParametricLaw
    draws: np.ndarray
    objective: float
    gradient_norm: float
    starts: int
    converged: int
    at_best: int
    refused_draws: int

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of E, A, B, alpha or beta."""
        one_of("name", name, CONSTANTS)
        return percentile_interval(self.draws[:, CONSTANTS.index(name)], level)

    def loss_interval(self, params: float, tokens: float, level: float = 0.80):
        """(low, high) of the expected loss at (params, tokens), from the joint draws."""
        E, A, B, alpha, beta = self.draws.T
        return percentile_interval(E + A / params**alpha + B / tokens**beta, level)

    def optimal_loss_interval(self, flops: float, level: float = 0.80):
        """(low, high) of the lowest expected loss at `flops`: every draw at its own optimum."""
        return percentile_interval(ParametricLaw(*self.draws.T).optimum(flops).loss, level)

    def to_dict(self) -> dict:
        fields = super().to_dict() | {name: getattr(self.law, name) for name in CONSTANTS}
        for name in CONSTANTS:
            for level in (80, 95):
                low, high = self.interval(name, level / 100)
                fields[f"{name}_interval{level}"] = [low, high] if low == low else None
        thinned = self.draws[:: max(1, -(-len(self.draws) // 1000))]
        return fields | {
            "draws": thinned.tolist(),
            "objective": self.objective,
            "gradient_norm": self.gradient_norm,
            "starts": self.starts,
            "converged": self.converged,
            "at_best": self.at_best,
            "refused_draws": self.refused_draws,
        }


def fit_parametric(
    runs: RunTable,
    *,
    delta: float = 1e-3,
    method: str = "lbfgs",
    overestimate_penalty: float = 1.0,
    drop_highest_loss: int = 0,
    starts: np.ndarray = HOFFMANN_STARTS,
    bootstrap: int = 4000,
    interval: str | np.ndarray = "residual",
    seed: int = 0,
) -> ParametricFit:
    """Fits E, A, B, alpha, beta to final losses, in float64.

    method: "lbfgs" minimises the paper's objective, the sum over runs of
    Huber_delta(log predicted - log observed), from every one of `starts` ((n, 5): log A, log B,
    log E, alpha, beta; the paper's 4,500 by default). "variable_projection" minimises another, the
    squared error of the loss itself, in which E, A, B >= 0 are linear, by a search over alpha and
    beta; "variable_projection_relative" weighs each run by 1 / loss^2. Another objective, another
    answer: on Epoch's points a = .545 instead of .514.
    overestimate_penalty: weight of runs whose loss is predicted too high, relative to those
    predicted too low (lbfgs only). Above 1 the law follows the best runs: under-tuned runs
    lie above the frontier.
    drop_highest_loss: this many runs of highest loss are left out first (Besiroglu et al.: 5).
    interval: "residual" resamples leverage-corrected log residuals; "pairs" resamples runs, as the
    papers do; an int array (draws, runs) holds the resampled row numbers themselves.
    Raises CannotFit (see there for the names) and BadInput for unknown settings.
    """
    one_of("method", method, METHODS)
    if isinstance(interval, str):
        one_of("interval", interval, INTERVALS)
    kept = np.argsort(np.argsort(-runs.loss, kind="stable"), kind="stable") >= drop_highest_loss
    dropped = runs.run_id[~kept]
    runs = runs.where(kept)
    flags = _check_design(runs)

    problem = _Problem(runs, method, delta, overestimate_penalty)
    if method == "lbfgs":
        ends = problem.minimise(starts)
    else:
        ends = problem.minimise(_variable_projection(problem)[None])
    best = np.argmin(ends.value)
    converged = ends.gradient_norm < GRADIENT_TOLERANCE
    law = problem.law(ends.theta[best])
    flags += _check_optimum(problem, ends.theta[best], law, converged[best])

    draws, refused = _bootstrap(problem, ends.theta[best], bootstrap, interval, seed)
    if refused > 0.05 * (refused + len(draws)):
        flags += ("refused_draws",)
    laws = ParametricLaw(*draws.T)
    residuals = problem.log_loss - np.log(law.loss(runs.params, runs.tokens))
    spread = problem.log_loss - problem.log_loss.mean()
    flops = np.geomspace(runs.flops.min(), runs.flops.max(), 9)
    return ParametricFit(
        approach="parametric",
        a=law.a,
        b=law.b,
        k_N=law.k_N,
        k_D=law.k_D,
        optima=tuple(Optimum(*map(float, law.optimum(c))) for c in flops),
        allocation_draws=np.stack(
            [laws.a, laws.b, np.log(laws.k_N), np.log(laws.k_D)], axis=1
        ),
        flops_range=(float(runs.flops.min()), float(runs.flops.max())),
        n_points=len(runs),
        residuals=residuals,
        goodness={
            "r_squared_log_loss": float(1 - (residuals**2).sum() / (spread**2).sum()),
            "rms_log_residual": float(np.sqrt((residuals**2).mean())),
            "largest_log_residual": float(np.abs(residuals).max()),
        },
        flags=flags,
        checklist={
            "law": "L(N, D) = E + A / N^alpha + B / D^beta",
            "objective": OBJECTIVES[method].format(delta=delta, penalty=overestimate_penalty),
            "method": method,
            "starts": len(ends.value),
            "gradient_tolerance": GRADIENT_TOLERANCE,
            "interval": interval if isinstance(interval, str) else "pairs, draws given",
            "bootstrap": len(draws) + refused,
            "dropped_highest_loss": [str(name) for name in dropped],
            "excluded": list(runs.excluded),
        },
        law=law,
        draws=draws,
        objective=float(ends.value[best]),
        gradient_norm=float(ends.gradient_norm[best]),
        starts=len(ends.value),
        converged=int(converged.sum()),
        at_best=int((ends.value < ends.value[best] * (1 + 1e-6)).sum()),
        refused_draws=refused,
    )


CONSTANTS = ("E", "A", "B", "alpha", "beta")
OBJECTIVES = {
    "lbfgs": "sum of Huber(log predicted - log observed), delta {delta:g}, "
    "over-estimates weighed {penalty:g}",
    "variable_projection": "sum of squared errors of the loss",
    "variable_projection_relative": "sum of squared relative errors of the loss",
}


class _Problem:
    """One table and one objective, in coordinates centred on the table: a' = log A - alpha mean(log N)
    and b' likewise, in which the minimum is well conditioned. theta outside is always log A, log B,
    log E, alpha, beta."""

    def __init__(self, runs, method, delta, overestimate_penalty):
        log_params, log_tokens = np.log(runs.params), np.log(runs.tokens)
        self.centers = np.array([log_params.mean(), log_tokens.mean()])
        self.x = log_params - self.centers[0]
        self.y = log_tokens - self.centers[1]
        self.log_loss = np.log(runs.loss)
        self.method, self.delta, self.penalty = method, delta, overestimate_penalty

    def log_points(self) -> np.ndarray:
        """(2, n): log params and log tokens of the runs."""
        return np.stack([self.x, self.y]) + self.centers[:, None]

    def law(self, theta) -> ParametricLaw:
        log_A, log_B, log_E, alpha, beta = map(float, theta)
        return ParametricLaw(np.exp(log_E), np.exp(log_A), np.exp(log_B), alpha, beta)

    def minimise(self, starts, log_loss=None, weights=None):
        """Minima from `starts` (m, 5), each row with its own log_loss (m, n) or weights (m, n) if given."""
        centred = np.array(starts, float)
        centred[:, :2] -= centred[:, 3:] * self.centers

        def objective(theta, rows):
            z = self.log_loss if log_loss is None else log_loss[rows]
            return self._value_and_gradient(theta, z, 1.0 if weights is None else weights[rows])

        # The tolerance leaves room for the way back to uncentred coordinates (factors of about 20).
        ends = minimise(objective, centred, points=len(self.x), tolerance=GRADIENT_TOLERANCE / 100)
        _, gradient = objective(ends.theta, np.arange(len(centred)))
        gradient[:, 3:] -= self.centers * gradient[:, :2]
        theta = ends.theta
        theta[:, :2] += theta[:, 3:] * self.centers
        return ends._replace(theta=theta, gradient_norm=np.linalg.norm(gradient, axis=1))

    def terms(self, centred):
        """A / N^alpha, B / D^beta (m, n) and E (m, 1). Clipped: starts with alpha = 0 are far off."""
        a, b, e, alpha, beta = (column[:, None] for column in centred.T)
        size = np.multiply(alpha, -self.x)
        data = np.multiply(beta, -self.y)
        for exponent, constant in ((size, a), (data, b)):
            exponent += constant
            np.minimum(exponent, 300, out=exponent)
            np.exp(exponent, out=exponent)
        return size, data, np.exp(np.minimum(e, 300))

    def _value_and_gradient(self, centred, log_loss, weights):
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
        gradient = [size.sum(1), data.sum(1), floor[:, 0] * slope.sum(1), -(size @ self.x), -(data @ self.y)]
        return value.sum(1), np.stack(gradient, axis=1)

    def jacobian(self, theta):
        """d log predicted / d theta, (n, 5), up to the linear change to centred coordinates."""
        centred = np.array(theta, float)
        centred[:2] -= centred[3:] * self.centers
        size, data, floor = self.terms(centred[None])
        total = size + data + floor
        shares = [size / total, data / total, floor / total]
        return np.concatenate([*shares, -shares[0] * self.x, -shares[1] * self.y]).T


def _check_design(runs: RunTable) -> tuple[str, ...]:
    """Refuses tables from which the law cannot be known; returns the flags of doubtful ones."""
    if not np.all(np.isfinite(runs.loss)):
        bad = ", ".join(map(str, runs.run_id[~np.isfinite(runs.loss)][:5]))
        raise CannotFit("non_finite_loss", f"the loss of run {bad} is not a number")
    if len(runs) < FEWEST_RUNS:
        raise CannotFit("too_few_points", f"{len(runs)} runs for 5 constants; at least {FEWEST_RUNS}")
    log_params, log_tokens, log_flops = np.log(runs.params), np.log(runs.tokens), np.log(runs.flops)
    if np.ptp(log_flops) < 0.1:
        raise CannotFit("one_budget", "all runs cost the same within 10 %: nothing to extrapolate from")
    # The narrower principal axis of the cloud of (log N, log D): 0 when D is a power of N.
    width = np.sqrt(np.linalg.eigvalsh(np.cov(log_params, log_tokens))[0])
    if width < 0.05:
        raise CannotFit(
            "collinear_design",
            f"tokens follow params (D = k N^p within {width:.1%}), so that the terms in N and in D "
            "cannot be told apart; vary tokens per parameter",
        )
    flags = () if width > 0.25 else ("nearly_collinear_design",)
    if len(runs) < 3 * len(CONSTANTS):
        flags += ("few_points",)
    if abs(np.median(runs.flops / (6 * runs.params * runs.tokens)) - 1) > 0.05:
        flags += ("flops_are_not_6nd",)  # the optimum below is under C = 6 N D all the same
    return flags


def _check_optimum(problem, theta, law, converged) -> tuple[str, ...]:
    predicted = np.exp(problem.log_loss)
    n, d = problem.log_points()
    size, data = law.A * np.exp(-law.alpha * n), law.B * np.exp(-law.beta * d)
    for name, exponent, term in (("alpha", law.alpha, size), ("beta", law.beta, data)):
        if not 0.01 < exponent < 3 or (term / predicted).max() < 1e-4:
            raise CannotFit(
                "optimum_at_bound",
                f"the best fit has {name} = {exponent:.3g} and its term at most {term.max():.2g} nats: "
                "the runs do not determine that term",
            )
    flags = () if converged else ("not_converged",)
    if (law.E / predicted).max() < 1e-3:
        flags += ("E_at_zero",)
    return flags


def _variable_projection(problem) -> np.ndarray:
    """theta of the least squares of the loss: E, A, B >= 0 are solved for on a grid over alpha, beta."""
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


def _bootstrap(problem, theta, n_draws, interval, seed):
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
        fitted = np.log(problem.law(theta).loss(*np.exp(problem.log_points())))
        delta = problem.delta if problem.method == "lbfgs" else np.inf
        errors = corrected_residuals(problem.log_loss - fitted, problem.jacobian(theta), delta)
        ends = problem.minimise(start, log_loss=fitted + rng.choice(errors, (n_draws, n)))
    else:
        ends = problem.minimise(start, weights=weights)
    sound = (ends.gradient_norm < GRADIENT_TOLERANCE) & (ends.theta[:, 3:] > 0).all(1)
    sound &= (ends.theta[:, :3] < 100).all(1)
    draws = ends.theta[sound][:, [2, 0, 1, 3, 4]]
    draws[:, :3] = np.exp(draws[:, :3])
    return draws, int(n_draws - sound.sum())
