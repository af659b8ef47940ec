"""The device mesh. Five axes, of which a run may use any:

replica  whole copies, a slice each (hybrid: ZeRO within a slice, plain data parallelism across)
stage    pipeline: consecutive layers
data     rows of the batch, and what ZeRO shards over them
context  chunks of a sequence
model    tensor parallelism: heads, feed-forward columns, vocabulary
"""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lm.command import BadInput
from lm.config import MESH_AXES, MeshConfig


def axis_sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """Devices along each of MESH_AXES, the -1 resolved.

    Raises ``BadInput`` where the axes do not multiply to the number of devices.
    """
    given = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    sizes = tuple(n_devices // fixed if size == -1 else size for size in given.values())
    if math.prod(sizes) != n_devices:
        told = ", ".join(f"mesh.{axis} = {size}" for axis, size in given.items() if size != 1)
        what = f"{fixed} must divide" if -1 in given.values() else "must multiply to"
        raise BadInput(f"{told}: {what} the {n_devices} devices here")
    return sizes


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over ``devices`` (default: all). Replicas lie on whole slices where there are some.

    Raises ``BadInput`` where the axes do not multiply to the number of devices, or where slices
    would have to share a replica.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    types = (AxisType.Auto,) * len(sizes)  # which the model is annotated for
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A mesh axis may take part of a torus axis, as 32 x 8 on 16x16; jax.make_mesh refuses that on
    # most chips. Where whole ones go, whole ones are taken.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(sizes, devices, **split), MESH_AXES, types)
    if sizes[0] % slices:
        raise BadInput(f"mesh.replica = {sizes[0]}: must be a multiple of the {slices} slices here")
    within = (sizes[0] // slices, *sizes[1:])
    across = (slices, *(1 for _ in sizes[1:]))
    laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, **split)
    return Mesh(laid, MESH_AXES, types)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are laid."""
    return mesh.shape["replica"] * mesh.shape["data"]
