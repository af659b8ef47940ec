"""RoPE: the lectures' worked example, and that only differences of positions count."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.model.rotary import frequencies, rotate


def turned(vector, position, base=10_000.0):
    x_BTNH = jnp.asarray(vector, jnp.float32).reshape(1, 1, 1, -1)
    return np.asarray(rotate(x_BTNH, jnp.array([[position]]), base)).ravel()


def test_worked_example():
    """theta = 1, q = [1, 2] at 2, k = [3, 0] at 3: q^T R_1 k = 3 cos 1 + 6 sin 1."""
    score = turned([1.0, 2.0], 2) @ turned([3.0, 0.0], 3)
    assert score == pytest.approx(6.6697, abs=5e-5)
    assert score == pytest.approx(np.array([1.0, 2.0]) @ turned([3.0, 0.0], 1), abs=1e-5)
    assert score == pytest.approx(3 * np.cos(1) + 6 * np.sin(1), abs=1e-5)


def test_frequencies_fall_from_1_to_almost_1_over_base():
    np.testing.assert_allclose(
        frequencies(8, 500_000.0), 500_000.0 ** -np.array([0, 0.25, 0.5, 0.75]), rtol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 99))
def test_scores_depend_on_the_difference_of_positions_alone(m, n, shift, seed):
    q, k = np.random.default_rng(seed).normal(size=(2, 8))
    score = turned(q, m) @ turned(k, n)
    assert turned(q, m + shift) @ turned(k, n + shift) == pytest.approx(score, abs=2e-3)
    assert np.linalg.norm(turned(q, m)) == pytest.approx(np.linalg.norm(q), rel=1e-5)


def test_position_0_turns_nothing():
    np.testing.assert_array_equal(turned([1.0, 2.0, 3.0, 4.0], 0), [1, 2, 3, 4])


def test_split_halves_are_the_papers_pairs_in_another_order():
    """Su et al. 2021, equation 34, has pairs (0, 1), (2, 3), ...; here they are (i, i + H/2)."""
    x, position, base = np.random.default_rng(0).normal(size=8), 5, 100.0
    pairs = x.reshape(4, 2) @ np.array([1, 1j])
    pairs = pairs * np.exp(1j * position * base ** (-np.arange(0, 8, 2) / 8))
    halves = turned(np.concatenate([x[0::2], x[1::2]]), position, base)
    np.testing.assert_allclose(halves, np.concatenate([pairs.real, pairs.imag]), atol=1e-6)


def test_every_row_may_have_its_own_positions_and_the_dtype_stays():
    x_BTNH = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 4)), jnp.float32)
    positions_BT = jnp.array([[0, 1, 2], [7, 0, 1]])
    together = rotate(x_BTNH, positions_BT, 100.0)
    for b in range(2):
        alone = rotate(x_BTNH[b : b + 1], positions_BT[b : b + 1], 100.0)
        np.testing.assert_array_equal(together[b : b + 1], alone)
    assert rotate(x_BTNH.astype(jnp.bfloat16), positions_BT, 100.0).dtype == jnp.bfloat16
