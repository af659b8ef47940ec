"""The collectives of a compiled program, from its HLO text: kind, mesh axes, times a step, bytes.

What is inside a loop counts as often as the loop turns. A loop whose bound is an argument, as the
one over a dispatch's optimizer steps, counts once: so all is per optimizer step.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")
_MESH_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")


class Collective(NamedTuple):
    """All of one kind over the same mesh axes, of one optimizer step."""

    kind: str
    axes: tuple[str, ...]  # along which the devices of a group differ
    group_size: int
    count: int
    payload_bytes: int  # the whole arrays: gathered, to be reduced, or sent on

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends, by a ring's or a torus's optimal algorithm.

        (n - 1) / n of the payload; twice that where it is reduced and gathered again.
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.payload_bytes
        share = (self.group_size - 1) / self.group_size
        return self.payload_bytes * share * (2 if self.kind == "all-reduce" else 1)


class _Instruction(NamedTuple):
    name: str
    opcode: str
    shape: str
    operands: str
    attributes: str
    is_root: bool


def collectives(hlo: str, sizes: dict[str, int]) -> list[Collective]:
    """The collectives of `hlo` (``compiled.as_text()``), the most bytes sent first.

    `sizes`: devices along each mesh axis, in the mesh's order.
    """
    computations, entry = _parse(hlo)
    totals = defaultdict(lambda: [0, 0])
    for one, kind, times in _walk(computations, entry, 1):
        axes, group_size, payload = _describe(one, sizes)
        if group_size > 1:
            total = totals[kind, axes, group_size]
            total[0] += times
            total[1] += times * payload
    found = [Collective(*key, *total) for key, total in totals.items()]
    return sorted(found, key=lambda c: -c.sent_bytes)


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # those end a kernel's settings
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            shape, rest = _split(line[found.end() :])
            opcode, _, rest = rest.strip().partition("(")
            operands, attributes = _split("(" + rest)
            current.append(
                _Instruction(found[2], opcode, shape, operands, attributes, bool(found[1]))
            )
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """A leading shape or argument list, which may be in nested parentheses; and the rest."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and (character == " " or (text[0] == "(" and character == ")")):
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _walk(
    computations: dict[str, list[_Instruction]], name: str, times: int
) -> Iterator[tuple[_Instruction, str, int]]:
    """Every collective reached from a computation, its kind, and how often it runs."""
    fused_channels = set()
    for one in computations.get(name, ()):
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            yield one, kind, times
            continue
        inside = times * (_turns(one, computations) if one.opcode == "while" else 1)
        for called in _CALLED.findall(one.attributes):
            for callee in re.findall(r"[\w.-]+", called):
                for found, kind, n in _walk(computations, callee, inside):
                    if one.opcode == "fusion":
                        # On TPU an asynchronous collective is in every fusion that it overlaps.
                        channel = re.search(r"channel_id=\d+", found.attributes)
                        if channel and channel[0] in fused_channels:
                            continue
                        fused_channels.add(channel and channel[0])
                        # And a reduce-scatter is the fusion of an all-reduce and a slice.
                        kind = "reduce-scatter" if "all-reduce-scatter" in callee else kind
                    yield found, kind, n


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often a loop runs: as XLA noted it, else the constant that its condition compares to."""
    if noted := re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.attributes):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    body = computations.get(condition[1], []) if condition else []
    root = next((i for i in body if i.is_root), None)
    constants = {i.name: i.operands.strip("() ") for i in body if i.opcode == "constant"}
    for operand in re.findall(r"%?([\w.-]+)", root.operands if root else ""):
        if constants.get(operand, "").isdigit():
            return int(constants[operand])
    return 1


def _describe(one: _Instruction, sizes: dict[str, int]) -> tuple[tuple[str, ...], int, int]:
    """The mesh axes of one collective, its group's size and its payload."""
    groups = _groups(one.attributes, math.prod(sizes.values()))
    coordinates = np.array(np.unravel_index(groups, list(sizes.values())))  # axis, group, member
    varies = np.any(coordinates != coordinates[..., :1], axis=(1, 2))
    axes = tuple(axis for axis, along in zip(sizes, varies, strict=True) if along)
    shape = one.shape.strip()
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        shape = _split(_split(shape[1:])[1].lstrip(" ,"))[0]  # (operand, result, ...)
    payload = sum(
        math.prod(_numbers(lengths)) * int(bits or 8) // 8  # `pred` is a byte
        for bits, lengths in _ARRAY.findall(shape)
    )
    if one.opcode == "reduce-scatter":
        payload *= groups.shape[1]
    is_pairs = one.opcode.startswith("collective-permute")
    return axes, math.prod(sizes[a] for a in axes) if is_pairs else groups.shape[1], payload


def _groups(attributes: str, n_devices: int) -> np.ndarray:
    """Devices by group, (groups, members), in any of the forms that XLA prints."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _rows(pairs[1])
    _, _, text = attributes.partition("replica_groups=")
    if text.startswith("{{"):
        return _rows(text.partition("}}")[0])
    if text.startswith("["):  # as [4,2]<=[2,4]T(1,0)
        shape, iota = re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text).groups()
        return _iota(iota).reshape(_numbers(shape))
    if text.startswith("mesh["):  # as mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
        return _mesh_groups(text)
    return np.arange(n_devices)[None]


def _mesh_groups(text: str) -> np.ndarray:
    mesh, _, rest = text.removeprefix("mesh[").partition("]")
    names, lengths = zip(*((m[1], int(m[2])) for m in _MESH_AXIS.finditer(mesh)), strict=True)
    order = re.match(r", device_ids=\((.*?\)?)\)", rest)
    devices = _iota(order[1]) if order else np.arange(math.prod(lengths))
    # An axis may be used in part, as 'a':(2)4: its middle factor, of length 4 after one of 2.
    shape, used = [], []
    chosen = {m[1]: m for m in _MESH_AXIS.finditer(rest[rest.index("{") : rest.index("}")])}
    for name, length in zip(names, lengths, strict=True):
        part = chosen.get(name)
        before, size = (int(part[3]), int(part[4])) if part and part[3] else (1, length)
        used += [False, part is not None, False]
        shape += [before, size, length // (before * size)]
    devices = devices.reshape(shape)
    order = sorted(range(len(shape)), key=lambda axis: used[axis])
    members = math.prod(n for n, u in zip(shape, used, strict=True) if u)
    return devices.transpose(order).reshape(-1, members)


def _iota(text: str) -> np.ndarray:
    """``[2,4]T(1,0)``: 0, 1, ... laid out as 2 x 4, transposed, flattened."""
    shape, axes = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    laid = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (laid.transpose(_numbers(axes)) if axes else laid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _rows(text: str) -> np.ndarray:
    return np.array([_numbers(group) for group in text.split("}")])
