"""One table from the model's logical axes to the axes of the mesh.

Maps, not one map: what is *stored* (parameters, gradients, optimizer state) need not lie as it is
*computed* with. ZeRO (Rajbhandari et al. 2020) is the difference: from its stage on, a stored
array is split over ``data`` too, along the model width; every product gathers it first.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.command import BadInput
from lm.config import Config
from lm.sharding.pipeline import check_pipeline

MeshAxes = str | tuple[str, ...] | None

# Logical axes of what is stored: where they lie when computed with, and where ZeRO puts them.
STORED: dict[str, tuple[MeshAxes, MeshAxes]] = {
    "embed": (None, "data"),
    "heads": ("model", "model"),
    "kv_heads": ("model", "model"),
    "ff": ("model", "model"),
    "vocab": ("model", "model"),
    "position": (None, None),
    "layers": ("stage", "stage"),
    "experts": ("model", "model"),
    "expert_embed": (None, "data"),
    "expert_ff": (None, None),
}
# Of activations. `sequence` is the residual stream's, `positions` those inside a sublayer.
COMPUTED: dict[str, MeshAxes] = {
    "batch": ("replica", "data"),
    "sequence": "context",
    "positions": "context",
    "keys": None,  # all of them: a context chunk's queries see the keys of all chunks before it
    "features": None,
    "act_heads": "model",
    "act_kv_heads": "model",
    "act_ff": "model",
    "act_vocab": "model",
    "act_experts": "model",
    "expert_batch": ("replica", "data"),  # rows of the batch where they are with the experts
    "act_expert_ff": None,
    "stages": "stage",
}
assert not STORED.keys() & COMPUTED.keys()


class Layout(NamedTuple):
    """Where everything lies under one config: logical axis to mesh axes."""

    params: dict[str, MeshAxes]
    gradients: dict[str, MeshAxes]
    moments: dict[str, MeshAxes]
    computed: dict[str, MeshAxes]  # activations, and parameters at their use


def layout(config: Config, mesh: Mesh) -> Layout:
    """The table under ``config``'s model and mesh.

    Raises ``BadInput`` where a dimension of the model does not divide over its axis.
    """
    check_pipeline(config, mesh.shape["stage"])
    model, chosen = config.model, config.mesh
    gathered = {axis: plain for axis, (plain, _) in STORED.items()}
    sharded = {axis: zero for axis, (_, zero) in STORED.items()}
    computed = dict(COMPUTED)
    if chosen.sequence_sharded:
        computed["sequence"] = ("context", "model")
    if model.n_kv_heads % mesh.shape["model"]:  # fewer of them than devices: every device has all
        gathered["kv_heads"] = sharded["kv_heads"] = computed["act_kv_heads"] = None
    if chosen.experts == "data":  # the experts' own columns then have `model` to themselves
        for table in (gathered, sharded):
            table.update(experts="data", expert_embed=None, expert_ff="model")
        computed.update(act_experts="data", act_expert_ff="model", expert_batch="replica")
    _check_divides("model.n_heads", model.n_heads, "model", mesh)
    _check_divides("data.seq_len", config.data.seq_len, computed["sequence"], mesh)
    _check_divides("model.moe.n_experts", model.moe.n_experts, computed["act_experts"], mesh)
    if model.moe.dispatch == "ragged" and chosen.experts == "data" and mesh.shape["data"] > 1:
        raise BadInput(
            "model.moe.dispatch = 'ragged' with mesh.experts = 'data': rows that change devices"
            " need slots, so it must be 'capacity', or experts on 'model'"
        )
    return Layout(
        params=sharded if chosen.zero >= 3 else gathered,
        gradients=sharded if chosen.zero >= 2 else gathered,
        moments=sharded if chosen.zero >= 1 else gathered,
        computed=computed | gathered,
    )


def _devices(axes: MeshAxes, mesh: Mesh) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    total = 1
    for axis in axes:
        total *= mesh.shape[axis]
    return total


def _check_divides(name: str, size: int, axes: MeshAxes, mesh: Mesh) -> None:
    n = _devices(axes, mesh)
    if size % n:
        axes = (axes,) if isinstance(axes, str) else axes
        over = " x ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
        fits = max(k for k in range(1, n) if size % k == 0)
        raise BadInput(
            f"{name} = {size} over {over}: must divide evenly,"
            f" as {-(-size // n) * n} would, or {size} over {fits}"
        )


def _spec(logical: tuple[str | None, ...], table: dict[str, Any]) -> PartitionSpec:
    unknown = [name for name in logical if name is not None and name not in table]
    if unknown:
        raise ValueError(f"unknown logical axis {unknown[0]!r}; known: {', '.join(table)}")
    axes = [None if name is None else table[name] for name in logical]
    used = [a for axis in axes for a in ((axis,) if isinstance(axis, str) else axis or ())]
    if len(used) != len(set(used)):
        raise ValueError(f"colliding mesh axes: {logical} would lie on {axes}")
    return PartitionSpec(*axes)


def partitioned(init: Callable, *logical: str | None) -> Callable:
    """An initialiser whose parameter carries its logical axes (one a dimension) as metadata.

    Raises ``ValueError`` for a misspelt axis, and for two axes that lie on the same mesh axis.
    """
    for column in (0, 1):
        _spec(logical, {axis: places[column] for axis, places in STORED.items()})
    return nn.with_logical_partitioning(init, logical)


def stored_shardings(boxed: Any, mesh: Mesh, table: dict[str, MeshAxes]) -> Any:
    """The sharding on ``mesh`` of every array that ``partitioned`` boxed (others: replicated).

    Raises ``BadInput`` where a mesh axis does not divide the dimension that lies on it.
    """

    def place(path, leaf, logical) -> NamedSharding:
        spec = _spec(tuple(logical), table)
        name = path[-1].key if hasattr(path[-1], "key") else jax.tree_util.keystr(path)
        for size, logical_axis, axes in zip(leaf.shape, logical, spec, strict=False):
            _check_divides(f"{name}'s axis {logical_axis!r}", size, axes, mesh)
        return NamedSharding(mesh, spec)

    specs = nn.get_partition_spec(boxed)
    return jax.tree_util.tree_map_with_path(place, nn.meta.unbox(boxed), specs)


_placement: ContextVar[tuple[Mesh, Layout] | None] = ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(mesh: Mesh, layout: Layout) -> Iterator[None]:
    """What is traced inside lies as ``layout`` says; outside, ``constrain`` has nothing to pin.

    It is no part of jit's cache key: trace with a fresh ``jax.jit`` for each layout.
    """
    token = _placement.set((mesh, layout))
    try:
        yield
    finally:
        _placement.reset(token)


def named_sharding(mesh: Mesh, layout: Layout, *logical: str | None) -> NamedSharding:
    """The sharding on ``mesh`` of an activation or batch with these logical axes."""
    return NamedSharding(mesh, _spec(logical, layout.computed))


def constrain(x: jax.Array, *logical: str | None, gradient: str | None = None) -> jax.Array:
    """Pins an activation's layout. Raises ``ValueError`` as ``partitioned`` does.

    ``gradient``: the second axis of its gradient's layout, where that is another. What is split in
    the forward pass is gathered in the backward pass (Korthikanti et al. 2022, figure 5); left to
    itself XLA may gather the whole batch instead.
    """
    _spec(logical, COMPUTED)
    placement = _placement.get()
    if placement is None:
        return x
    place = named_sharding(*placement, *logical)
    if gradient is None:
        return jax.lax.with_sharding_constraint(x, place)
    return _gather(x, place, named_sharding(*placement, logical[0], gradient, *logical[2:]))


def devices_along(logical: str) -> int:
    """How many devices an activation's axis lies over in what is being traced."""
    placement = _placement.get()
    return 1 if placement is None else _devices(placement[1].computed[logical], placement[0])


def is_split(logical: str) -> bool:
    """Whether an activation's axis lies on more than one device in what is being traced."""
    return devices_along(logical) > 1


def here(*logical: str | None) -> NamedSharding | None:
    """Where an activation with these axes lies in what is being traced (None: not ``placed``)."""
    placement = _placement.get()
    return None if placement is None else named_sharding(*placement, *logical)


def platform() -> str:
    """What is being traced runs on: cpu, gpu or tpu. An abstract mesh stands for a TPU's."""
    placement = _placement.get()
    if placement is None:
        return jax.default_backend()
    mesh = placement[0]
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else "tpu"


def stores_parts() -> bool:
    """Whether parameters are stored in parts (ZeRO's third stage) in what is being traced."""
    placement = _placement.get()
    return placement is not None and placement[1].params["embed"] is not None


def all_but_moved(primitive, *_, new_dtype=None, **__) -> bool:
    """A rematerialisation policy: keeps all but what was only moved between devices.

    Under ZeRO's third stage every layer's whole parameters would else wait for the backward pass.
    """
    # jax rounds what it keeps to the type's bits as if they were IEEE's: e4m3fn above 240 is lost.
    fp8 = new_dtype is not None and jnp.dtype(new_dtype).name.startswith("float8")
    return primitive.name != "sharding_constraint" and not fp8


def gather(kernel: jax.Array, *logical: str | None) -> jax.Array:
    """A parameter as it is computed with; its gradient as gradients lie.

    Without it, XLA may move the activations to the stored parameter instead.
    """
    placement = _placement.get()
    if placement is None:
        return kernel
    mesh, table = placement
    places = (NamedSharding(mesh, _spec(logical, t)) for t in (table.computed, table.gradients))
    return _gather(kernel, *places)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(kernel, use: NamedSharding, gradient: NamedSharding):
    return jax.lax.with_sharding_constraint(kernel, use)


_gather.defvjp(
    # Not by _gather itself: all_but_moved shall see the constraint.
    lambda kernel, use, _: (jax.lax.with_sharding_constraint(kernel, use), None),
    lambda use, gradient, _, g: (jax.lax.with_sharding_constraint(g, gradient),),
)
