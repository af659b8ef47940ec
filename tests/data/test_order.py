import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import order


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_index_exactly_once(size, seed, epoch):
    result = order.permute(np.arange(size), size, order.key(seed, epoch))
    np.testing.assert_array_equal(np.sort(result), np.arange(size))


def test_keys_by_element_agree_with_one_key():
    size = 1009
    index = np.arange(size)
    epochs = index % 3
    mixed = order.permute(index, size, order.key(7, epochs))
    for epoch in range(3):
        alone = order.permute(index, size, order.key(7, epoch))
        np.testing.assert_array_equal(mixed[epochs == epoch], alone[epochs == epoch])


def test_sizes_beyond_memory():
    size = 10**13
    result = order.permute(np.arange(10_000), size, order.key(1))
    assert len(set(result.tolist())) == 10_000
    assert abs(result.mean() / size - 0.5) < 4 * 0.289 / 100  # uniform: sd 0.289 / sqrt(10^4)


@pytest.mark.parametrize("size", [64, 1000])
def test_looks_like_a_shuffle(size):
    # Over many keys each index lands everywhere alike (chi-square, 5 sigma), neighbours do not stay
    # neighbours, and fixed points number about one a permutation.
    n_keys = 2000
    keys = order.key(np.arange(n_keys))
    landed = order.permute(np.full(n_keys, 5), size, keys)
    counts = np.bincount(landed * 20 // size, minlength=20)
    chi_square = np.sum((counts - n_keys / 20) ** 2 / (n_keys / 20))
    assert chi_square < 19 + 5 * np.sqrt(2 * 19)
    after = order.permute(np.full(n_keys, 6), size, keys)
    assert np.mean(np.abs(after - landed) == 1) < 3 * 2 / size + 0.01
    fixed = [np.sum(order.permute(np.arange(size), size, keys[i : i + 1]) == np.arange(size))
             for i in range(300)]  # fmt: skip
    assert 0.7 < np.mean(fixed) < 1.3


def test_seeds_and_epochs_give_different_orders():
    index = np.arange(500)
    orders = {
        order.permute(index, 500, order.key(s, e)).tobytes() for s in range(4) for e in range(4)
    }
    assert len(orders) == 16
