"""Pipeline parallelism inside one compiled program: layers split over the mesh axis ``stage``.

What a stage does is one function, mapped over the stages (GSPMD, Xu et al. 2021, 3.3): in every
iteration each stage works on its own micro-batch and hands the result to the next one, which is a
collective permute. Differentiating that gives the backward pipeline. With one round this is GPipe
(Huang et al. 2019). With v rounds each stage holds v runs of layers that lie apart, and a
micro-batch goes round v times (circular or interleaved, Narayanan et al. 2021, 2.2), which divides
the bubble by v.

M micro-batches, P stages, R rounds, K micro-batches a stage (M / P); B is a micro-batch's rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.command import BadInput
from lm.config import Config

AXIS = "stage"


def check_pipeline(config: Config, n_stages: int) -> None:
    """Raises ``BadInput`` where layers or micro-batches don't divide over the stages."""
    model, rounds, n_micro = config.model, config.mesh.rounds, config.train.accumulation
    if n_stages == 1:
        if rounds > 1:
            raise BadInput(f"mesh.rounds = {rounds} with mesh.stage = 1: must be 1, or more stages")
        return
    if not model.scan_layers:
        raise BadInput(
            f"model.scan_layers = False with mesh.stage = {n_stages}: must be True,"
            " since a stage is a part of the stacked layers"
        )
    n_scanned = len(model.moe_layers) or model.n_layers
    for name, size, over, n in (
        ("scanned layers", n_scanned, "mesh.stage x mesh.rounds", n_stages * rounds),
        ("train.accumulation", n_micro, "mesh.stage", n_stages),
    ):
        if size % n:
            raise BadInput(
                f"{name} = {size} over {over} = {n}: must be a multiple, as {-(-size // n) * n}"
            )


def assignment(iteration: Any, stage: Any, n_micro: int) -> tuple[Any, Any]:
    """The (micro-batch, round) on which ``stage`` works at ``iteration``; ints or arrays.

    The stage idles where the round is below 0, or ``rounds`` and above.
    """
    done = iteration - stage
    return done % n_micro, done // n_micro


def n_iterations(n_micro: int, n_stages: int, rounds: int = 1) -> int:
    """How often each stage works or idles in one pass, v m + p - 1."""
    return rounds * n_micro + n_stages - 1


def bubble_share(n_micro: int, n_stages: int, rounds: int = 1) -> float:
    """The share of a pass in which a stage idles, (p - 1) / (v m + p - 1)."""
    return (n_stages - 1) / n_iterations(n_micro, n_stages, rounds)


def _over_stages(x: jax.Array) -> jax.Array:
    """Pins axis 0 to the stages and leaves the others as they are."""
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(AXIS, *(free,) * (x.ndim - 1)))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _turn(x: jax.Array, by: int) -> jax.Array:
    """Hands what each stage has on axis 0 to the stage ``by`` further on: one permute each way.

    What autodiff makes of ``jnp.roll`` is two.
    """
    return _over_stages(jnp.roll(x, by, axis=0))


_turn.defvjp(lambda x, by: (_turn(x, by), None), lambda by, _, d: (_turn(d, -by),))


def _in_rounds(w: jax.Array, n_stages: int, rounds: int) -> jax.Array:
    """Stacked layers (L, ...) over stages as (P, R, L / (P R), ...): what each stage applies.

    Left to the partitioner this gathers every layer on every stage.
    """
    held = _over_stages(w.reshape(n_stages, rounds, -1, *w.shape[1:]))
    if rounds == 1:
        return held
    stages = np.arange(n_stages)[:, None]
    holder, place = np.divmod(np.arange(rounds) * n_stages + stages, rounds)
    applied = jnp.zeros_like(held)
    for by in range(n_stages):
        here = (stages - holder) % n_stages == by
        if here.any():
            found = jax.vmap(lambda w, i: w[i])(_turn(held, by), place)
            applied = jnp.where(here.reshape(*here.shape, *(1,) * w.ndim), found, applied)
    return _over_stages(applied)


def pipelined(
    stage_fn: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    stacked_params: Any,
    x_MBTD: jax.Array,
    per_micro: Any,
    n_stages: int,
    rounds: int = 1,
    policy: Callable | None = None,
) -> tuple[jax.Array, Any]:
    """Applies L stacked layers to M micro-batches, under ``jax.set_mesh`` with an axis ``stage``.

    Args:
      stage_fn: (the parameters of L / (P R) consecutive layers, x_BTD, the micro-batch's part of
        ``per_micro``) -> (x_BTD, an auxiliary pytree stacked over those layers, or None).
      stacked_params: leaves of (L, ...), in the order of the layers, over ``stage`` on axis 0.
        L must be a multiple of P R. With R > 1 a stage holds other layers than it applies: each
        pass hands them round, at most P - 1 times a stage's parameters in each direction.
      x_MBTD: M must be a multiple of P. Each stage keeps K micro-batches, before and after:
        stage 0's next one comes to it, and the last stage's results go back, one stage at a time.
      per_micro: leaves of (M, ...) that a stage reads and doesn't change, or None.
      policy: of ``jax.checkpoint``, what an application of ``stage_fn`` keeps for its backward
        pass. With R > 1 and none, that is among all else a copy of the parameters that it picked,
        in every iteration; so there it is the stage that is better rematerialised, not its layers.

    Returns:
      y_MBTD with M over ``stage``, and the auxiliary pytree with leaves (M, L, ...).
    """
    p, m = n_stages, x_MBTD.shape[0]
    k, n_layers = m // p, jax.tree.leaves(stacked_params)[0].shape[0]
    if m % p or n_layers % (p * rounds):
        raise ValueError(f"{m} micro-batches, {n_layers} layers: {p} stages, {rounds} rounds")
    params_PR = jax.tree.map(lambda w: _in_rounds(w, p, rounds), stacked_params)
    stages = np.arange(p)
    # Slot k of stage s begins with micro-batch s K + k, and whenever stage 0 reads its slot k, slot
    # k of all stages is handed back by one. When a result comes, its slot has got as far as:
    home = p - 1 - (p - 1) // k

    @jax.checkpoint  # or a mask of the whole result's size would be kept
    def where_stage(condition_P, x_PBTD, y_PBTD):
        return jnp.where(condition_P[:, None, None, None], x_PBTD, y_PBTD)

    def apply_round(params_R, round_, x_BTD, extras):
        index = round_ if rounds > 1 else 0  # one round: no copy of the parameters
        return stage_fn(jax.tree.map(lambda w: w[index], params_R), x_BTD, extras)

    apply = jax.checkpoint(apply_round, prevent_cse=False, policy=policy) if policy else apply_round

    def iterate(carry, i):
        x_PBTD, slots_PKBTD = carry
        micro_P, round_P = assignment(i, stages, m)
        next_PBTD = slots_PKBTD[:, i % k]
        slots_PKBTD = slots_PKBTD.at[:, i % k].set(_turn(next_PBTD, -1))
        x_PBTD = _over_stages(where_stage(stages == 0, next_PBTD, x_PBTD))
        extras_P = jax.tree.map(lambda leaf: _over_stages(leaf[micro_P]), per_micro)
        y_PBTD, aux_P = jax.vmap(apply, spmd_axis_name=AXIS)(
            params_PR, jnp.clip(round_P, 0, rounds - 1), x_PBTD, extras_P
        )
        came, slot = i >= p - 1, (i - (p - 1)) % k
        result_PBTD = _turn(y_PBTD, home - (p - 1)) if home < p - 1 else y_PBTD
        result_PBTD = where_stage((stages == home) & came, result_PBTD, slots_PKBTD[:, slot])
        slots_PKBTD = _over_stages(slots_PKBTD.at[:, slot].set(result_PBTD))
        return (_turn(y_PBTD, 1), slots_PKBTD), aux_P

    slots_PKBTD = _over_stages(x_MBTD.reshape(p, k, *x_MBTD.shape[1:]))
    # Idle stages work on real activations: a gradient of 0 must not meet an infinity.
    (_, slots_PKBTD), aux_IP = jax.lax.scan(
        iterate, (slots_PKBTD[:, 0], slots_PKBTD), jnp.arange(n_iterations(m, p, rounds))
    )
    # R M iterations hand every slot round entirely; the p - 1 that drain the pipeline are undone.
    turns, further = divmod(p - 1, k)
    y_PKBTD = jnp.concatenate(
        [_turn(slots_PKBTD[:, :further], turns + 1), _turn(slots_PKBTD[:, further:], turns)], axis=1
    )

    def in_order(aux_IPl):
        """Leaves (iterations, P, L / (P R), ...) -> (M, L, ...), without the idle iterations."""
        busy = jax.vmap(lambda x_I, s: jax.lax.dynamic_slice_in_dim(x_I, s, rounds * m), (1, 0))
        aux_PRMl = busy(aux_IPl, stages).reshape(p, rounds, m, *aux_IPl.shape[2:])
        return jnp.moveaxis(aux_PRMl, (2, 1, 0), (0, 1, 2)).reshape(m, -1, *aux_IPl.shape[3:])

    return _over_stages(y_PKBTD.reshape(x_MBTD.shape)), jax.tree.map(in_order, aux_IP)
