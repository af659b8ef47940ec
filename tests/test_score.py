import math

import numpy as np
import pytest

from lm.data import Batch
from lm.score import Ratio, score

TOKEN_BYTES = np.array([1, 2, 3, 0], np.int32)


def test_sums_over_valid_tokens_of_all_batches():
    """By hand: a mean of the batches' means would be another number."""
    tokens = np.array([[0, 1, 2], [2, 3, 0]], np.int32)
    weights = np.array([[1, 1, 1], [1, 0, 0]], np.float32)
    nats = iter((6.0, 1.0))
    found = score(
        lambda _: next(nats),
        [Batch(tokens, tokens, weights), Batch(tokens, tokens, np.float32([[0, 1, 0], [0, 0, 1]]))],
        TOKEN_BYTES,
    )
    assert found.tokens == 4 + 2
    assert found.loss == pytest.approx(7 / 6)
    assert found.bits_per_byte == pytest.approx(7 / math.log(2) / (1 + 2 + 3 + 3 + 2 + 1))
    assert found.perplexity == pytest.approx(math.exp(7 / 6))


def test_without_weights_every_token_counts():
    tokens = np.array([[0, 1, 2, 3]], np.int32)
    found = score(lambda _: 2.0, [Batch(tokens, tokens)] * 3, TOKEN_BYTES)
    assert (found.tokens, found.loss) == (12, 0.5)
    assert found.bits_per_byte == pytest.approx(6 / math.log(2) / 18)


def test_counts_beyond_float32_are_exact():
    tokens = np.zeros((1, 1), np.int32)
    batch = Batch(tokens, tokens, np.ones((1, 1), np.float32))
    found = score(lambda _: 1.0, [batch] * 2, np.array([2**24 + 1], np.int32))
    assert found.bits_per_byte == 2 / math.log(2) / (2**25 + 2)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    tokens = np.zeros((1, 1), np.int32)
    assert score(lambda _: 1e6, [Batch(tokens, tokens)], TOKEN_BYTES).perplexity == math.inf


def drawn(rng, clusters):
    """Texts of unlike lengths, whose tokens share a level: (nats, tokens) of each, mean 2."""
    tokens = rng.integers(5, 80, clusters)
    return 2 * tokens + rng.normal(0, 0.5, clusters) * tokens + rng.normal(0, tokens**0.5), tokens


def ratio_of(nats, tokens):
    ratio = Ratio()
    for x, n in zip(nats, tokens, strict=True):
        ratio.add(x, n)
    return ratio


def test_a_standard_error_between_clusters_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    nats, tokens = drawn(rng, 60)
    ratio = ratio_of(nats, tokens)
    assert ratio.value == pytest.approx(nats.sum() / tokens.sum()) and ratio.clusters == 60
    again = rng.integers(0, 60, (4_000, 60))
    values = nats[again].sum(1) / tokens[again].sum(1)
    assert float(ratio.standard_error) == pytest.approx(values.std(), rel=0.06)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """And those that take tokens for independent don't: a text's share its level."""
    rng = np.random.default_rng(1)
    covered = np.zeros(2)
    for _ in range(400):
        nats, tokens = drawn(rng, 50)
        ratio = ratio_of(nats, tokens)
        of_tokens = (0.5**2 + 1) ** 0.5 / tokens.sum() ** 0.5  # their deviation is known here
        off = abs(ratio.value - 2)
        covered += off < 1.96 * ratio.standard_error, off < 1.96 * of_tokens
    assert 0.91 < covered[0] / 400 < 0.98
    assert covered[1] / 400 < 0.6


def test_ratios_in_an_array_and_too_few_clusters():
    ratio = Ratio(3)
    ratio.add([1, 2, 0], [1, 1, 0])
    ratio.add([3, 0, 0], [1, 0, 0])
    np.testing.assert_array_equal(ratio.value, [2, 2, np.nan])
    # Residuals -1 and 1, of two clusters, over two tokens.
    np.testing.assert_allclose(ratio.standard_error, [(2 * 2 / 1) ** 0.5 / 2, np.nan, np.nan])
    np.testing.assert_array_equal(ratio.clusters, [2, 1, 0])
