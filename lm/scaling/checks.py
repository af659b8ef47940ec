"""Does a fit say the same without its most influential runs, and foresee runs it did not see?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import AllocationFit, CannotFit
from lm.scaling.parametric import ParametricFit
from lm.scaling.table import RunTable

SAME_BUDGET = 1.1  # runs within 10 % of the highest FLOPs are the top budget


@dataclass(frozen=True)
class HeldOut:
    """A fit on all runs below the top budget, and its errors there.

    `flops` of the held-out runs. `log_loss_errors`: log predicted - log observed loss of each, of a
    parametric fit; empty for the others, which predict no loss. `log_params_error`: log of N_opt at
    the top budget by this fit over that by the fit on all runs.
    """

    fit: AllocationFit
    flops: np.ndarray
    log_loss_errors: np.ndarray
    log_params_error: float


def leave_highest_out(
    runs: RunTable, fit: Callable[[RunTable], AllocationFit], ks: Sequence[int] = (0, 1, 3, 5, 8)
) -> list[tuple[int, AllocationFit]]:
    """(k, `fit` without the k highest losses) for each k. Raises CannotFit as `fit` does."""
    order = np.argsort(-runs.loss, kind="stable")
    return [(k, fit(runs.where(np.sort(order[k:])))) for k in ks]


def leave_top_budget_out(runs: RunTable, fit: Callable[[RunTable], AllocationFit]) -> HeldOut:
    """`fit` on the runs below the top budget, judged on the top budget's.

    The top budget is the highest value of the column `budget`, or all runs within 10 % of the
    highest FLOPs. Raises CannotFit as `fit` does, and where nothing is left.
    """
    budget = runs.columns.get("budget")
    if budget is not None and budget.dtype.kind == "f":
        top = budget == np.nanmax(budget)
    else:
        top = runs.flops > runs.flops.max() / SAME_BUDGET
    if top.all():
        raise CannotFit("one_budget", "all runs are of the top budget: none is left to fit")
    below, above = fit(runs.where(~top)), runs.where(top)
    errors = np.empty(0)
    if isinstance(below, ParametricFit):
        errors = np.log(below.law.loss(above.params, above.tokens) / above.loss)
    at = float(np.exp(np.median(np.log(above.flops))))
    everything = fit(runs).optimal_params(at)
    return HeldOut(below, above.flops, errors, float(np.log(below.optimal_params(at) / everything)))
