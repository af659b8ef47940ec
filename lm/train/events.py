"""``events.jsonl``: what happened to a run beside its steps, one object a line.

Each has ``step`` and ``event``, which is one of skipped (an update whose loss or gradient was not
finite), spike (a loss far above those before it), rollback (to an earlier state), diverged, and
damaged_checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

from lm.command import write_atomically
from lm.train.metrics import finite, read_lines


class EventLog:
    """Appends to a run's events, of which it keeps the first ``n``: those before its checkpoint.

    By their number, as steps before a rollback are there twice.
    """

    def __init__(self, workdir: Path, n: int):
        self._path = workdir / "events.jsonl"
        if self._path.exists():
            kept = read_events(workdir)[:n]
            write_atomically(self._path, "".join(json.dumps(event) + "\n" for event in kept))

    def write(self, event: dict[str, Any]) -> None:
        """Writes one, to the disk; numbers that are not finite become null."""
        with self._path.open("a") as file:
            file.write(json.dumps(finite(event)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_events(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's events; a line torn by a kill is left out."""
    return read_lines(workdir / "events.jsonl")
