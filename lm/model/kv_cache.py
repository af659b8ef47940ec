"""Keys and values of the tokens so far, so that a new token costs one position's work.

A row of the batch is a text of its own length. Position p lies in slot p mod S: with as many slots
as positions that is slot p; with a sliding window's worth of slots the cache rolls.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lm.config import ModelConfig

NAME = "kv"  # of an attention's variable in the collection `cache`
BLOCK = 128  # slots read at a time
DTYPES = ("float32", "bfloat16", "int8")


class Cache(NamedTuple):
    """One layer's. Scales are None unless the rest is int8."""

    key_BKSH: jax.Array
    value_BKSH: jax.Array
    key_scale_BKS: jax.Array | None = None
    value_scale_BKS: jax.Array | None = None


def empty(
    config: ModelConfig, params: Any, batch: int, positions: int, dtype: str = "float32"
) -> dict:
    """The collection ``cache`` of a decoder with these ``params``: a ``Cache`` of zeros a layer.

    Layers that are stacked in ``params`` are stacked here.

    Args:
      batch: rows.
      positions: the longest text.
      dtype: one of DTYPES. int8 has a float32 scale a head and position.
    """
    slots = min(positions, config.sliding_window or positions)
    result = {}
    for path, kernel in flatten_dict(params).items():
        if path[-3:] == ("attention", "key", "kernel"):
            shape = (*kernel.shape[:-2], batch, config.n_kv_heads, slots, config.head_width)
            arrays = [jnp.zeros(shape, dtype) for _ in range(2)]
            if dtype == "int8":
                arrays += [jnp.zeros(shape[:-1], jnp.float32) for _ in range(2)]
            result[(*path[:-2], NAME)] = Cache(*arrays)
    return unflatten_dict(result)


def write(
    cache: Cache,
    key_BTKH: jax.Array,
    value_BTKH: jax.Array,
    positions_BT: jax.Array,
    is_text_BT: jax.Array | None = None,
) -> Cache:
    """The cache with new positions in it, padding (where ``is_text_BT`` is False) left out."""
    slots = cache.key_BKSH.shape[2]
    kept_BT = jnp.full(positions_BT.shape, True) if is_text_BT is None else is_text_BT
    last_B1 = jnp.max(jnp.where(kept_BT, positions_BT, -1), -1, keepdims=True)
    kept_BT &= positions_BT > last_B1 - slots
    slot_BT = jnp.where(kept_BT, positions_BT % slots, slots)  # beyond the last slot: dropped
    rows_B1 = jnp.arange(len(key_BTKH))[:, None]

    def put(stored_BKSx, new_BTKx):
        # Advanced indices around the heads' slice: the indexed axes (B, T) come first.
        return stored_BKSx.at[rows_B1, :, slot_BT].set(
            new_BTKx.astype(stored_BKSx.dtype), mode="drop"
        )

    if cache.key_scale_BKS is None:
        return Cache(put(cache.key_BKSH, key_BTKH), put(cache.value_BKSH, value_BTKH))
    (key_BTKH, key_scale_BTK), (value_BTKH, value_scale_BTK) = map(_to_int8, (key_BTKH, value_BTKH))
    return Cache(*map(put, cache, (key_BTKH, value_BTKH, key_scale_BTK, value_scale_BTK)))


def _to_int8(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounded to 127 steps each way of its largest entry, and the step."""
    step_BTK = jnp.max(jnp.abs(x_BTKH.astype(jnp.float32)), -1) / 127
    return jnp.round(x_BTKH / jnp.maximum(step_BTK, 1e-30)[..., None]), step_BTK


def read(
    query_BNH: jax.Array, cache: Cache, position_B: jax.Array, sliding_window: int, soft_cap: float
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the positions up to ``position_B``, (B, N, H).

    A block of slots at a time, and no more blocks than the longest text fills, so that a token's
    cost grows with its position and not with the buffer (Dao et al. 2022's running softmax).
    """
    b, n, h = query_BNH.shape
    k, slots = cache.key_BKSH.shape[1:3]
    block = min(BLOCK, slots)
    query_BKGH = query_BNH.reshape(b, k, n // k, h).astype(jnp.float32) * h**-0.5
    n_blocks = -(-jnp.minimum(jnp.max(position_B) + 1, slots) // block)

    def visit(i, carry):
        out_BKGH, total_BKG, most_BKG = carry
        # The last block may start early, to end with the last slot; what it reads twice is hidden.
        start = jnp.minimum(i * block, slots - block)
        slot_S = start + jnp.arange(block)
        key_BKSH, value_BKSH = _block(cache, start, block)
        # The newest position up to the query's that lies in each slot; below 0: none yet.
        held_BS = position_B[:, None] - (position_B[:, None] - slot_S) % slots
        seen_BS = (held_BS >= 0) & (slot_S >= i * block)
        if sliding_window:
            seen_BS &= held_BS > position_B[:, None] - sliding_window
        score_BKGS = jnp.einsum("bkgh,bksh->bkgs", query_BKGH, key_BKSH)
        if soft_cap:
            score_BKGS = soft_cap * jnp.tanh(score_BKGS / soft_cap)
        score_BKGS = jnp.where(seen_BS[:, None, None], score_BKGS, -jnp.inf)
        new_most_BKG = jnp.maximum(most_BKG, jnp.max(score_BKGS, -1))
        # A row whose text has not come this far has seen nothing here, and perhaps nothing at all.
        finite_BKG = jnp.maximum(new_most_BKG, -1e30)
        weight_BKGS = jnp.exp(score_BKGS - finite_BKG[..., None])
        shrink_BKG = jnp.exp(most_BKG - finite_BKG)
        total_BKG = total_BKG * shrink_BKG + jnp.sum(weight_BKGS, -1)
        seen_BKGH = jnp.einsum("bkgs,bksh->bkgh", weight_BKGS, value_BKSH)
        return out_BKGH * shrink_BKG[..., None] + seen_BKGH, total_BKG, new_most_BKG

    start = (
        jnp.zeros_like(query_BKGH),
        jnp.zeros(query_BKGH.shape[:-1]),
        jnp.full(query_BKGH.shape[:-1], -jnp.inf),
    )
    out_BKGH, total_BKG, _ = jax.lax.fori_loop(0, n_blocks, visit, start)
    return (out_BKGH / total_BKG[..., None]).reshape(b, n, h).astype(query_BNH.dtype)


def _block(cache: Cache, start: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """float32 keys and values of ``size`` slots from ``start``, (B, K, size, H) each."""
    parts = [None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, 2) for x in cache]
    key, value, key_scale, value_scale = parts
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)
    if key_scale is not None:
        key, value = key * key_scale[..., None], value * value_scale[..., None]
    return key, value
