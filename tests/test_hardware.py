import math

import pytest

from lm.command import BadInput
from lm.config import MESH_AXES
from lm.hardware import CHIPS, GIB, topology


def test_a_name_gives_chips_and_torus():
    one = topology("v5p:4x8x8")
    assert (one.chip_name, one.torus, one.slices, one.n_chips) == ("v5p", (4, 8, 8), 1, 256)
    assert topology("4*v5e:16x16").n_chips == 1024


@pytest.mark.parametrize(
    "name, line",
    [
        ("h100:8", "'h100': must be one of v4, v5e, v5p, v6e"),
        ("v5p", "must be one of v5p:2x2x1, "),
        ("v5e:16x61", "did you mean '16x16'"),
        ("0*v5e:2x4", "'0' slices"),
        ("many*v5e:2x4", "'many' slices"),
    ],
)
def test_an_unknown_topology_is_told_the_known_ones(name, line):
    with pytest.raises(BadInput) as refused:
        topology(name)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def bandwidths(name, **sizes):
    one = topology(name)
    link = one.chip.link_bandwidth
    found = one.bandwidths(dict.fromkeys(MESH_AXES, 1) | sizes)
    return found and {axis: found[axis] / link for axis in sizes}


@pytest.mark.parametrize(
    "name, sizes, links",
    [
        ("v5e:16x16", {"data": 256}, {"data": 4}),  # two rings
        ("v5e:16x16", {"data": 16, "model": 16}, {"data": 2, "model": 2}),
        ("v5e:4x4", {"data": 16}, {"data": 2}),  # two lines: a v5e axis closes at 16 alone
        ("v5p:4x4x4", {"data": 64}, {"data": 6}),  # three rings
        ("v5p:2x2x1", {"data": 4}, {"data": 2}),
        ("v5p:8x8x8", {"data": 64, "model": 8}, {"data": 4, "model": 2}),
        ("v6e:16x16", {"data": 32, "model": 8}, {"data": 3, "model": 1}),  # part of an axis: a line
    ],
)
def test_a_mesh_axis_has_the_links_of_the_torus_axes_that_it_takes(name, sizes, links):
    assert bandwidths(name, **sizes) == links


def test_a_mesh_that_does_not_lie_on_the_torus_has_none():
    assert bandwidths("v5e:4x4", data=5, model=3) is None


def test_slices_are_replicas_over_the_data_center_network():
    one = topology("2*v5e:4x4")
    assert one.bandwidths(dict.fromkeys(MESH_AXES, 1) | {"data": 32}) is None
    found = one.bandwidths(dict.fromkeys(MESH_AXES, 1) | {"replica": 2, "data": 16})
    assert found["replica"] == 50e9 / 8 and found["data"] == 2 * one.chip.link_bandwidth


def test_the_chips_are_the_data_sheets():
    """A chip's links together, both ways: 300 GB/s of v4 (one way), 400, 1200 and 800 GB/s."""
    for name, (total, links) in {"v5e": (400e9, 4), "v5p": (1200e9, 6), "v6e": (800e9, 4)}.items():
        assert 2 * links * CHIPS[name].link_bandwidth == total
    assert 6 * CHIPS["v4"].link_bandwidth == 300e9
    for name, hbm in {"v4": 32 * GIB, "v5e": 16e9, "v5p": 103e9, "v6e": 32e9}.items():
        assert CHIPS[name].hbm_bytes == pytest.approx(hbm, rel=0.07)
    # The all-reduce bandwidth of a pod of 256, 51.2 and 102.4 TB/s, is all links one way.
    for name, terabytes in {"v5e": 51.2, "v6e": 102.4}.items():
        pod = math.prod(topology(f"{name}:16x16").torus) * 4 * CHIPS[name].link_bandwidth / 1e12
        assert pod == pytest.approx(terabytes)
