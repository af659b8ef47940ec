import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.command import BadInput
from lm.config import DataConfig
from lm.data import open_dataset


def write_corpus(folder, n=120, seed=0, alphabet="abcdefgh "):
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for i in range(n):
        text = "".join(draw.choices(alphabet, k=draw.randrange(20, 400)))
        (folder / f"{i:03}.txt").write_text(f"{i} {text}")
    return str(folder / "*.txt")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return DataConfig(
        corpus="text",
        files=write_corpus(folder / "a"),
        seq_len=32,
        validation_tokens=320,
        data_dir=str(folder / "data"),
    )


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(config)


def test_targets_follow_inputs_and_windows_follow_the_stream(dataset):
    stream = dataset.sources[0].store.tokens["train"]
    batch = dataset.batch(0, 0, 8)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (8, 32)
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == np.int32
    assert batch.weights_BT is batch.segments_BT is batch.positions_BT is None
    np.testing.assert_array_equal(batch.inputs_BT[:, 1:], batch.targets_BT[:, :-1])
    starts = {tuple(stream[i : i + 33]) for i in range(0, len(stream) - 32, 32)}
    rows = np.concatenate([batch.inputs_BT, batch.targets_BT[:, -1:]], axis=1)
    assert all(tuple(row) in starts for row in rows)


def test_one_epoch_reads_each_window_once_and_the_next_in_another_order(dataset):
    windows = dataset.sources[0].windows["train"]
    n = len(windows)
    rows = dataset.batches(5, 0, 2, n)
    for epoch in range(2):
        assert sorted(map(tuple, rows.inputs_BT[epoch])) == sorted(map(tuple, windows[:, :-1]))
    assert not np.array_equal(rows.inputs_BT[0], rows.inputs_BT[1])
    assert not np.array_equal(rows.inputs_BT[0], dataset.batch(6, 0, n).inputs_BT)
    assert dataset.train_tokens == n * 32
    assert dataset.epochs(3 * n * 32) == {dataset.sources[0].name: 3.0}


@given(
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10**6),
    batch_size=st.integers(1, 17),
    n_steps=st.integers(1, 4),
    n_hosts=st.integers(1, 4),
)
@settings(max_examples=40, deadline=None)
def test_same_on_any_number_of_hosts(dataset, seed, step, batch_size, n_steps, n_hosts):
    together = dataset.batches(seed, step, n_steps, batch_size)
    edges = np.linspace(0, batch_size, n_hosts + 1).astype(int)
    for i in range(n_steps):
        parts = [
            dataset.batch(seed, step + i, batch_size, slice(first, last)).inputs_BT
            for first, last in zip(edges[:-1], edges[1:], strict=True)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), together.inputs_BT[i])


def test_opened_twice_is_the_same(dataset, config):
    again = open_dataset(config)
    assert again.fingerprint == dataset.fingerprint
    assert again.statistics == dataset.statistics
    np.testing.assert_array_equal(again.batch(1, 7, 4).inputs_BT, dataset.batch(1, 7, 4).inputs_BT)


def test_validation_is_fixed_whole_and_padded(dataset):
    batches = list(dataset.validation(4))
    assert [b.inputs_BT.shape for b in batches] == [(4, 32)] * 3
    weights = np.concatenate([b.weights_BT for b in batches])
    assert weights.dtype == np.float32 and weights.sum() == 320
    assert np.all(weights[:10] == 1) and np.all(weights[10:] == 0)
    rows = np.concatenate([b.inputs_BT for b in batches])[:10]
    one_by_one = np.concatenate([b.inputs_BT for b in dataset.validation(1)])
    np.testing.assert_array_equal(rows, one_by_one)
    assert len(set(map(tuple, rows))) == 10
    held_out = dataset.sources[0].windows
    assert set(map(tuple, rows)) <= set(map(tuple, held_out["validation"][:, :-1]))
    tested = np.concatenate([b.inputs_BT for b in dataset.test(1)])
    assert set(map(tuple, tested)) <= set(map(tuple, held_out["test"][:, :-1]))
    trained = set(map(tuple, held_out["train"][:, :-1]))
    assert not trained & (set(map(tuple, rows)) | set(map(tuple, tested)))


def by_hand(tokens, end):
    """Segments, positions and weights of one row, one token at a time."""
    segment = position = 0
    result = []
    for token in tokens:
        result.append((segment, position, float(token != end)))
        position += 1
        if token == end:
            segment, position = segment + 1, 0
    return np.array(result).T


def test_documents_are_respected(dataset, config):
    apart = open_dataset(dataclasses.replace(config, respect_documents=True))
    batch = apart.batches(0, 0, 3, 16)
    np.testing.assert_array_equal(batch.inputs_BT, dataset.batches(0, 0, 3, 16).inputs_BT)
    assert batch.segments_BT.max() > 0
    for index in np.ndindex(3, 16):
        segments, positions, weights = by_hand(batch.inputs_BT[index], 256)
        np.testing.assert_array_equal(batch.segments_BT[index], segments)
        np.testing.assert_array_equal(batch.positions_BT[index], positions)
        np.testing.assert_array_equal(batch.weights_BT[index], weights)
    for field in (batch.segments_BT, batch.positions_BT):
        assert field.dtype == np.int32
    n_windows = len(apart.sources[0].windows["validation"])
    every = dataclasses.replace(config, respect_documents=True, validation_tokens=32 * n_windows)
    held_out = list(open_dataset(every).validation(n_windows + 2))
    assert len(held_out) == 1
    inputs, weights = held_out[0].inputs_BT, held_out[0].weights_BT
    assert weights[:-2].min() == 0 and np.all(weights[-2:] == 0)
    for row in range(n_windows):
        np.testing.assert_array_equal(weights[row], by_hand(inputs[row], 256)[2])


def test_bpe(config):
    dataset = open_dataset(dataclasses.replace(config, tokenizer="bpe:300"))
    assert dataset.vocab_size == 300
    tokens = dataset.sources[0].store.tokens["train"]
    counts = dataset.statistics["corpora"][dataset.sources[0].name]["sources"]["text"]["train"]
    assert dataset.token_bytes[tokens].sum() == counts["bytes"]
    assert len(tokens) == counts["tokens"] < counts["bytes"]
    # The same tokenizer as a file gives the same ids.
    saved = next(Path(config.data_dir, "tokenizers").glob("*.json"))
    again = open_dataset(dataclasses.replace(config, tokenizer=str(saved)))
    assert again.tokenizer.fingerprint == dataset.tokenizer.fingerprint
    np.testing.assert_array_equal(again.batch(0, 0, 4).inputs_BT, dataset.batch(0, 0, 4).inputs_BT)


@pytest.fixture(scope="module")
def mixed(config, tmp_path_factory):
    digits = write_corpus(tmp_path_factory.mktemp("b"), 200, 1, "0123456789")
    return dataclasses.replace(
        config,
        corpus="mixture",
        files="",
        mixture=((f"text:{config.files}", 3.0), (f"text:{digits}", 1.0)),
    )


def test_mixture_by_weight(mixed):
    dataset = open_dataset(mixed)
    inputs = dataset.batches(0, 0, 50, 8).inputs_BT.reshape(400, 32)
    letters = np.sum((inputs >= ord("a")) & (inputs <= ord("h")), axis=1) > 5
    assert abs(letters.sum() - 300) <= 1
    name_a, name_b = (s.name for s in dataset.sources)
    n_a, n_b = (len(s.windows["train"]) for s in dataset.sources)
    epochs = dataset.epochs(400 * 32)
    assert epochs == pytest.approx({name_a: 300 / n_a, name_b: 100 / n_b})
    assert dataset.train_tokens == (n_a + n_b) * 32
    validation = np.concatenate([b.inputs_BT for b in dataset.validation(1)])
    held_letters = np.sum((validation >= ord("a")) & (validation <= ord("h")), axis=1) > 5
    assert (held_letters.sum(), len(validation)) == (8, 10)


def test_mixture_shares_one_tokenizer(mixed):
    dataset = open_dataset(dataclasses.replace(mixed, tokenizer="bpe:400"))
    assert dataset.vocab_size == 400
    assert len({s.store.header["tokenizer_fingerprint"] for s in dataset.sources}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 100_000}, r"data.seq_len = 100000: must be at most \d+, since corpus text:"),
        ({"validation_tokens": 10**6}, r"data.validation_tokens = 1000000: must be at most \d+"),
        ({"validation_tokens": 31}, "must be at least data.seq_len = 32"),
        ({"tokenizer": "wordpiece"}, "must be bytes, bpe:SIZE, or a tokenizer.json's path"),
        ({"tokenizer": "nothing.json"}, "nothing.json: cannot be read"),
        ({"files": "nothing*.txt"}, "no file matches"),
        ({"data_dir": ""}, "data.data_dir is missing"),
        ({"data_dir": f"{__file__}/data"}, "test_dataset.py is a file; a folder is needed"),
    ],
)
def test_impossible_settings(config, change, message):
    with pytest.raises(BadInput, match=message):
        open_dataset(dataclasses.replace(config, **change))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_a_corpus_that_cannot_be_read_leaves_nothing_behind(config, tokenizer, tmp_path):
    shutil.copytree(Path(config.files).parent, tmp_path / "text")
    bad = tmp_path / "text" / "zz.txt"
    changed = {"files": str(tmp_path / "text/*.txt"), "data_dir": str(tmp_path / "data")}
    config = dataclasses.replace(config, tokenizer=tokenizer, **changed)
    bad.write_bytes(b"\xff")
    with pytest.raises(BadInput, match="zz.txt: invalid UTF-8"):
        open_dataset(config)
    assert not (tmp_path / "data").exists()
    bad.unlink()
    open_dataset(config)
    made = sorted((tmp_path / "data").rglob("*"))
    bad.write_bytes(b"\xff")
    with pytest.raises(BadInput, match="zz.txt: invalid UTF-8"):
        open_dataset(config)
    assert sorted((tmp_path / "data").rglob("*")) == made


def test_largest_allowed_settings_work(config):
    def most(**change):
        with pytest.raises(BadInput) as caught:
            open_dataset(dataclasses.replace(config, **change))
        return int(str(caught.value).split("at most ")[1].split(",")[0])

    longest = most(seq_len=10**6)
    dataset = open_dataset(dataclasses.replace(config, seq_len=longest, validation_tokens=longest))
    assert dataset.batch(0, 0, 2).inputs_BT.shape == (2, longest)
    tokens = most(validation_tokens=10**6)
    dataset = open_dataset(dataclasses.replace(config, validation_tokens=tokens))
    assert sum(b.weights_BT.sum() for b in dataset.validation(8)) == tokens


def test_a_corpus_named_twice(mixed):
    doubled = dataclasses.replace(mixed, mixture=mixed.mixture[:1] * 2)
    with pytest.raises(BadInput, match="twice"):
        open_dataset(doubled)
