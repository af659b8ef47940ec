import gzip
import json
import lzma
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.command import BadInput
from lm.data import local

TEXTS = ["First document.\nWith two lines.", "Zweites, mit Umlaut: ä.", "第三"]


def read(pattern, tmp_path):
    return [d.text for d in local.corpus(str(pattern), tmp_path / "data").read()]


def jsonl(texts=TEXTS):
    return "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)).encode()


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](jsonl()))
    assert read(tmp_path / "*.jsonl*", tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_is_named(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    texts = [os.urandom(400).hex() for _ in range(50)]  # does not compress away
    path.write_bytes(COMPRESS[suffix](jsonl(texts))[:-500])
    with pytest.raises(BadInput, match=f"{path}: truncated or damaged"):
        read(path, tmp_path)


def test_jsonl_lines_across_blocks_and_without_a_last_newline(tmp_path):
    texts = ["x" * 700_000, "y" * 700_000, "z"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts).rstrip(b"\n"))
    assert read(tmp_path / "a.jsonl", tmp_path) == texts


def test_txt_files_in_order_of_name(tmp_path):
    for name, text in zip("bca", TEXTS, strict=True):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "*.txt", tmp_path) == [TEXTS[2], TEXTS[0], TEXTS[1]]


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt", tmp_path) == ["hello"]


def test_one_long_file_is_cut_at_paragraphs(tmp_path):
    text = "".join(f"Paragraph {i}. " + "word " * 50 + "\n\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    pieces = read(tmp_path / "book.txt", tmp_path)
    assert "".join(pieces) == text and len(pieces) > 5
    assert all(p.startswith("Paragraph") and len(p) <= local.SHORTEST_CUT for p in pieces)
    unbroken = "x" * 100_000
    (tmp_path / "long.txt").write_text(unbroken)
    assert "".join(read(tmp_path / "long.txt", tmp_path)) == unbroken


def test_parquet(tmp_path):
    pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", tmp_path) == TEXTS
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[:-20])
    with pytest.raises(BadInput, match="b.parquet: truncated or damaged"):
        read(tmp_path / "b.parquet", tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": TEXTS}, "needs a string column 'text', has body"),
        ({"text": [1, 2]}, "must hold strings, not int"),
        ({"text": ["a", None]}, "record 2: a document of zero length"),
    ],
)
def test_bad_parquet_columns(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "a.parquet", tmp_path)


def test_invalid_utf8_names_file_and_offset(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xff bad")
    with pytest.raises(BadInput, match=rf"{path}: invalid UTF-8 at byte offset 5 \(0xff\)"):
        read(path, tmp_path)
    path = tmp_path / "b.jsonl"
    path.write_bytes('{"text": "ö"}\n'.encode() + b'{"text": "\xe4"}\n')
    with pytest.raises(BadInput, match=r"b.jsonl: invalid UTF-8 at byte offset 25 \(0xe4\)"):
        read(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: a document of zero length"),
        ("a.txt", b" \n", "a.txt: a document of zero length"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}\n', "a.jsonl, record 2: a document of zero"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl, line 1: needs a string field 'text', has body"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", b'{"n": ' + b"7" * 5_000 + b"}\n", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: needs a string field 'text', has list"),
        ("a.pdf", b"%PDF", "a.pdf: must be one of .txt, .jsonl"),
    ],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read(tmp_path / name, tmp_path)


def test_no_match(tmp_path):
    with pytest.raises(BadInput, match="no file matches"):
        local.corpus(str(tmp_path / "*.txt"), tmp_path)


def test_key_follows_content_not_time(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def key():
        return local.corpus(str(path), tmp_path / "data").key

    first = key()
    os.utime(path, ns=(1, 1))
    assert key() == first
    path.write_text("two")
    assert key() != first
