"""Accelerators by name: what a chip computes, holds and sends, and how chips are wired. No jax."""

import math
from dataclasses import dataclass
from itertools import combinations

from lm.command import BadInput, nearest, one_of

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A TPU chip, from docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}.

    ``hbm_bytes`` is what libtpu's compiler grants a program, a little less than the data sheet's.
    """

    peak_flops: float  # dense bfloat16 FLOP/s
    int8_flops: float  # FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s of one inter-chip link, one way
    shapes: tuple[str, ...]  # of slices that are lent; the first few are one host's
    ring: int  # a torus axis that is a multiple of this closes to a ring


_SHAPES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
_SHAPES_3D += ("8x16x16", "16x16x16")

CHIPS = {
    "v4": Chip(275e12, 275e12, 30.75 * GIB, 1.2e12, 50e9, (*_SHAPES_3D, "12x12x24"), 4),
    "v5e": Chip(197e12, 394e12, 15.75 * GIB, 0.819e12, 50e9, _SHAPES_2D, 16),
    "v5p": Chip(459e12, 918e12, 95.74 * GIB, 2.765e12, 100e9, (*_SHAPES_3D, "16x16x24"), 4),
    "v6e": Chip(918e12, 1836e12, 31.25 * GIB, 1.64e12, 100e9, _SHAPES_2D, 16),
}
# Dense bfloat16 FLOP/s of one chip; of GPUs from NVIDIA's data sheets.
PEAK_FLOPS = {name: chip.peak_flops for name, chip in CHIPS.items()}
PEAK_FLOPS |= {"a100": 312e12, "h100": 989e12}
# Bytes that a program is granted; of GPUs with 80 GB the three quarters that jax takes by itself.
HBM_BYTES = {name: chip.hbm_bytes for name, chip in CHIPS.items()}
HBM_BYTES |= {"a100": 60e9, "h100": 60e9}
# What jax calls a device whose chip is known.
DEVICE_KINDS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e"},
    **{"NVIDIA A100-SXM4-40GB": "a100", "NVIDIA A100-SXM4-80GB": "a100"},
    **{"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h100"},
}
# Bytes/s a chip to other slices: 50 Gbit/s of the data-center network (the v5p page's figure).
DCN_BANDWIDTH = 50e9 / 8


@dataclass(frozen=True)
class Topology:
    """Slices of one chip, as ``v5p:8x8x8``, or several as ``2*v5p:8x8x8``."""

    name: str
    chip_name: str
    torus: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def n_chips(self) -> int:
        return self.slices * math.prod(self.torus)

    def bandwidths(self, sizes: dict[str, int]) -> dict[str, float] | None:
        """Bytes/s that a device can send along each mesh axis, in both directions together.

        Axes take whole torus axes where products match, as ``jax.make_mesh`` lays them, else part
        of one, which then is a line and no ring. None where the mesh does not fit the torus.
        `sizes`: devices along each mesh axis; ``replica`` lies across slices first.
        """
        left = [(size, size % self.chip.ring == 0) for size in self.torus]
        result = {axis: math.inf for axis in sizes}
        sizes = dict(sizes)
        if self.slices > 1:
            if sizes.get("replica", 1) % self.slices:
                return None
            sizes["replica"] //= self.slices
        for axis in sorted(sizes, key=lambda axis: -sizes[axis]):
            if sizes[axis] == 1:
                continue
            taken = _whole_axes(left, sizes[axis]) or _part_of_axes(left, sizes[axis])
            if taken is None:
                return None
            left, ways = taken
            result[axis] = ways * self.chip.link_bandwidth
        if self.slices > 1:
            result["replica"] = DCN_BANDWIDTH
        return result


def _whole_axes(left: list[tuple[int, bool]], size: int):
    """What remains of the torus, and the links a device has along what was taken."""
    for n in range(1, len(left) + 1):
        for chosen in combinations(range(len(left)), n):
            if math.prod(left[i][0] for i in chosen) == size:
                rest = [axis for i, axis in enumerate(left) if i not in chosen]
                return rest, sum(2 if left[i][1] else 1 for i in chosen)
    return None


def _part_of_axes(left: list[tuple[int, bool]], size: int):
    rest, links = list(left), 0
    for i, (length, _) in enumerate(left):
        part = math.gcd(length, size)
        if part > 1:
            links += 2 if part == length and left[i][1] else 1
            rest[i] = (length // part, False)
            size //= part
    return (rest, links) if size == 1 else None


def topology(name: str) -> Topology:
    """The topology of a name as ``v5e:2x4`` or, of several slices, ``4*v5e:16x16``.

    Raises ``BadInput`` for an unknown chip or shape, naming those there are.
    """
    many, star, one = name.rpartition("*")
    chip_name, _, shape = one.partition(":")
    one_of("the chip of --topology", chip_name, list(CHIPS))
    shapes = CHIPS[chip_name].shapes
    if shape not in shapes:
        known = ", ".join(f"{chip_name}:{s}" for s in shapes)
        raise BadInput(
            f"--topology={name}: must be one of {known}, or several slices as"
            f" 2*{chip_name}:{shapes[-1]}{nearest(shape, shapes)}"
        )
    if star and not (many.isdigit() and int(many) > 0):
        raise BadInput(f"--topology={name}: {many!r} slices; write a number, as 2*{one}")
    return Topology(name, chip_name, tuple(map(int, shape.split("x"))), int(many) if star else 1)
