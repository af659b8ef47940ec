"""Cross-entropy as a sum of nats over the tokens that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from lm.model import cross_entropy

B, T, V = 4, 6, 9


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits_BTV = 3 * rng.normal(size=(B, T, V))
    targets_BT = rng.integers(V, size=(B, T))
    weights_BT = (np.arange(T)[None] < np.array([6, 1, 0, 4])[:, None]).astype(np.float32)
    return logits_BTV, targets_BT, weights_BT


def test_is_the_sum_of_minus_log_probabilities(batch):
    logits, targets, weights = batch
    nats = -np.take_along_axis(log_softmax(logits, -1), targets[..., None], -1)[..., 0]
    assert cross_entropy(jnp.asarray(logits), targets) == pytest.approx(nats.sum(), rel=1e-5)
    weighted = cross_entropy(jnp.asarray(logits), targets, weights)
    assert weighted == pytest.approx((nats * weights).sum(), rel=1e-5)


def test_any_split_of_a_batch_gives_one_mean(batch):
    """With rows of 6, 1, 0 and 4 tokens a mean of means would be another number."""
    logits, targets, weights = batch
    whole = cross_entropy(jnp.asarray(logits), targets, weights) / weights.sum()
    parts = [
        cross_entropy(jnp.asarray(logits[rows]), targets[rows], weights[rows])
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4))
    ]
    assert sum(parts) / weights.sum() == pytest.approx(float(whole), rel=1e-6)
    of_means = np.mean([float(parts[0]) / 6, float(parts[1]) / 1, float(parts[2]) / 4])
    assert abs(of_means - whole) > 0.1


def test_gradient_is_softmax_minus_one_hot_where_a_token_counts(batch):
    logits, targets, weights = batch
    gradient = jax.grad(cross_entropy)(jnp.asarray(logits, jnp.float32), targets, weights)
    expected = (softmax(logits, -1) - np.eye(V)[targets]) * weights[..., None]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_huge_logits_and_bfloat16():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    assert cross_entropy(logits, jnp.array([[0]])) == 0
    assert cross_entropy(logits, jnp.array([[1]])) == 2e4
    uniform = cross_entropy(jnp.zeros((1, 1, 257), jnp.bfloat16), jnp.array([[3]]))
    assert uniform.dtype == jnp.float32
    assert uniform == pytest.approx(np.log(257), rel=1e-6)
