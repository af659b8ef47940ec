"""Emergence as a choice of metric: Schaeffer, Miranda & Koyejo 2023 (arXiv:2304.15004).

A smooth per-token loss becomes a jump when a metric asks for many tokens right at once. From a loss
(any law's) or a per-token accuracy p to the metrics, and a measure of how sharp they look.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from lm.scaling.law import FittableLaw, positive


@dataclass(frozen=True)
class TokenLossLaw(FittableLaw):
    """Schaeffer's premise: cross-entropy (N/c)^alpha nats per token, alpha < 0 (section 2)."""

    c: float = 1e6
    alpha: float = -0.2
    source: str = "illustrative constants of Schaeffer et al. 2023, Figure 2"

    def loss(self, params):
        return (positive(params, "params") / self.c) ** self.alpha

    def smallest_visible_params(self, steps, test_size):
        """The N at which exact match over `steps` reaches 1 / `test_size`, the least a test shows.

        exp(-steps (N/c)^alpha) = 1/T: below it a finite test reads zero, whatever the smooth curve.
        """
        loss = np.log(positive(test_size, "test_size")) / positive(steps, "steps")
        return self.c * loss ** (1 / self.alpha)


def token_accuracy(loss):
    """p = exp(-loss): the probability given to the right token."""
    return np.exp(-np.asarray(loss, float))


def exact_match(accuracy, steps):
    """All of `steps` tokens or steps right: p^steps. 0.5^3 = 12.5 %, 0.9^3 = 72.9 %."""
    return _probability(accuracy) ** positive(steps, "steps")


def log_exact_match(loss, steps):
    """log p^steps = -steps * loss: exactly linear in the length, even where p^L underflows."""
    return -positive(steps, "steps") * np.asarray(loss, float)


def expected_edit_distance(accuracy, steps):
    """Tokens wrong out of `steps`, steps (1 - p): smooth, and linear in the length."""
    return positive(steps, "steps") * (1 - _probability(accuracy))


def brier_score(accuracy, choices):
    """Mean squared error of probabilities over `choices`, the wrong ones sharing 1 - p evenly."""
    wrong = 1 - _probability(accuracy)
    return wrong**2 + wrong**2 / (_choices(choices) - 1)


def multiple_choice_accuracy(accuracy, choices, spread: float = 1.0):
    """How often the right one of `choices` has the most probability, p being its mean.

    The log-odds of each item scatter by `spread`: the right option's leads the others' by
    ln(p (k-1) / (1-p)) on average, each with a normal error, P = integral phi(z - lead/spread)
    Phi(z)^(k-1) dz. Chance, 1/k, at p = 1/k; a step there as spread goes to 0.
    """
    k = _choices(choices)
    p = np.clip(_probability(accuracy), 1e-300, 1 - 1e-16)
    lead = np.log(p * (k - 1) / (1 - p)) / spread
    z = np.linspace(-9, 9, 1201)  # trapezium on a Gaussian: exact to rounding
    lead, k = np.broadcast_arrays(lead[..., None], np.asarray(k, float)[..., None])
    weights = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    return np.sum(weights * ndtr(z + lead) ** (k - 1), axis=-1)


def measured(accuracy, test_size: int, seed: int = 0):
    """What a test of `test_size` items would report: a binomial share, in steps of 1/test_size."""
    rng = np.random.default_rng(seed)
    return rng.binomial(test_size, _probability(accuracy)) / test_size


def emergence_score(metric):
    """How sharp a metric looks over scale (last axis, increasing): Srivastava et al. 2022.

    sign(argmax - argmin) (max - min) / sqrt(median of squared steps): near the number of points for
    a straight line, large for a jump from flat. inf where the median step is 0 and the range is
    not.
    """
    metric = np.asarray(metric, float)
    spread = metric.max(axis=-1) - metric.min(axis=-1)
    direction = np.sign(np.argmax(metric, axis=-1) - np.argmin(metric, axis=-1))
    typical_step = np.sqrt(np.median(np.diff(metric, axis=-1) ** 2, axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, direction * spread / typical_step, 0.0)


def sharpness(metric, params):
    """The largest |d log metric / d log N| over increasing `params` (last axis): fold per fold.

    Of exact match it is steps |alpha| (N/c)^alpha at the smallest model, in proportion to the
    length; of edit distance at most |alpha|, whatever the length.
    """
    slopes = np.gradient(np.log(positive(metric, "metric")), np.log(params), axis=-1)
    return np.abs(slopes).max(axis=-1)


def _probability(p):
    p = np.asarray(p, float)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError("an accuracy must be between 0 and 1")
    return p


def _choices(k):
    k = np.asarray(k)
    if not np.all(k >= 2):
        raise ValueError(f"choices must be 2 or more, not {np.min(k)}")
    return k
