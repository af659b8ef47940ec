"""What fits on a slice: the nearest change of a config that does, or its best mesh and batch.

Arithmetic ranks thousands of candidates; the compiler then judges the first few, and its ratio to
the arithmetic corrects the rest.
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

from lm.command import BadInput
from lm.config import MESH_AXES, Config
from lm.estimate.compiled import Compiled
from lm.estimate.memory import device_memory, fuses_attention
from lm.estimate.roofline import Roofline, roofline
from lm.hardware import Topology
from lm.sharding import axis_sizes

Compile = Callable[[Config, int], Compiled]

# Offloading is left to its user: the host's link is not in the roofline.
REMAT = ("none", "dots", "dots_with_no_batch_dims", "full")  # the most kept first
TENSOR = tuple(2**k for k in range(7))


class Candidate(NamedTuple):
    """A config that goes with the topology, and what the arithmetic says of it."""

    config: Config
    sequences: int  # rows of the global batch
    changes: dict[str, Any]  # settings that are not the given config's
    bytes: float  # of a chip
    roofline: Roofline


def nearest(
    config: Config,
    on: Topology,
    sequences: int,
    compile: Compile | None,
    ratio: float = 1.0,
    attempts: int = 4,
) -> tuple[Candidate, Compiled | None] | None:
    """The config with the same batch that fits and differs in the fewest settings.

    Among as many changes, the fastest by the roofline. Tried are chunks of the loss, smaller
    micro-batches, ZeRO's stages, rematerialisation, and tensor parallelism with a sequence-sharded
    residual. None where none fits, or none did in `attempts` compilations.

    Args:
      compile: the judge; None: the arithmetic's word is taken.
      ratio: compiled over estimated bytes, of the given config.
    """
    found = sorted(
        _variants(config, on, sequences), key=lambda c: (len(c.changes), c.roofline.bound_seconds)
    )
    for candidate in found:
        if not candidate.changes or candidate.bytes * ratio > on.chip.hbm_bytes:
            continue
        if compile is None:
            return candidate, None
        if attempts == 0:
            break
        attempts -= 1
        compiled = _try(compile, candidate)
        if compiled is None:
            continue
        if compiled.fits:
            return candidate, compiled
        ratio = max(ratio, compiled.peak_bytes / candidate.bytes)
    return None


def best(
    config: Config, on: Topology, compile: Compile | None, attempts: int = 4
) -> tuple[Candidate, Compiled | None] | None:
    """The mesh, ZeRO stage and rematerialisation that train fastest, with the largest batch.

    That is the largest without accumulation; of equally fast ones the largest. ``stage``,
    ``context`` and ``replica`` stay as they are. None where nothing fits.
    """
    ratio, verified, refused = 1.0, None, []
    while attempts:
        found = max(
            (c for c in _largest_batches(config, on, ratio) if c.config not in refused),
            key=lambda c: (-c.roofline.bound_seconds / c.sequences, c.sequences),
            default=None,
        )
        if compile is None:
            return found and (found, None)
        if found is None or (verified and found.config == verified[0].config):
            break
        attempts -= 1
        compiled = _try(compile, found)
        if compiled is None:
            refused.append(found.config)
            continue
        if compiled.fits:
            verified = found, compiled
        # What the compiler says of this one corrects the estimates of all.
        ratio = compiled.peak_bytes / found.bytes
    return verified


def _try(compile: Compile, candidate: Candidate) -> Compiled | None:
    try:
        return compile(candidate.config, candidate.sequences)
    except BadInput:  # something that the arithmetic does not know to be impossible
        return None


def _variants(config: Config, on: Topology, sequences: int) -> Iterator[Candidate]:
    model, train, mesh = config.model, config.train, config.mesh
    less = REMAT[REMAT.index(model.remat) + 1 :] if model.remat in REMAT else ()
    settings = {
        "train.loss_chunk": dict.fromkeys((train.loss_chunk, train.loss_chunk or _chunk(config))),
        "train.accumulation": [train.accumulation * 2**k for k in range(8)],
        "mesh.zero": range(mesh.zero, 4),
        "model.remat": (model.remat, *less),
        "mesh.model": (mesh.model, *(n for n in TENSOR if n > mesh.model)),
        "mesh.sequence_sharded": dict.fromkeys((mesh.sequence_sharded, True)),
    }
    for values in product(*settings.values()):
        changes = dict(zip(settings, values, strict=True))
        if changes["mesh.model"] != mesh.model:
            changes["mesh.data"] = -1
        if candidate := _candidate(config, on, sequences, changes):
            yield candidate


def _largest_batches(config: Config, on: Topology, ratio: float) -> Iterator[Candidate]:
    settings = {
        "mesh.model": TENSOR,
        "mesh.zero": range(4),
        "mesh.sequence_sharded": (False, True),
        "model.remat": REMAT,
        "train.loss_chunk": dict.fromkeys((config.train.loss_chunk, _chunk(config))),
    }
    for values in product(*settings.values()):
        changes = dict(zip(settings, values, strict=True))
        # A pipeline has as many micro-batches as stages at least.
        n_micro = max(1, config.mesh.stage)
        changes |= {"mesh.data": -1, "train.accumulation": n_micro, "train.batch_rule": "fixed"}
        shards = on.n_chips // (config.mesh.stage * config.mesh.context * changes["mesh.model"])
        shards *= n_micro
        one, two = (_candidate(config, on, shards * n, changes) for n in (1, 2))
        if one is None or two is None or one.bytes * ratio > on.chip.hbm_bytes:
            continue
        # The peak of a step grows in proportion to the rows, once it is activations'.
        more = int((on.chip.hbm_bytes / ratio - one.bytes) / (two.bytes - one.bytes))
        rows = shards * (1 + more)
        changes["train.batch_tokens"] = float(rows * config.data.seq_len)
        largest = _candidate(config, on, rows, changes)
        if largest and largest.bytes * ratio <= on.chip.hbm_bytes:
            yield largest


def _chunk(config: Config) -> int:
    """Positions of the loss at a time, where they are to be few."""
    return max(1, config.data.seq_len // 8)


def _candidate(
    config: Config, on: Topology, sequences: int, settings: dict[str, Any]
) -> Candidate | None:
    """None where the model or the batch does not divide over the mesh, or that over the torus."""
    changed = config
    changes = {}
    for name, value in settings.items():
        section, key = name.split(".")
        old = getattr(config, section)
        if getattr(old, key) != value:
            changes[name] = value
            new = dataclasses.replace(getattr(changed, section), **{key: value})
            changed = dataclasses.replace(changed, **{section: new})
    try:
        sizes = dict(zip(MESH_AXES, axis_sizes(changed.mesh, on.n_chips), strict=True))
    except BadInput:
        return None
    if not _divides(changed, sizes, sequences):
        return None
    time = roofline(changed, on, sizes, sequences)
    if time is None:
        return None
    size = device_memory(changed, sizes, sequences, fuses_attention(changed, sizes)).total
    return Candidate(changed, sequences, changes, size, time)


def _divides(config: Config, sizes: dict[str, int], sequences: int) -> bool:
    model, mesh = config.model, config.mesh
    if mesh.sequence_sharded and sizes["model"] == 1:
        return False
    rows = sizes["replica"] * sizes["data"] * config.train.accumulation
    positions = sizes["context"] * (sizes["model"] if mesh.sequence_sharded else 1)
    split = [(sequences, rows), (config.data.seq_len, positions)]
    split += [(n, sizes["model"]) for n in (model.n_heads, model.d_ff, model.vocab_size)]
    split += [(model.d_model, sizes["data"])] * (mesh.zero > 0)
    split += [(model.moe.n_experts, sizes[mesh.experts])]
    return all(size % devices == 0 for size, devices in split)
