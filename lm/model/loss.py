"""Cross-entropy as a sum over tokens, so that any batching divides by one global count."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array | None = None
) -> jax.Array:
    """The sum of nats over positions, times their weights (None: 1); a float32 scalar."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # A comparison, not a gather: its gradient is elementwise, where a gather's is a scatter.
    chosen_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), -1)
    nats_BT = jax.nn.logsumexp(logits_BTV, -1) - target_BT
    return jnp.sum(nats_BT if weights_BT is None else nats_BT * weights_BT)
