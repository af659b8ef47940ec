"""Equality with transformers' Llama, weight for weight (needs the extra `compare`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig
from lm.model import Decoder, cross_entropy

torch = pytest.importorskip("torch", reason="torch is not here; pip install '.[compare]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not here; pip install '.[compare]'"
)

T = 24
CONFIG = ModelConfig(
    vocab_size=61,
    d_model=36,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    head_width=8,
    d_ff=56,
    norm_eps=1e-4,
    rope_base=500.0,
)
# Ours to theirs, of one layer; kernels are (in, out) here and (out, in) there.
LAYER = {
    ("attention", "query", "kernel"): "self_attn.q_proj.weight",
    ("attention", "key", "kernel"): "self_attn.k_proj.weight",
    ("attention", "value", "kernel"): "self_attn.v_proj.weight",
    ("attention", "out", "kernel"): "self_attn.o_proj.weight",
    ("attention", "query", "bias"): "self_attn.q_proj.bias",
    ("attention", "key", "bias"): "self_attn.k_proj.bias",
    ("attention", "value", "bias"): "self_attn.v_proj.bias",
    ("feed_forward", "gate", "kernel"): "mlp.gate_proj.weight",
    ("feed_forward", "up", "kernel"): "mlp.up_proj.weight",
    ("feed_forward", "down", "kernel"): "mlp.down_proj.weight",
    ("attention_norm", "gain"): "input_layernorm.weight",
    ("feed_forward_norm", "gain"): "post_attention_layernorm.weight",
}


def their_model(config):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            tie_word_embeddings=config.tied,
            attention_bias=config.qkv_bias,
            max_position_embeddings=T,
        )
    )
    for name, weight in model.named_parameters():
        # theirs starts at 0.02 everywhere, with gains of 1 and biases of 0: too tame to tell
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.15)
        if name.endswith("o_proj.bias"):  # their bias is everywhere, ours on queries, keys, values
            torch.nn.init.zeros_(weight)
    return model


def as_ours(tensors, config):
    """Their tensors by name (weights or gradients) as our tree."""
    arrays = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    tree = {"embedding": arrays["model.embed_tokens.weight"]}
    tree["final_norm"] = {"gain": arrays["model.norm.weight"]}
    if not config.tied:
        tree["head"] = {"kernel": arrays["lm_head.weight"].T}
    for i in range(config.n_layers):
        layer = tree[f"layer_{i}"] = {}
        for path, theirs in LAYER.items():
            if f"model.layers.{i}.{theirs}" not in arrays:
                continue
            holder = layer
            for part in path[:-1]:
                holder = holder.setdefault(part, {})
            holder[path[-1]] = arrays[f"model.layers.{i}.{theirs}"].T
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": True}, {"n_kv_heads": 6}, {"n_kv_heads": 1}, {"qkv_bias": True}],
    ids=["grouped", "tied", "mha", "mqa", "bias"],
)
def test_logits_loss_and_gradients_are_llamas(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = their_model(config)
    rng = np.random.default_rng(0)
    inputs_BT, targets_BT = rng.integers(config.vocab_size, size=(2, 3, T))

    theirs = model(torch.tensor(inputs_BT)).logits
    their_loss = torch.nn.functional.cross_entropy(
        theirs.reshape(-1, config.vocab_size), torch.tensor(targets_BT).reshape(-1)
    )
    their_loss.backward()

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        logits_BTV = Decoder(config, T).apply({"params": params}, inputs_BT)
        return cross_entropy(logits_BTV, targets_BT) / targets_BT.size

    params = as_ours(dict(model.named_parameters()), config)
    logits_BTV = Decoder(config, T).apply({"params": params}, inputs_BT)
    np.testing.assert_allclose(logits_BTV, theirs.detach().numpy(), atol=1e-4)
    loss, gradient = loss_and_gradient(params)
    assert loss == pytest.approx(their_loss.item(), rel=1e-5)
    expected = as_ours({name: p.grad for name, p in model.named_parameters()}, config)
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, expected)
