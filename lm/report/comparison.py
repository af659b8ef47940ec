"""Two laws side by side, with the interval of each difference from both bootstraps' draws."""

from pathlib import Path

import numpy as np

from lm.command import BadInput, json_object
from lm.scaling import ParametricLaw, percentile_interval
from lm.scaling.multiplier import compute_multiplier
from lm.scaling.published import read_law

PAIRS = 4000
CONSTANTS = ("E", "A", "B", "alpha", "beta")


def read_law_file(path: Path) -> dict:
    """The content of a law.json. Raises BadInput naming file and key."""
    read_law(path)
    content = json_object(path)
    for approach in content["approaches"]:
        read_law(path, approach)
    if not content.get("flops_range"):
        raise BadInput(f"{path}: key 'flops_range' is missing")
    return content


def compare(this: dict, other: dict, name: str, seed: int = 0) -> dict:
    """`this` law.json beside `other`, called `name`: one row a quantity and shared approach.

    The two bootstraps are independent, so their draws are paired at random; where either law holds
    none, intervals are nan. N_opt is compared at the middle (in log C) of what both
    ranges share, or of the gap between them, and its `difference` is a ratio. Parametric laws of
    the same corpus and tokenizer are also compared by their compute multiplier.
    """
    shared = [a for a in this["approaches"] if a in other["approaches"]]
    if not shared:
        raise BadInput(
            f"{name} has approach {', '.join(other['approaches'])}, this table gives "
            f"{', '.join(this['approaches'])}: none in common"
        )
    (low_a, high_a), (low_b, high_b) = this["flops_range"], other["flops_range"]
    log_flops = np.log(max(low_a, low_b) * min(high_a, high_b)) / 2
    rng = np.random.default_rng(seed)
    rows = []
    for approach in shared:
        pair = this["approaches"][approach], other["approaches"][approach]
        draws = [_resampled(law.get("allocation_draws"), rng) for law in pair]
        for i, exponent in enumerate(("a", "b")):
            values = [law[exponent] for law in pair]
            spread = draws[0][:, i] - draws[1][:, i]
            rows.append(_row(approach, exponent, values, values[0] - values[1], spread))
        values = [law["k_N"] * np.exp(law["a"] * log_flops) for law in pair]
        log_params = [d[:, 2] + d[:, 0] * log_flops for d in draws]
        ratios = np.exp(log_params[0] - log_params[1])
        rows.append(_row(approach, "N_opt", values, values[0] / values[1], ratios))
    comparison = {"with": name, "flops": float(np.exp(log_flops)), "rows": rows}
    if "parametric" in shared:
        comparison["multiplier"] = _multiplier(this, other)
    return comparison


def _row(approach, quantity, values, difference, spread) -> dict:
    return {
        "approach": approach,
        "quantity": quantity,
        "this": values[0],
        "other": values[1],
        "difference": difference,
        "interval80": percentile_interval(spread, 0.80),
        "interval95": percentile_interval(spread, 0.95),
    }


def _resampled(draws, rng) -> np.ndarray:
    """PAIRS rows of a, b, log k_N, log k_D; nan where the law holds no draws."""
    draws = np.array(draws or [], float)
    if draws.ndim != 2 or draws.shape[1] != 4:
        return np.full((PAIRS, 4), np.nan)
    return draws[rng.integers(0, len(draws), PAIRS)]


def _multiplier(this: dict, other: dict) -> dict:
    """C_this / C_other at the loss that `other` reaches with this study's largest budget."""
    for key in ("corpus", "tokenizer"):
        values = [law.get("checklist", {}).get(key) for law in (this, other)]
        if values[0] != values[1]:
            return {"reason": f"losses of different {key} ({values[0]} and {values[1]})"}
    entries = [law["approaches"]["parametric"] for law in (this, other)]
    laws = [ParametricLaw(*(entry[name] for name in CONSTANTS)) for entry in entries]
    draws = [entry.get("draws") or None for entry in entries]
    flops = this["flops_range"][1]
    found = compute_multiplier(*laws, flops=flops, draws_a=draws[0], draws_b=draws[1])
    return {"flops": flops, **found._asdict()}
