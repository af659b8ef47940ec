"""The next token from its logits: greedy, or a draw from what temperature and filters leave."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.command import BadInput


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Applied in this order; each filter sees what the one before left."""

    repetition_penalty: float = 1.0  # of tokens already there (Keskar et al. 2019, CTRL, 4.1)
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # the k likeliest (0: all)
    top_p: float = 1.0  # the fewest whose probabilities reach p (Holtzman et al. 2020)
    min_p: float = 0.0  # those with at least min_p of the likeliest's probability

    def __post_init__(self):
        ranges = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
        }
        for name, (fine, allowed) in ranges.items():
            if not fine:
                raise BadInput(f"{name} = {getattr(self, name)}: must be {allowed}")


def filtered(
    logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> jax.Array:
    """The logits that a token is drawn from, -inf where none may be; temperature 0 counts as 1.

    ``seen_BV`` (bool): tokens of the text so far, which the repetition penalty makes less likely.
    Of equal logits the filters prefer the smaller id.
    """
    if sampling.repetition_penalty != 1:
        penalised = jnp.where(
            logits_BV > 0,
            logits_BV / sampling.repetition_penalty,
            logits_BV * sampling.repetition_penalty,
        )
        logits_BV = jnp.where(seen_BV, penalised, logits_BV)
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, -1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, -1)
    if sampling.top_k:
        sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < sampling.top_k, sorted_BV, -jnp.inf)
    if sampling.top_p < 1:
        p_BV = jax.nn.softmax(sorted_BV, -1)
        before_BV = jnp.cumsum(p_BV, -1) - p_BV
        sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
    if sampling.min_p:
        least_B1 = sorted_BV[:, :1] + jnp.log(sampling.min_p)
        sorted_BV = jnp.where(sorted_BV >= least_B1, sorted_BV, -jnp.inf)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return jnp.zeros_like(logits_BV).at[rows_B1, order_BV].set(sorted_BV)


def draw(
    keys_B: jax.Array, logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None
) -> jax.Array:
    """Token ids, (B,). A key a row: what a row draws does not depend on its neighbours."""
    logits_BV = filtered(logits_BV, sampling, seen_BV)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
