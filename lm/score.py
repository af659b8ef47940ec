"""The one validation sum: nats over a fixed set of tokens, and what follows from it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lm.data import Batch


@dataclass(frozen=True)
class Score:
    """Of a fixed token set. ``loss`` in nats a token."""

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def score(
    nats: Callable[[Batch], jax.Array], batches: Iterable[Batch], token_bytes: np.ndarray
) -> Score:
    """Sums over ``batches``: nats / tokens, and nats / (bytes ln 2).

    Args:
      nats: sum of nats of one batch, dispatched asynchronously.
      batches: laid over the devices, with weight 0 where a position does not count.
      token_bytes: bytes of each token id, (V,).
    """
    sums = []
    for batch in batches:
        sums.append((nats(batch), *_counts(batch, token_bytes)))
        # One batch ahead: what waits for the devices holds their memory, and can't be called back.
        jax.block_until_ready(sums[-2:-1])
    # In whole numbers and float64 on the host, whatever the order of batches.
    nats_sum = math.fsum(float(x) for x, _, _ in sums)
    tokens, n_bytes = (sum(int(counts[i]) for counts in sums) for i in (1, 2))
    return Score(nats_sum / tokens, nats_sum / (n_bytes * math.log(2)), tokens)


@jax.jit
def _counts(batch: Batch, token_bytes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens of a batch and their bytes; on the devices, as no host need have all of it."""
    weights = batch.weights_BT
    weights = jnp.ones_like(batch.targets_BT) if weights is None else weights.astype(jnp.int32)
    return weights.sum(), (token_bytes[batch.targets_BT] * weights).sum()


class Ratio:
    """sum(x) / sum(n) over clusters, one or an array of such, with its standard error.

    A cluster is what was drawn independently of the others: a document, whose tokens share a
    subject and a style, so that they tell less than as many tokens of different documents. The
    error is that of the linearised ratio between clusters (Cochran 1977, section 6.3; Miller 2024,
    "Adding error bars to evals", section 2.2); it needs two.
    """

    def __init__(self, *shape: int):
        # Of x, n, x^2, x n, n^2, and the clusters that have any n.
        self._sums = np.zeros((6, *shape))

    def add(self, x: np.ndarray | float, n: np.ndarray | float) -> None:
        """One whole cluster's sums."""
        x, n = np.asarray(x, np.float64), np.asarray(n, np.float64)
        self._sums += np.stack([x, n, x * x, x * n, n * n, n > 0])

    @property
    def n(self) -> np.ndarray:
        """sum(n)."""
        return self._sums[1]

    @property
    def clusters(self) -> np.ndarray:
        """How many have any n."""
        return self._sums[5]

    @property
    def value(self) -> np.ndarray:
        """sum(x) / sum(n); NaN where n is 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sums[0] / self._sums[1]

    @property
    def standard_error(self) -> np.ndarray:
        """NaN where there are fewer than two clusters."""
        _, n, xx, xn, nn, g = self._sums
        ratio = self.value
        with np.errstate(invalid="ignore", divide="ignore"):
            # Of residuals x - ratio n, whose sum is 0; rounding may leave a little less than none.
            residuals = np.maximum(xx - 2 * ratio * xn + ratio**2 * nn, 0)
            return np.where(g > 1, np.sqrt(residuals * g / (g - 1)) / n, np.nan)
