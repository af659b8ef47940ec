"""The few things that a study asks of the place where it is kept, so that it may be anywhere."""

import os
from pathlib import Path

from lm.command import write_atomically


class Folder:
    """A folder on a disk, or on NFS: whatever ``open`` reaches. Names are relative, as "a/b"."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def names(self, folder: str) -> list[str]:
        """Of the files in ``folder``; none where it is not there."""
        path = self._path / folder
        return [f"{folder}/{name}" for name in os.listdir(path)] if path.is_dir() else []

    def read(self, name: str) -> str | None:
        """The text of a file; None where it is not there."""
        try:
            return (self._path / name).read_text()
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str) -> None:
        """Writes a file whole."""
        write_atomically(self._path / name, text)

    def create(self, name: str, text: str) -> bool:
        """Writes a file that is not there; of any number who try, one is told True."""
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True
