"""The token store: one tokenised corpus, memory-mapped; a folder that is whole or isn't there.

    stores/<corpus>-<tokenizer>-<key>/
        train.bin, validation.bin, test.bin    uint16 or uint32 ids, end of text after a document
        train.answers.bin, ...                 of conversations: a bit a token, each's from a byte
        train.lengths.bin, ...                 and their tokens, uint32
        header.json                            sizes, hashes, statistics, a checksum of itself

The folder is written under another name and renamed when everything is on the disk.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from lm.command import BadInput
from lm.data import chat
from lm.data.corpora import SPLITS, Corpus, Document
from lm.data.tokenizers import Tokenizer

SCHEMA = 1
# Shares of a source's bytes that are held out (whole documents, by hash), and the most of them in
# all: beyond 64 MB a larger validation set buys nothing.
HELD_OUT = {"validation": 0.04, "test": 0.02}
MOST_HELD_OUT_BYTES = 64e6
ENCODE_BATCH = 256  # documents at a time
KINDS = {"": "", "answers": "uint8", "lengths": "uint32"}  # of a split's files; "": the header's


class Survey(NamedTuple):
    """One reading's result: the split of each document in order ("": dropped), and the counts."""

    splits: list[str]
    sources: dict[str, dict]


def survey(corpus: Corpus) -> Survey:
    """Reads ``corpus`` once, drops exact duplicates, and holds documents out by hash of their text.

    Within each source the documents with the smallest hashes are validation, the next test, until
    each has its share: the same text lands on the same side whatever the order, and every source
    is held out. Raises ``BadInput`` for no documents, or too few to hold any out.
    """
    hashes, sizes, sources, splits = [], [], [], []
    seen: set[bytes] = set()
    counts: dict[str, dict] = {}
    for document in corpus.read():
        data = document.text.encode()
        digest = hashlib.blake2b(data, digest_size=12).digest()
        of_source = counts.setdefault(document.source, {"duplicates_removed": 0})
        repeated = digest in seen
        of_source["duplicates_removed"] += repeated
        seen.add(digest)
        hashes.append(int.from_bytes(digest[:8], "big"))
        sizes.append(len(data))
        sources.append(document.source)
        splits.append("" if repeated else document.split or "train")
    if not hashes:
        raise BadInput(f"corpus {corpus.name}: holds no documents")
    wanted = [s for s in HELD_OUT if s not in splits]
    total = sum(sizes)
    for source in counts:
        members = [i for i, s in enumerate(sources) if s == source and splits[i] == "train"]
        members.sort(key=hashes.__getitem__, reverse=True)  # the smallest are popped off the end
        of_train = sum(sizes[i] for i in members)
        for split in wanted:
            share = min(HELD_OUT[split], MOST_HELD_OUT_BYTES / total)
            taken = 0
            while len(members) > 2 and taken < share * of_train:
                member = members.pop()
                splits[member] = split
                taken += sizes[member]
    for split in SPLITS:
        if split not in splits:
            raise BadInput(
                f"corpus {corpus.name}: {len(seen)} different documents are too few"
                f" to hold out a {split} split"
            )
    for i, split in enumerate(splits):
        if split:
            entry = counts[sources[i]].setdefault(split, {"documents": 0, "bytes": 0, "tokens": 0})
            entry["documents"] += 1
            entry["bytes"] += sizes[i]
    return Survey(splits, counts)


def training_texts(corpus: Corpus, found: Survey) -> Iterator[str]:
    """Texts of the training split: what a tokenizer may learn from."""
    for document, split in zip(corpus.read(), found.splits, strict=True):
        if split == "train":
            yield document.text


def path_of(corpus: Corpus, tokenizer: Tokenizer, data_dir: Path) -> Path:
    """The store's folder for this corpus and tokenizer."""
    identity = f"{SCHEMA} {corpus.key} {tokenizer.fingerprint}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    names = (re.sub(r"[^A-Za-z0-9]+", "_", n) for n in (corpus.name, tokenizer.name))
    slug = "-".join(n[-40:].strip("_") for n in names)
    return data_dir / "stores" / f"{slug}-{key}"


class Store(NamedTuple):
    """An open store: ids of each split (memory-mapped, one axis) and the header.

    Of conversations also, packed, which ids the loss counts, and the conversations' lengths.
    """

    path: Path
    tokens: dict[str, np.ndarray]
    header: dict
    answers: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]


def load(path: Path, verify: bool = False) -> Store | None:
    """The store at ``path``, or None where there is none; ``verify`` checks the hash of every file.

    Raises ``BadInput`` naming the file that is damaged.
    """
    try:
        header = json.loads((path / "header.json").read_text())
    except FileNotFoundError:
        if path.exists():
            raise BadInput(f"{path}: has no header.json; delete the folder and run again") from None
        return None
    except ValueError:
        header = {}
    if header.get("checksum") != _checksum(header):
        raise BadInput(f"{path / 'header.json'}: damaged; delete the folder and run again")
    found: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for name, entry in header["files"].items():
        file = path / f"{name}.bin"
        size = file.stat().st_size if file.exists() else -1
        if size != entry["bytes"] or (verify and _sha256(file) != entry["sha256"]):
            raise BadInput(f"{file}: damaged; delete the folder {path} and run again")
        split, _, kind = name.partition(".")
        dtype = KINDS[kind] or header["dtype"]
        # np.memmap's own class costs microseconds at every indexing; its plain view does not.
        array = np.asarray(np.memmap(file, dtype, "r")) if size else np.zeros(0, dtype)
        found[kind][split] = array
    return Store(path, found[""], header, found["answers"], found["lengths"])


def write(path: Path, corpus: Corpus, tokenizer: Tokenizer, found: Survey) -> None:
    """Tokenises ``corpus`` into a store at ``path``.

    Raises ``OSError`` where the disk is full, with nothing left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        _write_files(temporary, corpus, tokenizer, found)
        os.chmod(temporary, 0o755)
        os.rename(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():  # another machine on the same file system was first
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, "no space left to write the token store", str(path)
            ) from error
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_files(folder: Path, corpus: Corpus, tokenizer: Tokenizer, found: Survey) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    statistics = json.loads(json.dumps(found.sources))
    kinds = KINDS if corpus.template else ("",)
    names = [f"{split}.{kind}".rstrip(".") for split in SPLITS for kind in kinds]
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        for batch in track(
            _batches(corpus, found),
            f"tokenising {corpus.name}",
            total=-(-sum(map(bool, found.splits)) // ENCODE_BATCH),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        ):
            for document, split, ids in _encoded(batch, corpus, tokenizer):
                if corpus.template:
                    ids, is_answer = ids
                    files[f"{split}.answers"].write(np.packbits(is_answer).tobytes())
                    files[f"{split}.lengths"].write(np.uint32(len(ids)).tobytes())
                else:
                    ids = np.append(ids, tokenizer.end_of_text)
                files[split].write(ids.astype(dtype).tobytes())
                statistics[document.source][split]["tokens"] += len(ids)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    header = {
        "schema": SCHEMA,
        "corpus": corpus.name,
        "corpus_key": corpus.key,
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype.name,
        "files": {
            name: {
                "bytes": (folder / f"{name}.bin").stat().st_size,
                "sha256": _sha256(folder / f"{name}.bin"),
            }
            for name in names
        },
        "sources": statistics,
    }
    header["checksum"] = _checksum(header)
    with open(folder / "header.json", "w") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _encoded(
    batch: list[tuple[Document, str]], corpus: Corpus, tokenizer: Tokenizer
) -> Iterator[tuple[Document, str, Any]]:
    """Each document, its split and its ids; of a conversation also which of them are answers."""
    if corpus.template is None:
        encoded = tokenizer.encode_batch([document.text for document, _ in batch])
        yield from ((*given, ids) for given, ids in zip(batch, encoded, strict=True))
        return
    for document, split in batch:
        try:
            yield document, split, chat.encode(tokenizer, corpus.template, document.text)
        except BadInput as error:
            raise BadInput(f"{document.where}: {error}") from error


def _batches(corpus: Corpus, found: Survey) -> Iterator[list[tuple[Document, str]]]:
    batch = []
    for document, split in zip(corpus.read(), found.splits, strict=True):
        if split:
            batch.append((document, split))
        if len(batch) == ENCODE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(header: dict) -> str:
    content = {key: value for key, value in header.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def preparing(data_dir: Path) -> Iterator[None]:
    """One process at a time prepares in ``data_dir``; a killed process loses its lock."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".lock", "w") as file:
        # A file system without locks only loses the waiting: folders are still renamed when whole.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
            for stale in (data_dir / "stores").glob(".*"):  # left by killed processes
                shutil.rmtree(stale, ignore_errors=True)
        try:
            yield
        except BadInput:  # leaves nothing behind: of an unlinked lock too only the waiting is lost
            if not any((data_dir / "stores").glob("*")):
                (data_dir / ".lock").unlink(missing_ok=True)
                for folder in (data_dir / "stores", data_dir):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise
