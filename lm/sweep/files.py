"""The few things that a study asks of the place where it is kept, so that it may be anywhere."""

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from lm.command import BadInput, write_atomically

SECONDS_TO_SETTLE = 1.0  # between a write to a bucket and the look at whose it became


class Folder:
    """A folder on a disk, or on NFS: whatever ``open`` reaches. Names are relative, as "a/b"."""

    def __init__(self, path: str | Path):
        self.local = Path(path)  # where runs are trained and tables made

    def names(self, folder: str) -> list[str]:
        """Of the files in ``folder``; none where it is not there."""
        path = self.local / folder
        return [f"{folder}/{name}" for name in os.listdir(path)] if path.is_dir() else []

    def finished(self) -> list[str]:
        """The runs that have a result."""
        return [path.parent.name for path in self.local.glob("runs/*/result.json")]

    def read(self, name: str) -> str | None:
        """The text of a file; None where it is not there."""
        try:
            return (self.local / name).read_text()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.local / name}: damaged ({error})") from error

    def write(self, name: str, text: str) -> None:
        """Writes a file whole."""
        write_atomically(self.local / name, text)

    def create(self, name: str, text: str) -> bool:
        """Writes a file that is not there; of any number who try, one is told True."""
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:  # a full disk: what holds nothing must not hold others off
            path.unlink()
            raise
        return True

    def fetch(self, names: Iterable[str]) -> None:
        """Brings files to ``local``, where they are already."""

    def publish(self, names: Iterable[str]) -> None:
        """Brings files of ``local`` to where all see them, where they are already."""


class Bucket(Folder):
    """An object store that fsspec knows, as gs://bucket/study, worked on in a copy on this disk.

    Asks for whole reads and writes, listings, and objects that are created only where missing.
    Checkpoints stay on the disk of the machine that trains, so that a run that another one takes
    over begins anew.
    """

    def __init__(self, url: str):
        try:
            import fsspec

            self._fs, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise BadInput(f"--workdir={url}: {error}") from error
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        key = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
        super().__init__(cache / "lm" / "studies" / key)

    def names(self, folder: str) -> list[str]:
        """As ``Folder``'s."""
        try:
            paths = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [f"{folder}/{path.rpartition('/')[2]}" for path in paths]

    def finished(self) -> list[str]:
        """As ``Folder``'s."""
        return [path.split("/")[-2] for path in self._fs.glob(self._path("runs/*/result.json"))]

    def read(self, name: str) -> str | None:
        """As ``Folder``'s."""
        try:
            return self._fs.cat_file(self._path(name)).decode()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """As ``Folder``'s."""
        self._fs.pipe_file(self._path(name), text.encode())

    def create(self, name: str, text: str) -> bool:
        """As ``Folder``'s. ``text`` must be the caller's alone.

        A store that cannot refuse a second creation holds the last one's text after a while.
        """
        try:
            self._fs.pipe_file(self._path(name), text.encode(), mode="create")
        except FileExistsError:
            return False
        time.sleep(SECONDS_TO_SETTLE)
        return self.read(name) == text

    def fetch(self, names: Iterable[str]) -> None:
        """As ``Folder``'s."""
        for name in names:
            if (text := self.read(name)) is not None:
                write_atomically(self.local / name, text)

    def publish(self, names: Iterable[str]) -> None:
        """As ``Folder``'s."""
        for name in names:
            if (self.local / name).exists():
                self.write(name, (self.local / name).read_text())

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
