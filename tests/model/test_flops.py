"""The `exact` count of training FLOPs against every matrix product traced, and XLA's count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from lm import arithmetic
from lm.config import LoraConfig, ModelConfig
from lm.model import Decoder, cross_entropy, lora

B, T = 2, 32
GROUPED = ModelConfig(
    vocab_size=200, d_model=96, n_layers=2, n_heads=6, n_kv_heads=2, head_width=12, d_ff=224
)
PLAIN = dataclasses.replace(
    GROUPED, n_kv_heads=6, feed_forward="relu", tied=True, qkv_bias=True, position="learned"
)


def lowered(config):
    """The gradient of the summed loss, traced on shapes alone."""
    decoder = Decoder(config, T)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = meta.unbox(jax.eval_shape(decoder.init, jax.random.key(0), tokens))["params"]

    def loss(params, inputs_BT, targets_BT):
        return cross_entropy(decoder.apply({"params": params}, inputs_BT), targets_BT)

    return jax.jit(jax.value_and_grad(loss)).trace(params, tokens, tokens)


def product_flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2 * out * math.prod(left[axis] for axis in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += product_flops(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("config", [GROUPED, PLAIN], ids=["grouped", "plain"])
def test_exact_is_every_matrix_product_of_the_gradient(config):
    expected = arithmetic.training_flops(config, T, B * T, "exact")
    assert product_flops(lowered(config).jaxpr.jaxpr) == expected


def test_exact_with_adapters():
    """All but what would flow back to the embedding, which nothing trains: from the first layer's
    queries, keys and values, and their adapters."""
    config = dataclasses.replace(GROUPED, lora=LoraConfig(rank=4))
    decoder = Decoder(config, T)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = meta.unbox(jax.eval_shape(decoder.init, jax.random.key(0), tokens))["params"]

    def loss(trained, params, inputs_BT, targets_BT):
        params = lora.whole(params, trained)
        return cross_entropy(decoder.apply({"params": params}, inputs_BT), targets_BT)

    trained = lora.trained(params, config.lora)
    traced = jax.jit(jax.grad(loss)).trace(trained, params, tokens, tokens)
    expected = arithmetic.training_flops(config, T, B * T, "exact")
    into_the_first = 2 * B * T * config.d_model * ((6 + 2 * 2) * 12 + 3 * 4)
    assert product_flops(traced.jaxpr.jaxpr) == expected - into_the_first


def test_exact_is_xlas_count_but_for_what_is_elementwise():
    """XLA also counts norms, softmax, activations and the loss: 2 % at this width."""
    cost = lowered(GROUPED).lower().compile().cost_analysis()
    expected = arithmetic.training_flops(GROUPED, T, B * T, "exact")
    assert 1.0 < cost["flops"] / expected < 1.04
