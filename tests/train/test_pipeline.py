"""What a pipeline keeps for its backward pass, and what it scores. Equality: test_meshes.py."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from lm.config import MESH_AXES, Config, ModelConfig, replace
from lm.data import Batch
from lm.sharding import placed
from lm.sharding.pipeline import n_iterations
from lm.train import pipeline
from lm.train.step import Program

CONFIG = replace(
    Config(
        model=ModelConfig(
            vocab_size=32,
            d_model=20,
            n_layers=8,
            n_heads=2,
            n_kv_heads=2,
            d_ff=24,
            scan_layers=True,
        )
    ),
    data={"seq_len": 8},
    train={"accumulation": 4},
    mesh={"stage": 2, "data": 2, "model": 2},
)


def kept(**sections):
    """The shapes of the numbers that the loop over iterations keeps for the backward one."""
    config = replace(CONFIG, **sections)
    sizes = tuple(getattr(config.mesh, axis) for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    program = Program(config, mesh)
    tokens = jax.ShapeDtypeStruct((8, config.data.seq_len), jnp.int32)
    args = config, program.decoder, config.mesh.stage
    with jax.sharding.use_abstract_mesh(mesh), placed(mesh, program.layout):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, batch: pipeline.nats(*args, p, batch)[0]))(
            program.abstract_state.params, Batch(tokens, tokens)
        )
    n = n_iterations(config.train.accumulation, config.mesh.stage, config.mesh.rounds)
    loop = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == n)
    stacked = (out.aval for out in loop.outvars if out.aval.shape[:1] == (n,))
    return [x.shape for x in stacked if jnp.issubdtype(x.dtype, jnp.floating)]


def elements(shapes):
    return sum(map(math.prod, shapes))


def test_each_policy_keeps_what_it_says():
    """Two stages of 4 layers, micro-batches of 2 x 8 positions of width 20."""
    full = kept(model={"remat": "full"})
    assert full == [(5, 4, 2, 2, 8, 20)]  # an iteration, a layer, a stage: the layer's input
    products = kept(model={"remat": "dots_with_no_batch_dims"})
    # The input; queries, keys, values, attention's output; gate and up.
    assert sorted(shape[-1] for shape in products) == [20, 20, 20, 20, 20, 24, 24]
    assert elements(products) == elements(full) * (20 + 4 * 20 + 2 * 24) // 20
    dots, everything = kept(model={"remat": "dots"}), kept(model={"remat": "none"})
    assert elements(everything) > elements(dots) > elements(products)


def test_no_iteration_keeps_a_copy_of_the_parameters():
    assert kept(model={"remat": "full"}, mesh={"rounds": 2}) == [(9, 2, 2, 8, 20)]
    for shape in kept(model={"remat": "dots_with_no_batch_dims"}, mesh={"rounds": 2}):
        assert shape[-2] in (8, 2 * 8)  # positions, or those of all rows: no matrix


def test_splash_attention_lowers_inside_a_stage():
    config = replace(
        CONFIG,
        model={"d_model": 256, "dtype": "bfloat16", "attention_kernel": "splash"},
        data={"seq_len": 128},
    )
    mesh = AbstractMesh((1, 2, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    assert "tpu_custom_call" in Program(config, mesh).lower_train(8).as_text()
