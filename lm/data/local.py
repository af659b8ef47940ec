"""The user's own text: .txt, .jsonl (plain, .gz, .xz or .zst) and .parquet files."""

import glob
import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.command import BadInput, write_atomically
from lm.data import chat
from lm.data.corpora import Corpus, Document

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
# A .txt file is one document, unless it is more than this share of the corpus: then it is cut at
# paragraphs, so that there is something to hold out of a corpus of one long file.
LONGEST_SHARE, SHORTEST_CUT = 0.01, 2**14


def corpus(pattern: str, data_dir: Path, chats: bool = False) -> Corpus:
    """The corpus of the files that match ``pattern`` (``**`` allowed), keyed by their content.

    Of ``chats`` each line is a conversation, and each document's text the JSON of its messages.
    Raises ``BadInput`` where nothing matches or a file is of another kind.
    """
    suffixes = tuple(s for s in SUFFIXES if s.startswith(".jsonl")) if chats else SUFFIXES
    pattern = os.path.expanduser(pattern)
    paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
    if not paths:
        raise BadInput(f"data.files = {pattern!r}: no file matches")
    for path in paths:
        if not path.endswith(suffixes):
            raise BadInput(f"{path}: must be one of {', '.join(suffixes)}")
    # Unchanged files (by size and time) are not read a second time.
    stats = [(os.path.abspath(p), os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in paths]
    memo = data_dir / "hashes" / hashlib.sha256(repr(stats).encode()).hexdigest()[:24]
    known = memo.exists()
    key = memo.read_text() if known else _content_key(paths)

    def remember() -> None:
        if not known:
            write_atomically(memo, key)

    if chats:
        name, read, template = "chat", _read_chats, chat.Template("", {})
    else:
        name, read, template = "text", _read, None
    return Corpus(f"{name}:{pattern}", key, lambda: read(paths), template, remember)


def _content_key(paths: list[str]) -> str:
    """Hash of names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        digest.update(Path(path).name.encode() + b"\0" + content)
    return digest.hexdigest()


def _read(paths: list[str]) -> Iterator[Document]:
    sizes = [os.path.getsize(p) for p in paths if p.endswith(".txt")]
    longest = max(SHORTEST_CUT, int(LONGEST_SHARE * sum(sizes)))
    for path in paths:
        if path.endswith(".txt"):
            texts = _pieces(_decoded(Path(path).read_bytes(), path, 0), longest)
        elif path.endswith(".parquet"):
            texts = _parquet(path)
        else:
            texts = (_text(record, where) for record, where in _jsonl(path))
        for index, text in enumerate(texts, 1):
            if not text.strip():
                where = path if path.endswith(".txt") else f"{path}, record {index}"
                raise BadInput(f"{where}: a document of zero length")
            yield Document(text, "text")


def _read_chats(paths: list[str]) -> Iterator[Document]:
    for path in paths:
        for record, where in _jsonl(path):
            try:
                text = chat.messages_of(record)
            except BadInput as error:
                raise BadInput(f"{where}: {error}") from error
            yield Document(_utf8(text, where), "chat", where=where)


def _decoded(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}: invalid UTF-8 at byte offset {offset + error.start}"
            f" (0x{data[error.start]:02x})"
        ) from error


def _pieces(text: str, longest: int) -> Iterator[str]:
    """``text``, cut after paragraphs (else lines, words) into at most ``longest`` characters."""
    start = 0
    while len(text) - start > longest:
        end = start + longest
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + longest // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    if start == 0 or text[start:].strip():
        yield text[start:]


def _jsonl(path: str) -> Iterator[tuple[Any, str]]:
    """The record of each line, and where it is; offsets are of the decompressed file."""
    import pyarrow as pa

    kind = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    offset = number = 0
    try:
        xz = path.endswith(".xz")
        with lzma.open(path) if xz else pa.input_stream(path, compression=kind) as stream:
            for line in _lines(stream):
                number += 1
                text = _decoded(line, path, offset)
                offset += len(line)
                if text.strip():
                    where = f"{path}, line {number}"
                    try:
                        record = json.loads(text)
                    except (ValueError, RecursionError) as error:
                        told = getattr(error, "msg", error)
                        raise BadInput(f"{where}: not JSON ({told})") from error
                    yield record, where
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise BadInput(f"{path}: truncated or damaged ({error})") from error


def _lines(stream) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _text(record: Any, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise BadInput(f"{where}: needs a string field 'text', has {has}")
    return _utf8(record["text"], where)


def _utf8(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: not UTF-8 ({error.reason})") from error
    return text


def _parquet(path: str) -> Iterator[str]:
    """The column ``text``, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise BadInput(f"{path}: needs a string column 'text', has {names}")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, (str, type(None))):
                        raise BadInput(
                            f"{path}: column 'text' must hold strings, not {type(text).__name__}"
                        )
                    yield text or ""
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{path}: truncated or damaged ({error})") from error
