"""Cross-entropy as a sum over tokens, so that any batching divides by one global count."""

import jax
import jax.numpy as jnp

from lm.sharding import constrain, is_split


def cross_entropy(
    logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array | None = None
) -> jax.Array:
    """The sum of nats over positions, times their weights (None: 1); a float32 scalar."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    # A comparison, not a gather: its gradient is elementwise, where a gather's is a scatter, and
    # a vocabulary over several devices stays there.
    chosen_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    target_BT = jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0), -1)
    nats_BT = jax.nn.logsumexp(logits_BTV, -1) - target_BT
    return jnp.sum(nats_BT if weights_BT is None else nats_BT * weights_BT)


def logits(x_BTD: jax.Array, unembedding_DV: jax.Array, soft_cap: float = 0.0) -> jax.Array:
    """float32 logits_BTV of what ``Decoder.hidden`` and ``Decoder.unembedding`` give."""
    rows = x_BTD if is_split("positions") else x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_BTV = (rows @ unembedding_DV).reshape(*x_BTD.shape[:-1], -1)
    logits_BTV = constrain(logits_BTV.astype(jnp.float32), "batch", "positions", "act_vocab")
    return soft_cap * jnp.tanh(logits_BTV / soft_cap) if soft_cap else logits_BTV


def head_cross_entropy(
    x_BTD: jax.Array,
    unembedding_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array | None = None,
    soft_cap: float = 0.0,
    chunk: int = 0,
) -> jax.Array:
    """``cross_entropy`` of the ``logits``, of which ``chunk`` positions' exist at a time (0: all).

    The backward pass computes each chunk's logits again.
    """
    n_chunks = x_BTD.shape[1] // chunk if chunk else 1

    def nats(x_BTD, targets_BT, weights_BT):
        return cross_entropy(logits(x_BTD, unembedding_DV, soft_cap), targets_BT, weights_BT)

    if n_chunks == 1:
        return nats(x_BTD, targets_BT, weights_BT)

    def strided(x):
        """A chunk takes every n-th position: of a split sequence, as many from every part."""
        return jnp.moveaxis(x.reshape(x.shape[0], -1, n_chunks, *x.shape[2:]), 2, 0)

    given = jax.tree.map(strided, (x_BTD, targets_BT, weights_BT))
    add = jax.checkpoint(lambda total, chunk: (total + nats(*chunk), None), prevent_cse=False)
    return jax.lax.scan(add, jnp.float32(0), given)[0]
