"""How tokens come to experts and back: by gathers alone, in memory linear in the tokens.

Axes as in ``decoder.py``, and: E experts, C slots of an expert in a sequence, k experts of a token.

A slot holds one choice of one token, and a choice has one slot or, dropped, none. So slots and
choices are a partial permutation, and each gather's backward pass is the gather the other way.
Autodiff would make it a scatter, which is slow on CPU and takes no fixed order on GPUs; a one-hot
product (GShard, Lepikhin et al. 2021) would be quadratic in the tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slots(NamedTuple):
    """Which choice lies where; int32. What lies nowhere has an index beyond the last."""

    choice_EBC: jax.Array  # token * k + choice; T k where the slot is empty
    expert_BTk: jax.Array
    slot_BTk: jax.Array  # of the expert; C or more where the choice is dropped


def best(score_BTE: jax.Array, k: int) -> jax.Array:
    """The k experts of the highest scores, best first; of equals the first: (B, T, k).

    As ``jax.lax.top_k`` has it; but that one, XLA gathers from all devices before it begins.
    """
    experts = []
    for _ in range(k):
        experts.append(jnp.argmax(score_BTE, -1))
        taken_BTE = jax.nn.one_hot(experts[-1], score_BTE.shape[-1], dtype=bool)
        score_BTE = jnp.where(taken_BTE, -jnp.inf, score_BTE)
    return jnp.stack(experts, -1)


def by_position(expert_BTk: jax.Array, n_experts: int, capacity: int) -> Slots:
    """Every expert takes the first ``capacity`` choices of it in each sequence, by position.

    Switch's order at k = 1. For more, GShard serves all first choices before any second one; then a
    later token's first choice may drop an earlier token's second, and the decoder sees ahead.
    """
    n_tokens, k = expert_BTk.shape[1:]
    chosen_BTE = jnp.sum(jax.nn.one_hot(expert_BTk, n_experts, dtype=jnp.int32), 2)
    before_BTE = jnp.cumsum(chosen_BTE, 1) - chosen_BTE
    slot_BTk = jnp.take_along_axis(before_BTE, expert_BTk, -1)

    def invert(expert_Tk, slot_Tk):
        choice_Tk = jnp.arange(n_tokens * k).reshape(n_tokens, k)
        empty_EC = jnp.full((n_experts, capacity), n_tokens * k)
        return empty_EC.at[expert_Tk, slot_Tk].set(choice_Tk, mode="drop")

    return Slots(jax.vmap(invert, out_axes=1)(expert_BTk, slot_BTk), expert_BTk, slot_BTk)


def by_score(score_BTE: jax.Array, capacity: int) -> Slots:
    """Every expert takes the ``capacity`` tokens of a sequence that score it highest; k = E.

    (Zhou et al. 2022, "Mixture-of-experts with expert choice routing".) All of a sequence competes,
    so a token's experts depend on the tokens after it.
    """
    n_tokens, n_experts = score_BTE.shape[1:]

    def pick(score_TE):
        token_EC = jnp.argsort(score_TE, 0, stable=True, descending=True)[:capacity].T
        expert_E = jnp.arange(n_experts)
        none_TE = jnp.full((n_tokens, n_experts), capacity)
        slot_TE = none_TE.at[token_EC, expert_E[:, None]].set(jnp.arange(capacity))
        return token_EC * n_experts + expert_E[:, None], slot_TE

    choice_EBC, slot_BTE = jax.vmap(pick, out_axes=(1, 0))(score_BTE)
    return Slots(choice_EBC, jnp.broadcast_to(jnp.arange(n_experts), score_BTE.shape), slot_BTE)


def by_expert(expert_BTk: jax.Array, n_experts: int) -> tuple[Slots, jax.Array]:
    """One row a choice, in the order of experts, none dropped: slots with E = B = 1, C = B T k.

    Returns also the rows of each expert, sizes_E. Choices of experts outside 0 .. E - 1 have no
    row.
    """
    expert_A = expert_BTk.reshape(-1)
    known_A = (expert_A >= 0) & (expert_A < n_experts)
    expert_A = jnp.where(known_A, expert_A, n_experts)
    order_A = jnp.argsort(expert_A, stable=True)
    n_rows = expert_A.size
    slot_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(n_rows))
    slots = Slots(
        jnp.where(known_A[order_A], order_A, n_rows)[None, None],
        jnp.zeros((1, n_rows // expert_BTk.shape[-1], expert_BTk.shape[-1]), jnp.int32),
        jnp.where(known_A, slot_A, n_rows).reshape(1, -1, expert_BTk.shape[-1]),
    )
    return slots, jnp.bincount(expert_A, length=n_experts)


def _at_slots(x_BN: jax.Array, index_EBC: jax.Array) -> jax.Array:
    """x[b, index] at each slot, with x's further axes; 0 where the index is beyond N."""
    rest = x_BN.shape[2:]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=tuple(range(3, 3 + len(rest))),
        collapsed_slice_dims=(1,),
        start_index_map=(1,),
        operand_batching_dims=(0,),
        start_indices_batching_dims=(1,),
    )
    return jax.lax.gather(
        *(x_BN, index_EBC[..., None], numbers, (1, 1, *rest)), mode="fill", fill_value=0
    )


def _at_choices(y_EBCD: jax.Array, slots: Slots) -> jax.Array:
    """The rows of every token's choices, (B, T, k, D); 0 where dropped."""
    width = y_EBCD.shape[-1]
    if not y_EBCD.size:  # no slots at all, which XLA's gather refuses
        return jnp.zeros((*slots.slot_BTk.shape, width), y_EBCD.dtype)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3,),
        collapsed_slice_dims=(0, 2),
        start_index_map=(0, 2),
        operand_batching_dims=(1,),
        start_indices_batching_dims=(0,),
    )
    index_BTk2 = jnp.stack([slots.expert_BTk, slots.slot_BTk], -1)
    return jax.lax.gather(
        *(y_EBCD, index_BTk2, numbers, (1, 1, 1, width)), mode="fill", fill_value=0
    )


@jax.custom_vjp
def dispatch(x_BTD: jax.Array, slots: Slots) -> jax.Array:
    """The tokens in their slots, (E, B, C, D); 0 in empty ones."""
    return _at_slots(x_BTD, slots.choice_EBC // slots.slot_BTk.shape[-1])


dispatch.defvjp(
    lambda x_BTD, slots: (dispatch(x_BTD, slots), slots),
    lambda slots, g_EBCD: (jnp.sum(_at_choices(g_EBCD, slots), 2), None),
)


@jax.custom_vjp
def combine(y_EBCD: jax.Array, gate_BTk: jax.Array, slots: Slots) -> jax.Array:
    """What the experts say of each token, times its gates: (B, T, D) in float32."""
    return jnp.sum(_at_choices(y_EBCD, slots) * gate_BTk[..., None], 2)


def _combine_backward(residuals, g_BTD):
    y_EBCD, gate_BTk, slots = residuals
    k = gate_BTk.shape[-1]
    gate_EBC = _at_slots(gate_BTk.reshape(len(gate_BTk), -1), slots.choice_EBC)
    g_EBCD = _at_slots(g_BTD, slots.choice_EBC // k) * gate_EBC[..., None]
    g_gate_BTk = jnp.sum(_at_choices(y_EBCD, slots) * g_BTD[:, :, None], -1)
    return g_EBCD.astype(y_EBCD.dtype), g_gate_BTk, None


combine.defvjp(
    lambda y_EBCD, gate_BTk, slots: (combine(y_EBCD, gate_BTk, slots), (y_EBCD, gate_BTk, slots)),
    _combine_backward,
)
