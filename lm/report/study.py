"""What one call of `lm.fit` found, and its law.json: what page, figures and terminal show."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lm.report.expert_loads import ExpertLoads
from lm.scaling import AllocationFit, CurveTable, HeldOut, ParametricFit, RunTable

SCHEMA = 1
MOST_DRAWS = 1000
MOST_OPTIMA = 150  # of the envelope's 1,500
NOT_GIVEN = "not in the table"


class PublishedRow(NamedTuple):
    """Exponents as printed, with their 80 % intervals where the source gives them."""

    label: str
    a: float
    a_interval80: tuple[float, float] | None
    b: float
    b_interval80: tuple[float, float] | None


# Hoffmann et al. 2022, Table 2 (10th and 90th percentile over 100 resamples), and its row of
# Kaplan et al. 2020.
TABLE_2 = (
    PublishedRow("Hoffmann 1  envelope", 0.50, (0.488, 0.502), 0.50, (0.501, 0.512)),
    PublishedRow("Hoffmann 2  IsoFLOP", 0.49, (0.462, 0.534), 0.51, (0.483, 0.529)),
    PublishedRow("Hoffmann 3  parametric", 0.46, (0.454, 0.455), 0.54, (0.542, 0.543)),
    PublishedRow("Kaplan et al. 2020", 0.73, None, 0.27, None),
)
APPROACH_NAMES = {"envelope": "1  Envelope", "isoflop": "2  IsoFLOP", "parametric": "3  Parametric"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs, the fits made of them, and how far each can be trusted.

    fits: by approach. refused: approach -> why it was not fitted. accounting: `params` and `flops`,
    the conventions fitted under ("as in the table" where nothing was recounted). exponents: one row
    an accounting, by the approach `exponents_by`; empty for the reason `no_exponents`.
    highest_out: approach -> (k, the fit without the k highest losses). held_out: approach -> the
    fit below the top budget. unchecked: "approach, check" -> why it was not made.
    """

    runs: RunTable
    curves: CurveTable | None
    fits: dict[str, AllocationFit]
    refused: dict[str, str]
    accounting: dict[str, str]
    exponents: list[dict] = field(default_factory=list)
    exponents_by: str = ""
    no_exponents: str = ""
    highest_out: dict[str, list[tuple[int, AllocationFit]]] = field(default_factory=dict)
    held_out: dict[str, HeldOut] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)
    comparison: dict | None = None
    experts: ExpertLoads | None = None  # of the best run, where it has any

    @property
    def headline(self) -> AllocationFit:
        """The fit that speaks for the study: IsoFLOP minima assume least of the loss's form."""
        return next(self.fits[a] for a in ("isoflop", "parametric", "envelope") if a in self.fits)

    @property
    def top_flops(self) -> float:
        """The largest budget at which the headline fit saw an optimum."""
        return max(optimum.flops for optimum in self.headline.optima)

    @property
    def law(self) -> dict:
        """The content of law.json: plain numbers, strings, lists; None for what is not finite."""
        approaches = {}
        for name, fit in self.fits.items():
            entry = fit.to_dict() | {"allocation_draws": fit.allocation_draws}
            for draws in ("allocation_draws", "draws"):
                if draws in entry:
                    entry[draws] = _rounded(_thinned(np.asarray(entry[draws]), MOST_DRAWS))
            approaches[name] = entry | {"optima": _thinned(entry["optima"], MOST_OPTIMA)}
        return plain(
            {
                "schema": SCHEMA,
                "approaches": approaches,
                "refused": self.refused,
                "flops_range": _range(self.runs.flops),
                "accounting": {**self.accounting, "exponents": self.exponents},
                "checklist": self.checklist(),
                "comparison": self.comparison,
            }
        )

    def checklist(self) -> dict:
        """What decides whether a fit can be trusted and repeated, by name."""
        runs, fits = self.runs, self.fits

        def of_each(*keys: str):
            """The first of `keys` in each fit's own checklist."""
            found = {}
            for name, fit in fits.items():
                value = next((fit.checklist[key] for key in keys if key in fit.checklist), None)
                if value is not None:
                    found[name] = value
            return found

        return {
            "law_form": of_each("law"),
            "params_convention": self.accounting["params"],
            "flops_convention": self.accounting["flops"],
            "runs": len(runs),
            "params_range": _range(runs.params),
            "tokens_range": _range(runs.tokens),
            "flops_range": _range(runs.flops),
            "tokens_per_parameter_range": _range(runs.tokens / runs.params),
            "loss_range": _range(runs.loss),
            **{
                name: column(runs, name)
                for name in (
                    "corpus",
                    "tokenizer",
                    "vocab_size",
                    "seq_len",
                    "epochs",
                    "schedule",
                    "optimizer",
                    "learning_rate",
                    "batch_tokens",
                    "seed",
                    "device",
                )
            },
            "exclusions": list(runs.excluded),
            "objective": of_each("objective"),
            "delta": of_each("delta"),
            "initial_points": {
                n: f.starts for n, f in fits.items() if isinstance(f, ParametricFit)
            },
            "tolerance": of_each("gradient_tolerance"),
            "interval_method": of_each("interval"),
            "bootstrap_draws": of_each("bootstrap"),
            "held_out_error": {name: held_out_errors(h) for name, h in self.held_out.items()},
        }


def held_out_errors(held: HeldOut) -> dict:
    """Errors at the top budget of a fit that did not see it, in log units (0.01 is about 1 %)."""
    errors = held.log_loss_errors
    return {
        "top_budget_flops": float(np.median(held.flops)),
        "rms_log_loss_error": float(np.sqrt(np.mean(errors**2))) if errors.size else None,
        "mean_log_loss_error": float(np.mean(errors)) if errors.size else None,
        "log_params_error": float(held.log_params_error),
        "a": held.fit.a,
    }


def column(runs: RunTable, name: str):
    """One value, a [low, high] range, or the distinct texts of a column of the table."""
    values = runs.columns.get(name)
    if values is None:
        return NOT_GIVEN
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
        if not values.size:
            return NOT_GIVEN
        return _range(values) if np.ptp(values) else float(values[0])
    texts = [text for text in dict.fromkeys(values.tolist()) if text]
    return texts[0] if len(texts) == 1 else texts or NOT_GIVEN


def plain(value):
    """`value` with arrays as lists, numpy numbers as Python's, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [
            plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)
        ]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _thinned(rows, most: int):
    return rows[:: max(1, -(-len(rows) // most))]


def _rounded(draws: np.ndarray) -> list[list[float]]:
    """Eight significant digits: far below the draws' own spread, and half the file."""
    return [[float(f"{x:.8g}") for x in row] for row in draws]


def _range(values) -> list[float]:
    return [float(np.min(values)), float(np.max(values))]
