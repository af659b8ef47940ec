"""AdamW with decoupled decay and clipping; its rate comes from ``schedule.py``."""

import jax
import jax.numpy as jnp
import optax

from lm.config import OptimizerConfig
from lm.model import lora


def is_matrix(path: tuple) -> bool:
    """Whether it is a matrix of the blocks or the head, or a part of an adapter beside one: what
    decays, and what `width` scales."""
    return path[-1].key in ("kernel", *lora.NAMES)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and Adam's direction; the rate and the decay are applied by ``apply_updates``."""
    return optax.chain(*_parts(config, config.beta1, config.beta2))


def update_if(finite: jax.Array, config: OptimizerConfig, gradient, moments, params):
    """``adamw``'s update; where not ``finite``, moments as they were and a direction of NaN.

    By decays of one and a gradient of zero: a choice between old moments and new ones would need
    memory for both, since the direction is made of the new. Bias corrections divide it by zero.
    """
    betas = (jnp.where(finite, beta, 1.0) for beta in (config.beta1, config.beta2))
    clip, adam = _parts(config, *betas)
    clipped, before = moments
    gradient, clipped = clip.update(gradient, clipped, params)
    gradient = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
    direction, after = adam.update(gradient, before, params)
    count = jnp.where(finite, after.count, before.count)
    return direction, (clipped, after._replace(count=count))


def _parts(config: OptimizerConfig, beta1, beta2) -> tuple[optax.GradientTransformation, ...]:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return clip, optax.scale_by_adam(beta1, beta2, config.eps)


def apply_updates(params, direction, rate, matrix_scale, weight_decay: float):
    """``p - rate * scale * (direction + weight_decay * p)``, decoupled (Loshchilov & Hutter 2019).

    Scale and decay are the matrices' alone.
    """

    def update(path, p, u):
        if not is_matrix(path):
            return p - rate * u
        return p - rate * matrix_scale * (u + weight_decay * p)

    return jax.tree_util.tree_map_with_path(update, params, direction)
