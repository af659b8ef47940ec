"""The feed-forward sublayer: gated (Shazeer 2020, "GLU variants") or plain."""

from functools import partial

import flax.linen as nn
import jax

from lm.config import ModelConfig
from lm.model.layers import Linear
from lm.sharding import constrain

ACTIVATIONS = {"swiglu": nn.silu, "geglu": nn.gelu, "gelu": nn.gelu, "relu": nn.relu}
GATED = ("swiglu", "geglu")


def activate(kind: str, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """``activation(gate) * up``; ungated (None), ``activation(up)``."""
    return ACTIVATIONS[kind](up) if gate is None else ACTIVATIONS[kind](gate) * up


class FeedForward(nn.Module):
    """SwiGLU: ``(SiLU(x W_gate) * (x W_up)) W_down``; ungated: ``activation(x W_up) W_down``."""

    config: ModelConfig
    d_ff: int = 0  # 0: the config's

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        linear = partial(Linear, dtype=c.dtype, quantization=c.quantization, lora=c.lora)
        into = partial(linear, self.d_ff or c.d_ff, ("embed", "ff"))
        up_BTF = into(name="up")(x_BTD)
        gate_BTF = into(name="gate")(x_BTD) if c.feed_forward in GATED else None
        hidden_BTF = activate(c.feed_forward, up_BTF, gate_BTF)
        hidden_BTF = constrain(hidden_BTF, "batch", "positions", "act_ff")
        out = linear(c.d_model, ("ff", "embed"), (2 * c.n_layers) ** -0.5, name="down")
        return out(hidden_BTF)
