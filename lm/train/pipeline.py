"""The decoder's loss with its layers in a pipeline over the mesh axis ``stage``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lm.config import Config
from lm.data import Batch
from lm.model import Decoder, head_cross_entropy
from lm.model.decoder import rematerialised, scanned
from lm.sharding.pipeline import AXIS, pipelined


def micro_batches(batch: Batch, n: int) -> Batch:
    """(B, ...) as (n, B / n, ...): strided, so that every micro-batch spans all data shards."""
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)


def nats(
    config: Config, decoder: Decoder, n_stages: int, params: Any, batch: Batch
) -> tuple[jax.Array, Any]:
    """The sum of nats over a batch, and the layers' routing, (M, L, ...) (None: no layer routes).

    The embedding, the last norm and the head are no stage's: every stage has their parameters, and
    applies them to its own share of the M = ``train.accumulation`` micro-batches.
    """
    n_micro, model = config.train.accumulation, config.model
    block = rematerialised(model, scanned(model))(model)
    apply = partial(decoder.apply, {"params": params})
    over_stages = partial(jax.vmap, spmd_axis_name=AXIS)
    micro = micro_batches(batch, n_micro)
    steps_T = jnp.arange(batch.inputs_BT.shape[1])[None]

    def embed(inputs_BT, positions_BT):
        positions_BT = steps_T if positions_BT is None else positions_BT
        return apply(inputs_BT, positions_BT, method="embed")

    def stage(layers, x_BTD, documents):
        segments_BT, positions_BT = documents
        positions_BT = steps_T if positions_BT is None else positions_BT

        def layer(x_BTD, layer):
            return block.apply({"params": layer}, x_BTD, positions_BT, segments_BT)

        return jax.lax.scan(layer, x_BTD, layers)

    x_MBTD = over_stages(embed)(micro.inputs_BT, micro.positions_BT)
    documents = (micro.segments_BT, micro.positions_BT)
    x_MBTD, routing = pipelined(
        stage, params["layers"], x_MBTD, documents, n_stages, config.mesh.rounds
    )
    unembedding_DV = apply(method="unembedding")

    def add(total, micro):
        x_BTD, targets_BT, weights_BT = micro
        return total + head_cross_entropy(
            *(apply(x_BTD, method="last"), unembedding_DV, targets_BT, weights_BT),
            soft_cap=config.model.logit_soft_cap,
            chunk=config.train.loss_chunk,
        ), None

    def head(share):
        # The backward pass computes logits again: else those of the whole batch would exist at once.
        return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.float32(0), share)[0]

    shares = jax.tree.map(
        lambda x: x.reshape(n_stages, -1, *x.shape[1:]),
        (x_MBTD, micro.targets_BT, micro.weights_BT),
    )
    return jnp.sum(over_stages(head)(shares)), routing
