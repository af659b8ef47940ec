"""Causal self-attention with grouped queries (Ainslie et al. 2023); MHA and MQA are its ends."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.model import rotary
from lm.model.layers import Linear, Norm
from lm.sharding import constrain

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


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query_BKGTH, key_BKSH, value_BKSH, mask_BTS, soft_cap: float) -> jax.Array:
    """softmax(q k^T) v, (B, K, G, T, H), with its gradient written out below.

    XLA on CPU is slow at what autodiff makes of it: the score-sized arrays are copied into
    transposed order, and the softmax's row sum is fused with a product. Here the score-sized
    arrays enter every product as they lie, and the row sum is taken over H (Dao et al. 2022,
    FlashAttention, appendix B.2).
    """
    return _attend_forward(query_BKGTH, key_BKSH, value_BKSH, mask_BTS, soft_cap)[0]


def _rows(x_BKGTS: jax.Array) -> jax.Array:
    """Merges a head group's queries, so that every product is a plain batch of matrices."""
    return x_BKGTS.reshape(*x_BKGTS.shape[:2], -1, x_BKGTS.shape[-1])


def _scores(query_BKRH: jax.Array, key_BKSH: jax.Array) -> jax.Array:
    """q k^T in float32 whatever the operands' type: a bfloat16 score of 10 is off by 0.03."""
    return jnp.matmul(query_BKRH, key_BKSH.mT, preferred_element_type=jnp.float32)


def _attend_forward(query_BKGTH, key_BKSH, value_BKSH, mask_BTS, soft_cap):
    shape = query_BKGTH.shape
    query_BKRH = _rows(query_BKGTH)
    score_BKRS = _scores(query_BKRH, key_BKSH)
    if soft_cap:
        score_BKRS = soft_cap * jnp.tanh(score_BKRS / soft_cap)
    score_BKGTS = score_BKRS.reshape(*shape[:4], -1)
    score_BKRS = _rows(jnp.where(mask_BTS[:, None, None], score_BKGTS, MASKED))
    exp_BKRS = jnp.exp(score_BKRS - jnp.max(score_BKRS, -1, keepdims=True))
    total_BKR1 = jnp.sum(exp_BKRS, -1, keepdims=True)
    exp_BKRS = exp_BKRS.astype(value_BKSH.dtype)
    # The narrow output is divided by the softmax's total, not the wide weights.
    out_BKRH = ((exp_BKRS @ value_BKSH) / total_BKR1).astype(value_BKSH.dtype)
    saved = query_BKRH, key_BKSH, value_BKSH, exp_BKRS, total_BKR1, out_BKRH
    return out_BKRH.reshape(shape), saved


def _attend_backward(soft_cap, saved, d_out_BKGTH):
    query_BKRH, key_BKSH, value_BKSH, exp_BKRS, total_BKR1, out_BKRH = saved
    d_out_BKRH = _rows(d_out_BKGTH) / total_BKR1
    row_sum_BKR1 = jnp.sum(d_out_BKRH * out_BKRH, -1, keepdims=True)
    d_out_BKRH = d_out_BKRH.astype(out_BKRH.dtype)
    d_weight_BKRS = d_out_BKRH @ value_BKSH.mT
    d_score_BKRS = exp_BKRS * (d_weight_BKRS - row_sum_BKR1)
    if soft_cap:
        d_score_BKRS *= 1 - jnp.tanh(_scores(query_BKRH, key_BKSH) / soft_cap) ** 2
    d_score_BKRS = d_score_BKRS.astype(exp_BKRS.dtype)
    d_query_BKGTH = (d_score_BKRS @ key_BKSH).reshape(d_out_BKGTH.shape)
    d_key_BKSH = (query_BKRH.mT @ d_score_BKRS).mT
    d_value_BKSH = (d_out_BKRH.mT @ exp_BKRS).mT
    return d_query_BKGTH, d_key_BKSH, d_value_BKSH, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask_BTS: jax.Array,
    soft_cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, (B, T, N, H); N = K * G query heads over K key/value heads."""
    b, t, n, h = query_BTNH.shape
    k = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(b, t, k, n // k, h) * h**-0.5
    query_BKGTH = jnp.moveaxis(query_BTKGH, 1, 3)
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    out_BKGTH = _attend(query_BKGTH, key_BKSH, value_BKSH, mask_BTS, soft_cap)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(b, t, n, h)


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
        query_BTNH = constrain(query_BTNH, "batch", "positions", "act_heads", None)
        key_BSKH = constrain(key_BSKH, "batch", "keys", "act_kv_heads", None)
        value_BSKH = constrain(value_BSKH, "batch", "keys", "act_kv_heads", None)
        out_BTNH = attend(query_BTNH, key_BSKH, value_BSKH, mask_BTS, c.attention_soft_cap)
        out_BTNH = constrain(out_BTNH, "batch", "positions", "act_heads", None)
        return Linear(
            c.d_model, ("heads", "embed"), (2 * c.n_layers) ** -0.5, dtype=c.dtype, name="out"
        )(out_BTNH.reshape(b, t, -1))
