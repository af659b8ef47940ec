"""The feed-forward sublayer: gated (Shazeer 2020, "GLU variants") or plain."""

import flax.linen as nn
import jax

from lm.config import ModelConfig
from lm.model.layers import Linear
from lm.sharding import constrain

ACTIVATIONS = {"swiglu": nn.silu, "geglu": nn.gelu, "gelu": nn.gelu, "relu": nn.relu}
GATED = ("swiglu", "geglu")


class FeedForward(nn.Module):
    """SwiGLU: ``(SiLU(x W_gate) * (x W_up)) W_down``; ungated: ``activation(x W_up) W_down``."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.feed_forward]
        up_BTF = Linear(c.d_ff, ("embed", "ff"), dtype=c.dtype, name="up")(x_BTD)
        if c.feed_forward in GATED:
            gate_BTF = Linear(c.d_ff, ("embed", "ff"), dtype=c.dtype, name="gate")(x_BTD)
            hidden_BTF = activation(gate_BTF) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "positions", "act_ff")
        return Linear(
            c.d_model, ("ff", "embed"), (2 * c.n_layers) ** -0.5, dtype=c.dtype, name="down"
        )(hidden_BTF)
