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


def grown(config: ModelConfig, caches: Any, positions: int) -> Any:
    """The collection with room for ``positions``: zeros after the slots that are there.

    A window's worth of slots is never exceeded, and before that no position has come round.
    """
    slots = min(positions, config.sliding_window or positions)

    def pad(x: jax.Array, axis: int) -> jax.Array:
        more = [(0, 0)] * x.ndim
        more[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, more)

    def pad_all(cache: Cache) -> Cache:
        axes = (-2, -2, -1, -1)
        return Cache(*(None if x is None else pad(x, a) for x, a in zip(cache, axes, strict=True)))

    return jax.tree.map(pad_all, caches, is_leaf=lambda x: isinstance(x, Cache))


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


def step(
    query_BNH: jax.Array,
    cache: Cache,
    key_B1KH: jax.Array,
    value_B1KH: jax.Array,
    position_B: jax.Array,
    sliding_window: int,
    soft_cap: float,
) -> tuple[jax.Array, Cache]:
    """softmax(q k^T / sqrt(H)) v over the positions up to ``position_B``, (B, N, H), and the cache.

    The cache given has all of them but the last, which the one returned has too. All slots are
    read: a part of them would be copied before each product. Whoever writes a text has the cache
    ``grown`` with it.
    """
    b, n, h = query_BNH.shape
    k, slots = cache.key_BKSH.shape[1:3]
    query_BKGH = query_BNH.reshape(b, k, n // k, h).astype(jnp.float32) * h**-0.5
    seen_BS = jnp.arange(slots) < position_B[:, None]
    if sliding_window:
        # The newest position before the query's that lies in each slot; below 0: none yet.
        before_B1 = position_B[:, None] - 1
        held_BS = before_B1 - (before_B1 - jnp.arange(slots)) % slots
        seen_BS = (held_BS >= 0) & (held_BS > before_B1 + 1 - sliding_window)
    key_BKSH, value_BKSH = cache.key_BKSH.astype(jnp.float32), cache.value_BKSH.astype(jnp.float32)
    if cache.key_scale_BKS is not None:
        key_BKSH *= cache.key_scale_BKS[..., None]
        value_BKSH *= cache.value_scale_BKS[..., None]
    score_BKGS = jnp.einsum("bkgh,bksh->bkgs", query_BKGH, key_BKSH)
    own_BKG1 = jnp.einsum("bkgh,bskh->bkgs", query_BKGH, key_B1KH.astype(jnp.float32))
    if soft_cap:
        score_BKGS, own_BKG1 = (soft_cap * jnp.tanh(x / soft_cap) for x in (score_BKGS, own_BKG1))
    score_BKGS = jnp.where(seen_BS[:, None, None], score_BKGS, -jnp.inf)
    most_BKG1 = jnp.maximum(jnp.max(score_BKGS, -1, keepdims=True), own_BKG1)
    weight_BKGS, own_BKG1 = jnp.exp(score_BKGS - most_BKG1), jnp.exp(own_BKG1 - most_BKG1)
    out_BKGH = jnp.einsum("bkgs,bksh->bkgh", weight_BKGS, value_BKSH)
    out_BKGH += own_BKG1 * value_B1KH.swapaxes(1, 2)
    out_BKGH /= jnp.sum(weight_BKGS, -1, keepdims=True) + own_BKG1
    out_BNH = out_BKGH.reshape(b, n, h).astype(query_BNH.dtype)
    # What is not finite is not kept: 0 times it is no 0, where its slot is not read. And so the
    # slots are written after they were read, or XLA reads a copy of them all.
    is_finite_B1 = jnp.all(jnp.isfinite(out_BNH), (1, 2))[:, None]
    return out_BNH, write(cache, key_B1KH, value_B1KH, position_B[:, None], is_finite_B1)
