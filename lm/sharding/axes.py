"""One table from the model's logical axes to the mesh axes ``data`` and ``model``.

Two maps, since what is *stored* (parameters, optimizer state) need not lie as what is *computed*
(activations) does.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.command import BadInput

STORED = {
    "embed": None,
    "heads": "model",
    "kv_heads": "model",
    "ff": "model",
    "vocab": "model",
    "position": None,
    "layers": None,
}
COMPUTED = {
    "batch": "data",
    "sequence": None,
    "features": None,
}
assert not STORED.keys() & COMPUTED.keys()


def rules() -> tuple[tuple[str, str | None], ...]:
    """The table in the form that ``flax.linen.logical_axis_rules`` takes."""
    return tuple({**STORED, **COMPUTED}.items())


def _mesh_axes(logical: tuple[str | None, ...], table: dict[str, str | None]) -> list[str | None]:
    unknown = [name for name in logical if name is not None and name not in table]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known: {', '.join(table)}")
    mesh_axes = [None if name is None else table[name] for name in logical]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"colliding mesh axes: {logical} would lie on {mesh_axes}")
    return mesh_axes


def partitioned(init: Callable, *logical: str | None) -> Callable:
    """An initialiser whose parameter carries its logical axes (one a dimension) as metadata.

    Raises ``ValueError`` for a misspelt axis, and for two axes that lie on the same mesh axis.
    """
    _mesh_axes(logical, STORED)
    return nn.with_logical_partitioning(init, logical)


def stored_shardings(abstract: Any, mesh: Mesh) -> Any:
    """The sharding of every boxed parameter (and of the optimizer's state like it) on ``mesh``.

    Raises ``BadInput`` where a mesh axis does not divide the dimension that lies on it.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, rules())

    def check(path, leaf, sharding):
        for i, axis in enumerate(sharding.spec):
            if axis is not None and leaf.shape[i] % mesh.shape[axis]:
                name = path[-1].key if hasattr(path[-1], "key") else jax.tree_util.keystr(path)
                raise BadInput(
                    f"{name} has {leaf.shape[i]} entries along an axis laid over"
                    f" mesh.{axis} = {mesh.shape[axis]}: must divide evenly"
                )

    jax.tree_util.tree_map_with_path(check, nn.meta.unbox(abstract), shardings)
    return shardings


def named_sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    """The sharding on ``mesh`` of an activation or batch with these logical axes."""
    return NamedSharding(mesh, PartitionSpec(*_mesh_axes(logical, COMPUTED)))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins an activation's layout under ``nn.logical_axis_rules(rules())`` and ``jax.set_mesh``."""
    _mesh_axes(logical, COMPUTED)
    return nn.with_logical_constraint(x, logical)
