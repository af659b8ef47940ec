"""Low-rank adapters (Hu et al. 2021): which parameters they are, and what they add up to.

A matrix W with an adapter computes x W + scale * x A B, with A (D, R) and B (R, F).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from optax import MaskedNode

from lm.config import LoraConfig

NAMES = ("lora_a", "lora_b")


def trained(params: Any, lora: LoraConfig) -> Any:
    """``params`` with optax's mask in the place of what stays as it is: all but the adapters.

    Without adapters nothing is masked. A masked leaf is no leaf: it has no gradient, and the
    optimizer no state for it.
    """
    if not lora.rank:
        return params
    flat = flatten_dict(params)
    return unflatten_dict({k: x if k[-1] in NAMES else MaskedNode() for k, x in flat.items()})


def whole(params: Any, trained: Any) -> Any:
    """``params`` with the leaves that ``trained`` has in the place of their own."""
    return jax.tree.map(lambda p, t: p if isinstance(t, MaskedNode) else t, params, trained)


def merged(params: Any, lora: LoraConfig) -> Any:
    """Plain parameters, of the same function: every adapter's product added to its matrix.

    Layers that are stacked in ``params`` stay so.
    """
    flat = flatten_dict(params)
    plain = {key: x for key, x in flat.items() if key[-1] not in NAMES}
    for key in flat:
        if key[-1] == "lora_a":
            a, b = flat[key], flat[(*key[:-1], "lora_b")]
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            plain[(*key[:-1], "kernel")] += lora.scale * product
    return unflatten_dict(plain)
