"""Attention against a loop over rows, heads and positions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.attention import allowed, attend

B, T, K, G, H = 2, 6, 2, 3, 4


def by_loops(query_BTNH, key_BSKH, value_BSKH, mask_BTS, soft_cap=0.0):
    out_BTNH = np.zeros(query_BTNH.shape)
    n_heads, n_kv_heads = query_BTNH.shape[2], key_BSKH.shape[2]
    for b, t, n in np.ndindex(query_BTNH.shape[:3]):
        k = n // (n_heads // n_kv_heads)
        keys = [s for s in range(key_BSKH.shape[1]) if mask_BTS[b, t, s]]
        scores = np.array([query_BTNH[b, t, n] @ key_BSKH[b, s, k] for s in keys])
        scores /= np.sqrt(query_BTNH.shape[3])
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores) / np.exp(scores).sum()
        out_BTNH[b, t, n] = sum(w * value_BSKH[b, s, k] for w, s in zip(weights, keys, strict=True))
    return out_BTNH


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, T, K * G, H)), *rng.normal(size=(2, B, T, K, H))


def as_float32(arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("soft_cap", [0.0, 0.5])
def test_equals_the_loop(qkv, window, soft_cap):
    segments_BT = jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    mask_BTS = allowed(T, window, segments_BT)
    out = attend(*as_float32(qkv), mask_BTS, soft_cap)
    np.testing.assert_allclose(out, by_loops(*qkv, mask_BTS, soft_cap), atol=2e-6)


def test_grouped_queries_are_all_heads_with_repeated_keys_and_values(qkv):
    query, key, value = as_float32(qkv)
    mask = allowed(T)
    repeated = attend(query, jnp.repeat(key, G, 2), jnp.repeat(value, G, 2), mask)
    np.testing.assert_allclose(attend(query, key, value, mask), repeated, atol=1e-6)
    one_head = attend(query, key[:, :, :1], value[:, :, :1], mask)
    shared = attend(query, *(jnp.repeat(x[:, :, :1], K * G, 2) for x in (key, value)), mask)
    np.testing.assert_allclose(one_head, shared, atol=1e-6)


def test_what_a_query_may_see():
    causal = np.tril(np.ones((5, 5), bool))
    np.testing.assert_array_equal(allowed(5)[0], causal)
    np.testing.assert_array_equal(allowed(5, 2)[0], causal & ~np.tril(causal, -2))
    segments = jnp.array([[1, 1, 3, 3, 0], [2, 2, 2, 2, 0]])
    mask = allowed(5, 0, segments)
    for b in range(2):
        same = segments[b][:, None] == segments[b][None]
        np.testing.assert_array_equal(mask[b], causal & same)


def test_large_scores_and_empty_rows_stay_finite(qkv):
    query, key, value = as_float32(qkv)
    assert np.isfinite(attend(1e4 * query, 1e4 * key, value, allowed(T))).all()
    assert np.isfinite(attend(query, key, value, jnp.zeros((1, T, T), bool))).all()


def test_bfloat16_keeps_the_softmax_in_float32(qkv):
    """Equal scores over many keys: bfloat16 sums of 1/S would drift, float32 ones do not."""
    n = 512
    zeros, ones = jnp.zeros((1, n, 1, H), jnp.bfloat16), jnp.ones((1, n, 1, H), jnp.bfloat16)
    out = attend(zeros, zeros, ones, allowed(n))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.004)


@pytest.mark.parametrize("soft_cap", [0.0, 0.5])
def test_the_written_gradient_is_the_plain_formulas(qkv, soft_cap):
    mask_BTS = allowed(T, segments_BT=jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]))
    seed_BTNH = np.random.default_rng(1).normal(size=(B, T, K * G, H)).astype(np.float32)

    def plain(query_BTNH, key_BSKH, value_BSKH):
        key_BSNH, value_BSNH = (jnp.repeat(x, G, 2) for x in (key_BSKH, value_BSKH))
        score_BNTS = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BSNH) / H**0.5
        if soft_cap:
            score_BNTS = soft_cap * jnp.tanh(score_BNTS / soft_cap)
        weight_BNTS = jax.nn.softmax(score_BNTS, where=mask_BTS[:, None], axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weight_BNTS, value_BSNH)

    def gradient(function):
        return jax.grad(lambda qkv: jnp.sum(seed_BTNH * function(*qkv)))(as_float32(qkv))

    written = gradient(lambda *qkv: attend(*qkv, mask_BTS, soft_cap))
    for given, expected in zip(written, gradient(plain), strict=True):
        np.testing.assert_allclose(given, expected, atol=2e-6)
