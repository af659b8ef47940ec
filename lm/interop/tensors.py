"""The decoder's tensors under transformers' names, read straight into their places on a mesh.

A parameter of ours is a matrix of theirs, transposed, or stacks several: of the layers that a scan
runs over, of the experts of a layer.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import tree_flatten_with_path

from lm.checkpoint import abstract_params
from lm.command import BadInput
from lm.config import Config, ModelConfig

# Ours to theirs. {i} is the layer, {e} the expert.
OUTSIDE = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/gain": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
LAYER = {
    "attention_norm/gain": "input_layernorm.weight",
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/query_norm/gain": "self_attn.q_norm.weight",
    "attention/key_norm/gain": "self_attn.k_norm.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "feed_forward_norm/gain": "post_attention_layernorm.weight",
    "feed_forward/gate/kernel": "mlp.gate_proj.weight",
    "feed_forward/up/kernel": "mlp.up_proj.weight",
    "feed_forward/down/kernel": "mlp.down_proj.weight",
    "feed_forward/router/kernel": "block_sparse_moe.gate.weight",
    "feed_forward/experts/gate/kernel": "block_sparse_moe.experts.{e}.w1.weight",
    "feed_forward/experts/up/kernel": "block_sparse_moe.experts.{e}.w3.weight",
    "feed_forward/experts/down/kernel": "block_sparse_moe.experts.{e}.w2.weight",
}
LAYER |= {  # adapters, by the names of the package peft
    ours.replace("kernel", f"lora_{x}"): theirs.replace("weight", f"lora_{x.upper()}.weight")
    for ours, theirs in LAYER.items()
    for x in "ab"
    if ours.endswith("kernel") and "{e}" not in theirs
}
NAMES = OUTSIDE | {f"layer/{ours}": f"model.layers.{{i}}.{name}" for ours, name in LAYER.items()}
# Of older files; they follow from the config.
NO_WEIGHTS = ("rotary_emb.inv_freq", "masked_bias")
DTYPES = ("F32", "BF16", "F16")
BLOCKS = 8  # a tensor's part is read in as many blocks,
SMALLEST_BLOCK = 2**18  # but of no fewer values; a block is held three times for a moment


class Source(Protocol):
    """Where another's tensors are read from."""

    tensors: dict[str, tuple[tuple[int, ...], str]]  # name to shape and dtype, by safetensors' name

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in a float dtype."""


class Leaf(NamedTuple):
    """A parameter of ours: which tensors of theirs it holds, and over how many leading axes."""

    names: dict[tuple[int, ...], str]  # by place along the stacked axes
    stacked: int  # how many these are
    is_kernel: bool  # or a part of an adapter: the axes after them are theirs, transposed
    array: Any  # with a shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each of their tensors."""
        own = self.array.shape[self.stacked :]
        return own[::-1] if self.is_kernel else own


def leaves(model: ModelConfig, params: Any) -> list[Leaf]:
    """The leaves of a tree of parameters, in its order.

    Raises ``BadInput`` for a parameter that no family of transformers has.
    """
    return [_leaf(model, path, array) for path, array in tree_flatten_with_path(params)[0]]


def _leaf(model: ModelConfig, path: Any, array: Any) -> Leaf:
    first, *rest = (key.key for key in path)
    layers, scanned = range(1), first == "layers"
    if scanned:  # a scan repeats one layer, or a period of several
        start, step = (model.moe.first_dense, model.moe.every) if model.moe.n_experts else (0, 1)
        if rest[0].startswith("layer_"):
            start += int(rest.pop(0).removeprefix("layer_"))
        layers, first = range(start, model.n_layers, step), "layer"
    elif first.startswith("layer_"):
        layers, first = [int(first.removeprefix("layer_"))], "layer"
    ours = "/".join([first, *rest])
    if ours not in NAMES:
        raise BadInput(f"the parameter {ours}: no family of transformers has it")
    routed = "{e}" in NAMES[ours]
    experts = range(model.moe.n_experts if routed else 1)
    names = {
        (j,) * scanned + (e,) * routed: NAMES[ours].format(i=i, e=e)
        for (j, i), e in itertools.product(enumerate(layers), experts)
    }
    return Leaf(names, scanned + routed, ours.endswith(("kernel", "lora_a", "lora_b")), array)


def load(source: Source, config: Config, mesh: Mesh) -> Any:
    """The decoder's parameters out of ``source``, laid over ``mesh`` as the config has it.

    Every device's part of a tensor is read on its own, in blocks, so beside the parts that are in
    place no more than blocks are held. Each host reads what its devices hold.

    Raises ``BadInput`` where ``source`` holds other tensors, shapes or dtypes than the decoder.
    """
    abstract = abstract_params(config, mesh)
    flat = leaves(config.model, abstract)
    check(source, flat, config.model.tied)
    arrays = [_placed(source, leaf) for leaf in flat]
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def check(source: Source, flat: list[Leaf], tied: bool) -> None:
    """Raises ``BadInput`` where ``source`` holds other tensors, shapes or dtypes than ``flat``."""
    wanted = {name: leaf.shape for leaf in flat for name in leaf.names.values()}
    free = NO_WEIGHTS + ((OUTSIDE["head/kernel"],) if tied else ())
    missing = [name for name in wanted if name not in source.tensors]
    extra = [name for name in source.tensors if name not in wanted and not name.endswith(free)]
    for what, names in (("are missing", missing), ("fit nowhere", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BadInput(f"tensors {what}: {names[0]}{more}")
    for name, shape in wanted.items():
        given, dtype = source.tensors[name]
        if tuple(given) != shape:
            raise BadInput(f"tensor {name}: has the shape {tuple(given)}, must be {shape}")
        if dtype not in DTYPES:
            raise BadInput(f"tensor {name}: is {dtype}, must be one of {', '.join(DTYPES)}")


def _placed(source: Source, leaf: Leaf) -> jax.Array:
    shape, sharding = leaf.array.shape, leaf.array.sharding
    parts: dict[tuple[range, ...], jax.Array] = {}  # one of each, for devices with copies
    shards = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        axes = tuple(range(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        if axes not in parts:
            parts[axes] = _shard(source, leaf, device, axes)
        shards.append(jax.device_put(parts[axes], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _shard(source: Source, leaf: Leaf, device: jax.Device, axes: tuple[range, ...]) -> jax.Array:
    """What ``device`` holds of a parameter: these indices of each axis."""
    shard = jnp.zeros([len(axis) for axis in axes], jnp.float32, device=device)
    stacked, own = axes[: leaf.stacked], axes[leaf.stacked :]
    for index in itertools.product(*stacked):
        at = [i - axis.start for i, axis in zip(index, stacked, strict=True)]
        for start, block in _blocks(source, leaf.names[index], own, leaf.is_kernel):
            block = np.array(block, np.float32, order="C", ndmin=len(axes))
            start = np.array([*at, *start], np.int32)
            shard = _write(shard, block, start).block_until_ready()
    return shard


def _blocks(
    source: Source, name: str, axes: tuple[range, ...], is_kernel: bool
) -> Iterator[tuple[list[int], np.ndarray]]:
    """A part of a tensor in blocks of its rows, as ours: where in the part each starts, and it."""
    rows, *columns = axes[::-1] if is_kernel else axes
    others = tuple(slice(axis.start, axis.stop) for axis in columns)
    size = max(len(rows) // BLOCKS, SMALLEST_BLOCK // max(1, math.prod(map(len, columns))), 1)
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        block = source.read(name, (slice(part.start, part.stop), *others))
        start = [first, *(0 for _ in columns)]
        yield (start[::-1], block.T) if is_kernel else (start, block)


@partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, block, tuple(start))


def pieces(
    model: ModelConfig, params: Any
) -> dict[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """Their tensors out of our parameters: name to shape, and a call that gives it in float32.

    Raises ``BadInput`` for a parameter that no family of transformers has.
    """

    def get(leaf: Leaf, place: tuple[int, ...]) -> np.ndarray:
        piece = np.asarray(leaf.array[place])
        return np.ascontiguousarray(piece.T if leaf.is_kernel else piece)

    return {
        name: (leaf.shape, partial(get, leaf, place))
        for leaf in leaves(model, params)
        for place, name in leaf.names.items()
    }
