"""Approach 2 (Hoffmann et al. 2022, section 3.2): one loss profile a budget, the minima on a line."""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import AllocationFit, Optimum
from lm.scaling.table import RunTable


@dataclass(frozen=True)
class Profile:
    """One budget's runs and the curve through them, over x = log params.

    `coefficients` are those of the polynomial in (x - center), highest power first; empty for
    Akima. `minimum` is the estimator's own optimum, `akima` the Akima interpolant's optimum in
    parameters (nan where it is at an edge) as a cross-check. `reason` says why the profile
    was excluded and is "" for those used. `used` masks the points inside the window.
    """

    flops: float
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    used: np.ndarray
    center: float
    coefficients: np.ndarray
    minimum: Optimum | None
    akima: float
    reason: str

    def curve(self, params: np.ndarray) -> np.ndarray:
        """The fitted loss at `params`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(AllocationFit):
    """The allocation of Approach 2, with its profiles (used and excluded)."""

    estimator: str
    profiles: tuple[Profile, ...]


def fit_isoflop(
    runs: RunTable,
    *,
    budgets: str | float | None = None,
    estimator: str = "parabola",
    window: float | None = None,
    bootstrap: int = 4000,
    interval: str = "residual",
    seed: int = 0,
) -> IsoflopFit:
    """Fits N = k_N C^a through the minima of the isoFLOP profiles.

    budgets: a column of the table that names each run's budget, or a relative tolerance by which
    FLOPs are grouped (0.1: within 10 % of each other); None takes the column `budget` where there is one and 0.1 otherwise.
    estimator: "parabola", "cubic" (both least squares of the loss in log N) or "akima" (interpolation).
    window: keeps runs within this factor of the lowest-loss run's parameters (6.0: N/6 .. 6 N).
    interval: "residual" (leverage-corrected) or "pairs" (over runs).
    Raises CannotFit.
    """
    raise NotImplementedError
