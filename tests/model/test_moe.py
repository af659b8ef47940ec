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


pytestmark = pytest.mark.usefixtures("quick_compilation")


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
            room, untaken = -(-moe.top_k * len(x_TD) // moe.n_experts), set(range(len(x_TD)))
            for e in range(moe.n_experts):
                for t in np.argsort(-scores[:, e], kind="stable")[:room]:
                    untaken -= {t}
                    y_BTD[b, t] += scores[t, e] * expert(p["experts"], e, x_TD[t], kind)
            dropped += len(untaken)
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


@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"gate": "sigmoid", "n_shared": 1}])
def test_expert_choice_takes_the_best_tokens_of_each_sequence(changes):
    c = config(routing="expert_choice", **changes)
    y_BTD, routing = apply(c, weights(c))
    expected, _, untaken = reference(c, weights(c))
    np.testing.assert_allclose(y_BTD, expected, atol=2e-5)
    np.testing.assert_array_equal(routing.load_E, np.full(E, 1 / E))
    assert routing.dropped == pytest.approx(untaken / (B * T))
    assert untaken > 0 or changes == {}


def test_one_expert_is_the_dense_layer():
    params = weights(config(n_experts=1, top_k=1))
    dense = {name: {"kernel": leaf["kernel"][0]} for name, leaf in params["experts"].items()}
    for dispatch in ("auto", "capacity", "ragged"):
        c = config(n_experts=1, top_k=1, dispatch=dispatch)
        expected = jax.jit(FeedForward(c).apply)({"params": dense}, X_BTD)
        np.testing.assert_array_equal(apply(c, params)[0], expected, err_msg=dispatch)


@pytest.mark.parametrize("dispatch", ["capacity", "ragged"])
def test_the_experts_order_does_not_matter(dispatch):
    c = config(dispatch=dispatch, bias_rate=0.1)
    params, order = weights(c), np.array([2, 0, 3, 1])
    moved = {
        "router": jax.tree.map(lambda x: x[..., order], params["router"]),
        "experts": jax.tree.map(lambda x: x[order], params["experts"]),
    }
    (y_BTD, routing), (expected, before) = apply(c, moved), apply(c, params)
    np.testing.assert_allclose(y_BTD, expected, atol=1e-6)
    np.testing.assert_allclose(routing.load_E, before.load_E[order], atol=1e-7)


def test_with_no_room_at_all_the_residual_is_all_there_is():
    c = config(dispatch="capacity")
    object.__setattr__(c.moe, "capacity_factor", 0.0)  # what a config refuses
    y_BTD, routing = jax.jit(Moe(c).apply)({"params": weights(c)}, X_BTD)
    np.testing.assert_array_equal(y_BTD, 0)
    assert routing.dropped == 1


def test_what_else_is_in_the_batch_changes_nothing():
    c = config(dispatch="capacity", capacity_factor=0.5)
    whole = apply(c, weights(c))[0]
    for b in range(B):
        np.testing.assert_allclose(
            apply(c, weights(c), X_BTD[b : b + 1])[0][0], whole[b], atol=1e-6
        )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_later_tokens_change_nothing_before_them_though_tokens_are_dropped(top_k):
    """With GShard's order, first choices before all second ones, this fails for top_k > 1."""
    c = config(dispatch="capacity", capacity_factor=0.4, top_k=top_k)
    before, routing = apply(c, weights(c))
    after, _ = apply(c, weights(c), X_BTD.at[:, 6:].multiply(-1))
    assert routing.dropped > 0.2
    np.testing.assert_array_equal(before[:, :6], after[:, :6])


def test_expert_choice_looks_ahead():
    c = config(routing="expert_choice")
    before, _ = apply(c, weights(c))
    after, _ = apply(c, weights(c), X_BTD.at[:, 6:].multiply(-3))
    assert np.abs(before[:, :6] - after[:, :6]).max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        dict(dispatch="capacity", capacity_factor=0.75),
        dict(dispatch="ragged"),
        dict(dispatch="capacity", top_k=1, capacity_factor=0.75),
        dict(routing="expert_choice"),
        dict(gate="sigmoid", renormalise=False, dispatch="capacity", n_shared=1),
    ],
)
def test_gradients_are_finite_differences(changes):
    """To input and every parameter, the router's too: at a token whose choices are not on edge."""
    c = config(**changes, balance_coefficient=1.0, z_coefficient=1.0)
    g_BTD = jnp.asarray(np.random.default_rng(5).normal(size=X_BTD.shape), jnp.float32)

    @jax.jit
    def loss(params, x_BTD):
        y_BTD, routing = Moe(c).apply({"params": params}, x_BTD)
        return jnp.sum(y_BTD * g_BTD) + routing.balance_loss + routing.z_loss + routing.entropy

    point, rng = (weights(c), X_BTD), np.random.default_rng(6)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), point)
    gradient = jax.grad(loss, (0, 1))(*point)
    for name in ("router", "experts", "x"):  # each alone, so that none hides behind another

        def moved(by, name=name):
            params = dict(point[0])
            if name == "x":
                return float(loss(params, point[1] + by * direction[1]))
            params[name] = jax.tree.map(lambda p, d: p + by * d, params[name], direction[0][name])
            return float(loss(params, point[1]))

        h = 1e-3
        numeric = (moved(h) - moved(-h)) / (2 * h)
        parts = (
            (gradient[1], direction[1]) if name == "x" else (gradient[0][name], direction[0][name])
        )
        exact = sum(
            float(jnp.vdot(a, b)) for a, b in zip(*map(jax.tree.leaves, parts), strict=True)
        )
        assert abs(exact) > 0.05
        assert numeric == pytest.approx(exact, rel=0.02, abs=0.02), name


def test_the_load_balancing_loss_is_1_when_uniform_and_e_when_collapsed():
    uniform_E, n = jnp.full(8, 1 / 8), 1000
    assert load_balancing_loss(uniform_E, jnp.full((2, n, 8), 1 / 8)) == pytest.approx(1)
    one = jnp.zeros(8).at[3].set(1.0)
    assert load_balancing_loss(one, jnp.broadcast_to(one, (2, n, 8))) == pytest.approx(8)
    # A router that is uniform but for who wins by a hair: P alone is uniform, so the loss is 1 too.
    assert load_balancing_loss(one, jnp.full((2, n, 8), 1 / 8)) == pytest.approx(1)
    assert router_z_loss(jnp.zeros((1, 5, 8))) == pytest.approx(np.log(8) ** 2)


def test_the_layers_own_loss_is_1_at_uniform_top_1_routing():
    """Every token another expert, of equal probability: all f_e and P_e are 1/E."""
    c = config(top_k=1)
    params = weights(c)
    params["router"]["kernel"] = 50 * jnp.eye(D)[:, :E]
    x_BTD = jnp.eye(D)[jnp.arange(T) % E][None]
    _, routing = apply(c, params, x_BTD)
    np.testing.assert_allclose(routing.load_E, 1 / E)
    assert routing.balance_loss == pytest.approx(1, rel=1e-6)
    assert routing.entropy == pytest.approx(0, abs=1e-6)


def test_the_balance_bias_chooses_and_has_no_part_in_the_gates():
    moe = MoeConfig(n_experts=3, top_k=2, gate="sigmoid", renormalise=False, bias_rate=1e-3)
    score_BTE = jnp.array([[[0.5, 0.4, 0.3]]])
    expert_BTk, gate_BTk = choose(moe, score_BTE, jnp.array([0.0, 0.0, 0.3]))
    np.testing.assert_array_equal(expert_BTk, [[[2, 0]]])
    np.testing.assert_allclose(gate_BTk, [[[0.3, 0.5]]])
    gradient = jax.grad(lambda b: jnp.sum(choose(moe, score_BTE, b)[1]))(jnp.zeros(3))
    np.testing.assert_array_equal(gradient, 0)


def test_the_router_is_float32_in_a_bfloat16_model():
    c = dataclasses.replace(config(), dtype="bfloat16")
    x_BTD, params = X_BTD.astype(jnp.bfloat16), weights(c)
    y_BTD, routing = apply(c, params, x_BTD)
    assert y_BTD.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in routing} == {jnp.dtype("float32")}
    logits = np.asarray(x_BTD, np.float64) @ np.asarray(params["router"]["kernel"], np.float64)
    expected = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    assert routing.z_loss == pytest.approx(expected, rel=1e-6)


def test_jitter_is_of_its_key_and_of_training_alone():
    c = config(jitter=0.3)

    @jax.jit
    def layer(**rngs):
        return Moe(c).apply({"params": weights(c)}, X_BTD, rngs=rngs)[0]

    plain = apply(config(), weights(c))[0]
    np.testing.assert_allclose(layer(), plain, atol=1e-6)
    noisy = layer(jitter=jax.random.key(0))
    np.testing.assert_array_equal(noisy, layer(jitter=jax.random.key(0)))
    assert np.abs(noisy - plain).max() > 1e-2
    assert np.abs(noisy - layer(jitter=jax.random.key(1))).max() > 1e-2


@pytest.mark.parametrize("dispatch", ["capacity", "ragged"])
def test_memory_is_linear_in_the_tokens(dispatch):
    """No array of the program, forward or backward, grows faster than the sequence."""
    c = config(n_experts=8, top_k=2, dispatch=dispatch)

    def largest(n_tokens):
        def loss(params, x_BTD):
            return jnp.sum(Moe(c).apply({"params": params}, x_BTD)[0] ** 2)

        x_BTD = jnp.zeros((1, n_tokens, D))
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(weights(c), x_BTD)
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights(c), x_BTD).compile()
        sizes = [np.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars]
        return max(sizes), compiled.memory_analysis().temp_size_in_bytes

    (array, temp), (array_4, temp_4) = largest(512), largest(2_048)
    assert array_4 <= 4 * array
    assert temp_4 <= 4.1 * temp


REFUSED = [
    (dict(n_experts=8, top_k=9), r"top_k = 9: must be at most model\.moe\.n_experts = 8"),
    (dict(capacity_factor=0.0), r"capacity_factor = 0\.0: must be above 0"),
    (dict(jitter=1.0), r"jitter = 1\.0: must lie in \[0, 1\)"),
    (dict(gate="sofmax"), "model.moe.gate.*softmax"),
    (dict(routing="expert_choice", bias_rate=0.1), "expert_choice.*bias_rate = 0.1"),
    (dict(routing="expert_choice", dispatch="ragged"), "expert_choice.*'ragged'"),
    (dict(granularity=4), "model.moe.granularity = 4: must divide model.d_ff = 6"),
    (dict(first_dense=2), "first_dense = 2.*none would have experts"),
    (dict(every=3), "every = 3.*none would have experts"),
]


@pytest.mark.parametrize("changes, why", REFUSED)
def test_what_cannot_be_is_refused_in_one_line(changes, why):
    with pytest.raises(BadInput, match=why) as refused:
        config(**changes)
    assert "\n" not in str(refused.value)
