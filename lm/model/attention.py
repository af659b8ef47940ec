"""Causal self-attention with grouped queries (Ainslie et al. 2023); MHA and MQA are its ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.model import rotary
from lm.model.layers import Linear, Norm

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite


def allowed(
    n_positions: int, sliding_window: int = 0, segments_BT: jax.Array | None = None
) -> jax.Array:
    """Which keys S a query T may see, as bool (1 or B, T, S): none ahead, none beyond the window
    (``sliding_window`` keys, the query's own included), none of another document."""
    query, key = jnp.arange(n_positions)[:, None], jnp.arange(n_positions)[None, :]
    mask_TS = key <= query
    if sliding_window:
        mask_TS &= key > query - sliding_window
    mask_BTS = mask_TS[None]
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return mask_BTS


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask_BTS: jax.Array,
    soft_cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v with N = K * G query heads over K key/value heads. (B, T, N, H)."""
    b, t, n, h = query_BTNH.shape
    k = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(b, t, k, n // k, h) * h**-0.5
    score_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH).astype(jnp.float32)
    if soft_cap:
        score_BKGTS = soft_cap * jnp.tanh(score_BKGTS / soft_cap)
    score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS, MASKED)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(value_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, value_BSKH)
    return out_BTKGH.reshape(b, t, n, h)


class Attention(nn.Module):
    """Projections, positions, attention, output."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask_BTS: jax.Array,
    ) -> jax.Array:
        c = self.config
        b, t, _ = x_BTD.shape

        def project(name: str, n_heads: int, axis: str) -> jax.Array:
            y = Linear(
                n_heads * c.head_width,
                ("embed", axis),
                use_bias=c.qkv_bias,
                dtype=c.dtype,
                name=name,
            )(x_BTD)
            return y.reshape(b, t, n_heads, c.head_width)

        query_BTNH = project("query", c.n_heads, "heads")
        key_BSKH = project("key", c.n_kv_heads, "kv_heads")
        value_BSKH = project("value", c.n_kv_heads, "kv_heads")
        if c.qk_norm:
            query_BTNH = Norm("rms", c.norm_eps, None, name="query_norm")(query_BTNH)
            key_BSKH = Norm("rms", c.norm_eps, None, name="key_norm")(key_BSKH)
        if c.position == "rope":
            query_BTNH = rotary.rotate(query_BTNH, positions_BT, c.rope_base)
            key_BSKH = rotary.rotate(key_BSKH, positions_BT, c.rope_base)
        out_BTNH = attend(query_BTNH, key_BSKH, value_BSKH, mask_BTS, c.attention_soft_cap)
        return Linear(
            c.d_model, ("heads", "embed"), (2 * c.n_layers) ** -0.5, dtype=c.dtype, name="out"
        )(out_BTNH.reshape(b, t, -1))
