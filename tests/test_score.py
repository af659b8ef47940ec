import math

import numpy as np
import pytest

from lm.data import Batch
from lm.score import score

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
