"""Scaling laws from run tables: arrays or a CSV in, laws with intervals out.

from lm.scaling import fit_parametric, read_runs
fit = fit_parametric(read_runs("runs.csv"))
fit.a, fit.a_interval95, fit.law.optimum(1e21)
"""

from lm.scaling.accounting import exponents_by_accounting, recount
from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.checks import HeldOut, leave_highest_out, leave_top_budget_out
from lm.scaling.data_limited import MUENNIGHOFF2023, DataLimitedLaw
from lm.scaling.emergence import (
    TokenLossLaw,
    brier_score,
    emergence_score,
    exact_match,
    expected_edit_distance,
    multiple_choice_accuracy,
    sharpness,
    token_accuracy,
)
from lm.scaling.envelope import EnvelopeFit, fit_envelope
from lm.scaling.inference import (
    SARDANA2024,
    flops_for_loss,
    lifetime_optimum,
    lifetime_optimum_at_budget,
    overtrain,
    tokens_for_loss,
)
from lm.scaling.intervals import percentile_interval
from lm.scaling.isoflop import IsoflopFit, Profile, fit_isoflop
from lm.scaling.kaplan import CriticalBatch, KaplanAllocation, KaplanLaw, LearningCurve, PowerLaw
from lm.scaling.law import PowerLawAllocation, TokensPerParameter
from lm.scaling.moe_laws import (
    ABNAR2025,
    CLARK_HASH,
    CLARK_RL_R,
    CLARK_S_BASE,
    KRAJEWSKI2024,
    KRAJEWSKI2024_DENSE,
    LUDZIEJEWSKI2025,
    AbnarLaw,
    ClarkLaw,
    KrajewskiLaw,
    LudziejewskiLaw,
)
from lm.scaling.multiplier import compute_multiplier
from lm.scaling.parametric import (
    BESIROGLU2024,
    HOFFMANN2022,
    ParametricFit,
    ParametricLaw,
    fit_parametric,
)
from lm.scaling.published import NamedLaw, hoffmann_tables, named_law
from lm.scaling.reconciliation import NonEmbeddingView
from lm.scaling.sweep_design import SweepDesign, plan_sweep, simulate
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
    "ABNAR2025",
    "AbnarLaw",
    "CLARK_HASH",
    "CLARK_RL_R",
    "CLARK_S_BASE",
    "ClarkLaw",
    "CriticalBatch",
    "DataLimitedLaw",
    "KRAJEWSKI2024",
    "KRAJEWSKI2024_DENSE",
    "KaplanAllocation",
    "KaplanLaw",
    "KrajewskiLaw",
    "LUDZIEJEWSKI2025",
    "LearningCurve",
    "LudziejewskiLaw",
    "MUENNIGHOFF2023",
    "NamedLaw",
    "NonEmbeddingView",
    "PowerLaw",
    "PowerLawAllocation",
    "SARDANA2024",
    "SweepDesign",
    "TokenLossLaw",
    "TokensPerParameter",
    "brier_score",
    "compute_multiplier",
    "emergence_score",
    "exact_match",
    "expected_edit_distance",
    "flops_for_loss",
    "hoffmann_tables",
    "lifetime_optimum",
    "lifetime_optimum_at_budget",
    "multiple_choice_accuracy",
    "named_law",
    "overtrain",
    "plan_sweep",
    "sharpness",
    "simulate",
    "token_accuracy",
    "tokens_for_loss",
]
