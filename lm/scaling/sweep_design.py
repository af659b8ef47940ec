"""Planning the sweep itself: which budgets and sizes tell the exponent `a` to a wanted precision.

By simulation: runs are drawn from a prior law with seed noise, fitted by Approach 2 as they would
be, and the spread of the fitted `a` about the true one is counted.
"""

from typing import NamedTuple

import numpy as np

from lm.scaling.allocation import CannotFit
from lm.scaling.isoflop import fit_isoflop
from lm.scaling.parametric import ParametricLaw
from lm.scaling.table import RunTable


class SweepDesign(NamedTuple):
    """A grid of runs and what it tells: `half_width` is the 95th percentile of |a fitted - a true|.

    `refused` is the share of simulated sweeps that Approach 2 refuses to fit; `bias` the mean error
    of a; `total_flops` the sum over all runs.
    """

    budgets: np.ndarray
    sizes: int
    half_width: float
    bias: float
    refused: float
    total_flops: float

    @property
    def runs(self) -> int:
        return len(self.budgets) * self.sizes


def simulate(
    law: ParametricLaw,
    budgets,
    sizes: int,
    *,
    spread: float = 6.0,
    noise: float = 0.003,
    draws: int = 100,
    misplaced: float = 0.3,
    seed: int = 0,
) -> SweepDesign:
    """Simulates an isoFLOP sweep of `sizes` runs over +-`spread` of the optimum at each budget.

    noise: relative standard deviation of a loss. misplaced: sd, in log N, by which the sweep's
    centre misses the optimum, since it is not known beforehand (one miss a sweep).
    """
    rng = np.random.default_rng(seed)
    budgets = np.asarray(budgets, float)
    centre = law.optimum(budgets).params[:, None]
    factors = np.exp(np.linspace(-np.log(spread), np.log(spread), sizes))
    flops = np.repeat(budgets, sizes)
    errors = []
    for _ in range(draws):
        params = (centre * factors * np.exp(misplaced * rng.normal())).ravel()
        tokens = flops / (6 * params)
        loss = law.loss(params, tokens) * (1 + noise * rng.normal(size=flops.size))
        runs = RunTable.from_arrays(loss=loss, params=params, tokens=tokens, flops=flops)
        try:
            errors.append(fit_isoflop(runs, budgets=0.01, bootstrap=0).a - law.a)
        except CannotFit:
            continue
    if len(errors) < draws / 2:
        half_width, bias = np.inf, np.nan
    else:
        half_width, bias = float(np.quantile(np.abs(errors), 0.95)), float(np.mean(errors))
    return SweepDesign(
        budgets, sizes, half_width, bias, 1 - len(errors) / draws, float(sizes * budgets.sum())
    )


def plan_sweep(
    law: ParametricLaw, lowest_flops: float, highest_flops: float, half_width: float, **simulation
) -> tuple[SweepDesign | None, list[SweepDesign]]:
    """(the cheapest design with a 95 % half-width of `a` <= `half_width`, or None; all tried).

    Designs: 4, 6 or 8 budgets from `lowest_flops` to a top of 1, 1/3, 1/10, 1/30 or 1/100 of
    `highest_flops` (a factor of 10 or more above the lowest), by 5, 7 or 9 sizes. From the
    cheapest up, so that a design that suffices ends the search.
    Raises ValueError where the range of budgets spans less than a factor of ten.
    """
    if not 0 < lowest_flops <= highest_flops / 10:
        raise ValueError(
            f"budgets {lowest_flops:.3g} to {highest_flops:.3g}: must span a factor of ten or more"
        )
    tops = [
        highest_flops / f for f in (1, 3, 10, 30, 100) if highest_flops / f >= 10 * lowest_flops
    ]
    grids = [
        (np.geomspace(lowest_flops, top, n), sizes)
        for top in tops
        for n in (4, 6, 8)
        for sizes in (5, 7, 9)
    ]
    tried = []
    for budgets, sizes in sorted(grids, key=lambda grid: grid[0].sum() * grid[1]):
        tried.append(simulate(law, budgets, sizes, **simulation))
        if tried[-1].half_width <= half_width and tried[-1].refused <= 0.05:
            return tried[-1], tried
    return None, tried
