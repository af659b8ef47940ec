import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config, LoraConfig, ModelConfig, MoeConfig, replace
from lm.model import Decoder, cross_entropy, lora

PLAIN = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
LORA = LoraConfig(rank=3, alpha=7.0)
CONFIG = dataclasses.replace(PLAIN, lora=LORA)
SCANNED = dataclasses.replace(CONFIG, scan_layers=True, remat="full")
TOKENS_BT = jnp.array(np.random.default_rng(0).integers(0, 32, (2, 9)))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def initialised(config):
    decoder = Decoder(config, 8)
    return decoder, meta.unbox(decoder.init(jax.random.key(0), TOKENS_BT[:, :-1])["params"])


def begun(config):
    """After some training: B is no longer zero."""
    decoder, params = initialised(config)
    draw = np.random.default_rng(1)
    flat = flatten_dict(params)
    for key, x in flat.items():
        if key[-1] == "lora_b":
            flat[key] = jnp.array(draw.normal(0, 0.3, x.shape), jnp.float32)
    return decoder, unflatten_dict(flat)


def without_adapters(params):
    flat = flatten_dict(params)
    return unflatten_dict({key: x for key, x in flat.items() if key[-1] not in lora.NAMES})


@pytest.mark.parametrize(
    "config", [pytest.param(CONFIG, marks=pytest.mark.slow), SCANNED], ids=["unrolled", "scanned"]
)
def test_at_the_start_the_function_is_what_it_was(config):
    decoder, params = initialised(config)
    plain = Decoder(dataclasses.replace(config, lora=LoraConfig()), 8)
    wanted = plain.apply({"params": without_adapters(params)}, TOKENS_BT)
    np.testing.assert_array_equal(decoder.apply({"params": params}, TOKENS_BT), wanted)
    a = params["layers" if config.scan_layers else "layer_0"]["attention"]["query"]["lora_a"]
    assert a.std() == pytest.approx(0.25, rel=0.2)  # and so B has a gradient


@pytest.mark.parametrize("config", [CONFIG, SCANNED], ids=["unrolled", "scanned"])
def test_merged_is_the_same_function(config):
    decoder, params = begun(config)
    plain = Decoder(dataclasses.replace(config, lora=LoraConfig()), 8)
    found = plain.apply({"params": lora.merged(params, LORA)}, TOKENS_BT)
    wanted = decoder.apply({"params": params}, TOKENS_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    off = plain.apply({"params": without_adapters(params)}, TOKENS_BT)
    assert np.abs(off - wanted).max() > 0.1


def test_gradients_are_those_of_the_merged_matrix():
    """W + s A B: dA = s dW B^T and dB = s A^T dW."""
    decoder, params = begun(CONFIG)
    plain = Decoder(PLAIN, 8)

    def nats(decoder, params):
        logits_BTV = decoder.apply({"params": params}, TOKENS_BT[:, :-1])
        return cross_entropy(logits_BTV, TOKENS_BT[:, 1:]) / 16  # nats a token

    gradient = jax.jit(jax.grad(lambda p: nats(plain, p)))
    of_plain = flatten_dict(gradient(lora.merged(params, LORA)))
    masked = lora.trained(params, LORA)
    gradient = jax.jit(jax.grad(lambda t: nats(decoder, lora.whole(params, t))))
    found = flatten_dict(gradient(masked))
    flat, seen = flatten_dict(params), 0
    for key in flat:
        if key[-1] == "lora_a":
            place = key[:-1]
            d_W, b = of_plain[(*place, "kernel")], flat[(*place, "lora_b")]
            wanted = 7 / 3 * d_W @ b.T, 7 / 3 * flat[key].T @ d_W
            for name, expected in zip(lora.NAMES, wanted, strict=True):
                np.testing.assert_allclose(found[(*place, name)], expected, rtol=2e-4, atol=5e-6)
            seen += 1
    assert seen == 2 * 7
    assert len(jax.tree.leaves(found)) == 2 * seen  # nothing else has a gradient


@pytest.mark.parametrize("targets", [("query", "value"), ("down",), LORA.targets])
@pytest.mark.parametrize("feed_forward", ["swiglu", "relu"])
def test_counted(targets, feed_forward):
    wanted = dataclasses.replace(LORA, targets=targets)
    config = dataclasses.replace(CONFIG, lora=wanted, feed_forward=feed_forward, head_width=6)
    _, params = initialised(config)
    sizes = {key: x.size for key, x in flatten_dict(params).items()}
    count = arithmetic.parameters(config)
    assert count.total == sum(sizes.values())
    assert count.adapters == sum(n for key, n in sizes.items() if key[-1] in lora.NAMES)
    names = {key[-2] for key in sizes if key[-1] in lora.NAMES}
    assert names == set(targets) - ({"gate"} if feed_forward == "relu" else set())
    plain = arithmetic.parameters(dataclasses.replace(config, lora=LoraConfig()))
    assert (plain.adapters, plain.blocks_and_head) == (0, count.blocks_and_head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lora={"rank": -1}), "model.lora.rank = -1: must be 0 or more"),
        (dict(lora={"rank": 2, "alpha": 0.0}), "model.lora.alpha = 0.0: must be above 0"),
        (dict(lora={"rank": 2, "targets": ("querry",)}), "did you mean 'query'"),
        (dict(lora={"rank": 2, "targets": ()}), "must name a matrix"),
        (
            dict(lora={"rank": 2}, moe={"n_experts": 4}),
            "experts have no adapters, so with model.moe it must be of query, key, value, out",
        ),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        replace(Config(), model=settings)


def test_attention_beside_experts():
    moe = MoeConfig(n_experts=4)
    config = dataclasses.replace(PLAIN, moe=moe, lora=LoraConfig(2, targets=("query", "out")))
    _, params = initialised(config)
    assert arithmetic.parameters(config).adapters == 2 * 2 * (2 * (16 + 16))
    assert sum(key[-1] == "lora_a" for key in flatten_dict(params)) == 4
