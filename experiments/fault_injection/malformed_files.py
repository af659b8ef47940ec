"""Corpora and tokenizers that cannot be read, and folders of runs and studies that are damaged."""

import gzip
import json
import lzma
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.fault_injection.malformed_configs import Case, data


def make_corpora(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Makes corpora of every kind of file; yields calls that must be accepted."""
    texts = [path.read_text() for path in sorted((folder.parent / "data").glob("*.txt"))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    zstd = pa.BufferOutputStream()
    with pa.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(lines)
    written = {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.xz": lzma.compress(lines),
        "jsonl.zst": zstd.getvalue().to_pybytes(),
    }
    for suffix, content in written.items():
        (folder / f"corpus.{suffix}").write_bytes(content)
    pq.write_table(pa.table({"text": texts}), folder / "corpus.parquet")
    for suffix in (*written, "parquet"):
        yield "lm.data", corpus(folder, folder / f"corpus.{suffix}", folder / "stores")
    shutil.rmtree(folder / "stores")


def make_folders(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Makes a run and a study; yields calls that must be accepted."""
    small = (
        *(f"--config={folder / 'config.py'}", *data(folder), "--config.train.tokens=2048"),
        *("--config.sweep.budgets=(2e8,)", "--config.sweep.sizes=1"),
    )
    yield "lm.train", [*small, f"--workdir={folder / 'run'}"]
    yield "lm.generate", [f"--workdir={folder / 'run'}", "--prompt=a", "--max_tokens=1"]
    yield "lm.sweep", [*small, f"--workdir={folder / 'study'}"]
    yield "lm.sweep", ["--status", f"--workdir={folder / 'study'}"]


def corpus(inputs: Path, files: Path, store: Path) -> list[str]:
    """Arguments of ``lm.data``."""
    return [
        *(f"--config={inputs / 'config.py'}", f"--config.data.files={files}"),
        f"--config.data.data_dir={store}",
    ]


def case(draw, folder: Path, inputs: Path, path: Path, names: str = "") -> Case:
    """A command that reads the corpus ``path``."""
    command = draw.choice(("lm.data", "lm.train", "lm.sweep"))
    workdir = [f"--workdir={folder / 'run'}"] if command != "lm.data" else []
    arguments = [*corpus(inputs, path, folder / "stores"), *workdir]
    return Case(command, arguments, names or path.name)


def text_file(change):
    """A class: one of the valid text files changed by ``change(draw, bytes) -> bytes``."""

    def make(draw, folder, inputs):
        for path in (inputs.parent / "data").glob("*.txt"):
            shutil.copy(path, folder)
        path = folder / f"{draw.randrange(60):02}.txt"
        path.write_bytes(change(draw, path.read_bytes()))
        made = case(draw, folder, inputs, folder / "*.txt")
        return made._replace(names=path.name)

    return make


def record(make_line):
    """A class: one line of the valid .jsonl, plain or packed, replaced by ``make_line(draw)``."""

    def make(draw, folder, inputs):
        lines = (inputs / "corpus.jsonl").read_bytes().splitlines(keepends=True)
        number = draw.randrange(len(lines))
        lines[number] = make_line(draw, lines[number])
        content, suffix = b"".join(lines), draw.choice(("jsonl", "jsonl.gz", "jsonl.xz"))
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[suffix]
        path = folder / f"corpus.{suffix}"
        path.write_bytes(pack(content))
        return case(draw, folder, inputs, path)

    return make


def packed(change):
    """A class: a packed corpus changed by ``change(draw, bytes) -> bytes``."""

    def make(draw, folder, inputs):
        name = draw.choice(("corpus.jsonl.gz", "corpus.jsonl.xz", "corpus.jsonl.zst"))
        path = folder / name
        path.write_bytes(change(draw, (inputs / name).read_bytes()))
        return case(draw, folder, inputs, path)

    return make


def inserted(*choices: bytes):
    def change(draw: random.Random, content: bytes) -> bytes:
        place = draw.randrange(len(content))
        return content[:place] + draw.choice(choices) + content[place:]

    return change


def shortened(draw, content: bytes) -> bytes:
    return content[: draw.randrange(1, len(content) - 8)]


def flipped(draw, content: bytes) -> bytes:
    """One bit of the compressed data, which every kind has a checksum of, but for .zst."""
    place = draw.randrange(len(content) // 4, len(content) // 2)
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def flipped_gzip(draw, folder, inputs):
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(flipped(draw, (inputs / path.name).read_bytes()))
    return case(draw, folder, inputs, path)


def parquet(draw, folder, inputs):
    """Cut, without a text, with numbers, or not parquet at all."""
    path, valid = folder / "corpus.parquet", (inputs / "corpus.parquet").read_bytes()
    kind = draw.randrange(4)
    if kind == 0:
        path.write_bytes(shortened(draw, valid))
    elif kind == 1:
        pq.write_table(pa.table({"texts": ["a", "b"]}), path)
    elif kind == 2:
        pq.write_table(pa.table({"text": [1, 2, 3]}), path)
    else:
        path.write_bytes(draw.randbytes(500))
    return case(draw, folder, inputs, path)


def not_there(draw, folder, inputs):
    (folder / "folder.txt").mkdir()
    return case(draw, folder, inputs, folder / draw.choice(("*.txt", "none.jsonl", "folder.txt")))


def other_kind(draw, folder, inputs):
    path = folder / f"corpus.{draw.choice(('docx', 'pdf', 'json', 'csv', 'txt.bak'))}"
    path.write_bytes((inputs / "corpus.jsonl").read_bytes())
    return case(draw, folder, inputs, path)


def too_little(draw, folder, inputs):
    """One document, or one many times, or no line at all."""
    line = (inputs / "corpus.jsonl").read_bytes().splitlines(keepends=True)[0]
    path = folder / "corpus.jsonl"
    path.write_bytes(draw.choice((line, line * 20, b"\n \n\n", b"")))
    return case(draw, folder, inputs, path)


def tokenizer(draw, folder, inputs):
    """A tokenizer.json that is none."""
    path = folder / "tokenizer.json"
    path.write_bytes(draw.choice((b"", b"{", b"[]", b'{"model": 3}', b"\xff\0", b"[" * 100_000)))
    made = case(draw, folder, inputs, inputs.parent / "data" / "*.txt", "tokenizer.json")
    return made._replace(arguments=[*made.arguments, f"--config.data.tokenizer={path}"])


CORPORA = {
    "bytes that are not UTF-8": text_file(inserted(b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80")),
    "another encoding": text_file(lambda draw, text: text.decode().encode("utf-16")),
    "an empty document": text_file(lambda draw, text: draw.choice((b"", b" ", b"\n\t\n"))),
    "a line that is cut": record(
        lambda draw, line: line[: draw.randrange(1, len(line) - 2)] + b"\n"
    ),
    "a record without text": record(
        lambda draw, line: draw.choice((b'{"txt": "a"}\n', b"{}\n", b"[]\n", b"3\n", b'"a"\n'))
    ),
    "a text that is none": record(
        lambda draw, line: b'{"text": ' + draw.choice((b"3", b"null", b'["a"]')) + b"}\n"
    ),
    "half a surrogate": record(lambda draw, line: b'{"text": "a \\ud800 b"}\n'),
    "nesting without end": record(lambda draw, line: b'{"text": ' + b"[" * 100_000 + b"\n"),
    "a number without end": record(lambda draw, line: b'{"n": ' + b"7" * 5000 + b"}\n"),
    "bytes in a record": record(inserted(b"\xff", b"\xe2\x28")),
    "a packed file that is cut": packed(shortened),
    "not packed at all": packed(lambda draw, content: draw.randbytes(len(content))),
    "a flipped bit": flipped_gzip,
    **{f.__name__.replace("_", " "): f for f in (parquet, not_there, other_kind, too_little)},
    "tokenizer": tokenizer,
}


DAMAGES = {
    "cut": lambda draw, text: text[: draw.randrange(1, len(text) - 1)],
    "empty": lambda draw, text: b"",
    "zeros": lambda draw, text: b"\0" * len(text),
    "not UTF-8": lambda draw, text: text[:9] + b"\xff" + text[9:],
    "a list": lambda draw, text: b"[" + text + b"]",
    "no config": lambda draw, text: text.replace(b'"config"', b'"konfig"'),
    "an unknown key": lambda draw, text: text.replace(b'"d_model"', b'"e_model"'),
    "a wrong type": lambda draw, text: text.replace(b'"seq_len": 64', b'"seq_len": "64"'),
}


def damaged(damage: str):
    """A class: ``config.json`` of a run or ``study.json`` of a study is damaged."""

    def make(draw, folder, inputs):
        kind = draw.choice(("run", "study"))
        shutil.copytree(inputs / kind, folder / kind)
        file = folder / kind / ("config.json" if kind == "run" else "study.json")
        file.write_bytes(DAMAGES[damage](draw, file.read_bytes()))
        where = f"--workdir={folder / kind}"
        if kind == "study":
            return Case("lm.sweep", ["--status", where], "study.json")
        return Case("lm.generate", [where, "--prompt=a"], "config.json")

    return make


def damaged_result(draw, folder, inputs):
    """A result that the same command would return."""
    shutil.copytree(inputs / "study", folder / "study")
    file = draw.choice(sorted((folder / "study").glob("runs/*/result.json")))
    file.write_bytes(draw.choice(list(DAMAGES.values())[:4])(draw, file.read_bytes()))
    return Case("lm.sweep", ["--status", f"--workdir={folder / 'study'}"], "result.json")


FOLDERS = {**{damage: damaged(damage) for damage in DAMAGES}, "result": damaged_result}
