import pytest

from lm.command import BadInput
from lm.config import MeshConfig
from lm.sharding import make_mesh


@pytest.mark.parametrize(
    "config, shape",
    [
        (MeshConfig(), {"data": 8, "model": 1}),
        (MeshConfig(data=2, model=-1), {"data": 2, "model": 4}),
        (MeshConfig(data=4, model=2), {"data": 4, "model": 2}),
    ],
)
def test_an_axis_takes_what_the_other_leaves(config, shape):
    assert dict(make_mesh(config).shape) == shape


@pytest.mark.parametrize("config", [MeshConfig(data=3, model=2), MeshConfig(data=-1, model=3)])
def test_axes_must_multiply_to_the_devices(config):
    with pytest.raises(BadInput, match="must multiply to the 8 devices"):
        make_mesh(config)
