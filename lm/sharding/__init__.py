"""Where arrays live: the device mesh and the one table from logical axes to mesh axes."""

from lm.sharding.axes import (
    Layout,
    all_but_moved,
    constrain,
    devices_along,
    gather,
    here,
    is_split,
    layout,
    named_sharding,
    partitioned,
    placed,
    platform,
    stored_shardings,
    stores_parts,
)
from lm.sharding.mesh import axis_sizes, batch_shards, make_mesh
from lm.sharding.rows import held, lay

__all__ = [
    "Layout",
    "all_but_moved",
    "axis_sizes",
    "batch_shards",
    "constrain",
    "devices_along",
    "gather",
    "held",
    "here",
    "is_split",
    "lay",
    "layout",
    "make_mesh",
    "named_sharding",
    "partitioned",
    "placed",
    "platform",
    "stored_shardings",
    "stores_parts",
]
