"""Attention's kernels: einsum against a loop in float64, the others against einsum or lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.command import BadInput
from lm.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from lm.model.kernels import attend, choose_kernel, cudnn, einsum, splash, visible
from lm.sharding import layout, make_mesh, placed

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
    mask_BTS = visible(T, window, segments_BT)
    out = einsum(*as_float32(qkv), mask_BTS, soft_cap)
    np.testing.assert_allclose(out, by_loops(*qkv, mask_BTS, soft_cap), atol=2e-6)


def test_grouped_queries_are_all_heads_with_repeated_keys_and_values(qkv):
    query, key, value = as_float32(qkv)
    mask = visible(T)
    repeated = einsum(query, jnp.repeat(key, G, 2), jnp.repeat(value, G, 2), mask)
    np.testing.assert_allclose(einsum(query, key, value, mask), repeated, atol=1e-6)
    one_head = einsum(query, key[:, :, :1], value[:, :, :1], mask)
    shared = einsum(query, *(jnp.repeat(x[:, :, :1], K * G, 2) for x in (key, value)), mask)
    np.testing.assert_allclose(one_head, shared, atol=1e-6)


def test_what_a_query_may_see():
    causal = np.tril(np.ones((5, 5), bool))
    np.testing.assert_array_equal(visible(5)[0], causal)
    np.testing.assert_array_equal(visible(5, 2)[0], causal & ~np.tril(causal, -2))
    segments = jnp.array([[1, 1, 3, 3, 0], [2, 2, 2, 2, 0]])
    mask = visible(5, 0, segments)
    for b in range(2):
        same = segments[b][:, None] == segments[b][None]
        np.testing.assert_array_equal(mask[b], causal & same)


def test_large_scores_and_empty_rows_stay_finite(qkv):
    query, key, value = as_float32(qkv)
    assert np.isfinite(einsum(1e4 * query, 1e4 * key, value, visible(T))).all()
    assert np.isfinite(einsum(query, key, value, jnp.zeros((1, T, T), bool))).all()


def test_bfloat16_keeps_the_softmax_in_float32(qkv):
    """Equal scores over many keys: bfloat16 sums of 1/S would drift, float32 ones do not."""
    n = 512
    zeros, ones = jnp.zeros((1, n, 1, H), jnp.bfloat16), jnp.ones((1, n, 1, H), jnp.bfloat16)
    out = einsum(zeros, zeros, ones, visible(n))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.004)


@pytest.mark.parametrize("soft_cap", [0.0, 0.5])
def test_the_written_gradient_is_the_plain_formulas(qkv, soft_cap):
    mask_BTS = visible(T, segments_BT=jnp.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]))
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

    written = gradient(lambda *qkv: einsum(*qkv, mask_BTS, soft_cap))
    for given, expected in zip(written, gradient(plain), strict=True):
        np.testing.assert_allclose(given, expected, atol=2e-6)


# --- the fused kernels: a real sequence of blocks, half of the heads' keys, documents across blocks

ROWS, SEQ, HEADS, KV_HEADS, WIDTH = 2, 256, 4, 2, 16
SPLIT_HEADS, SPLIT_POSITIONS = {"data": 2, "model": 4}, {"data": 2, "context": 2, "model": 2}


@pytest.fixture
def quick_compilation():
    """What runs once is not worth optimising."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def blocks():
    """Query, key, value, the output's cotangent, and documents that no block border divides."""
    rng = np.random.default_rng(0)
    query, weight = rng.normal(size=(2, ROWS, SEQ, HEADS, WIDTH))
    key, value = rng.normal(size=(2, ROWS, SEQ, KV_HEADS, WIDTH))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, size=(ROWS, SEQ))), jnp.int32)
    return *as_float32((query, key, value, weight)), segments


def value_and_gradient(kernel, blocks):
    """The output, and the gradient of its product with the cotangent."""
    query, key, value, weight, _ = blocks

    def loss(qkv):
        out = kernel(*qkv)
        return jnp.sum(out * weight), out

    (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))((query, key, value))
    return out, *gradient


def on(mesh, trace):
    """``trace()`` under a mesh of the eight devices, which the model's heads and rows divide."""
    if mesh is None:
        return trace()
    model = ModelConfig(d_model=64, n_heads=HEADS, n_kv_heads=KV_HEADS, scan_layers=True)
    config = Config(
        model=model,
        data=DataConfig(seq_len=SEQ),
        train=TrainConfig(accumulation=2),
        mesh=MeshConfig(**mesh),
    )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), placed(mesh, layout(config, mesh)):
        return trace()


def assert_all_close(given, expected):
    for g, e in zip(given, expected, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "soft_cap", "documents", "mesh"),
    [
        (0, 0.0, False, None),
        (30, 0.5, True, None),
        (30, 0.0, True, SPLIT_HEADS),
        (0, 0.5, True, SPLIT_POSITIONS),
    ],
)
def test_splash_is_einsum(quick_compilation, blocks, window, soft_cap, documents, mesh):
    segments = blocks[-1] if documents else None
    mask = visible(SEQ, window, segments)
    expected = value_and_gradient(lambda *qkv: einsum(*qkv, mask, soft_cap), blocks)

    def kernel(*qkv):
        return splash(*qkv, segments, window, soft_cap, interpret=True)

    assert_all_close(on(mesh, lambda: value_and_gradient(kernel, blocks)), expected)


def test_splash_under_a_pipelines_map_over_stages(quick_compilation, blocks):
    *qkv, _, segments = blocks
    expected = einsum(*qkv, visible(SEQ, 0, segments))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (*qkv, segments))

    def stages():
        kernel = functools.partial(splash, interpret=True)
        return jax.jit(jax.vmap(kernel, spmd_axis_name="stage"))(*stacked)

    out = on({"stage": 2, "data": 2, "model": 2}, stages)
    assert_all_close((out[0], out[1]), (expected, expected[::-1]))


@pytest.mark.parametrize(
    ("window", "documents", "mesh"),
    [(0, False, None), (30, True, None), (30, True, SPLIT_HEADS)],
)
def test_what_cudnn_is_asked_for_is_einsum(blocks, window, documents, mesh):
    """The same call with jax's own implementation, which runs here."""
    segments = blocks[-1] if documents else None
    mask = visible(SEQ, window, segments)
    expected = value_and_gradient(lambda *qkv: einsum(*qkv, mask), blocks)

    def kernel(*qkv):
        return cudnn(*qkv, segments, window, implementation="xla")

    assert_all_close(on(mesh, lambda: value_and_gradient(kernel, blocks)), expected)


def test_both_lower_for_their_platforms(blocks, monkeypatch):
    """Forward and backward, in bfloat16, on one device and on a mesh."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000
    )
    segments = blocks[-1]

    def lowered(kernel, platform):
        def loss(qkv):
            return jnp.sum(kernel(*qkv, segments, 100).astype(jnp.float32))

        qkv = [x.astype(jnp.bfloat16) for x in blocks[:3]]
        return jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=(platform,)).as_text()

    for mesh in (None, SPLIT_HEADS, SPLIT_POSITIONS):
        text = on(mesh, lambda: lowered(splash, "tpu"))
        for part in ("fwd", "dq", "dkv"):
            assert f"splash_mha_{part}_segmented" in text
    for mesh in (None, SPLIT_HEADS):
        text = on(mesh, lambda: lowered(cudnn, "cuda"))
        assert "__cudnn$fmha" in text and "SoftmaxBackward" in text
        assert "dot_general" not in text


# --- the choice


def choice(kernel, platform, monkeypatch, chunks=1, **changed):
    monkeypatch.setattr("lm.model.kernels.platform", lambda: platform)
    monkeypatch.setattr("lm.model.kernels.devices_along", lambda axis: chunks)
    asked = {"n_positions": 256, "head_width": 64, "dtype": "bfloat16", "soft_cap": 0.0}
    return choose_kernel(kernel, **asked | changed)


def test_auto_is_the_platforms_own_where_that_can(monkeypatch):
    chosen = {p: choice("auto", p, monkeypatch) for p in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "einsum", "gpu": "cudnn", "tpu": "splash"}
    assert choice("auto", "gpu", monkeypatch, dtype="float32") == "einsum"
    assert choice("auto", "tpu", monkeypatch, dtype="float32", soft_cap=30.0) == "splash"
    assert choice("auto", "tpu", monkeypatch, n_positions=200) == "einsum"
    assert choice("auto", "tpu", monkeypatch, chunks=2) == "splash"
    assert choice("auto", "tpu", monkeypatch, chunks=4) == "einsum"
    assert choice("einsum", "tpu", monkeypatch) == "einsum"


@pytest.mark.parametrize(
    ("kernel", "platform", "changed", "why"),
    [
        ("splash", "cpu", {}, "the platform cpu: must be a TPU"),
        ("cudnn", "tpu", {}, "the platform tpu: must be a GPU"),
        ("splash", "tpu", {"n_positions": 200}, "data.seq_len = 200: must be a multiple of 128"),
        ("splash", "tpu", {"chunks": 4}, ".* a multiple of 128 x mesh.context = 512"),
        ("cudnn", "gpu", {"dtype": "float32"}, "model.dtype = 'float32': must be 'bfloat16'"),
        ("cudnn", "gpu", {"head_width": 20}, "model.head_width = 20: must be a multiple of 8"),
        ("cudnn", "gpu", {"head_width": 256}, "model.head_width = 256: .* at most 128"),
        ("cudnn", "gpu", {"n_positions": 7}, "data.seq_len = 7: must be even"),
        ("cudnn", "gpu", {"soft_cap": 30.0}, "model.attention_soft_cap = 30.0: must be 0"),
        ("cudnn", "gpu", {"chunks": 2}, "mesh.context = 2: must be 1"),
    ],
)
def test_a_kernel_asked_for_by_name_says_why_it_cannot(kernel, platform, changed, why, monkeypatch):
    with pytest.raises(BadInput, match=f"model.attention_kernel = '{kernel}' with {why}"):
        choice(kernel, platform, monkeypatch, **changed)


def test_attend_sees_what_einsum_sees_through_its_mask(blocks):
    *qkv, _, segments = blocks
    out = attend(*qkv, segments, sliding_window=100, soft_cap=0.5)
    expected = einsum(*qkv, visible(SEQ, 100, segments), 0.5)
    np.testing.assert_array_equal(out, expected)
