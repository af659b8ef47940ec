"""The cache against attention over everything, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from lm.config import ModelConfig
from lm.model import kv_cache

N, H = 4, 8
LENGTHS = np.array([1, 7, 30])  # of the prompts; padded to the longest


def config(n_kv_heads=2, window=0):
    return ModelConfig(
        d_model=32, n_heads=N, n_kv_heads=n_kv_heads, head_width=H, sliding_window=window
    )


def reference(query, keys, values, window, soft_cap):
    """One query (N, H) over its row's keys and values (T, K, H)."""
    out = []
    for n in range(N):
        k = n * keys.shape[1] // N
        scores = keys[:, k] @ query[n] / np.sqrt(H)
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        if window:
            scores[: max(0, len(scores) - window)] = -np.inf
        out.append(softmax(scores) @ values[:, k])
    return np.stack(out)


def empty(c, batch, positions, dtype="float32"):
    params = {"layer_0": {"attention": {"key": {"kernel": jnp.zeros((32, c.n_kv_heads * H))}}}}
    return kv_cache.empty(c, params, batch, positions, dtype)["layer_0"]["attention"]["kv"]


def filled(c, keys, values, lengths, n_steps, dtype="float32"):
    """A prompt's worth written at once, then token by token."""
    cache = empty(c, len(lengths), keys.shape[1], dtype)
    t = lengths.max()
    positions = np.broadcast_to(np.arange(t), (len(lengths), t))
    write = jax.jit(kv_cache.write)
    # What lies beyond a row's length is padding that must leave no trace.
    is_text = positions < lengths[:, None]
    padded = [np.where(is_text[..., None, None], x[:, :t], np.nan) for x in (keys, values)]
    cache = write(cache, *padded, positions, is_text)
    rows = np.arange(len(lengths))
    for i in range(n_steps):
        at = lengths + i
        new = [x[rows, at][:, None] for x in (keys, values)]
        cache = write(cache, *new, at[:, None])
    return cache


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window, soft_cap, positions", [(0, 0.0, 48), (5, 0.3, 48)])
def test_reading_the_cache_is_attention_over_all_so_far(n_kv_heads, window, soft_cap, positions):
    c = config(n_kv_heads, window)
    draw = np.random.default_rng(0)
    keys, values = draw.normal(size=(2, 3, positions, n_kv_heads, H)).astype(np.float32)
    query = draw.normal(size=(3, N, H)).astype(np.float32)
    n_steps = 12
    last = LENGTHS + n_steps
    cache = filled(c, keys, values, LENGTHS, n_steps)
    assert cache.key_BKSH.shape[2] == (window or positions)
    new = [x[np.arange(3), last][:, None] for x in (keys, values)]
    step = jax.jit(kv_cache.step, static_argnums=(5, 6))
    found, after = step(query, cache, *new, last, window, soft_cap)
    wanted = filled(c, keys, values, LENGTHS, n_steps + 1)
    jax.tree.map(np.testing.assert_array_equal, after, wanted)
    for row, p in enumerate(last):
        wanted = reference(query[row], keys[row, : p + 1], values[row, : p + 1], window, soft_cap)
        np.testing.assert_allclose(found[row], wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.01), ("int8", 0.015)])
def test_smaller_caches_are_close_and_weigh_less(dtype, error):
    c, draw = config(), np.random.default_rng(0)
    keys, values = draw.normal(size=(2, 3, 48, 2, H)).astype(np.float32)
    query = draw.normal(size=(3, N, H)).astype(np.float32)
    cache = filled(c, keys, values, LENGTHS, 3, dtype)
    last = LENGTHS + 3
    new = [x[np.arange(3), last][:, None] for x in (keys, values)]
    found, _ = kv_cache.step(query, cache, *new, last, 0, 0.0)
    wanted = np.stack([
        reference(query[row], keys[row, :n], values[row, :n], 0, 0.0)
        for row, n in enumerate(LENGTHS + 4)
    ])  # fmt: skip
    off = np.abs(np.asarray(found) - wanted).max()
    assert 1e-5 < off < error * np.abs(values).max()
    content = 2 * 3 * 48 * 2 * H * jnp.dtype(dtype).itemsize
    scales = 2 * 3 * 48 * 2 * 4 if dtype == "int8" else 0
    assert sum(x.nbytes for x in cache if x is not None) == content + scales


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_what_is_not_finite_spoils_neither_its_slot_nor_other_rows(dtype, bad):
    c, draw = config(window=36), np.random.default_rng(0)
    keys, values = draw.normal(size=(2, 3, 48, 2, H)).astype(np.float32)
    query, last = draw.normal(size=(3, N, H)).astype(np.float32), LENGTHS + 3
    cache = filled(c, keys, values, LENGTHS, 3, dtype)
    step = jax.jit(kv_cache.step, static_argnums=(5, 6))
    new = [x[np.arange(3), last][:, None] for x in (keys, values)]
    wanted, _ = step(query, cache, *new, last, 36, 0.0)
    spoiled = [np.where(np.arange(3)[:, None, None, None] == 1, bad, x) for x in new]
    found, after = step(query, cache, new[0], spoiled[1], last, 36, 0.0)
    assert np.isfinite(found).all((1, 2)).tolist() == [True, False, True]
    np.testing.assert_array_equal(found[::2], wanted[::2])
    found, _ = step(query, after, *new, last, 36, 0.0)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [0, 36])
def test_grown_on_the_way_it_holds_the_same(dtype, window):
    c, draw = config(window=window), np.random.default_rng(0)
    keys, values = draw.normal(size=(2, 3, 48, 2, H)).astype(np.float32)
    whole = filled(c, keys, values, LENGTHS, 12, dtype)
    small = filled(c, keys[:, :32], values[:, :32], LENGTHS, 2, dtype)
    cache = kv_cache.grown(c, {"layer": small}, 48)["layer"]
    for i in range(2, 12):
        new = [x[np.arange(3), LENGTHS + i][:, None] for x in (keys, values)]
        cache = kv_cache.write(cache, *new, (LENGTHS + i)[:, None])
    jax.tree.map(np.testing.assert_array_equal, cache, whole)
