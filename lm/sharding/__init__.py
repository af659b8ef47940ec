"""Where arrays live: the device mesh and the one table from logical axes to mesh axes."""

from lm.sharding.axes import (
    constrain,
    named_sharding,
    partitioned,
    rules,
    stored_shardings,
)
from lm.sharding.mesh import make_mesh

__all__ = ["constrain", "make_mesh", "named_sharding", "partitioned", "rules", "stored_shardings"]
