import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.sharding import held, lay

N = 24
GLOBAL = np.arange(3 * N * 4).reshape(3, N, 4)


class Here:
    """The shardings of a process whose devices hold some blocks of a batch over eight."""

    def __init__(self, *blocks):
        self.slices = [slice(N // 8 * block, N // 8 * (block + 1)) for block in blocks]

    def addressable_devices_indices_map(self, shape):
        assert shape == (N,)
        return {i: (part,) for i, part in enumerate(self.slices)}


@pytest.mark.parametrize(
    "blocks, rows",
    [
        ((0, 1), range(6)),
        ((6, 2), [6, 7, 8, 18, 19, 20]),  # as a torus may have it
        ((3, 3, 3), [9, 10, 11]),  # devices along other axes hold the same rows
        (range(8), range(N)),
    ],
)
def test_each_device_gets_its_rows_of_what_its_process_read(monkeypatch, blocks, rows):
    here = Here(*blocks)
    found = held(here, N)
    np.testing.assert_array_equal(found, rows)
    laid = []

    def make(shape, sharding, part):
        assert shape == GLOBAL.shape and sharding is here
        for rows in here.slices:
            index = (slice(None), rows, slice(1, 3))  # and half of the positions
            np.testing.assert_array_equal(part(index), GLOBAL[index])
            laid.append(index)

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    lay(GLOBAL[:, found], found, N, 1, here)
    assert len(laid) == len(here.slices)


def test_one_process_lays_the_whole_batch():
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data"))
    np.testing.assert_array_equal(held(sharding, N), np.arange(N))
    laid = lay(GLOBAL, np.arange(N), N, 1, NamedSharding(mesh, P(None, "data", "context")))
    np.testing.assert_array_equal(laid, GLOBAL)
    assert {shard.data.shape for shard in laid.addressable_shards} == {(3, N // 4, 2)}
