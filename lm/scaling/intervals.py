"""Bootstrap draws and the intervals read off them."""

import numpy as np


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """(low, high) percentiles that hold the central `level` of finite `draws`; nan for fewer than 2."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if draws.size < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
