"""The learning rate as a function of the saved step: warmup, then cosine, linear (WSD) or no decay.

All that differs between runs of one shape is an argument here, so that they share one program.
"""

from typing import Any, NamedTuple

Scalar = Any  # a number, or a traced scalar


class Schedule(NamedTuple):
    """A run's schedule, in optimizer steps."""

    peak: Scalar  # rate of everything but the matrices
    matrix_scale: Scalar  # the matrices' rate over `peak` (1 but under the rule `width`)
    warmup: Scalar  # steps of linear warmup
    decay_start: Scalar  # the step at which decay begins
    decay_steps: Scalar  # its length; steps beyond hold the final rate
    final_fraction: Scalar  # the last rate over the peak


def learning_rate(schedule: Schedule, step: Scalar, kind: str) -> Scalar:
    """The rate of step ``step``, from 0: ``cosine``, ``wsd`` (linear decay) or ``constant``."""
    import jax.numpy as jnp  # here, so that planning a run needs no jax

    warm = jnp.minimum(1.0, (step + 1) / jnp.maximum(schedule.warmup, 1.0))
    if kind == "constant":
        return schedule.peak * warm
    done = jnp.clip((step - schedule.decay_start) / jnp.maximum(schedule.decay_steps, 1.0), 0, 1)
    shape = 0.5 * (1 + jnp.cos(jnp.pi * done)) if kind == "cosine" else 1 - done
    final = schedule.final_fraction
    return schedule.peak * warm * (final + (1 - final) * shape)
