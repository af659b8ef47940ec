"""The decoder's loss with its layers in a pipeline over the mesh axis ``stage``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import Config
from lm.data import Batch
from lm.model import Decoder, head_cross_entropy
from lm.model.decoder import remat_policy, rematerialised, scanned
from lm.model.rotary import laid_out
from lm.sharding.pipeline import AXIS, pipelined


def micro_batches(batch: Batch, n: int) -> Batch:
    """(B, ...) as (n, B / n, ...): strided, so that every micro-batch spans all data shards."""
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)


def nats(
    config: Config,
    decoder: Decoder,
    n_stages: int,
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The sum of nats over a batch, and the routing of each layer with experts.

    That is the mean over the M = ``train.accumulation`` micro-batches. What is no part of the
    stacked layers (embedding, first dense layers, last norm, head) is no stage's: every stage has
    these parameters and applies them to its own share of the micro-batches.

    ``key`` is of the router's jitter, in training.
    """
    model, n_micro = laid_out(config.model, config.data.seq_len), config.train.accumulation
    apply = partial(decoder.apply, {"params": params})
    over_stages = partial(jax.vmap, spmd_axis_name=AXIS)
    micro = micro_batches(batch, n_micro)
    if micro.positions_BT is None:
        steps_T = jnp.arange(batch.inputs_BT.shape[1])
        micro = micro._replace(positions_BT=jnp.tile(steps_T, (n_micro, 1, 1)))

    def before(inputs_BT, positions_BT, segments_BT):
        x_BTD = apply(inputs_BT, positions_BT, method="embed")
        dense = rematerialised(model, mapped=True)(model, has_experts=False)
        for i in range(model.moe.first_dense if model.moe.n_experts else 0):
            layer = {"params": params[f"layer_{i}"]}
            x_BTD, _ = dense.apply(layer, x_BTD, positions_BT, segments_BT)
        return x_BTD

    rounds, block = config.mesh.rounds, scanned(model)
    if rounds == 1:
        block = rematerialised(model, block, mapped=True)

    def stage(layers, x_BTD, micro):
        (positions_BT, segments_BT), i = micro

        def apply_one(x_BTD, layer):
            params, key = layer
            rngs = None if key is None else {"jitter": jax.random.fold_in(key, i)}
            args = (x_BTD, positions_BT, segments_BT)
            return block(model).apply({"params": params}, *args, rngs=rngs)

        return jax.lax.scan(apply_one, x_BTD, layers)

    def after(share):
        def add(total, micro):
            x_BTD, targets_BT, weights_BT = micro
            return total + head_cross_entropy(
                *(apply(x_BTD, method="last"), unembedding_DV, targets_BT, weights_BT),
                soft_cap=model.logit_soft_cap,
                chunk=config.train.loss_chunk,
            ), None

        # The backward pass computes logits again, or those of the whole batch would exist at once.
        return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.float32(0), share)[0]

    layers, documents = params["layers"], (micro.positions_BT, micro.segments_BT)
    keys = None
    if key is not None:
        keys = jax.random.split(key, jax.tree.leaves(layers)[0].shape[0])
    x_MBTD, routing = pipelined(
        stage,
        (layers, keys),
        over_stages(before)(micro.inputs_BT, *documents),
        (documents, jnp.arange(n_micro)),
        *(n_stages, rounds),
        policy=remat_policy(model, mapped=True) if rounds > 1 else None,
    )
    unembedding_DV = apply(method="unembedding")
    shares = jax.tree.map(
        lambda x: x.reshape(n_stages, -1, *x.shape[1:]),
        (x_MBTD, micro.targets_BT, micro.weights_BT),
    )
    nats = jnp.sum(over_stages(after)(shares))
    return nats, jax.tree.map(lambda x_ML: jnp.mean(x_ML, 0), routing)
