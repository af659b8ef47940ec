"""Loss on text against sums over rows taken one at a time; documents as clusters."""

import copy
import math

import numpy as np
import pytest

from lm.command import BadInput
from lm.config import replace
from lm.data import open_dataset
from lm.evaluate.corpus import Document, held_out, rolling, summarise, texts
from tests.evaluate.test_scorer import CONFIG, alone, made

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def scorer(text_data):
    config = replace(CONFIG, data=vars(text_data) | {"seq_len": 48, "validation_tokens": 960})
    return made(config)


def nats_alone(decoder, params, tokens):
    """Of each token after the first."""
    log_p_TV = alone(decoder, params, tokens[:1], tokens[1:])
    return -log_p_TV[np.arange(len(tokens) - 1), tokens[1:]]


def test_held_out_windows_are_the_ones_of_training(scorer):
    scorer, decoder, params = scorer
    dataset = open_dataset(scorer.config.data)
    (store,) = (source.store for source in dataset.sources)
    stream = store.tokens["validation"]
    found = list(held_out(scorer))
    nats = np.concatenate([document.nats for document in found])
    expected = np.concatenate(
        [
            nats_alone(decoder, params, [*inputs, targets[-1]])
            for batch in dataset.validation(1)
            for inputs, targets in zip(batch.inputs_BT, batch.targets_BT, strict=True)
        ]
    )
    np.testing.assert_allclose(nats, expected, atol=1e-5)
    assert sum(len(document.nats) for document in found) == 960
    # 60 documents of 100 to 400 words: a few of them are held out, longer than a window.
    ends = (stream == 256).sum()
    assert 2 <= len(found) <= ends and max(len(d.nats) for d in found) > 48
    told = summarise(found)
    assert told["tokens"] == 960 and told["documents"] == len(found)
    assert told["loss"] == pytest.approx(expected.mean())
    assert told["perplexity"] == pytest.approx(math.exp(expected.mean()))


def test_positions_start_again_where_documents_are_kept_apart(scorer):
    apart = copy.copy(scorer[0])
    apart.config = replace(apart.config, data={"respect_documents": True})
    found = np.concatenate([document.positions for document in held_out(apart)])
    wanted = np.concatenate(
        [
            batch.positions_BT[batch.weights_BT > 0]
            for batch in open_dataset(apart.config.data).validation(1)
        ]
    )
    np.testing.assert_array_equal(found, wanted)
    assert (found != np.concatenate([d.positions for d in held_out(scorer[0])])[: len(found)]).any()


def test_targets_are_of_the_documents_that_the_stream_has(tmp_path):
    """In windows that several short documents share."""
    draw = np.random.default_rng(0)
    texts = ("".join(draw.choice(list("abcdef"), draw.integers(5, 40))) for _ in range(200))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    data = {"corpus": f"text:{tmp_path}/a.jsonl", "seq_len": 16, "validation_tokens": 128}
    dataset = open_dataset(replace(CONFIG, data=data | {"data_dir": str(tmp_path)}).data)
    stream = dataset.sources[0].store.tokens["train"]
    numbers = np.cumsum(stream == 256) - (stream == 256)
    seen = 0
    for batch, source_B, document_BT in dataset.documents("train", 5):
        for b in np.flatnonzero(source_B == 0):
            row = [*batch.inputs_BT[b], batch.targets_BT[b, -1]]
            (at,) = (i for i in range(0, len(stream) - 16, 16) if (stream[i : i + 17] == row).all())
            np.testing.assert_array_equal(document_BT[b], numbers[at + 1 : at + 17])
            seen += 1
    assert seen == 8 and (source_B == -1).sum() == 2


def test_texts_are_judged_whole_once_and_alone(scorer, tmp_path):
    scorer, decoder, params = scorer
    written = {"a.txt": "It was a dark night. " * 12, "b.txt": "No.", "c.txt": "x" * 49}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    found = list(texts(scorer, f"text:{tmp_path}/*.txt", stride=20))
    assert [len(document.nats) for document in found] == [len(t) for t in written.values()]
    for document, text in zip(found, written.values(), strict=True):
        tokens = [256, *text.encode()]
        for i, (nats, position) in enumerate(zip(document.nats, document.positions, strict=True)):
            if i % 7 and i < len(text) - 1:
                continue
            context = tokens[i - position : i + 1]
            assert 28 <= len(context) <= 48 or i == position
            (log_p_V,) = alone(decoder, params, context, tokens[i + 1 : i + 2])
            assert nats == pytest.approx(-log_p_V[tokens[i + 1]], abs=1e-4)
    told = summarise(found)
    assert told["bytes"] == sum(map(len, written.values())) and told["documents"] == 3
    expected = sum(d.nats.sum() for d in found) / math.log(2) / told["bytes"]
    assert told["bits_per_byte"] == pytest.approx(expected)
    assert len(list(texts(scorer, f"text:{tmp_path}/*.txt", most=2))) == 2


@pytest.mark.parametrize("n", [1, 47, 48, 49, 97, 200])
@pytest.mark.parametrize("stride", [0, 1, 30, 48])
def test_windows_judge_each_token_once_with_as_much_context_as_there_is(scorer, n, stride):
    scorer, *_ = scorer
    tokens = list(range(n))
    pairs = rolling(scorer, tokens, stride)
    assert [t for _, continuation in pairs for t in continuation] == tokens
    whole, at = [256, *tokens], 1
    for k, (context, continuation) in enumerate(pairs):
        assert context == whole[at - len(context) : at]
        at += len(continuation)
        assert len(context) + len(continuation) - 1 <= 48
        last = k == len(pairs) - 1
        assert len(continuation) <= (48 if k == 0 else stride or 48)
        assert len(context) + len(continuation) - 1 == 48 or last and at <= 49
    # lm-eval's: what its docstring shows for a text of ten tokens and a context of four.
    if not stride and n == 97:
        assert [len(c) for c, _ in pairs] == [1, 1, 48]


def test_sources_positions_and_the_error_of_a_single_document():
    one = Document("a", np.array([1.0, 3.0]), np.array([2, 0]), np.array([0, 5]))
    two = Document("b", np.array([4.0]), np.array([1]), np.array([4]))
    told = summarise([one, two])
    assert told["loss"] == pytest.approx(8 / 3)
    assert told["bits_per_byte"] == pytest.approx(8 / math.log(2) / 3)
    assert told["sources"]["a"]["loss"] == 2 and told["sources"]["b"]["tokens"] == 1
    assert told["sources"]["a"]["standard_error"] is None
    # Residuals 4 - 2 * 8/3 and 4 - 8/3: -4/3 and 4/3.
    assert told["standard_error"] == pytest.approx((2 * 2 * 16 / 9) ** 0.5 / 3)
    told = {(p["first"], p["last"]): (p["loss"], p["tokens"]) for p in told["positions"]}
    assert told == {(0, 0): (1.0, 1), (4, 7): (3.5, 2)}
    exact = summarise([one, two], edges=range(6))["positions"]
    assert [(p["first"], p["loss"]) for p in exact] == [(0, 1.0), (4, 4.0), (5, 3.0)]


def test_what_cannot_be_judged(scorer, tmp_path):
    scorer, *_ = scorer
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    for call, line in {
        lambda: held_out(scorer, seq_len=96): "seq_len = 96: must be at most max_length = 48",
        lambda: held_out(scorer, "dev"): "must be one of train, validation, test",
        lambda: texts(scorer, f"text:{tmp_path}/*.txt"): "no file matches",
        lambda: texts(scorer, f"chat:{tmp_path}/*.jsonl"): "conversations",
        lambda: rolling(scorer, [1], 49): "stride = 49",
        lambda: summarise([]): "without a token",
    }.items():
        with pytest.raises(BadInput, match=line):
            list(call())
