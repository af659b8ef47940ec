"""Bootstrap resampling and the intervals read off its draws."""

import numpy as np


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """(low, high) that hold the central `level` of the finite `draws`; (nan, nan) for fewer than 2."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if draws.size < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def corrected_residuals(residuals: np.ndarray, jacobian: np.ndarray) -> np.ndarray:
    """Residuals (n,) as they would be had the fit not followed them: r / sqrt(1 - leverage), centred.

    jacobian: (n, p), d fitted / d parameters. A fit of p parameters shrinks its residuals by about
    sqrt(1 - p / n), and with them the intervals (Davison & Hinkley 1997, section 6.2.3).
    """
    basis, _ = np.linalg.qr(jacobian)
    leverage = np.minimum((basis**2).sum(1), 1 - 1e-3)
    corrected = residuals / np.sqrt(1 - leverage)
    return corrected - corrected.mean()


def multinomial_counts(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """(draws, n) counts of how often each of n rows is in a resample of n rows with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
