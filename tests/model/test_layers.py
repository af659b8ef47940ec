"""Matrices, norms and positions by their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model.layers import Linear, Norm, sinusoidal


@pytest.fixture
def x():
    return 3 + 2 * np.random.default_rng(0).normal(size=(2, 5, 8))


def test_rms_norm(x):
    gain = np.linspace(0.5, 2, 8)
    out = Norm("rms", 0.1).apply({"params": {"gain": gain}}, jnp.asarray(x, jnp.float32))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * gain
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_layer_norm(x):
    gain, bias = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    params = {"params": {"gain": gain, "bias": bias}}
    out = Norm("layer", 0.1).apply(params, jnp.asarray(x, jnp.float32))
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 0.1) * gain + bias
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_norms_of_bfloat16_are_taken_in_float32(x):
    x16 = jnp.asarray(x, jnp.bfloat16)
    out = Norm("rms", 1e-5).apply({"params": {"gain": np.ones(8)}}, x16)
    exact = np.asarray(x16, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(out, np.float32), np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float32)
    )


def test_linear_is_a_matrix_product(x):
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(8, 3)), rng.normal(size=3)
    layer = Linear(3, ("embed", "ff"), use_bias=True)
    out = layer.apply({"params": {"kernel": kernel, "bias": bias}}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(out, x @ kernel + bias, rtol=1e-4, atol=1e-4)


def test_kernels_start_with_a_deviation_of_scale_over_root_fan_in():
    layer = Linear(400, ("embed", "ff"), scale=0.3, use_bias=True)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    kernel = np.asarray(params["kernel"].value)
    assert kernel.std() == pytest.approx(0.3 / 10, rel=0.02)
    assert abs(kernel.mean()) < 0.03 / 50
    assert (params["bias"].value == 0).all()


def test_sinusoidal_positions():
    """Vaswani et al. 2017: PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = its cosine."""
    positions_TD = sinusoidal(50, 6)
    for pos, i in ((0, 0), (1, 0), (7, 1), (49, 2)):
        angle = pos / 10_000 ** (2 * i / 6)
        assert positions_TD[pos, 2 * i] == pytest.approx(np.sin(angle), abs=1e-5)
        assert positions_TD[pos, 2 * i + 1] == pytest.approx(np.cos(angle), abs=1e-5)
