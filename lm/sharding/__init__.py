"""Where arrays live: the device mesh and the one table from logical axes to mesh axes."""

from lm.sharding.axes import (
    Layout,
    constrain,
    gather,
    is_split,
    layout,
    named_sharding,
    partitioned,
    placed,
    stored_shardings,
)
from lm.sharding.mesh import axis_sizes, batch_shards, make_mesh

__all__ = [
    "Layout",
    "axis_sizes",
    "batch_shards",
    "constrain",
    "gather",
    "is_split",
    "layout",
    "make_mesh",
    "named_sharding",
    "partitioned",
    "placed",
    "stored_shardings",
]
