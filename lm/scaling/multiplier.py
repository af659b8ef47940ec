"""The compute multiplier: how much more compute one recipe needs than another for the same loss."""

from typing import NamedTuple

import numpy as np

from lm.scaling.inference import flops_for_loss
from lm.scaling.intervals import percentile_interval
from lm.scaling.parametric import ParametricLaw


class Multiplier(NamedTuple):
    """`value` = C_A / C_B at equal loss; above 1, recipe B is that many times as efficient as A.

    `unreachable` is the share of draws in which A never reaches the loss: they count as infinite.
    """

    value: float
    interval80: tuple[float, float]
    interval95: tuple[float, float]
    loss: float
    unreachable: float


def compute_multiplier(
    law_a: ParametricLaw,
    law_b: ParametricLaw,
    *,
    flops: float | None = None,
    loss: float | None = None,
    draws_a=None,
    draws_b=None,
    pairs: int = 4000,
    seed: int = 0,
) -> Multiplier:
    """C_A / C_B at equal loss, both trained compute-optimally, with percentile intervals.

    Give `loss`, or `flops`: then the loss is what B reaches with it (in every draw: B's draw's
    own). draws_a, draws_b: (n, 5) joint draws E, A, B, alpha, beta of independent fits
    (`ParametricFit.draws`), paired at random. Without both the intervals are nan. Both losses must
    be of the same data and tokenizer. Raises ValueError where neither or both of flops and loss are
    given.
    """
    if (flops is None) == (loss is None):
        raise ValueError("give flops or loss, one of the two")

    def ratio(a: ParametricLaw, b: ParametricLaw):
        target = loss if loss is not None else b.optimum(flops).loss
        flops_b = flops_for_loss(b, target)
        with np.errstate(invalid="ignore"):
            return flops_for_loss(a, target) / flops_b

    target = float(loss if loss is not None else law_b.optimum(flops).loss)
    value = float(ratio(law_a, law_b))
    if draws_a is None or draws_b is None:
        nothing = (float("nan"), float("nan"))
        return Multiplier(value, nothing, nothing, target, float(not np.isfinite(value)))
    rng = np.random.default_rng(seed)
    a, b = (
        ParametricLaw(*np.asarray(d, float)[rng.integers(0, len(d), pairs)].T)
        for d in (draws_a, draws_b)
    )
    ratios = ratio(a, b)
    # A percentile of a finite stand-in is the percentile of the infinite, and stays a number to
    # sort.
    capped = np.where(np.isinf(ratios), 1e300, ratios)
    intervals = [
        tuple(np.inf if edge >= 1e299 else edge for edge in percentile_interval(capped, level))
        for level in (0.80, 0.95)
    ]
    return Multiplier(value, *intervals, target, float(np.mean(np.isinf(ratios))))
