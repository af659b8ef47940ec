"""Causal self-attention with grouped queries (Ainslie et al. 2023); MHA and MQA are its ends."""

import flax.linen as nn
import jax

from lm.config import ModelConfig
from lm.model import kv_cache, rotary
from lm.model.kernels import attend
from lm.model.layers import Linear, Norm
from lm.sharding import constrain


class Attention(nn.Module):
    """Projections, positions, attention, output."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        """(B, T, D). With a collection ``cache``, which must be mutable, new keys and values go
        into it, those of segment 0 alone; a single position then attends to all in it."""
        c = self.config
        b, t, _ = x_BTD.shape

        def project(name: str, n_heads: int, axis: str) -> jax.Array:
            y = Linear(
                n_heads * c.head_width,
                ("embed", axis),
                use_bias=c.qkv_bias,
                dtype=c.dtype,
                quantization=c.quantization,
                lora=c.lora,
                name=name,
            )(x_BTD)
            return y.reshape(b, t, n_heads, c.head_width)

        query_BTNH = project("query", c.n_heads, "heads")
        key_BSKH = project("key", c.n_kv_heads, "kv_heads")
        value_BSKH = project("value", c.n_kv_heads, "kv_heads")
        if c.qk_norm:
            norm = ("rms", c.norm_eps, None, c.zero_centred_gains)
            query_BTNH = Norm(*norm, name="query_norm")(query_BTNH)
            key_BSKH = Norm(*norm, name="key_norm")(key_BSKH)
        if c.position == "rope":
            query_BTNH = rotary.rotate(query_BTNH, positions_BT, c.rope_base, c.rope_scaling)
            key_BSKH = rotary.rotate(key_BSKH, positions_BT, c.rope_base, c.rope_scaling)
        query_BTNH = constrain(query_BTNH, "batch", "positions", "act_heads", None)
        key_BSKH = constrain(key_BSKH, "batch", "keys", "act_kv_heads", None)
        value_BSKH = constrain(value_BSKH, "batch", "keys", "act_kv_heads", None)
        is_decoding = self.has_variable("cache", kv_cache.NAME)
        if is_decoding:
            cache = self.variable("cache", kv_cache.NAME, None)
        if is_decoding and t == 1:
            new = (key_BSKH, value_BSKH, positions_BT[:, 0])
            how = (c.sliding_window, c.attention_soft_cap)
            out_BNH, cache.value = kv_cache.step(query_BTNH[:, 0], cache.value, *new, *how)
            out_BTNH = out_BNH[:, None]
        else:
            if is_decoding:
                is_text_BT = None if segments_BT is None else segments_BT == 0
                cache.value = kv_cache.write(
                    cache.value, key_BSKH, value_BSKH, positions_BT, is_text_BT
                )
            out_BTNH = attend(
                *(query_BTNH, key_BSKH, value_BSKH, segments_BT),
                sliding_window=c.sliding_window,
                soft_cap=c.attention_soft_cap,
                # Initialising traces a single position, which not every kernel takes.
                kernel="einsum" if self.is_initializing() else c.attention_kernel,
            )
        out_BTNH = constrain(out_BTNH, "batch", "positions", "act_heads", None)
        return Linear(
            c.d_model,
            ("heads", "embed"),
            (2 * c.n_layers) ** -0.5,
            dtype=c.dtype,
            quantization=c.quantization,
            lora=c.lora,
            name="out",
        )(out_BTNH.reshape(b, t, -1))
