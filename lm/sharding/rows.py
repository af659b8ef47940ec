"""The rows of a batch that a process reads, and how they become a global array."""

from functools import lru_cache

import jax
import numpy as np
from jax.sharding import NamedSharding


@lru_cache(maxsize=256)  # asked for at every dispatch
def held(sharding: NamedSharding, n: int) -> np.ndarray:
    """Which of ``n`` entries, laid along one axis as ``sharding`` says, devices here hold, (k,)."""
    slices = sharding.addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[part] for part in slices]))


def lay(x: np.ndarray, rows: np.ndarray, n: int, axis: int, sharding: NamedSharding) -> jax.Array:
    """The global array of which this process has ``x``, the ``rows`` of all ``n`` along ``axis``.

    ``rows`` are at least those that ``held`` gives, in order.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[axis].indices(n)
        first = int(np.searchsorted(rows, start))
        return x[*index[:axis], first : first + stop - start, *index[axis + 1 :]]

    shape = (*x.shape[:axis], n, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, part)
