import jax
import numpy as np
import pytest

from lm.command import BadInput
from lm.config import MESH_AXES, MeshConfig
from lm.sharding import batch_shards, make_mesh


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 1, 8, 1, 1)),
        (MeshConfig(data=2, model=-1), (1, 1, 2, 1, 4)),
        (MeshConfig(data=4, model=2), (1, 1, 4, 1, 2)),
        (MeshConfig(stage=2, model=2), (1, 2, 2, 1, 2)),
        (MeshConfig(replica=2, context=2), (2, 1, 2, 2, 1)),
    ],
)
def test_an_axis_takes_what_the_others_leave(config, sizes):
    mesh = make_mesh(config)
    assert mesh.axis_names == MESH_AXES
    assert tuple(mesh.shape.values()) == sizes
    assert batch_shards(mesh) == sizes[0] * sizes[2]


@pytest.mark.parametrize(
    "config, line",
    [
        (MeshConfig(data=3, model=2), "mesh.data = 3, mesh.model = 2: must multiply to the 8 dev"),
        (MeshConfig(data=-1, model=3), "mesh.model = 3: 3 must divide the 8 devices here"),
    ],
)
def test_axes_must_multiply_to_the_devices(config, line):
    with pytest.raises(BadInput, match=line):
        make_mesh(config)


class SliceDevice:
    """A device of a multi-slice TPU system, as far as the mesh looks."""

    platform, device_kind, process_index, core_on_chip = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, i):
        self.id, self.slice_index, self.coords = i, i // 4, (i % 2, i % 4 // 2, 0)


def test_replicas_are_slices():
    devices = [SliceDevice(i) for i in range(8)]
    laid = make_mesh(MeshConfig(replica=2), devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(laid)
    assert (slices[0] == 0).all() and (slices[1] == 1).all()
    with pytest.raises(BadInput, match="mesh.replica = 1: must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(), devices)
    assert len(jax.devices()) == 8  # which have no slices
