"""Bootstrap resampling and the intervals read off its draws."""

import numpy as np


def percentile_interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """(low, high) of the central `level` of the finite `draws`; (nan, nan) for fewer than 2."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if draws.size < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def corrected_residuals(
    residuals: np.ndarray, jacobian: np.ndarray, delta: float = np.inf
) -> np.ndarray:
    """Residuals (n,) as if the fit had not followed them: r / sqrt(1 - influence), centred.

    jacobian: (n, p), d fitted / d parameters. A least-squares fit shrinks its residuals by
    sqrt(1 - leverage), about sqrt(1 - p / n), and with them the intervals (Davison & Hinkley 1997,
    section 6.2.3). A Huber fit follows run i with influence leverage * psi(r) / r / mean psi':
    small for runs beyond delta, large for the p runs that a small delta makes it pass through,
    whose residuals of about zero would otherwise make the intervals too narrow.
    """
    n, p = jacobian.shape
    leverage = _leverage(jacobian)
    inside = np.mean(np.abs(residuals) <= delta)
    # Among those inside, p are there because the fit goes through them, not by their noise.
    inside = max(inside - p / n * (1 - inside), 0.05)
    weight = np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300))
    influence = np.minimum(leverage * weight / inside, 0.9)
    corrected = residuals / np.sqrt(1 - influence)
    return corrected - corrected.mean()


def uneven_noise(residuals: np.ndarray, jacobian: np.ndarray) -> bool:
    """Whether runs of high leverage are also the noisier ones (rank correlation above 3 sd).

    A residual bootstrap takes noise to be alike for all runs. Where it is not, its intervals are
    too narrow (on Epoch's Chinchilla points by a factor 2.4 for `a`): those of pairs hold.
    """
    ranks = [np.argsort(np.argsort(v)) for v in (np.abs(residuals), _leverage(jacobian))]
    return bool(np.corrcoef(ranks)[0, 1] * np.sqrt(len(residuals) - 1) > 3)


def _leverage(jacobian: np.ndarray) -> np.ndarray:
    basis, _ = np.linalg.qr(jacobian)
    return (basis**2).sum(1)


def multinomial_counts(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """(draws, n) counts of how often each of n rows is in a resample of n rows with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
