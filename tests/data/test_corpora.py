import importlib.util
import sys

import pytest
import tensorflow_datasets as tfds

from lm.command import BadInput
from lm.config import DataConfig
from lm.data import corpora, open_dataset


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A registered TFDS data set with a validation split of its own, made without a download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "title": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples("train", 100),
            "validation": self._generate_examples("held", 10),
        }

    def _generate_examples(self, name, n):
        for i in range(n):
            yield f"{name}{i}", {"text": f"{name} text {i} " + "ä" * i, "title": f"t{i}"}


class NoText(TinyTexts):
    """Two text features, neither called text."""

    def _info(self):
        features = {"body": tfds.features.Text(), "title": tfds.features.Text()}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, name, n):
        yield name, {"body": "b", "title": "t"}


class Broken(TinyTexts):
    def _generate_examples(self, name, n):
        raise ConnectionError("the host is away\nand more")
        yield


def texts_of(name, n):
    return {f"{name} text {i} " + "ä" * i for i in range(n)}


def test_tfds_name(tmp_path):
    documents = list(corpora.find("tiny_texts", "", tmp_path).read())
    train = {d.text for d in documents if d.split == ""}
    held = {d.text for d in documents if d.split == "validation"}
    assert (train, held) == (texts_of("train", 100), texts_of("held", 10))
    assert list((tmp_path / "tfds" / "tiny_texts" / "1.0.0").glob("*.array_record*"))
    assert "tensorflow" not in sys.modules


def test_folder_that_tfds_prepared(tmp_path):
    builder = TinyTexts(data_dir=tmp_path / "mine", file_format="array_record")
    builder.download_and_prepare()
    documents = list(corpora.find(str(builder.data_path), "", tmp_path / "data").read())
    assert {d.text for d in documents} == texts_of("train", 100) | texts_of("held", 10)


def test_dataset_of_a_tfds_name(tmp_path):
    config = DataConfig(
        corpus="tiny_texts", seq_len=16, validation_tokens=160, data_dir=str(tmp_path)
    )
    dataset = open_dataset(config)
    counts = dataset.statistics["corpora"]["tiny_texts"]["sources"]["tiny_texts"]
    assert counts["validation"]["documents"] == 10
    assert counts["train"]["documents"] + counts["test"]["documents"] == 100
    assert dataset.batch(0, 0, 4).inputs_BT.shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_corpus_at_all", "not pd_english, text, chat or mixture, and TFDS cannot prepare"),
        pytest.param(
            "c4/en",
            "No module named 'apache_beam'",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("apache_beam") is not None, reason="apache_beam is there"
            ),
        ),
        ("no_text", "exactly one text feature, has body, title"),
        ("broken", r"TFDS cannot prepare it \(the host is away\)"),
    ],
)
def test_names_that_cannot_be_read(tmp_path, name, message):
    with pytest.raises(BadInput, match=message) as caught:
        list(corpora.find(name, "", tmp_path).read())
    assert "\n" not in str(caught.value) and f"'{name}'" in str(caught.value)
