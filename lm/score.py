"""The one validation sum: nats over a fixed set of tokens, and what follows from it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
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
      batches: with weight 0 where a position does not count.
      token_bytes: bytes of each token id, (V,).
    """
    sums, tokens, n_bytes = [], 0, 0
    for batch in batches:
        sums.append(nats(batch))
        weights = np.ones(batch.targets_BT.shape) if batch.weights_BT is None else batch.weights_BT
        tokens += int(weights.sum())
        n_bytes += int((token_bytes[batch.targets_BT] * weights).sum())
    total = math.fsum(float(x) for x in sums)  # float64 on the host, whatever the order of batches
    return Score(total / tokens, total / (n_bytes * math.log(2)), tokens)
