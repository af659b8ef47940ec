"""Mixtures: which source each row of the global batch reads, and the epochs of each source."""

from collections.abc import Mapping, Sequence

import numpy as np

from lm.data import order

UNIT = 2**32  # weights are multiples of 1 / UNIT, so that counts are exact in integers


def assign(rows: np.ndarray, weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, index within the source), int64 each, of global rows (int64, below 2**31).

    Of the first n rows, source i reads n * weight_i to within one per source, whatever the batch
    size: rows are dealt evenly rather than drawn, and each source's own indices run 0, 1, 2, ...
    without a gap.
    """
    source = np.full(rows.shape, len(weights) - 1, np.int64)
    local = rows.astype(np.uint64)  # the index among the rows that no earlier source took
    active = np.ones(rows.shape, bool)
    rest = float(sum(weights))
    for i, weight in enumerate(weights[:-1]):
        share = np.uint64(round(weight / rest * UNIT))
        phase = order.key(seed, i) >> np.uint64(32)
        before = (local * share + phase) // np.uint64(UNIT)
        after = ((local + np.uint64(1)) * share + phase) // np.uint64(UNIT)
        taken = active & (after > before)
        source[taken] = i
        local = np.where(active, np.where(taken, before, local - before), local)
        active &= ~taken
        rest -= weight
    return source, local.astype(np.int64)


def epochs(
    tokens: float, sizes: Mapping[str, float], weights: Mapping[str, float]
) -> dict[str, float]:
    """Passes over each source (of ``sizes`` tokens) in a run of ``tokens`` tokens, by weight."""
    total = sum(weights.values())
    return {name: tokens * weights[name] / total / sizes[name] for name in sizes}
