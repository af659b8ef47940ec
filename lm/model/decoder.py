"""The decoder, functional: ``.init(key, inputs_BT)`` and ``.apply({"params": ...}, inputs_BT)``.

Axes in names, here and in the whole room:
B batch, T query position, S key position, D model width, F feed-forward width, N query heads,
K key/value heads, G query heads a key/value head, H head width, L layers, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.model.attention import Attention, allowed
from lm.model.feedforward import FeedForward
from lm.model.layers import Linear, norm, sinusoidal
from lm.sharding import constrain, partitioned


class Block(nn.Module):
    """One layer. Pre-norm adds ``f(norm(x))`` to the residual; post-norm is ``norm(x + f(x))``."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array
    ) -> tuple[jax.Array, None]:
        c = self.config
        attention = Attention(c, name="attention")
        feed_forward = FeedForward(c, name="feed_forward")
        attention_norm, feed_forward_norm = norm(c, "attention_norm"), norm(c, "feed_forward_norm")
        if c.norm_position == "pre":
            x_BTD += attention(attention_norm(x_BTD), positions_BT, mask_BTS)
            x_BTD += feed_forward(feed_forward_norm(x_BTD))
        else:
            x_BTD = attention_norm(x_BTD + attention(x_BTD, positions_BT, mask_BTS))
            x_BTD = feed_forward_norm(x_BTD + feed_forward(x_BTD))
        x_BTD = constrain(x_BTD, "batch", "sequence", "features")
        return x_BTD, None  # the carry and output that nn.scan expects


class Decoder(nn.Module):
    """Token ids in, logits out."""

    config: ModelConfig
    max_positions: int  # the longest sequence, which learned positions need

    @nn.compact
    def __call__(
        self,
        inputs_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """float32 logits_BTV of the next token at every position.

        ``segments_BT`` (int32, a number a document) stops attention at document borders;
        ``positions_BT`` (int32) restarts positions there. Without them a row is one document.
        """
        c = self.config
        n_positions = inputs_BT.shape[1]
        if c.position in ("sinusoidal", "learned") and n_positions > self.max_positions:
            last = self.max_positions
            raise ValueError(f"{n_positions} positions: {c.position} ones end at {last}")
        if positions_BT is None:
            positions_BT = jnp.arange(n_positions)[None]
        mask_BTS = allowed(n_positions, c.sliding_window, segments_BT)

        init = partitioned(nn.initializers.normal(c.d_model**-0.5), "vocab", "embed")
        embedding_VD = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        x_BTD = embedding_VD.astype(c.dtype)[inputs_BT]
        if c.position == "sinusoidal":
            x_BTD *= c.d_model**0.5  # as the paper has it: a sine is as large as an embedding
            x_BTD += sinusoidal(self.max_positions, c.d_model).astype(c.dtype)[positions_BT]
        elif c.position == "learned":
            init = partitioned(nn.initializers.normal(0.02), "position", "embed")
            shape = (self.max_positions, c.d_model)
            x_BTD += self.param("positions", init, shape, jnp.float32).astype(c.dtype)[positions_BT]
        x_BTD = constrain(x_BTD, "batch", "sequence", "features")

        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat == "full" else Block
        if c.scan_layers:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.n_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, name="layers")
            x_BTD, _ = layers(x_BTD, positions_BT, mask_BTS)
        else:
            for i in range(c.n_layers):
                x_BTD, _ = block(c, name=f"layer_{i}")(x_BTD, positions_BT, mask_BTS)
        if c.norm_position == "pre":
            x_BTD = norm(c, "final_norm")(x_BTD)

        if c.tied:
            x_RD, embedding_DV = x_BTD.reshape(-1, c.d_model), embedding_VD.T.astype(c.dtype)
            logits_BTV = (x_RD @ embedding_DV).reshape(*inputs_BT.shape, -1)
        else:
            logits_BTV = Linear(c.vocab_size, ("embed", "vocab"), dtype=c.dtype, name="head")(x_BTD)
        logits_BTV = logits_BTV.astype(jnp.float32)
        if c.logit_soft_cap:
            logits_BTV = c.logit_soft_cap * jnp.tanh(logits_BTV / c.logit_soft_cap)
        return logits_BTV
