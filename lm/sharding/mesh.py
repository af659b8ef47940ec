"""The device mesh: axes ``data`` (batch) and ``model`` (tensor parallelism)."""

import jax
from jax.sharding import AxisType, Mesh

from lm.command import BadInput
from lm.config import MeshConfig

AXES = ("data", "model")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A ``data`` x ``model`` mesh over ``devices`` (default: all of them).

    Raises ``BadInput`` where the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    data, model = config.data, config.model
    if data == -1 and n % model == 0:
        data = n // model
    if model == -1 and n % data == 0:
        model = n // data
    if data * model != n:
        raise BadInput(
            f"mesh.data = {config.data}, mesh.model = {config.model}:"
            f" must multiply to the {n} devices here"
        )
    # Linen's logical constraints work on Auto axes; make_mesh gives Explicit ones unless asked.
    return jax.make_mesh((data, model), AXES, devices=devices, axis_types=(AxisType.Auto,) * 2)
