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
    sums = [(nats(batch), *_counts(batch, token_bytes)) for batch in batches]
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
