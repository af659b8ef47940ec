"""The attention layer's own choices; that it computes the papers' formulas: test_decoder.py."""

import jax
import jax.numpy as jnp
import pytest

from lm.command import BadInput
from lm.config import ModelConfig
from lm.model.attention import Attention


def test_a_kernel_that_cannot_run_here_initialises_but_does_not_compute():
    """The parameters are the same whatever computes: a TPU's checkpoint loads anywhere."""
    x_BTD, positions_BT = jnp.ones((1, 4, 16)), jnp.arange(4)[None]
    shapes = {}
    for kernel in ("einsum", "splash"):
        layer = Attention(ModelConfig(d_model=16, n_heads=2, n_kv_heads=1, attention_kernel=kernel))
        variables = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, positions_BT, None)
        shapes[kernel] = jax.tree.map(lambda x: x.shape, variables)
    assert shapes["einsum"] == shapes["splash"]
    with pytest.raises(BadInput, match="the platform cpu: must be a TPU"):
        jax.eval_shape(layer.apply, variables, x_BTD, positions_BT, None)
