"""Approach 3 (Hoffmann et al. 2022, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta."""

from dataclasses import dataclass

import numpy as np

from lm.command import one_of
from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.cost import Cost
from lm.scaling.intervals import percentile_interval, uneven_noise
from lm.scaling.objective import (
    GRADIENT_TOLERANCE,
    HOFFMANN_STARTS,
    OBJECTIVES,
    Problem,
    bootstrap_constants,
    constants,
    variable_projection,
)
from lm.scaling.table import RunTable

CONSTANTS = ("E", "A", "B", "alpha", "beta")
METHODS = tuple(OBJECTIVES)
INTERVALS = ("residual", "pairs")
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


# Unrounded, as Besiroglu et al. read them in the paper's TeX source: the rounded 1.69, 406.4,
# 410.7, .34, .28 move the optimal tokens per parameter at 5.88e23 FLOPs from 59 to 93.
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


@dataclass(frozen=True, kw_only=True)
class ParametricFit(AllocationFit):
    """The fitted law, its bootstrap, and how the search for it ended.

    `draws` is (n, 5): E, A, B, alpha, beta, refused draws left out and counted in `refused_draws`.
    `residuals` are log observed minus log predicted loss, in the order of the runs fitted.
    `starts` says how many starts were run, `converged` how many of them ended with a gradient norm
    below 1e-6 (with respect to log A, log B, log E, alpha, beta), `at_best` how many at the best
    objective.
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
    Where the table's FLOPs are not 6 N D, a, b, k_N, k_D and the optima are under its own FLOPs a
    token, as a function of N (flag `flops_are_not_6nd`); `law.optimum` is always under C = 6 N D.
    interval: "residual" resamples leverage-corrected log residuals, as if noise were alike for all
    runs (flag `uneven_noise` where it is not: take pairs then); "pairs" resamples runs, as the
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
    cost = Cost(runs)

    problem = Problem(runs, method, delta, overestimate_penalty)
    if method == "lbfgs":
        ends = problem.minimise(starts)
    else:
        ends = problem.minimise(variable_projection(problem)[None])
    best = np.argmin(ends.value)
    converged = ends.gradient_norm < GRADIENT_TOLERANCE
    law = ParametricLaw(*map(float, constants(ends.theta[best])))
    flags += _check_optimum(runs, law, converged[best])

    draws, refused = bootstrap_constants(problem, ends.theta[best], bootstrap, interval, seed)
    a, b, log_k_N, log_k_D = cost.allocation(ParametricLaw(*draws.T))
    known = np.isfinite(a)
    draws, refused = draws[known], refused + int((~known).sum())
    allocation_draws = np.stack([a, b, log_k_N, log_k_D], axis=1)[known]
    a, b, log_k_N, log_k_D = map(float, cost.allocation(law))
    if not np.isfinite(a):
        raise CannotFit("optimum_at_bound", "the law's optimum lies outside the runs' sizes")
    if refused > 0.05 * (refused + len(draws)):
        flags += ("refused_draws",)
    log_predicted, jacobian = problem.log_predicted(ends.theta[best])
    residuals = problem.log_loss - log_predicted
    if uneven_noise(residuals, jacobian):
        flags += ("uneven_noise",)
    spread = problem.log_loss - problem.log_loss.mean()
    best_params, best_tokens = cost.optimum(law)
    optima = (cost.flops, best_params, best_tokens, law.loss(best_params, best_tokens))
    return ParametricFit(
        approach="parametric",
        a=a,
        b=b,
        k_N=float(np.exp(log_k_N)),
        k_D=float(np.exp(log_k_D)),
        optima=tuple(Optimum(*map(float, row)) for row in zip(*optima, strict=True)),
        allocation_draws=allocation_draws,
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
            "delta": delta if method == "lbfgs" else None,
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


def _check_design(runs: RunTable) -> tuple[str, ...]:
    """Refuses tables from which the law cannot be known; returns the flags of doubtful ones."""
    if not np.all(np.isfinite(runs.loss)):
        bad = ", ".join(map(str, runs.run_id[~np.isfinite(runs.loss)][:5]))
        raise CannotFit("non_finite_loss", f"the loss of run {bad} is not a number")
    if len(runs) < FEWEST_RUNS:
        raise CannotFit(
            "too_few_points", f"{len(runs)} runs for 5 constants; {FEWEST_RUNS} at least"
        )
    log_params, log_tokens, log_flops = np.log(runs.params), np.log(runs.tokens), np.log(runs.flops)
    if np.ptp(log_flops) < 0.1:
        raise CannotFit(
            "one_budget", "all runs cost the same within 10 %: an exponent needs more budgets"
        )
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
    if np.any(np.abs(np.log(runs.flops / (6 * runs.params * runs.tokens))) > 0.05):
        flags += ("flops_are_not_6nd",)  # so that fit.a is not fit.law.a, which is under C = 6 N D
    return flags


def _check_optimum(runs: RunTable, law: ParametricLaw, converged: bool) -> tuple[str, ...]:
    size, data = law.A / runs.params**law.alpha, law.B / runs.tokens**law.beta
    for name, exponent, term in (("alpha", law.alpha, size), ("beta", law.beta, data)):
        if not 0.01 < exponent < 3 or (term / runs.loss).max() < 1e-4:
            raise CannotFit(
                "optimum_at_bound",
                f"the best fit has {name} = {exponent:.3g}, its term below {term.max():.2g} nats: "
                "the runs do not determine it",
            )
    flags = () if converged else ("not_converged",)
    if (law.E / runs.loss).max() < 1e-3:
        flags += ("E_at_zero",)
    return flags
