"""A mixture of experts in the place of a feed-forward layer: routing, dispatch, balance.

Axes as in ``decoder.py``, and: E experts, C slots of an expert in a sequence, k experts of a token.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.config import ModelConfig, MoeConfig
from lm.model.dispatch import Slots, best, by_expert, by_position, by_score, combine, dispatch
from lm.model.feedforward import GATED, FeedForward, activate
from lm.model.quantized import matmul, ragged_dot
from lm.sharding import constrain, devices_along, gather, here, partitioned, platform


class Routing(NamedTuple):
    """How a layer routed the tokens that it was given; float32.

    Of a batch in parts (accumulation, a pipeline) each part has its own: the balance loss is no sum
    over tokens, so the parts' mean is not the whole batch's.
    """

    balance_loss: jax.Array
    z_loss: jax.Array
    load_E: jax.Array  # share of the tokens' choices, dropped ones too; sums to 1
    dropped: jax.Array  # share of the choices; under expert choice, of tokens that no expert took
    entropy: jax.Array  # nats, of a token's probabilities of the experts; mean over tokens


def capacity(moe: MoeConfig, n_tokens: int) -> int:
    """Slots of an expert in a sequence: its fair share of the choices times the factor, rounded up.

    A token chooses an expert once at most, so ``n_tokens`` slots are room for all.
    """
    factor = 1.0 if moe.routing == "expert_choice" else moe.capacity_factor
    return min(n_tokens, math.ceil(factor * moe.top_k * n_tokens / moe.n_experts))


def load_balancing_loss(load_E: jax.Array, probability_BTE: jax.Array) -> jax.Array:
    """E sum_e f_e P_e (Fedus et al. 2022, eq. 4): 1 where f or P is uniform.

    f is each expert's share of the choices (so a top-k sum is divided by k), P its mean probability
    over the batch. The gradient flows through P.
    """
    return load_E.size * jnp.sum(load_E * jnp.mean(probability_BTE, (0, 1)))


def router_z_loss(logits_BTE: jax.Array) -> jax.Array:
    """The mean square of the logits' logsumexp (Zoph et al. 2022, ST-MoE, eq. 5)."""
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits_BTE, -1)))


def choose(
    moe: MoeConfig, score_BTE: jax.Array, bias_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token, best first, and their gates: (B, T, k) both.

    ``bias_E`` has a say in the choice and none in the gates (Wang et al. 2024; DeepSeek-V3, 2.1.2).
    """
    ranked_BTE = score_BTE if bias_E is None else score_BTE + bias_E
    expert_BTk = best(jax.lax.stop_gradient(ranked_BTE), moe.top_k)
    gate_BTk = jnp.take_along_axis(score_BTE, expert_BTk, -1)
    if moe.renormalise and moe.top_k > 1:
        gate_BTk /= jnp.sum(gate_BTk, -1, keepdims=True)
    return expert_BTk, gate_BTk


class Router(nn.Module):
    """Logits of the experts, in float32 whatever the rest is in (Fedus et al. 2022, 2.4)."""

    moe: MoeConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """logits_BTE, and the balance bias (E,) where the config asks for one."""
        moe, d_model = self.moe, x_BTD.shape[-1]
        init = partitioned(nn.initializers.normal(d_model**-0.5), "embed", None)
        kernel_DE = self.param("kernel", init, (d_model, moe.n_experts), jnp.float32)
        x_BTD = x_BTD.astype(jnp.float32)
        if moe.jitter and self.has_rng("jitter"):  # given in training alone
            low, high = 1 - moe.jitter, 1 + moe.jitter
            x_BTD *= jax.random.uniform(
                self.make_rng("jitter"), x_BTD.shape, minval=low, maxval=high
            )
        kernel_DE = gather(kernel_DE, "embed", None)
        logits_BTE = jnp.matmul(x_BTD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
        if not moe.bias_rate:
            return logits_BTE, None
        zeros = partitioned(nn.initializers.zeros, None)
        return logits_BTE, self.param("balance_bias", zeros, (moe.n_experts,), jnp.float32)


class Stack(nn.Module):
    """One matrix of every expert, (E, fan_in, features) in ``dtype``."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    scale: float  # the standard deviation is scale / sqrt(fan_in)
    dtype: str

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.scale / self.shape[1] ** 0.5)
        kernel = self.param("kernel", partitioned(init, *self.axes), self.shape, jnp.float32)
        return gather(kernel.astype(self.dtype), *self.axes)


class Experts(nn.Module):
    """The matrices of all experts: ``up`` and ``gate`` (E, D, F), ``down`` (E, F, D)."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        c = self.config
        n_experts, into = c.moe.n_experts, ("experts", "expert_embed", "expert_ff")
        result = {
            name: Stack((n_experts, c.d_model, c.expert_d_ff), into, 1.0, c.dtype, name=name)()
            for name in (("up", "gate") if c.feed_forward in GATED else ("up",))
        }
        out, scale = (into[0], *into[:0:-1]), (2 * c.n_layers) ** -0.5
        shape = (n_experts, c.expert_d_ff, c.d_model)
        return result | {"down": Stack(shape, out, scale, c.dtype, name="down")()}


class Moe(nn.Module):
    """y = sum over a token's experts of gate_e expert_e(x), and shared(x) where there are any.

    Gates are softmax or sigmoid scores. Renormalised, those of a token sum to 1 (Mixtral: it is the
    softmax of the chosen logits); a single one stays as it is (Switch), or the router would not
    learn. A token that an expert has no room for goes on by the residual alone.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, Routing]:
        c, moe = self.config, self.config.moe
        x_BTD = constrain(x_BTD, "batch", None, "features")  # capacity is a whole sequence's
        logits_BTE, bias_E = Router(moe, name="router")(x_BTD)
        if moe.gate == "softmax":
            score_BTE = probability_BTE = jax.nn.softmax(logits_BTE)
        else:
            score_BTE = jax.nn.sigmoid(logits_BTE)
            probability_BTE = score_BTE / jnp.sum(score_BTE, -1, keepdims=True)
        kernels = Experts(c, name="experts")()
        route = _expert_choice if moe.routing == "expert_choice" else _token_choice
        y_BTD, load_E, dropped = route(c, kernels, x_BTD, score_BTE, bias_E)
        y_BTD = y_BTD.astype(x_BTD.dtype)
        if moe.n_shared:
            y_BTD += FeedForward(c, moe.n_shared * c.expert_d_ff, name="shared")(x_BTD)
        entropy_BT = -jnp.sum(jax.scipy.special.xlogy(probability_BTE, probability_BTE), -1)
        return y_BTD, Routing(
            load_balancing_loss(load_E, probability_BTE),
            router_z_loss(logits_BTE),
            load_E,
            dropped,
            jnp.mean(entropy_BT),
        )


def _expert_choice(c: ModelConfig, kernels, x_BTD, score_BTE, _) -> tuple[jax.Array, ...]:
    """(y_BTD, load_E, dropped); a token's gates are its scores, whoever took it."""
    slots = by_score(jax.lax.stop_gradient(score_BTE), capacity(c.moe, x_BTD.shape[1]))
    n_slots = slots.choice_EBC.shape[-1]
    untaken = jnp.mean(jnp.all(slots.slot_BTk >= n_slots, -1), dtype=jnp.float32)
    y_BTD = _in_slots(c, kernels, x_BTD, score_BTE, slots)
    return y_BTD, jnp.full(c.moe.n_experts, 1 / c.moe.n_experts, jnp.float32), untaken


def _token_choice(c: ModelConfig, kernels, x_BTD, score_BTE, bias_E) -> tuple[jax.Array, ...]:
    """(y_BTD, load_E, dropped)."""
    moe = c.moe
    expert_BTk, gate_BTk = choose(moe, score_BTE, bias_E)
    chosen_BTkE = jax.nn.one_hot(expert_BTk, moe.n_experts)
    load_E = jnp.mean(chosen_BTkE, (0, 1, 2))
    split_by_rows = devices_along("expert_batch") < devices_along("batch")
    if moe.dispatch == "ragged" or (
        moe.dispatch == "auto" and platform() != "cpu" and not split_by_rows
    ):
        y_BTD = _ragged(c, kernels, x_BTD, gate_BTk, expert_BTk)
        return y_BTD, load_E, jnp.float32(0)
    n_slots = x_BTD.shape[1] if moe.dispatch == "auto" else capacity(moe, x_BTD.shape[1])
    slots = by_position(expert_BTk, moe.n_experts, n_slots)
    dropped = jnp.mean(slots.slot_BTk >= n_slots, dtype=jnp.float32)
    return _in_slots(c, kernels, x_BTD, gate_BTk, slots), load_E, dropped


def _feed_forward(c: ModelConfig, kernels, rows, product: Callable) -> jax.Array:
    gate = product(rows, kernels["gate"]) if "gate" in kernels else None
    hidden = activate(c.feed_forward, product(rows, kernels["up"]), gate)
    return product(hidden, kernels["down"])


def _in_slots(c: ModelConfig, kernels, x_BTD, gate_BTk, slots: Slots) -> jax.Array:
    """By slots of equal number for every expert; float32.

    Where experts lie on the axis of the batch's rows, rows and experts change places: an all-to-all
    each way.
    """

    def product(x_EBCD, w_EDF):
        n_experts, d_in, d_out = w_EDF.shape
        rows = x_EBCD.shape[1] * x_EBCD.shape[2]
        y_ERF = matmul(x_EBCD.reshape(n_experts, rows, d_in), w_EDF, c.quantization)
        return y_ERF.reshape(*x_EBCD.shape[:3], d_out)

    rows_EBCD = constrain(dispatch(x_BTD, slots), None, "batch", None, "features")
    rows_EBCD = constrain(rows_EBCD, "act_experts", "expert_batch", None, "features")
    y_EBCD = _feed_forward(c, kernels, rows_EBCD, product)
    y_EBCD = constrain(y_EBCD, "act_experts", "expert_batch", None, "features")
    y_EBCD = constrain(y_EBCD, None, "batch", None, "features")
    return combine(y_EBCD, gate_BTk, slots)


def _ragged(c: ModelConfig, kernels, x_BTD, gate_BTk, expert_BTk) -> jax.Array:
    """By rows in the experts' order, as many as each one has; float32.

    Each device sorts its own rows. Where experts lie on several devices, each computes its experts'
    part of the rows that they share, and the parts are summed.
    """
    # Initialising traces one row, which has no place on several devices.
    place = here("batch", None, None) if len(x_BTD) % devices_along("batch") == 0 else None
    axis = here("act_experts").spec[0] if place and devices_along("act_experts") > 1 else None

    def local(kernels, x_BTD, gate_BTk, expert_BTk):
        n_experts = len(kernels["up"])
        if axis:
            expert_BTk -= n_experts * jax.lax.axis_index(axis)
        slots, sizes_E = by_expert(expert_BTk, n_experts)
        product = partial(ragged_dot, sizes_E=sizes_E, quantization=c.quantization)
        flat_1RD = x_BTD.reshape(1, -1, x_BTD.shape[-1])
        y_RD = _feed_forward(c, kernels, dispatch(flat_1RD, slots)[0, 0], product)
        gate_1Rk = gate_BTk.reshape(1, -1, gate_BTk.shape[-1])
        y_BTD = combine(y_RD[None, None], gate_1Rk, slots).reshape(x_BTD.shape)
        return jax.lax.psum(y_BTD, axis) if axis else y_BTD

    if place is None or place.mesh.size == 1:
        return local(kernels, x_BTD, gate_BTk, expert_BTk)
    return jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(PartitionSpec(axis), place.spec, place.spec, place.spec),
        out_specs=place.spec,
        check_vma=False,
    )(kernels, x_BTD, gate_BTk, expert_BTk)


def no_routing(config: ModelConfig, *leading: int) -> Routing | None:
    """Zeros as the layers' stacked routing has them, (*leading, L, ...); None without experts."""
    if not config.moe.n_experts:
        return None
    shape = (*leading, len(config.moe_layers))
    zeros = {name: jnp.zeros(shape, jnp.float32) for name in Routing._fields}
    return Routing(**zeros | {"load_E": jnp.zeros((*shape, config.moe.n_experts), jnp.float32)})


def auxiliary_loss(moe: MoeConfig, routing: Routing | None) -> jax.Array | float:
    """What is added to cross-entropy, for layers' stacked routing: the sum over layers.

    (Fedus et al. 2022, 2.2: "for each Switch layer, this auxiliary loss is added".)
    """
    if routing is None:
        return 0.0
    balance, z = jnp.sum(routing.balance_loss), jnp.sum(routing.z_loss)
    return moe.balance_coefficient * balance + moe.z_coefficient * z


def shift_balance_bias(config: ModelConfig, params: Any, load_LE: jax.Array) -> Any:
    """``params`` with every balance bias moved by its rate towards the experts of low load.

    b_e + rate sign(mean load - load_e) (Wang et al. 2024, "Auxiliary-loss-free load balancing",
    Algorithm 1), after the optimizer's step. ``load_LE``: the batch's, one row a layer of experts.
    """
    step_LE = config.moe.bias_rate * jnp.sign(jnp.mean(load_LE, -1, keepdims=True) - load_LE)

    def shift(path, p):
        if path[-1].key != "balance_bias":
            return p
        if p.ndim == 2:
            return p + step_LE
        layer = int(path[0].key.removeprefix("layer_"))
        return p + step_LE[config.moe_layers.index(layer)]

    return jax.tree_util.tree_map_with_path(shift, params)
