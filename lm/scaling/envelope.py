"""Approach 1 (Hoffmann et al. 2022, section 3.1): the lower envelope of all training curves."""

from dataclasses import dataclass

import numpy as np

from lm.scaling.allocation import AllocationFit
from lm.scaling.table import CurveTable


@dataclass(frozen=True, kw_only=True)
class EnvelopeFit(AllocationFit):
    """The allocation of Approach 1; `optima` are the envelope's points, one a FLOP value.

    `run_of_optimum` names the run each optimum lies on, `progress` how far through that run it is (1.0: its end).
    """

    run_of_optimum: np.ndarray
    progress: np.ndarray


def fit_envelope(
    curves: CurveTable,
    *,
    n_flops: int = 1500,
    smoothing: float = 10.0,
    last_fraction: float = 0.15,
    bootstrap: int = 4000,
    seed: int = 0,
) -> EnvelopeFit:
    """Fits N = k_N C^a, D = k_D C^b to the run with the lowest loss at each of `n_flops` log-spaced FLOPs.

    smoothing: width in logged points of the Gaussian window over each curve. last_fraction: only points in the
    last part of a run count, where its learning rate has decayed (the paper finds all its own there: 0.15); 1.0 keeps all.
    Intervals: pairs bootstrap over runs. Raises CannotFit.
    """
    raise NotImplementedError
