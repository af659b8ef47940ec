"""The order of windows: pure functions of (seed, epoch, index), so that any host can compute any part of it.

Nothing here needs memory in the number of windows, or a state to save.
"""

import numpy as np

ROUNDS = 6


def mix(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values (SplitMix64's finaliser; Steele, Lea and Flood 2014)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key out of several integers (arrays broadcast)."""
    result = np.zeros(1, np.uint64)
    for part in parts:
        result = mix(result ^ mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return result


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where ``index`` (int64, 0 <= index < size) goes in the permutation of range(size) that ``keys`` choose.

    A Feistel network over the next power of two, repeated while the result is outside the range (cycle
    walking; Black and Rogaway 2002): a bijection for each key, at a cost independent of ``size``.
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    result = np.broadcast_to(index, np.broadcast_shapes(index.shape, keys.shape)).astype(np.uint64)
    keys = np.broadcast_to(keys, result.shape)
    outside = np.ones(result.shape, bool)
    while outside.any():
        x, k = result[outside], keys[outside]
        high, low = x >> low_bits, x & low_mask
        for round_ in range(ROUNDS):
            round_key = k + np.uint64(round_)
            if round_ % 2:
                low = low ^ (mix(high ^ mix(round_key)) & low_mask)
            else:
                high = high ^ (mix(low ^ mix(round_key)) & high_mask)
        result[outside] = (high << low_bits) | low
        outside[outside] = result[outside] >= size
    return result.astype(np.int64)
