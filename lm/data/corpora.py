"""Corpora by name. A corpus is a key (what it holds) and a way to read its documents."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lm.command import BadInput
from lm.data import chat, pd_english

# tensorflow_datasets is imported only where there is something to build or to read: a prepared
# store opens without it, in milliseconds.

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """A text, its source within the corpus, and its split ("": by hash, as the store does)."""

    text: str
    source: str
    split: str = ""
    where: str = ""  # for messages: a conversation's file and line


class Corpus(NamedTuple):
    """``key`` changes when the text does; ``read`` yields every document, always in the same order.

    ``read`` raises ``BadInput`` naming the file where something cannot be read.
    """

    name: str
    key: str
    read: Callable[[], Iterator[Document]]
    template: chat.Template | None = None  # of conversations
    remember: Callable[[], None] = lambda: None  # called once all of it was read or found prepared


def find(name: str, files: str, data_dir: Path) -> Corpus:
    """The corpus ``pd_english``, ``text`` or ``chat`` (a glob in ``files``), ``text:GLOB``,
    ``chat:GLOB``, or a TFDS name.

    Reads nothing but the user's own files (to know their content's hash).
    """
    kind, _, pattern = name.partition(":")
    if kind in ("text", "chat"):
        from lm.data import local

        return local.corpus(pattern or files, data_dir, chats=kind == "chat")
    if name == "pd_english":
        return Corpus(name, pd_english.KEY, lambda: _read_pd_english(data_dir))
    key = hashlib.sha256(f"tfds {name}".encode()).hexdigest()
    return Corpus(name, key, lambda: _read_tfds(name, data_dir))


def _read_pd_english(data_dir: Path) -> Iterator[Document]:
    from lm.data import pd_english_builder

    for example in pd_english_builder.data_source(data_dir):
        yield Document(example["text"].decode(), example["source"].decode())


def _read_tfds(name: str, data_dir: Path) -> Iterator[Document]:
    """Documents of a TFDS data set with a text feature, by name or prepared folder."""
    import tensorflow_datasets as tfds
    import tensorflow_datasets.text  # registers what tfds itself imports too late: c4, wiki40b, ...

    tfds.disable_progress_bar()
    folder = data_dir / "tfds"
    try:
        if Path(name, "dataset_info.json").exists():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(
                name, data_dir=folder, file_format=tfds.core.FileFormat.ARRAY_RECORD
            )
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports its folders at length
                builder.download_and_prepare()
        features = builder.info.features
        feature = _text_feature(name, features)
        sources = {split: builder.as_data_source(split=split) for split in builder.info.splits}
    except BadInput:
        raise
    except Exception as error:  # whatever a builder's download and parsing may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"data.corpus = {name!r}: not pd_english, text, chat or mixture, and TFDS cannot"
            f" prepare it ({reason})"
        ) from error
    for split, examples in sources.items():
        wanted = split if split in SPLITS else "train"
        # A validation or test split of its own is kept; what is missing is held out of train by
        # hash.
        own = "" if wanted == "train" else wanted
        for index, example in enumerate(examples):
            try:
                text = example[feature].decode()
            except UnicodeDecodeError as error:
                raise BadInput(
                    f"{name}, split {split}, example {index}: invalid UTF-8 at byte {error.start}"
                ) from error
            if text:  # a published data set may hold empty documents; nobody here can mend it
                yield Document(text, name, own)


def _text_feature(name: str, features) -> str:
    """The feature ``text``, or the only text feature there is."""
    import tensorflow_datasets as tfds

    texts = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise BadInput(
            f"data.corpus = {name!r}: needs a feature 'text' or exactly one text feature,"
            f" has {', '.join(sorted(features))}"
        )
    return texts[0]
