"""The decoder, functional: ``.init(key, inputs_BT)`` and ``.apply({"params": ...}, inputs_BT)``.

Axes in names, here and in the whole room:
B batch, T query position, S key position, D model width, F feed-forward width, N query heads,
K key/value heads, G query heads a key/value head, H head width, L layers, V vocabulary.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.model import rotary
from lm.model.attention import Attention
from lm.model.feedforward import FeedForward
from lm.model.layers import Norm, Unembedding, sinusoidal
from lm.model.loss import logits
from lm.model.moe import Moe, Routing
from lm.sharding import all_but_moved, constrain, gather, partitioned, stores_parts

# What a rematerialised layer keeps besides its input; jax's policies by their own names.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Block(nn.Module):
    """One layer. Pre-norm adds ``f(norm(x))`` to the residual; post-norm is ``norm(x + f(x))``."""

    config: ModelConfig
    has_experts: bool = True  # where the config has any

    def setup(self):
        c = self.config
        self.attention_norm = Norm(c.norm, c.norm_eps, zero_centred=c.zero_centred_gains)
        self.attention = Attention(c)
        self.feed_forward_norm = Norm(c.norm, c.norm_eps, zero_centred=c.zero_centred_gains)
        self.routes = self.has_experts and c.moe.n_experts > 0
        self.feed_forward = Moe(c) if self.routes else FeedForward(c)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, Routing | None]:
        """The residual stream, and how the layer routed its tokens (None: it has no experts)."""

        def attend(y_BTD):
            y_BTD = constrain(y_BTD, "batch", "positions", "features", gradient="sequence")
            y_BTD = self.attention(y_BTD, positions_BT, segments_BT)
            return constrain(y_BTD, "batch", "sequence", "features", gradient="positions")

        def feed_forward(y_BTD):
            y_BTD = constrain(y_BTD, "batch", "positions", "features", gradient="sequence")
            y_BTD, routing = self.feed_forward(y_BTD), None
            if self.routes:
                y_BTD, routing = y_BTD
            y_BTD = constrain(y_BTD, "batch", "sequence", "features", gradient="positions")
            return y_BTD, routing

        if self.config.norm_position == "pre":
            x_BTD += attend(self.attention_norm(x_BTD))
            y_BTD, routing = feed_forward(self.feed_forward_norm(x_BTD))
            x_BTD += y_BTD
        else:
            x_BTD = self.attention_norm(x_BTD + attend(x_BTD))
            y_BTD, routing = feed_forward(x_BTD)
            x_BTD = self.feed_forward_norm(x_BTD + y_BTD)
        return constrain(x_BTD, "batch", "sequence", "features"), routing


class Period(nn.Module):
    """As many layers as ``moe.every``, of which the last has the experts: what a scan repeats."""

    config: ModelConfig

    def setup(self):
        n = self.config.moe.every
        self.layer = [Block(self.config, i == n - 1) for i in range(n)]

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, Routing]:
        """The residual stream, and how the last layer routed its tokens."""
        for layer in self.layer:
            x_BTD, routing = layer(x_BTD, positions_BT, segments_BT)
        return x_BTD, routing


def scanned(config: ModelConfig) -> type[nn.Module]:
    """What a scan over layers repeats: a layer, or as many as it takes to come to one's like."""
    return Period if config.moe.n_experts and config.moe.every > 1 else Block


def remat_policy(config: ModelConfig, mapped: bool = False) -> Callable | None:
    """What a layer keeps for its backward pass; None: all.

    jax's policies look at a product's batch dimensions: where layers are ``mapped``, over the
    stages of a pipeline, all have one that is not meant.
    """
    if config.remat == "none":
        return all_but_moved if stores_parts() else None
    policy = REMAT_POLICIES[config.remat]

    def of_one(primitive, *args, **params):
        if primitive.name == "dot_general":
            contracted, (left, right) = params["dimension_numbers"]
            params["dimension_numbers"] = contracted, (left[1:], right[1:])
        return policy(primitive, *args, **params)

    return of_one if mapped else policy


def rematerialised(
    config: ModelConfig, module: type[nn.Module] = Block, mapped: bool = False
) -> type[nn.Module]:
    """``module`` under ``remat_policy``."""
    policy = remat_policy(config, mapped)
    if policy is None:
        return module
    # Inside a scan nothing can be shared between the two computations anyway.
    return nn.remat(module, prevent_cse=not config.scan_layers, policy=policy)


class Decoder(nn.Module):
    """Token ids in, logits out."""

    config: ModelConfig
    max_positions: int  # the longest sequence, which learned positions and LongRoPE need

    def setup(self):
        c = rotary.laid_out(self.config, self.max_positions)
        init = partitioned(nn.initializers.normal(c.d_model**-0.5), "vocab", "embed")
        self.embedding = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        if c.position == "learned":
            init = partitioned(nn.initializers.normal(0.02), "position", "embed")
            shape = (self.max_positions, c.d_model)
            self.positions = self.param("positions", init, shape, jnp.float32)
        block = rematerialised(c)
        n_dense = c.moe.first_dense if c.moe.n_experts else 0
        n_unrolled = n_dense if c.scan_layers else c.n_layers
        self.layer = [block(c, i in c.moe_layers) for i in range(n_unrolled)]
        if c.scan_layers:
            self.layers = nn.scan(
                rematerialised(c, scanned(c)),
                variable_axes={"params": 0, "cache": 0},
                split_rngs={"params": True, "jitter": True},
                in_axes=nn.broadcast,
                length=(c.n_layers - n_dense) // (c.moe.every if c.moe.n_experts else 1),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c)
        if c.norm_position == "pre":
            self.final_norm = Norm(c.norm, c.norm_eps, zero_centred=c.zero_centred_gains)
        if not c.tied:
            self.head = Unembedding(c)

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
        x_BTD, _ = self.hidden(inputs_BT, segments_BT, positions_BT)
        return logits(x_BTD, self.unembedding(), self.config.logit_soft_cap)

    def hidden(
        self,
        inputs_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """What the head reads, (B, T, D), and how the layers with experts routed their tokens.

        That is stacked over these layers; None where there are none.
        """
        n_positions = inputs_BT.shape[1]
        if positions_BT is None:
            positions_BT = jnp.arange(n_positions)[None]
        x_BTD = self.embed(inputs_BT, positions_BT)
        routings = []
        for layer in self.layer:
            x_BTD, routing = layer(x_BTD, positions_BT, segments_BT)
            routings += [routing] if routing else []
        routing = jax.tree.map(lambda *layers: jnp.stack(layers), *routings) if routings else None
        if self.config.scan_layers:
            x_BTD, routing = self.layers(x_BTD, positions_BT, segments_BT)
        return self.last(x_BTD), routing

    def embed(self, inputs_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """What the first layer reads, (B, T, D)."""
        c = self.config
        n_positions = inputs_BT.shape[1]
        if c.position in ("sinusoidal", "learned") and n_positions > self.max_positions:
            last = self.max_positions
            raise ValueError(f"{n_positions} positions: {c.position} ones end at {last}")
        embedding_VD = gather(self.embedding.astype(c.dtype), "vocab", "embed")
        x_BTD = embedding_VD[inputs_BT]
        # Vaswani et al. scale too: a sine is as large as an embedding.
        if c.scaled_embedding or c.position == "sinusoidal":
            x_BTD *= c.d_model**0.5
        if c.position == "sinusoidal":
            x_BTD += sinusoidal(self.max_positions, c.d_model).astype(c.dtype)[positions_BT]
        elif c.position == "learned":
            table_TD = gather(self.positions.astype(c.dtype), "position", "embed")
            x_BTD += table_TD[positions_BT]
        return constrain(x_BTD, "batch", "sequence", "features")

    def last(self, x_BTD: jax.Array) -> jax.Array:
        """The last layer's output as the head reads it."""
        x_BTD = self.final_norm(x_BTD) if self.config.norm_position == "pre" else x_BTD
        return constrain(x_BTD, "batch", "positions", "features")

    def unembedding(self) -> jax.Array:
        """The head's matrix, (D, V), as it is computed with."""
        if not self.config.tied:
            return self.head()
        return gather(self.embedding.astype(self.config.dtype), "vocab", "embed").T
