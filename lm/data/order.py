"""The order of windows: pure functions of (seed, epoch, index), so any host finds any part.

Nothing here needs memory in the number of windows, or a state to save.
"""

import math

import numpy as np

ROUNDS = 6


def mix(values: np.ndarray) -> np.ndarray:
    """A bijective hash of uint64 values (SplitMix64's finaliser; Steele, Lea and Flood 2014)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key out of several integers (arrays broadcast; at least one axis)."""
    result = np.zeros(1, np.uint64)
    for part in parts:
        result = mix(result ^ mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return result


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where ``index`` (int64, one axis) goes in the permutation of range(size) of ``keys``.

    ``keys`` are one for all or one for each index. A Feistel network on the digits of the index in
    a rectangle just larger than the range, repeated where the result falls outside (generalised
    Feistel cipher with cycle walking; Black and Rogaway 2002): a bijection, at a cost independent
    of ``size``.
    """
    rows = max(1, math.isqrt(size - 1) + 1)
    columns = -(-size // rows)
    result = _feistel(index.astype(np.uint64), np.uint64(rows), np.uint64(columns), keys)
    while (outside := result >= size).any():
        mine = keys if keys.size == 1 else keys[outside]
        result[outside] = _feistel(result[outside], np.uint64(rows), np.uint64(columns), mine)
    return result.astype(np.int64)


def _feistel(x: np.ndarray, rows: np.uint64, columns: np.uint64, keys: np.ndarray) -> np.ndarray:
    row, column = x // columns, x % columns
    for i in range(ROUNDS):
        round_keys = mix(keys + np.uint64(i))
        if i % 2:
            column = (column + mix(row ^ round_keys)) % columns
        else:
            row = (row + mix(column ^ round_keys)) % rows
    return row * columns + column
