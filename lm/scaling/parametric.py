"""Approach 3 (Hoffmann et al. 2022, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta."""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import AllocationFit, Optimum
from lm.scaling.table import RunTable


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
        """Loss in nats per token of `params` parameters trained on `tokens` tokens (numbers or arrays)."""
        return self.E + self.A / np.asarray(params, float) ** self.alpha + self.B / np.asarray(tokens, float) ** self.beta

    def optimum(self, flops) -> Optimum:
        """The point of lowest loss with 6 N D = `flops` (number or array; equation 4)."""
        flops = np.asarray(flops, float)
        params, tokens = self.k_N * flops**self.a, self.k_D * flops**self.b
        return Optimum(flops, params, tokens, self.loss(params, tokens))


# The TeX source of the paper holds the unrounded constants (read by Besiroglu et al. 2024): the rounded ones
# (1.69, 406.4, 410.7, .34, .28) move the optimal tokens per parameter at 5.88e23 FLOPs from 59 to 93.
HOFFMANN2022 = ParametricLaw(
    float(np.exp(0.5267228)), float(np.exp(6.0073404)), float(np.exp(6.0179186)), 0.33917084, 0.2849083,
    "Hoffmann et al. 2022, equation 10, unrounded",
)
BESIROGLU2024 = ParametricLaw(1.81686, 482.00572, 2085.43420, 0.34781303, 0.36585412, "Besiroglu et al. 2024")


@dataclass(frozen=True, kw_only=True)
class ParametricFit(AllocationFit):
    """The fitted law, its bootstrap and how the search for it ended.

    `draws` is (n, 5): E, A, B, alpha, beta. `residuals` are log predicted minus log observed loss. `starts` counts how many starts were run,
    `converged` how many ended with a gradient norm below 1e-6, `at_best` how many of those at the best objective.
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
        raise NotImplementedError

    def loss_interval(self, params: float, tokens: float, level: float = 0.80) -> tuple[float, float]:
        """Percentile interval of the expected loss at (params, tokens), from the joint draws."""
        raise NotImplementedError

    def optimal_loss_interval(self, flops: float, level: float = 0.80) -> tuple[float, float]:
        """Percentile interval of the expected loss at the fit's own optimum for `flops`."""
        raise NotImplementedError


def fit_parametric(
    runs: RunTable,
    *,
    delta: float = 1e-3,
    method: str = "newton",
    overestimate_penalty: float = 1.0,
    drop_highest_loss: int = 0,
    starts: np.ndarray | None = None,
    bootstrap: int = 4000,
    interval: str = "residual",
    seed: int = 0,
) -> ParametricFit:
    """Fits the five constants to final losses. Raises CannotFit.

    method: "newton" and "lbfgs" minimise the paper's objective, the sum of Huber_delta(log predicted - log observed), from
    every one of `starts` ((n, 5): log A, log B, log E, alpha, beta; the paper's 4,500 by default);
    "variable_projection" minimises another: the squared error of the loss itself.
    overestimate_penalty: weight of residuals above zero (predicted above observed) in the objective, relative to those below.
    interval: "residual" (leverage-corrected) or "pairs" (over runs, as the papers do).
    """
    raise NotImplementedError
