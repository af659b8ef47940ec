import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import mixture


@given(
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    n_rows=st.integers(1, 3000),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_and_indices_have_no_gap(weights, seed, n_rows):
    source, local = mixture.assign(np.arange(n_rows), weights, seed)
    shares = np.array(weights) / sum(weights)
    for i, share in enumerate(shares):
        mine = local[source == i]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        # Dealt, not drawn: a prefix has its share to within the roundings of the sources before.
        assert abs(len(mine) - share * n_rows) <= i + 1


def test_pure_in_the_global_row():
    weights = [0.67, 0.15, 0.18]
    whole = mixture.assign(np.arange(1000), weights, 3)
    part = mixture.assign(np.arange(400, 500), weights, 3)
    np.testing.assert_array_equal(np.stack(whole)[:, 400:500], np.stack(part))


def test_rows_far_into_a_run():
    rows = np.arange(2**31 - 1000, 2**31)
    source, local = mixture.assign(rows, [0.3, 0.7], 0)
    assert np.all(np.diff(local[source == 0]) == 1) and np.all(np.diff(local[source == 1]) == 1)
    assert abs(local[source == 0][0] / rows[0] - 0.3) < 1e-8


# LLaMA (Touvron et al. 2023, Table 1): sampling share and epochs of each source in 1.4T tokens.
LLAMA = {
    "CommonCrawl": (0.67, 1.10),
    "C4": (0.15, 1.06),
    "GitHub": (0.045, 0.64),
    "Wikipedia": (0.045, 2.45),
    "books": (0.045, 2.23),
    "arXiv": (0.025, 1.06),
    "StackExchange": (0.02, 1.03),
}


def test_llama_table_epochs():
    # The table's own columns tell the sizes: tokens of a source = share * 1.4T / epochs.
    weights = {name: share for name, (share, _) in LLAMA.items()}
    sizes = {name: share * 1.4e12 / epochs for name, (share, epochs) in LLAMA.items()}
    assert sum(weights.values()) == pytest.approx(1)
    assert sizes["CommonCrawl"] == pytest.approx(853e9, rel=0.01)
    found = mixture.epochs(1.4e12, sizes, weights)
    assert {n: round(e, 2) for n, e in found.items()} == {n: e for n, (_, e) in LLAMA.items()}
    # and rows dealt by these weights make the same epochs
    source, _ = mixture.assign(np.arange(100_000), list(weights.values()), 0)
    for i, (name, (_, epochs)) in enumerate(LLAMA.items()):
        tokens = np.sum(source == i) * 1.4e12 / 100_000
        assert tokens / sizes[name] == pytest.approx(epochs, rel=1e-3)


def test_weights_need_not_sum_to_one():
    assert mixture.epochs(100, {"a": 10, "b": 10}, {"a": 3, "b": 1}) == {"a": 7.5, "b": 2.5}
