"""Samplers against the distributions that their papers define, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from lm.command import BadInput
from lm.generate.sampling import Sampling, draw, filtered

LOGITS_V = np.array([2.0, -1.0, 0.5, 1.5, 0.5, -3.0, 0.0, 1.0, -0.5, 2.5])


def reference(sampling, logits=LOGITS_V, seen=()):
    """Probabilities by the definitions, one token at a time."""
    logits = np.array(logits, np.float64)
    for v in seen:
        logits[v] *= sampling.repetition_penalty ** (-1 if logits[v] > 0 else 1)
    logits = logits / sampling.temperature
    ranked = sorted(range(len(logits)), key=lambda v: -logits[v])
    kept = ranked[: sampling.top_k or None]
    p = dict(zip(kept, softmax(logits[kept]), strict=True))
    nucleus, total = [], 0.0
    for v in kept:
        if total >= sampling.top_p:
            break
        nucleus.append(v)
        total += p[v]
    kept = [v for v in nucleus if p[v] >= sampling.min_p * p[ranked[0]]]
    result = np.zeros(len(logits))
    result[kept] = softmax(logits[kept])
    return result


SAMPLERS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=3),
    Sampling(top_p=0.8),
    Sampling(min_p=0.2),
    Sampling(temperature=1.7, top_k=6, top_p=0.85, min_p=0.3),
    Sampling(repetition_penalty=1.3, temperature=0.8),
]


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_draws_follow_the_distribution(sampling):
    seen = [0, 1, 5]
    p_V = reference(sampling, seen=seen)
    seen_BV = jnp.zeros((1, 10), bool).at[0, jnp.array(seen)].set(True)
    left_V = np.asarray(filtered(jnp.array([LOGITS_V]), sampling, seen_BV)[0])
    np.testing.assert_array_equal(np.isfinite(left_V), p_V > 0)
    n = 100_000
    keys_B, logits_BV = jax.random.split(jax.random.key(0), n), jnp.tile(LOGITS_V, (n, 1))
    tokens = draw(keys_B, logits_BV, sampling, seen_BV)
    counts = np.bincount(tokens, minlength=10)
    assert (counts[p_V == 0] == 0).all()
    assert chisquare(counts[p_V > 0], n * p_V[p_V > 0]).pvalue > 1e-3
    if sampling != Sampling():  # the test could tell: plain sampling is not this distribution
        plain = np.bincount(draw(keys_B, logits_BV, Sampling()), minlength=10)
        q_V = np.maximum(p_V, 1e-9)
        assert chisquare(plain, n * q_V / q_V.sum()).pvalue < 1e-9


def test_temperature_0_is_the_likeliest_and_rows_are_apart():
    logits = jnp.array([LOGITS_V, LOGITS_V[::-1]])
    keys = jax.random.split(jax.random.key(0))
    assert draw(keys, logits, Sampling(temperature=0)).tolist() == [9, 0]
    seen = jnp.zeros((2, 10), bool).at[0, 9].set(True)
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert draw(keys, logits, greedy, seen).tolist() == [0, 0]


def test_the_filters_keep_exact_numbers_of_equal_logits():
    even = jnp.zeros((1, 8))
    for sampling, n in [
        (Sampling(top_k=3), 3),
        (Sampling(top_p=0.5), 4),
        (Sampling(top_p=0.51), 5),
        (Sampling(top_p=1e-6), 1),
        (Sampling(min_p=1.0), 8),
    ]:
        kept = np.isfinite(filtered(even, sampling)[0])
        assert kept.tolist() == [True] * n + [False] * (8 - n)


@pytest.mark.parametrize(
    "wrong, line",
    [
        (dict(top_p=0.0), r"top_p = 0.0: must be in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p = 1.5: must be in \(0, 1\]"),
        (dict(temperature=-1.0), "temperature = -1.0: must be 0 or more"),
        (dict(top_k=-1), "top_k = -1: must be 0 or more"),
        (dict(min_p=2.0), "min_p = 2.0"),
        (dict(repetition_penalty=0.0), "repetition_penalty = 0.0: must be above 0"),
    ],
)
def test_impossible_samplers_are_refused(wrong, line):
    with pytest.raises(BadInput, match=line):
        Sampling(**wrong)
