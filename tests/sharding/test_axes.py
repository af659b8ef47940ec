import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.sharding import (
    constrain,
    gather,
    is_split,
    layout,
    make_mesh,
    named_sharding,
    partitioned,
    placed,
    stored_shardings,
)

MODEL = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)


def place(**mesh):
    config = Config(model=MODEL, mesh=MeshConfig(**mesh))
    mesh = make_mesh(config.mesh)
    return mesh, layout(config, mesh)


def boxed(shape, *logical):
    init = partitioned(nn.initializers.ones, *logical)
    return {"kernel": jax.eval_shape(lambda: init(jax.random.key(0), shape, jnp.float32))}


def test_a_misspelt_axis_fails_by_name():
    with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
        partitioned(nn.initializers.ones, "embd")
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'"):
        constrain(jnp.ones(3), "bacth")
    with pytest.raises(ValueError, match="unknown logical axis 'embed'"):
        constrain(jnp.ones(3), "embed")  # stored, not computed


def test_two_axes_on_one_mesh_axis_fail_by_name():
    with pytest.raises(ValueError, match="colliding mesh axes"):
        partitioned(nn.initializers.ones, "heads", "ff")
    with pytest.raises(ValueError, match="colliding mesh axes"):
        partitioned(nn.initializers.ones, "embed", "expert_embed")  # under ZeRO alone
    with placed(*place(data=4, model=2)), pytest.raises(ValueError, match="colliding mesh axes"):
        constrain(jnp.ones((2, 2)), "act_heads", "act_ff")


def test_a_constraint_is_no_silent_no_op():
    mesh, table = place(data=4, model=2)
    with jax.set_mesh(mesh), placed(mesh, table):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "features"))(jnp.ones((8, 3)))
    assert y.sharding.is_equivalent_to(named_sharding(mesh, table, "batch", "features"), 2)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_splits_one_more_thing_a_stage(zero):
    mesh, table = place(zero=zero)
    kernel = boxed((16, 24), "embed", "ff")
    found = [
        stored_shardings(kernel, mesh, stored)["kernel"].spec
        for stored in (table.moments, table.gradients, table.params)
    ]
    assert found == [P("data" if zero >= stage else None, "model") for stage in (1, 2, 3)]


def test_a_gathered_parameter_is_whole_and_its_gradient_is_not():
    mesh, table = place(data=8, zero=3)
    seen = []

    def loss(kernel):
        whole = gather(kernel, "embed", "ff")
        jax.debug.inspect_array_sharding(whole, callback=lambda s: seen.append(s))
        return jnp.sum(whole**2)

    stored = stored_shardings(boxed((16, 24), "embed", "ff"), mesh, table.params)["kernel"]
    kernel = jax.device_put(jnp.ones((16, 24)), stored)
    with jax.set_mesh(mesh), placed(mesh, table):
        gradient = jax.jit(jax.grad(loss))(kernel)
    assert seen and seen[0].is_fully_replicated
    assert {s.data.shape for s in gradient.addressable_shards} == {(2, 24)}
    assert (gradient == 2).all()


def test_fewer_kv_heads_than_devices_are_on_every_device():
    _, two = place(data=4, model=2)
    _, four = place(data=2, model=4)
    assert two.params["kv_heads"] == two.computed["act_kv_heads"] == "model"
    assert four.params["kv_heads"] is four.computed["act_kv_heads"] is None


def test_experts_and_their_columns_never_share_an_axis():
    for experts in ("data", "model"):
        mesh, table = place(data=4, model=2, zero=3, experts=experts)
        shapes = boxed((8, 16, 24), "experts", "expert_embed", "expert_ff")
        for stored in table[:3]:
            (sharding,) = stored_shardings(shapes, mesh, stored).values()
            assert experts in sharding.spec
        assert table.computed["act_experts"] == experts


def test_the_residual_stream_is_split_over_model_when_asked():
    assert place(data=4, model=2)[1].computed["sequence"] == "context"
    _, table = place(data=2, context=2, model=2, sequence_sharded=True)
    assert table.computed["sequence"] == ("context", "model")
    assert table.computed["positions"] == "context"


def test_a_gradient_may_lie_otherwise_than_its_activation():
    """Split in the forward pass, gathered in the backward pass; values as they were."""
    mesh, table = place(data=4, model=2, sequence_sharded=True)
    split, whole = (
        named_sharding(mesh, table, "batch", axis, "features") for axis in ("sequence", "positions")
    )
    assert split.spec != whole.spec

    def loss(x_BTD):
        y_BTD = constrain(x_BTD, "batch", "sequence", "features", gradient="positions")
        return jnp.sum(y_BTD**2), y_BTD

    x_BTD = jnp.arange(4.0 * 8 * 16).reshape(4, 8, 16)
    with jax.set_mesh(mesh), placed(mesh, table):
        (_, y_BTD), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x_BTD)
    assert y_BTD.sharding.is_equivalent_to(split, 3)
    assert gradient.sharding.is_equivalent_to(whole, 3)
    assert (gradient == 2 * x_BTD).all()


def test_is_split_knows_what_is_being_traced():
    assert not is_split("positions")
    with placed(*place(data=8)):
        assert is_split("batch") and not is_split("positions")
    with placed(*place(data=2, context=4)):
        assert is_split("positions")


@pytest.mark.parametrize(
    "model, mesh, line",
    [
        (dict(n_heads=2, n_kv_heads=2), dict(model=8), r"model.n_heads = 2 over mesh.model = 8"),
        ({}, dict(data=4, context=2), r"data.seq_len = 63 over mesh.context = 2: .* as 64 would"),
    ],
)
def test_what_does_not_divide_is_told_with_what_would(model, mesh, line):
    config = replace(Config(model=MODEL, mesh=MeshConfig(**mesh)), model=model)
    config = replace(config, data={"seq_len": 63})
    with pytest.raises(BadInput, match=line):
        layout(config, make_mesh(config.mesh))
    mesh, table = place(zero=3)
    with pytest.raises(BadInput, match=r"kernel's axis 'embed' = 12 over mesh.data = 8"):
        stored_shardings(boxed((12, 8), "embed", "ff"), mesh, table.params)
