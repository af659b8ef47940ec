"""Repeating data: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models" (2305.16264).

L = E + A / N'^alpha + B / D'^beta, where repeated tokens and excess parameters decay in value: D' =
U_D + U_D R_D* (1 - exp(-R_D / R_D*)), R_D = D / U_D - 1 (epochs beyond the first), and N' alike
with U_N, the parameters that U_D unique tokens call for.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize

from lm.scaling.allocation import Optimum
from lm.scaling.law import minimise_on_log_grid, positive
from lm.scaling.parametric import ParametricLaw


class RepetitionFit(NamedTuple):
    """The law found, its objective, and the profile: the best objective at each fixed R_D*."""

    law: "DataLimitedLaw"
    objective: float
    profile_r_tokens: np.ndarray
    profile_objective: np.ndarray


@dataclass(frozen=True)
class DataLimitedLaw:
    """A `ParametricLaw` for fresh data and the two decay constants of repetition."""

    base: ParametricLaw
    r_tokens: float  # R_D*
    r_params: float  # R_N*
    source: str = ""

    def effective_tokens(self, tokens, unique_tokens):
        """D': what `tokens` drawn from `unique_tokens` are worth in fresh tokens."""
        tokens = positive(tokens, "tokens")
        unique = np.minimum(positive(unique_tokens, "unique_tokens"), tokens)
        return _saturate(tokens, unique, self.r_tokens)

    def effective_params(self, params, tokens, unique_tokens):
        """N': what `params` parameters are worth beside so little unique data, repeated or not."""
        params = positive(params, "params")
        unique = np.minimum(positive(unique_tokens, "unique_tokens"), positive(tokens, "tokens"))
        called_for = self.base.optimum((unique / self.base.k_D) ** (1 / self.base.b)).params
        return _saturate(params, np.minimum(called_for, params), self.r_params)

    def loss(self, params, tokens, unique_tokens):
        return self.base.loss(
            self.effective_params(params, tokens, unique_tokens),
            self.effective_tokens(tokens, unique_tokens),
        )

    def optimum(self, flops, unique_tokens) -> Optimum:
        """Least loss with 6 N D = `flops` and only `unique_tokens` to read, over any epochs.

        With enough unique tokens this is the base law's optimum.
        """
        flops, unique = np.broadcast_arrays(
            positive(flops, "flops"), positive(unique_tokens, "unique_tokens")
        )
        centre = self.base.optimum(flops).params
        params = minimise_on_log_grid(
            lambda n: self.loss(n, flops / (6 * n), unique), centre / 1e5, centre * 1e3
        )
        tokens = flops / (6 * params)
        return Optimum(flops, params, tokens, self.loss(params, tokens, unique))

    def objective(self, params, tokens, unique_tokens, loss, delta: float = 1e-3):
        """Sum over runs (last axis) of Huber_delta(log L_law - log L), the paper's objective."""
        size = np.abs(np.log(self.loss(params, tokens, unique_tokens)) - np.log(loss))
        return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=-1)

    def fit(
        self,
        params,
        tokens,
        unique_tokens,
        loss,
        delta: float = 1e-3,
        bounds: tuple[float, float] = (0.1, 1e4),
        points: int = 64,
    ) -> RepetitionFit:
        """Fits R_D* and R_N* within `bounds`, the base law held: a log grid, then its best cells.

        The grid has `points` values of R_D* by four times as many of R_N*. The surface is flat
        along R_D*, with several local minima: look at the profile before believing the point.
        Raises ValueError for fewer than 3 runs with more than one epoch.
        """
        columns = [np.asarray(c, float) for c in (params, tokens, unique_tokens, loss)]
        repeated = int(np.sum(columns[1] > 1.01 * columns[2]))
        if repeated < 3:
            raise ValueError(f"{repeated} runs repeat data; the two decay constants need 3 or more")

        def law_at(log_r) -> DataLimitedLaw:
            r_tokens, r_params = np.exp(np.clip(log_r, *np.log(bounds)))
            return replace(self, r_tokens=float(r_tokens), r_params=float(r_params))

        r_tokens, r_params = (np.geomspace(*bounds, n) for n in (points, 4 * points))
        every = replace(self, r_tokens=r_tokens[:, None, None], r_params=r_params[:, None])
        surface = every.objective(*columns, delta)
        best = None
        for row in np.argsort(surface.min(axis=1))[:6]:
            start = np.log((r_tokens[row], r_params[np.argmin(surface[row])]))
            found = minimize(
                lambda log_r: law_at(log_r).objective(*columns, delta),
                start,
                method="Nelder-Mead",
                options={"xatol": 1e-7, "fatol": 1e-14},
            )
            best = found if best is None or found.fun < best.fun else best
        law = replace(law_at(best.x), source=f"fitted to {len(columns[0])} runs, Huber {delta:g}")
        return RepetitionFit(law, float(best.fun), r_tokens, surface.min(axis=1))


def _saturate(total, unique, r_star):
    """unique + unique r* (1 - exp(-(total/unique - 1) / r*)); `total` itself where it is unique."""
    repeats = total / unique - 1
    return unique - unique * r_star * np.expm1(-repeats / r_star)


MUENNIGHOFF2023 = DataLimitedLaw(
    base=ParametricLaw(
        float(np.exp(0.6254804)),
        float(np.exp(6.255414)),
        float(np.exp(7.3049974)),
        0.3526596,
        0.3526596,
        "Muennighoff et al. 2023, C4, alpha = beta tied",
    ),
    r_tokens=15.387756,
    r_params=5.309743,
    source="Muennighoff et al. 2023: a local optimum of their own objective",
)
