"""What all three of Chinchilla's approaches end in: N = k_N C^a and D = k_D C^b, with intervals."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.scaling.intervals import percentile_interval


class CannotFit(ValueError):
    """A fit that could not be trusted and is therefore refused, by `name`.

    Names: `too_few_points`, `one_budget`, `no_interior_minimum`, `collinear_design`,
    `optimum_at_bound`, `non_finite_loss`, `no_curves`.
    """

    def __init__(self, name: str, message: str):
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class Optimum(NamedTuple):
    """One compute-optimal point: FLOPs, parameters, tokens, loss in nats per token."""

    flops: float
    params: float
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class AllocationFit:
    """N_opt = k_N C^a parameters and D_opt = k_D C^b tokens, as one approach fitted them.

    `allocation_draws` is (n, 4): a, b, log k_N, log k_D of each bootstrap draw; empty (0, 4) where
    no bootstrap was asked for, and the intervals are then (nan, nan). `flags` are named doubts
    that were not grave enough to refuse the fit. `goodness` names its own figures. `checklist`
    holds how the fit was made: objective, conventions, exclusions, interval method.
    """

    approach: str
    a: float
    b: float
    k_N: float
    k_D: float
    optima: tuple[Optimum, ...]
    allocation_draws: np.ndarray
    flops_range: tuple[float, float]
    n_points: int
    residuals: np.ndarray
    goodness: dict[str, float]
    flags: tuple[str, ...]
    checklist: dict[str, object]

    @property
    def a_interval80(self) -> tuple[float, float]:
        return percentile_interval(self.allocation_draws[:, 0], 0.80)

    @property
    def a_interval95(self) -> tuple[float, float]:
        return percentile_interval(self.allocation_draws[:, 0], 0.95)

    @property
    def b_interval80(self) -> tuple[float, float]:
        return percentile_interval(self.allocation_draws[:, 1], 0.80)

    @property
    def b_interval95(self) -> tuple[float, float]:
        return percentile_interval(self.allocation_draws[:, 1], 0.95)

    def optimal_params(self, flops):
        """N_opt at `flops` (number or array)."""
        return self.k_N * np.asarray(flops, float) ** self.a

    def optimal_tokens(self, flops):
        """D_opt at `flops` (number or array)."""
        return self.k_D * np.asarray(flops, float) ** self.b

    def params_interval(self, flops: float, level: float = 0.80) -> tuple[float, float]:
        """Percentile interval of N_opt at `flops`, from the joint draws of a and k_N."""
        a, _, log_k, _ = self.allocation_draws.T
        low, high = percentile_interval(log_k + a * np.log(flops), level)
        return float(np.exp(low)), float(np.exp(high))

    def tokens_interval(self, flops: float, level: float = 0.80) -> tuple[float, float]:
        """Percentile interval of D_opt at `flops`, from the joint draws of b and k_D."""
        _, b, _, log_k = self.allocation_draws.T
        low, high = percentile_interval(log_k + b * np.log(flops), level)
        return float(np.exp(low)), float(np.exp(high))

    def to_dict(self) -> dict:
        """The approach's entry of law.json: plain numbers, lists and strings."""
        fields = {name: float(getattr(self, name)) for name in ("a", "b", "k_N", "k_D")}
        for name in ("a_interval80", "a_interval95", "b_interval80", "b_interval95"):
            fields[name] = [float(x) if np.isfinite(x) else None for x in getattr(self, name)]
        return fields | {
            "optima": [optimum._asdict() for optimum in self.optima],
            "n_points": self.n_points,
            "flops_range": list(self.flops_range),
            "goodness": self.goodness,
            "flags": list(self.flags),
            "checklist": self.checklist,
        }
