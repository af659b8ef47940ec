"""RoPE: the lectures' worked example, that only differences of positions count, longer contexts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import ModelConfig, RopeScalingConfig
from lm.model.rotary import attention_factor, frequencies, laid_out, rotate


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


# --- beyond the context of pre-training ---

H, BASE, L = 16, 1000.0, 64
SCALINGS = {
    "linear": RopeScalingConfig("linear", 4.0),
    "ntk": RopeScalingConfig("ntk", 4.0),
    "yarn": RopeScalingConfig("yarn", 4.0, L),
    "yarn_own": RopeScalingConfig("yarn", 8.0, L, fast_turns=8.0, slow_turns=2.0),
    "yarn_attention": RopeScalingConfig("yarn", 8.0, L, attention_factor=1.5),
    "llama3": RopeScalingConfig("llama3", 8.0, L),
    "llama3_own": RopeScalingConfig("llama3", 8.0, L, fast_turns=8.0, slow_turns=0.5),
    "longrope": RopeScalingConfig(
        "longrope",
        4.0,
        L,
        short_factors=tuple(np.linspace(1, 1.5, H // 2)),
        long_factors=tuple(np.geomspace(1, 4, H // 2)),
    ),
}


def slowed(kind, **settings):
    """By how much each pair turns more slowly than unscaled."""
    scaling = RopeScalingConfig(kind, **settings)
    return frequencies(H, BASE) / frequencies(H, BASE, scaling)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_a_factor_of_1_scales_nothing(kind):
    scaling = RopeScalingConfig(kind, 1.0, L)
    np.testing.assert_allclose(frequencies(H, BASE, scaling), frequencies(H, BASE), rtol=1e-12)
    assert attention_factor(scaling) == 1


def test_interpolation_is_a_smaller_step_between_positions():
    linear = RopeScalingConfig("linear", 4.0)
    x_BTNH = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, H)), jnp.float32)
    steps = jnp.arange(5.0)[None]
    np.testing.assert_allclose(
        rotate(x_BTNH, steps, BASE, linear), rotate(x_BTNH, steps / 4, BASE), atol=1e-6
    )


def test_ntk_keeps_the_first_pair_and_slows_the_last_by_the_factor():
    ratio = slowed("ntk", factor=4.0)
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(4)
    np.testing.assert_allclose(ratio[1:] / ratio[:-1], 4 ** (1 / (H // 2 - 1)))


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_by_parts_keeps_what_turns_often_and_slows_what_does_not(kind):
    turns = L * frequencies(H, BASE) / (2 * np.pi)
    ratio = slowed(kind, factor=4.0, original_positions=L, fast_turns=4.0, slow_turns=1.0)
    np.testing.assert_allclose(ratio[turns > 4 * BASE ** (2 / H)], 1)  # a pair from the ramp's end
    np.testing.assert_allclose(ratio[turns < 1 / BASE ** (2 / H)], 4)
    between = (turns > 1) & (turns < 4)
    assert between.any() and (1 < ratio[between]).all() and (ratio[between] < 4).all()
    assert (np.diff(ratio) >= 0).all()


def test_llama3s_ramp_in_closed_form():
    """Turns of 2.5 lie in the middle of 1 and 4: the mean of the frequency and its 8th."""
    frequency = BASE ** (-2 / H)
    length = round(2.5 * 2 * np.pi / frequency * 1000)
    scaling = RopeScalingConfig("llama3", 8.0, length, slow_turns=1000.0, fast_turns=4000.0)
    expected = frequency * (1 + 1 / 8) / 2
    assert frequencies(H, BASE, scaling)[1] == pytest.approx(expected, rel=1e-4)


def test_attention_factors_in_closed_form():
    assert attention_factor(SCALINGS["yarn"]) == pytest.approx(0.1 * np.log(4) + 1)
    assert attention_factor(SCALINGS["yarn_attention"]) == 1.5
    assert attention_factor(SCALINGS["longrope"]) == pytest.approx(np.sqrt(1 + 1 / 3))
    x_BTNH = jnp.ones((1, 1, 1, H))
    turned = rotate(x_BTNH, jnp.array([[3]]), BASE, SCALINGS["yarn"])
    assert jnp.linalg.norm(turned) == pytest.approx(4 * (0.1 * np.log(4) + 1), rel=1e-5)


def test_longrope_chooses_by_the_longest_sequence():
    config = ModelConfig(head_width=H, rope_scaling=SCALINGS["longrope"])
    for n_positions, factors in ((L, "short_factors"), (L + 1, "long_factors")):
        scaling = laid_out(config, n_positions).rope_scaling
        ratio = frequencies(H, BASE) / frequencies(H, BASE, scaling)
        np.testing.assert_allclose(ratio, getattr(SCALINGS["longrope"], factors))
    yarn = dataclasses.replace(config, rope_scaling=SCALINGS["yarn"])
    assert laid_out(yarn, 1) is yarn


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_factors_are_transformers(name):
    transformers = pytest.importorskip("transformers", reason="pip install '.[compare]'")
    pytest.importorskip("torch", reason="pip install '.[compare]'")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = SCALINGS[name]
    kind, length = ours.kind, None
    theirs = {"rope_theta": BASE, "factor": ours.factor}
    if ours.original_positions:
        theirs["original_max_position_embeddings"] = L
    if ours.attention_factor:
        theirs["attention_factor"] = ours.attention_factor
    fast = ours.fast_turns or {"yarn": 32, "llama3": 4}.get(kind)
    if kind == "ntk":  # theirs grows with the sequence: at a factor of 1 it is s = length / L
        kind, length, theirs["factor"] = "dynamic", int(ours.factor * L), 1.0
    if kind == "yarn":
        theirs |= {"beta_fast": fast, "beta_slow": ours.slow_turns}
    if kind == "llama3":
        theirs |= {"high_freq_factor": fast, "low_freq_factor": ours.slow_turns}
    if kind == "longrope":
        length = L + 1
        theirs |= {"short_factor": list(ours.short_factors), "long_factor": [*ours.long_factors]}
    config = transformers.LlamaConfig(
        hidden_size=2 * H,
        num_attention_heads=2,
        max_position_embeddings=L,
        rope_parameters=theirs | {"rope_type": kind},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    np.testing.assert_allclose(frequencies(H, BASE, ours), expected.numpy(), rtol=2e-6)
    assert attention_factor(ours) == pytest.approx(factor)
