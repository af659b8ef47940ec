"""Rotary position embedding (Su et al. 2021, RoFormer), in the split halves of Llama checkpoints.

Column i turns with column i + H/2 by ``position * base**(-2 i / H)``. The interleaved layout of
the paper is the same function up to a permutation of the head's columns.
"""

import jax
import jax.numpy as jnp


def frequencies(head_width: int, base: float) -> jax.Array:
    """Angles per position step, (H/2,), in radians."""
    return base ** (-jnp.arange(0, head_width, 2) / head_width)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Turns queries or keys by their positions; scores then depend on position differences alone.

    ``positions_BT`` may have a leading axis of size 1.
    """
    angle_BT1h = positions_BT[..., None, None] * frequencies(x_BTNH.shape[-1], base)
    sin, cos = jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
