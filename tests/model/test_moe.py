"""The mixture of experts against a loop over tokens in float64, and what routing must not break."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy.special import expit, softmax

from lm.command import BadInput
from lm.config import ModelConfig, MoeConfig
from lm.model.feedforward import FeedForward
from lm.model.moe import Moe, capacity, choose, load_balancing_loss, router_z_loss

B, T, D, F, E = 3, 12, 8, 6, 4
X_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Many small programs run once each: their compilation is what these tests wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(feed_forward="swiglu", n_layers=2, **moe):
    moe = MoeConfig(**{"n_experts": E, "top_k": 2, **moe})
    return ModelConfig(
        d_model=D, n_heads=2, n_kv_heads=2, d_ff=F, n_layers=n_layers,
        feed_forward=feed_forward, moe=moe,
    )  # fmt: skip


def weights(config):
    """The layer's parameters, with a router that has opinions."""
    tree = jax.eval_shape(Moe(config).init, jax.random.key(0), X_BTD)
    shapes, rng = meta.unbox(tree)["params"], np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / x.shape[-2 if x.ndim > 1 else 0] ** 0.5),
        shapes,
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, x_BTD=X_BTD):
    return Moe(config).apply({"params": params}, x_BTD)


def expert(p, e, x, kind):
    up = x @ p["up"]["kernel"][e]
    gelu = lambda y: y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))  # noqa: E731
    if kind == "relu":
        hidden = np.maximum(up, 0)
    elif kind == "gelu":
        hidden = gelu(up)
    else:
        gate = x @ p["gate"]["kernel"][e]
        hidden = (gate * expit(gate) if kind == "swiglu" else gelu(gate)) * up
    return hidden @ p["down"]["kernel"][e]


def reference(config, params, x_BTD=X_BTD, n_slots=None):
    """One token after the other: y_BTD, and how often each expert was chosen and had no room."""
    moe, kind = config.moe, config.feed_forward
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    y_BTD = np.zeros(x_BTD.shape)
    chosen, dropped = np.zeros(moe.n_experts), 0
    for b, x_TD in enumerate(np.asarray(x_BTD, np.float64)):
        taken = np.zeros(moe.n_experts, int)
        logits = x_TD @ p["router"]["kernel"]
        scores = softmax(logits, -1) if moe.gate == "softmax" else expit(logits)
        if moe.routing == "expert_choice":
            room = -(-moe.top_k * len(x_TD) // moe.n_experts)
            for e in range(moe.n_experts):
                for t in np.argsort(-scores[:, e], kind="stable")[:room]:
                    y_BTD[b, t] += scores[t, e] * expert(p["experts"], e, x_TD[t], kind)
        else:
            bias = p["router"].get("balance_bias", 0)
            for t, x in enumerate(x_TD):
                best = np.argsort(-(scores[t] + bias), kind="stable")[: moe.top_k]
                gates = scores[t][best]
                if moe.renormalise and moe.top_k > 1:
                    gates = gates / gates.sum()
                for e, gate in zip(best, gates, strict=True):
                    chosen[e] += 1
                    if n_slots is not None and taken[e] >= n_slots:
                        dropped += 1
                        continue
                    taken[e] += 1
                    y_BTD[b, t] += gate * expert(p["experts"], e, x, kind)
        for t, x in enumerate(x_TD if moe.n_shared else ()):
            shared = {name: {"kernel": k["kernel"][None]} for name, k in p["shared"].items()}
            y_BTD[b, t] += expert(shared, 0, x, kind)
    return y_BTD, chosen, dropped


VARIANTS = {
    "mixtral": {},
    "switch": dict(top_k=1),
    "three": dict(top_k=3, renormalise=False),
    "sigmoid": dict(gate="sigmoid"),
    "shared": dict(n_shared=2),
    "fine": dict(n_experts=8, top_k=4, granularity=2),
    "own_width": dict(expert_d_ff=5),
    "bias": dict(bias_rate=0.1),
    "relu": dict(feed_forward="relu"),
    "gelu": dict(feed_forward="gelu"),
    "geglu": dict(feed_forward="geglu"),
}


@pytest.mark.parametrize("dispatch", ["auto", "ragged", "capacity"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_is_its_formula_token_by_token(name, dispatch):
    c = config(**VARIANTS[name], dispatch=dispatch, capacity_factor=0.75)
    n_slots = capacity(c.moe, T) if dispatch == "capacity" else None
    y_BTD, routing = apply(c, weights(c))
    expected, chosen, dropped = reference(c, weights(c), n_slots=n_slots)
    np.testing.assert_allclose(y_BTD, expected, atol=2e-5)
    np.testing.assert_allclose(routing.load_E, chosen / chosen.sum(), rtol=1e-6)
    assert routing.dropped == pytest.approx(dropped / chosen.sum(), rel=1e-6)
    assert (dropped > 0) == (dispatch == "capacity")
