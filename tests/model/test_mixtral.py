"""Equality with transformers' Mixtral, weight for weight (needs the extra `compare`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import ModelConfig, MoeConfig
from lm.model.moe import Moe, Router

torch = pytest.importorskip("torch", reason="torch is not here; pip install '.[compare]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not here; pip install '.[compare]'"
)
from transformers.models.mixtral import modeling_mixtral  # noqa: E402

D, F, E, B, T = 24, 40, 8, 3, 17


def their_block(top_k):
    torch.manual_seed(0)
    block = modeling_mixtral.MixtralSparseMoeBlock(
        transformers.MixtralConfig(
            hidden_size=D,
            intermediate_size=F,
            num_local_experts=E,
            num_experts_per_tok=top_k,
            experts_implementation="eager",
        )
    ).float()
    for weight in block.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.3)
    return block


def as_ours(block, of=lambda weight: weight):
    """Their weights, or what ``of`` makes of them, as our tree."""
    get = {name: of(weight).detach().numpy() for name, weight in block.named_parameters()}
    if "experts.gate_up_proj" in get:
        gate, up = np.split(get["experts.gate_up_proj"], 2, 1)
        down = get["experts.down_proj"]
    else:  # before transformers 5, a module an expert
        gate, down, up = (
            np.stack([get[f"experts.{e}.{name}.weight"] for e in range(E)])
            for name in ("w1", "w2", "w3")
        )
    tree = {
        "router": {"kernel": get["gate.weight"].T},
        "experts": {
            name: {"kernel": np.swapaxes(stack, 1, 2)}
            for name, stack in (("gate", gate), ("up", up), ("down", down))
        },
    }
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("dispatch", ["capacity", "ragged", "auto"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_outputs_gradients_and_the_order_of_experts_are_mixtrals(top_k, dispatch):
    block, rng = their_block(top_k), np.random.default_rng(0)
    x_BTD, g_BTD = rng.normal(size=(2, B, T, D)).astype(np.float32)
    moe = MoeConfig(n_experts=E, top_k=top_k, dispatch=dispatch, capacity_factor=float(E))
    config = ModelConfig(d_model=D, n_heads=2, n_kv_heads=2, d_ff=F, moe=moe)
    params = as_ours(block)

    theirs_x = torch.tensor(x_BTD, requires_grad=True)
    theirs = block(theirs_x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    (theirs * torch.tensor(g_BTD)).sum().backward()

    def loss(params, x_BTD):
        y_BTD, routing = Moe(config).apply({"params": params}, x_BTD)
        return jnp.sum(y_BTD * g_BTD), (y_BTD, routing)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (y_BTD, routing)), (gradient, x_gradient) = step(params, x_BTD)
    np.testing.assert_allclose(y_BTD, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    expected = as_ours(block, lambda weight: weight.grad)
    assert jax.tree.structure(gradient) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected)
    np.testing.assert_allclose(x_gradient, theirs_x.grad.numpy(), atol=1e-4)

    their_logits = (torch.tensor(x_BTD) @ block.gate.weight.T).detach()
    logits_BTE, _ = Router(moe).apply({"params": params["router"]}, x_BTD)
    np.testing.assert_allclose(logits_BTE, their_logits.numpy(), atol=1e-5)
    np.testing.assert_array_equal(np.argsort(logits_BTE, -1), np.argsort(their_logits.numpy(), -1))

    # They divide the experts' counts by tokens and we by choices: theirs is k at uniform routing.
    flat = their_logits.reshape(-1, E)
    their_loss = modeling_mixtral.load_balancing_loss_func((flat,), E, top_k).item()
    assert routing.balance_loss == pytest.approx(their_loss / top_k, rel=1e-5)
