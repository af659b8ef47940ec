"""Scaling laws from run tables: arrays or a CSV in, laws with intervals out.

    from lm.scaling import fit_parametric, read_runs
    fit = fit_parametric(read_runs("runs.csv"))
    fit.a, fit.a_interval95, fit.law.optimum(1e21)
"""

from lm.scaling.accounting import exponents_by_accounting, recount
from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.checks import HeldOut, leave_highest_out, leave_top_budget_out
from lm.scaling.envelope import EnvelopeFit, fit_envelope
from lm.scaling.intervals import percentile_interval
from lm.scaling.isoflop import IsoflopFit, Profile, fit_isoflop
from lm.scaling.parametric import (
    BESIROGLU2024,
    HOFFMANN2022,
    ParametricFit,
    ParametricLaw,
    fit_parametric,
)
from lm.scaling.table import CurveTable, RunTable, read_curves, read_runs

__all__ = [
    "BESIROGLU2024",
    "HOFFMANN2022",
    "AllocationFit",
    "CannotFit",
    "CurveTable",
    "EnvelopeFit",
    "HeldOut",
    "IsoflopFit",
    "Optimum",
    "ParametricFit",
    "ParametricLaw",
    "Profile",
    "RunTable",
    "exponents_by_accounting",
    "fit_envelope",
    "fit_isoflop",
    "fit_parametric",
    "leave_highest_out",
    "leave_top_budget_out",
    "percentile_interval",
    "read_curves",
    "read_runs",
    "recount",
]
