"""Rotary position embedding (Su et al. 2021, RoFormer), in the split halves of Llama checkpoints.

Column i turns with column i + H/2 by ``position * base**(-2 i / H)``. The interleaved layout of
the paper is the same function up to a permutation of the head's columns.

Beyond the context L of pre-training by a factor s, ``RopeScalingConfig.kind`` slows the turning:

linear    every pair by s (Chen et al. 2023, "Extending context window ...", eq. 4)
ntk       by a base of base * s**(H / (H - 2)): the first pair as it was, the last by s (bloc97
          2023; Peng et al. 2023, YaRN, eq. 16)
yarn      pairs with many turns in L not at all, those with few by s, a ramp between; attention at
          a lower temperature (Peng et al. 2023, "NTK-by-parts" and eq. 22; the ramp runs over the
          pairs' numbers, rounded outwards, as in the authors' code and in transformers)
llama3    likewise, but the ramp runs over the turns, and there is no temperature (Llama 3.1)
longrope  each pair by a factor that was searched for (Ding et al. 2024, LongRoPE)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig, RopeScalingConfig

UNSCALED = RopeScalingConfig()
FAST_TURNS = {"yarn": 32.0, "llama3": 4.0}  # the papers' own


def frequencies(head_width: int, base: float, scaling: RopeScalingConfig = UNSCALED) -> np.ndarray:
    """Angles per position step, (H/2,), in radians."""
    pair = np.arange(head_width // 2)
    if scaling.kind == "ntk":
        base *= scaling.factor ** (head_width / (head_width - 2))
    frequency = base ** (-2 * pair / head_width)
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "longrope":
        return frequency / np.array(scaling.long_factors)
    if scaling.kind in FAST_TURNS:
        fast, slow = scaling.fast_turns or FAST_TURNS[scaling.kind], scaling.slow_turns
        if scaling.kind == "yarn":
            first = max(math.floor(_pair_that_turns(fast, head_width, base, scaling)), 0)
            last = math.ceil(_pair_that_turns(slow, head_width, base, scaling))
            last = max(min(last, head_width - 1), first + 1e-3)
            kept = (last - pair) / (last - first)
        else:
            turns = scaling.original_positions * frequency / (2 * math.pi)
            kept = (turns - slow) / (fast - slow)
        kept = np.clip(kept, 0, 1)
        return frequency * (kept + (1 - kept) / scaling.factor)
    return frequency


def _pair_that_turns(turns: float, head_width: int, base: float, scaling) -> float:
    """The number, not whole, of the pair that turns this often in the original context."""
    slowest = scaling.original_positions / (2 * math.pi * turns)
    return head_width / 2 * math.log(slowest) / math.log(base)


def attention_factor(scaling: RopeScalingConfig) -> float:
    """What queries and keys are each multiplied with; scores grow by its square."""
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":  # eq. 22: sqrt(1 / t) = 0.1 ln s + 1
        return 0.1 * math.log(scaling.factor) + 1
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_positions))
    return 1.0


def laid_out(config: ModelConfig, n_positions: int) -> ModelConfig:
    """``config`` for sequences of up to ``n_positions``: under LongRoPE, with the factors for them.

    One choice for all sequences, so that a cache's keys are never turned by two sets.
    """
    scaling = config.rope_scaling
    if scaling.kind != "longrope" or n_positions > scaling.original_positions:
        return config
    chosen = dataclasses.replace(scaling, long_factors=scaling.short_factors)
    return dataclasses.replace(config, rope_scaling=chosen)


def rotate(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    base: float,
    scaling: RopeScalingConfig = UNSCALED,
) -> jax.Array:
    """Turns queries or keys by their positions; scores then depend on position differences alone.

    ``positions_BT`` may have a leading axis of size 1.
    """
    frequency_h = jnp.asarray(frequencies(x_BTNH.shape[-1], base, scaling), jnp.float32)
    angle_BT1h = positions_BT[..., None, None] * frequency_h
    factor = attention_factor(scaling)
    sin, cos = factor * jnp.sin(angle_BT1h), factor * jnp.cos(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
