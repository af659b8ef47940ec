import errno
import fcntl
import json
import os
import random

import numpy as np
import pytest

from lm.command import BadInput
from lm.data import store
from lm.data.corpora import SPLITS, Corpus, Document
from lm.data.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def corpus_of(documents, name="test", key="k"):
    return Corpus(name, key, lambda: iter(documents))


def many(n=200, source="a"):
    draw = random.Random(source)
    return [Document(f"{source}{i} " + "x" * draw.randrange(500), source) for i in range(n)]


def written(corpus, data_dir):
    path = store.path_of(corpus, BYTES, data_dir)
    store.write(path, corpus, BYTES, store.survey(corpus))
    return store.load(path)


def test_every_document_is_in_its_split_in_order(tmp_path):
    documents = many()
    corpus = corpus_of(documents)
    found = store.survey(corpus)
    opened = written(corpus, tmp_path)
    for split in SPLITS:
        expected = b"".join(
            np.append(BYTES.encode(d.text), 256).astype(np.uint16).tobytes()
            for d, s in zip(documents, found.splits, strict=True)
            if s == split
        )
        assert opened.tokens[split].tobytes() == expected
        assert opened.tokens[split].dtype == np.uint16


def test_shares_of_each_source_and_order_of_reading(tmp_path):
    documents = many(300, "a") + many(50, "b")
    found = store.survey(corpus_of(documents))
    for source in "ab":
        size = {s: 0 for s in SPLITS}
        for document, split in zip(documents, found.splits, strict=True):
            if document.source == source:
                size[split] += len(document.text)
        total, longest = sum(size.values()), 510
        assert 0.04 * total <= size["validation"] <= 0.04 * total + longest
        assert 0.02 * total <= size["test"] <= 0.02 * total + longest
        counts = found.sources[source]
        assert {s: counts[s]["bytes"] for s in SPLITS} == size
    # The split is the text's own, not its place's.
    splits = dict(zip((d.text for d in documents), found.splits, strict=True))
    shuffled = documents[::-1]
    again = store.survey(corpus_of(shuffled)).splits
    assert dict(zip((d.text for d in shuffled), again, strict=True)) == splits


def test_duplicates_are_removed_once_and_counted(tmp_path):
    documents = many(100)
    doubled = documents + documents[:7]
    found = store.survey(corpus_of(doubled))
    assert found.sources["a"]["duplicates_removed"] == 7
    assert found.splits[100:] == [""] * 7
    opened = written(corpus_of(doubled), tmp_path)
    alone = written(corpus_of(documents, key="other"), tmp_path)
    for split in SPLITS:
        np.testing.assert_array_equal(opened.tokens[split], alone.tokens[split])


def test_splits_of_the_corpus_itself_are_kept():
    documents = many(100) + [Document(f"held out {i}", "a", "validation") for i in range(5)]
    splits = store.survey(corpus_of(documents)).splits
    assert splits[100:] == ["validation"] * 5
    assert "validation" not in splits[:100] and "test" in splits[:100]


def test_statistics(tmp_path):
    opened = written(corpus_of(many()), tmp_path)
    counts = opened.header["sources"]["a"]
    assert sum(counts[s]["documents"] for s in SPLITS) == 200
    for split in SPLITS:
        assert counts[split]["tokens"] == len(opened.tokens[split])
        assert counts[split]["tokens"] == counts[split]["bytes"] + counts[split]["documents"]


@pytest.mark.parametrize(
    ("documents", "message"),
    [([], "holds no documents"), (many(2), "2 different documents are too few to hold out")],
)
def test_too_little_text(documents, message):
    with pytest.raises(BadInput, match=message):
        store.survey(corpus_of(documents))


def test_other_text_or_tokenizer_is_another_store(tmp_path):
    class Other(ByteTokenizer):
        fingerprint = "other"

    paths = {
        store.path_of(corpus_of([]), BYTES, tmp_path),
        store.path_of(corpus_of([], key="k2"), BYTES, tmp_path),
        store.path_of(corpus_of([]), Other(), tmp_path),
    }
    assert len(paths) == 3


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, code):
    def full(descriptor):
        raise OSError(code, os.strerror(code))

    corpus = corpus_of(many())
    path = store.path_of(corpus, BYTES, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left to write the token store") as caught:
            store.write(path, corpus, BYTES, store.survey(corpus))
    assert caught.value.filename == str(path)
    assert list(path.parent.iterdir()) == [] and store.load(path) is None
    assert written(corpus, tmp_path).path == path


def test_what_a_killed_process_left_is_swept_by_the_next_to_prepare(tmp_path):
    corpus = corpus_of(many())
    path = store.path_of(corpus, BYTES, tmp_path)
    stale = path.parent / f".{path.name}.abc"
    stale.mkdir(parents=True)
    (stale / "train.bin").write_bytes(b"half")
    assert store.load(path) is None
    with store.preparing(tmp_path):
        written(corpus, tmp_path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_one_prepares_at_a_time(tmp_path):
    with store.preparing(tmp_path), open(tmp_path / ".lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_second_writer_keeps_the_first_ones_store(tmp_path):
    corpus = corpus_of(many())
    first = written(corpus, tmp_path)
    again = written(corpus, tmp_path)
    assert again.header == first.header
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def damage_truncate(path):
    data = (path / "train.bin").read_bytes()
    (path / "train.bin").write_bytes(data[:-2])


def damage_missing(path):
    (path / "test.bin").unlink()


def damage_header(path):
    header = json.loads((path / "header.json").read_text())
    header["files"]["train"]["bytes"] -= 2
    (path / "header.json").write_text(json.dumps(header))


def damage_header_text(path):
    (path / "header.json").write_text((path / "header.json").read_text()[:-9])


def damage_no_header(path):
    (path / "header.json").unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_truncate, "train.bin"),
        (damage_missing, "test.bin"),
        (damage_header, "header.json"),
        (damage_header_text, "header.json"),
        (damage_no_header, "header.json"),
    ],
)
def test_a_damaged_store_is_never_read(tmp_path, damage, named):
    path = written(corpus_of(many()), tmp_path).path
    damage(path)
    with pytest.raises(BadInput, match=rf"{named}.*delete the folder"):
        store.load(path)


def test_verify_reads_every_byte(tmp_path):
    path = written(corpus_of(many()), tmp_path).path
    data = bytearray((path / "train.bin").read_bytes())
    data[100] ^= 1
    (path / "train.bin").write_bytes(data)
    store.load(path)
    with pytest.raises(BadInput, match="train.bin: damaged"):
        store.load(path, verify=True)
