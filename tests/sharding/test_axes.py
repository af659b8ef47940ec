import flax.linen as nn
import jax
import pytest

from lm.config import MeshConfig
from lm.sharding import constrain, make_mesh, named_sharding, partitioned, rules


def test_a_misspelt_axis_fails_by_name():
    with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
        partitioned(nn.initializers.ones, "embd")
    with pytest.raises(ValueError, match="unknown logical axis 'bacth'"):
        constrain(jax.numpy.ones(3), "bacth")


def test_two_axes_on_one_mesh_axis_fail_by_name():
    with pytest.raises(ValueError, match="colliding mesh axes"):
        partitioned(nn.initializers.ones, "heads", "ff")


def test_a_constraint_is_no_silent_no_op():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules()):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "features"))(jax.numpy.ones((8, 3)))
    assert y.sharding.is_equivalent_to(named_sharding(mesh, "batch", "features"), 2)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 3)}
