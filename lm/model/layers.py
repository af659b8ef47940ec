"""What every sublayer is made of: matrices, norms, positions that are added once."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import LoraConfig, ModelConfig
from lm.model.quantized import matmul
from lm.sharding import gather, is_split, partitioned


class Linear(nn.Module):
    """``x @ kernel (+ bias)`` over the last axis; float32 parameters, computed in ``dtype``.

    Its name says whether ``lora`` means it.
    """

    features: int
    axes: tuple[str, str]  # logical axes of the kernel
    scale: float = 1.0  # the kernel's standard deviation is scale / sqrt(fan_in)
    use_bias: bool = False
    dtype: str = "float32"
    quantization: str = "none"  # of the product: none | int8 | fp8
    lora: LoraConfig = LoraConfig()  # where it names this matrix, + scale * x @ A @ B

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = x.shape[-1]
        init = nn.initializers.normal(self.scale / fan_in**0.5)
        kernel = self.param(
            "kernel", partitioned(init, *self.axes), (fan_in, self.features), jnp.float32
        )
        # Two axes: the backward of (B, T, D) @ (D, F) is slow in XLA on CPU; no worse elsewhere.
        # But positions over several devices have no place in one axis with the batch.
        rows = x if is_split("positions") else x.reshape(-1, fan_in)
        y = matmul(rows, gather(kernel.astype(self.dtype), *self.axes), self.quantization)
        if self.lora.adapts(self.name):
            (into, out), rank = self.axes, self.lora.rank
            # B is zero, so that the function is at first what it was; A then has a gradient for B.
            a_init = partitioned(nn.initializers.normal(fan_in**-0.5), into, None)
            b_init = partitioned(nn.initializers.zeros, None, out)
            a_DR = self.param("lora_a", a_init, (fan_in, rank), jnp.float32)
            b_RF = self.param("lora_b", b_init, (rank, self.features), jnp.float32)
            a_DR = gather(a_DR.astype(self.dtype), into, None)
            b_RF = gather(b_RF.astype(self.dtype), None, out)
            y += self.lora.scale * ((rows @ a_DR) @ b_RF)
        if self.use_bias:
            zeros = partitioned(nn.initializers.zeros, self.axes[1])
            y += self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Unembedding(nn.Module):
    """The head's matrix, (D, V), in the config's dtype."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        init = partitioned(nn.initializers.normal(c.d_model**-0.5), "embed", "vocab")
        kernel = self.param("kernel", init, (c.d_model, c.vocab_size), jnp.float32)
        return gather(kernel.astype(c.dtype), "embed", "vocab")


class Norm(nn.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * gain (Zhang & Sennrich 2019), or LayerNorm.

    Over the last axis, in float32.
    """

    kind: str
    eps: float
    axis: str | None = "embed"  # logical axis of the gain
    zero_centred: bool = False  # what is stored is the gain less 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x32 = x.astype(jnp.float32)  # bfloat16 squares lose too much
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, -1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
        init = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        gain = self.param("gain", partitioned(init, self.axis), (width,), jnp.float32)
        x32 = x32 * (1 + gain if self.zero_centred else gain)
        if self.kind == "layer":
            zeros = partitioned(nn.initializers.zeros, self.axis)
            x32 = x32 + self.param("bias", zeros, (width,), jnp.float32)
        return x32.astype(x.dtype)


def sinusoidal(n_positions: int, d_model: int) -> jax.Array:
    """Sines in the even columns, cosines in the odd ones (Vaswani et al. 2017, 3.5); (T, D)."""
    angle = jnp.arange(n_positions)[:, None] / 10_000 ** (jnp.arange(0, d_model, 2) / d_model)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(n_positions, d_model)
