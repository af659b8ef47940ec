"""Laws that know the model will be used: over-training at fixed loss (Sardana & Frankle 2023).

A forward pass costs 2 N FLOPs a token, so a model that will serve T tokens costs 6 N D + 2 N T over
its life (arXiv:2401.00448). Any `ParametricLaw` will do; they used their own rounding
of Hoffmann's constants, `SARDANA2024`.
"""

from typing import NamedTuple

import numpy as np

from lm.scaling.law import positive
from lm.scaling.parametric import ParametricLaw

SARDANA2024 = ParametricLaw(
    1.69,
    406.4,
    410.7,
    0.336,
    0.283,
    "Sardana & Frankle 2024 (Hoffmann's, rounded otherwise)",
)


class LifetimeOptimum(NamedTuple):
    """A model and its cost: `flops` to train (6 N D), `lifetime_flops` with inference (+ 2 N T)."""

    flops: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    lifetime_flops: np.ndarray


def flops_for_loss(law: ParametricLaw, loss):
    """The least training FLOPs that reach `loss`, from L = E + K (C/6)^-gamma; inf at loss <= E.

    gamma = alpha beta / (alpha + beta); K = A G^-alpha + B G^beta.
    """
    excess_at_unit = law.A * law.G**-law.alpha + law.B * law.G**law.beta
    left = np.asarray(loss, float) - law.E
    with np.errstate(divide="ignore", over="ignore"):
        unit = (excess_at_unit / np.abs(left)) ** ((law.alpha + law.beta) / (law.alpha * law.beta))
    return np.where(left > 0, 6.0 * unit, np.inf)


def tokens_for_loss(law: ParametricLaw, loss, params):
    """The D at which `params` parameters reach `loss`; inf where they never do."""
    left = np.asarray(loss, float) - law.E - law.A * positive(params, "params") ** -law.alpha
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(left > 0, (law.B / np.abs(left)) ** (1 / law.beta), np.inf)


def overtrain(law: ParametricLaw, flops, size_factor) -> LifetimeOptimum:
    """A model `size_factor` times the compute-optimal one at `flops`, trained to the same loss.

    What a smaller model costs to train: at Hoffmann's constants and 1e21 FLOPs, half the size takes
    2.42 times the tokens, 21 % more compute. tokens and flops are inf below the critical size.
    """
    best = law.optimum(flops)
    params = best.params * positive(size_factor, "size_factor")
    tokens = tokens_for_loss(law, best.loss, params)
    return LifetimeOptimum(6 * params * tokens, params, tokens, best.loss, 6 * params * tokens)


def lifetime_optimum(law: ParametricLaw, loss, inference_tokens) -> LifetimeOptimum:
    """The model that reaches `loss` at the least 6 N D + 2 N T, T = `inference_tokens`.

    With u the share of the size term in L - E, the stationary point is
    3 D(u) ((alpha/beta) u / (1 - u) - 1) = T, whose left side grows with u: bisection in logit u.
    Raises ValueError where loss <= E.
    """
    loss, served = np.broadcast_arrays(np.asarray(loss, float), np.asarray(inference_tokens, float))
    left = loss - law.E
    if not np.all(left > 0):
        raise ValueError(
            f"loss {np.min(loss):g} is not above the law's floor E = {np.max(law.E):g}"
        )
    if not np.all(served >= 0):
        raise ValueError(f"inference_tokens must be zero or more, not {np.min(served):g}")

    def tokens_at(odds):  # odds = u / (1 - u)
        return (law.B * (1 + odds) / left) ** (1 / law.beta)

    low = np.full(left.shape, np.log(law.beta / law.alpha))  # T = 0
    high = low + 60.0
    for _ in range(100):
        middle = (low + high) / 2
        odds = np.exp(middle)
        too_low = 3 * tokens_at(odds) * (law.alpha / law.beta * odds - 1) < served
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    odds = np.exp(low)
    tokens = tokens_at(odds)
    params = (law.A * (1 + odds) / (odds * left)) ** (1 / law.alpha)
    training = 6 * params * tokens
    return LifetimeOptimum(training, params, tokens, loss, training + 2 * params * served)


def lifetime_optimum_at_budget(
    law: ParametricLaw, lifetime_flops, inference_tokens
) -> LifetimeOptimum:
    """The model of least loss whose training and inference together cost `lifetime_flops`.

    The dual of `lifetime_optimum`, and solved through it: its cost falls as the loss grows.
    """
    budget, served = np.broadcast_arrays(
        positive(lifetime_flops, "lifetime_flops"), np.asarray(inference_tokens, float)
    )
    # Training alone can do no better than the optimum without inference.
    low = np.log(law.optimum(budget).loss - law.E)
    high = low + 20.0
    for _ in range(80):
        middle = (low + high) / 2
        dear = lifetime_optimum(law, law.E + np.exp(middle), served).lifetime_flops > budget
        low, high = np.where(dear, middle, low), np.where(dear, high, middle)
    return lifetime_optimum(law, law.E + np.exp(high), served)
