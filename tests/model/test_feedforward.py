"""The feed-forward sublayer by its formula, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from lm.config import ModelConfig
from lm.model.feedforward import FeedForward

D, F = 6, 10


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "swiglu": lambda x, up, gate: (x @ gate) * expit(x @ gate) * (x @ up),
    "geglu": lambda x, up, gate: gelu(x @ gate) * (x @ up),
    "gelu": lambda x, up, gate: gelu(x @ up),
    "relu": lambda x, up, gate: np.maximum(x @ up, 0),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_formula(kind):
    rng = np.random.default_rng(0)
    up, gate, down, x = (rng.normal(size=s) for s in ((D, F), (D, F), (F, D), (2, 3, D)))
    config = ModelConfig(d_model=D, d_ff=F, n_heads=1, n_kv_heads=1, feed_forward=kind)
    params = {"up": {"kernel": up}, "down": {"kernel": down}}
    if kind in ("swiglu", "geglu"):
        params["gate"] = {"kernel": gate}
    out = FeedForward(config).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, FORMULAS[kind](x, up, gate) @ down, rtol=1e-4, atol=1e-4)
