"""What the later laws share: a robust `fit` from their own constants, allocations without a loss,
and a derivative-free minimiser over arrays.

Units everywhere: N in parameters, D in tokens, C in training FLOPs, loss in nats per token. Arrays
broadcast, results are float64. C = 6 N D unless a method says otherwise.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from scipy.optimize import least_squares

from lm.scaling.allocation import Optimum

FLOPS_PER_PARAM_TOKEN = 6.0  # C = 6 N D: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)


class FittableLaw:
    """Gives a frozen dataclass law, whose fields are constants and `source`, a robust `fit`."""

    def fit(
        self,
        *columns,
        loss,
        free: tuple[str, ...] | None = None,
        delta: float = 1e-3,
        starts: int = 8,
        seed: int = 0,
    ) -> Self:
        """Refits the `free` constants (all by default) to `loss`, from this law's as first guess.

        `columns` are the arguments of `self.loss`, arrays of one shape. The objective is Hoffmann's
        sum of Huber_delta(log L_fit - log L) over runs; each constant keeps its sign and is
        searched in log scale, from this law's value and `starts - 1` log-normal jitters of it (sd
        0.3).

        Raises:
          ValueError: fewer runs than free constants, a loss <= 0, or no start that converges.
        """
        free = free or tuple(f.name for f in fields(self) if f.name != "source")
        columns = [np.asarray(c, float) for c in columns]
        log_loss = np.log(positive(loss, "loss"))
        if log_loss.size < len(free):
            raise ValueError(f"{log_loss.size} runs cannot determine {len(free)} constants {free}")
        first_guess = np.array([getattr(self, name) for name in free], float)

        def with_constants(t):
            return replace(self, **dict(zip(free, first_guess * np.exp(t), strict=True)))

        def residuals(t):
            with np.errstate(all="ignore"):
                fitted = np.log(with_constants(t).loss(*columns)) - log_loss
            return np.nan_to_num(fitted, nan=1e3, posinf=1e3, neginf=-1e3)

        rng = np.random.default_rng(seed)
        best = None
        for start in range(starts):
            t = rng.normal(0, 0.3, len(free)) * (start > 0)
            found = least_squares(
                residuals,
                t,
                loss="huber",
                f_scale=delta,
                x_scale="jac",
                xtol=1e-12,
                ftol=1e-12,
                gtol=1e-12,
                max_nfev=2000,
            )
            if found.status > 0 and (best is None or found.cost < best.cost):
                best = found
        if best is None:
            raise ValueError(f"no start of {starts} converged; fix some constants by `free`")
        law = with_constants(best.x)
        objective = f"{best.cost:.8g}"
        return replace(
            law,
            source=f"{type(self).__name__} fitted to {log_loss.size} runs, "
            f"Huber delta {delta:g}, objective {objective}",
        )


@dataclass(frozen=True)
class PowerLawAllocation:
    """N_opt = k_N C^a, with no loss (nan): what Approaches 1 and 2 and most model reports publish.

    Without k_D and b, D = C / 6N, so that 6 N D is the budget; with them D = k_D C^b, as a fit
    under another FLOP convention than 6 N D gives it.
    """

    k_N: float
    a: float
    k_D: float | None = None
    b: float | None = None
    source: str = ""

    def optimum(self, flops) -> Optimum:
        flops = positive(flops, "flops")
        params = self.k_N * flops**self.a
        if self.k_D is None:
            return Optimum(flops, params, flops / (FLOPS_PER_PARAM_TOKEN * params), np.nan)
        return Optimum(flops, params, self.k_D * flops**self.b, np.nan)


@dataclass(frozen=True)
class TokensPerParameter:
    """D = ratio * N: N = sqrt(C / (6 ratio)). At ratio 20, C = 1.2e24 gives N = 1e11, D = 2e12."""

    ratio: float
    source: str = "rule of thumb; 20 is Chinchilla's own ratio (70B, 1.4T)"

    def optimum(self, flops) -> Optimum:
        flops = positive(flops, "flops")
        # The root of a quotient of decimal round numbers is exact, a power 0.5 of 1/(6 ratio) is
        # not.
        params = np.sqrt(flops / (FLOPS_PER_PARAM_TOKEN * self.ratio))
        return Optimum(flops, params, self.ratio * params, np.nan)


def minimise_on_log_grid(objective, low, high, points: int = 65, zooms: int = 14):
    """The x in [low, high] of least `objective(x)`, by a log grid that zooms on its best cell.

    `low` and `high` broadcast to one shape; `objective` maps (points, *shape) to the same shape.
    Needs no derivative and finds the global minimum if it spans more than a grid cell.
    """
    low, high = np.broadcast_arrays(np.log(low), np.log(high))
    step = (high - low) / (points - 1)
    steps = np.arange(points).reshape(-1, *[1] * low.ndim)
    for _ in range(zooms):
        grid = low + steps * step
        best = np.argmin(objective(np.exp(grid)), axis=0)
        x = np.take_along_axis(grid, best[None], axis=0)[0]
        low = np.maximum(x - step, low)
        step = (np.minimum(x + step, high) - low) / (points - 1)
        high = low + step * (points - 1)
        if np.all(step < 1e-9):
            break
    return np.exp(x)


def positive(values, name: str):
    values = np.asarray(values, float)
    if not np.all(values > 0):
        raise ValueError(f"{name} must be positive, not {values[~(values > 0)].flat[0]:g}")
    return values
