"""AdamW with decoupled decay and clipping; its rate comes from ``schedule.py``."""

import jax
import optax

from lm.config import OptimizerConfig
from lm.model import lora


def is_matrix(path: tuple) -> bool:
    """Whether it is a matrix of the blocks or the head, or a part of an adapter beside one: what
    decays, and what `width` scales."""
    return path[-1].key in ("kernel", *lora.NAMES)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping and Adam's direction; the rate and the decay are applied by ``apply_updates``."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(config.beta1, config.beta2, config.eps))


def apply_updates(params, direction, rate, matrix_scale, weight_decay: float):
    """``p - rate * scale * (direction + weight_decay * p)``, decoupled (Loshchilov & Hutter 2019).

    Scale and decay are the matrices' alone.
    """

    def update(path, p, u):
        if not is_matrix(path):
            return p - rate * u
        return p - rate * matrix_scale * (u + weight_decay * p)

    return jax.tree_util.tree_map_with_path(update, params, direction)
