"""Would the fit say the same without its most influential runs, and does it foresee runs it did not see?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import AllocationFit
from lm.scaling.parametric import ParametricFit
from lm.scaling.table import RunTable


@dataclass(frozen=True)
class HeldOut:
    """A fit on all but the top budget, and its errors there: log predicted minus log observed."""

    fit: AllocationFit
    flops: np.ndarray
    log_loss_errors: np.ndarray  # of a parametric fit on the held-out runs' losses; empty otherwise
    log_params_error: float  # of the optimum at the top budget, against the fit on all runs


def leave_highest_out(
    runs: RunTable, fit: Callable[[RunTable], AllocationFit], ks: Sequence[int] = (0, 1, 3, 5, 8)
) -> list[tuple[int, AllocationFit]]:
    """`fit` with the k highest losses left out, for each k."""
    raise NotImplementedError


def leave_top_budget_out(runs: RunTable, fit: Callable[[RunTable], AllocationFit]) -> HeldOut:
    """`fit` on the runs below the top budget, judged on the top budget's."""
    raise NotImplementedError
