import dataclasses
import json

import numpy as np
import pytest

from lm.config import DataConfig
from lm.data import excerpts as module
from lm.data import open_dataset
from lm.data.excerpts import excerpts


@pytest.fixture(scope="module")
def dataset(text_data):
    return open_dataset(text_data)


def documents(dataset):
    """The training documents, as tokens with their marks."""
    tokens = dataset.sources[0].store.tokens["train"]
    ends = np.flatnonzero(tokens == dataset.tokenizer.end_of_text) + 1
    return np.split(tokens, ends)[:-1]


@pytest.mark.parametrize("chunk", [2**24, 50])
def test_each_target_is_in_the_document_that_is_told(dataset, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    wanted, several = documents(dataset), 0
    for step in range(30):
        batch = dataset.batch(3, step, 4)
        for row in range(4):
            found = excerpts(dataset, 3, step, 4, row)
            several += len(found) > 1
            # Without a gap, all targets are somebody's.
            assert [found[0].start, *(e.stop for e in found)] == [
                *(e.start for e in found),
                len(batch.targets_BT[row]),
            ]
            for each in found:
                document = wanted[each.document]
                part = batch.targets_BT[row, each.start : each.stop]
                windows = np.lib.stride_tricks.sliding_window_view(document, len(part))
                assert (windows == part).all(1).any()
                text = dataset.tokenizer.decode(document[:-1])
                assert each.source == dataset.sources[0].name and text.startswith(each.text[:100])
    assert several


def test_of_a_mixture_the_source_is_told(text_data, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}{i} " * 40)
    mixture = tuple((f"text:{tmp_path}/{name}/*.txt", 0.5) for name in ("a", "b"))
    config = dataclasses.replace(
        text_data, corpus="mixture", files="", mixture=mixture, validation_tokens=128
    )
    dataset, names = open_dataset(config), {name[-7]: name for name, _ in mixture}
    seen = set()
    for row in range(8):
        for each in excerpts(dataset, 0, 1, 8, row):
            assert each.source == names[each.text[0]]
            seen.add(each.source)
    assert len(seen) == 2


def test_of_conversations(text_data, tmp_path):
    with (tmp_path / "chat.jsonl").open("w") as file:
        for i in range(90):
            turns = ("user", f"q{i}"), ("assistant", f"a{i}")
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = DataConfig(
        corpus="chat",
        files=str(tmp_path / "chat.jsonl"),
        seq_len=128,
        validation_tokens=128,
        data_dir=str(tmp_path),
    )
    dataset = open_dataset(config)
    for row in range(4):
        batch = dataset.batch(0, 0, 4)
        found = excerpts(dataset, 0, 0, 4, row)
        assert len(found) > 1
        for number, each in enumerate(found):
            assert (batch.segments_BT[row, each.start + 1 : each.stop] == number).all()
            assert dataset.tokenizer.decode(batch.targets_BT[row, each.start : each.stop])
