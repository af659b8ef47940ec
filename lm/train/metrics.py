"""``metrics.jsonl``, one object a line, and the same as TensorBoard events."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from lm.command import write_atomically


class MetricsLog:
    """Appends to a run's log. Opened at a step, it forgets what was logged beyond that step.

    TensorBoard events are written by tensorboardX: clu's writers import tensorflow.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool = True):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir), purge_step=step + 1 if step else None)

    def write(self, line: dict) -> None:
        """Writes one line; numbers that are not finite become null, which JSON can hold."""
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self._file.write(json.dumps(line) + "\n")
        if self._events:
            for key, value in _scalars(line):
                if key != "step" and value is not None:
                    self._events.add_scalar(key, value, line["step"])

    def flush(self, to_disk: bool = False) -> None:
        """Shows to others what was written; ``to_disk`` waits until the disk, or bucket, has it."""
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        if self._events:
            self._events.close()


def _scalars(line: dict) -> Iterator[tuple[str, float | None]]:
    """The line's entries; of one that is a list, ``key/0``, ``key/1`` and so on."""
    for key, value in line.items():
        if isinstance(value, list):
            yield from _scalars({f"{key}/{i}": item for i, item in enumerate(value)})
        else:
            yield key, value


def read_metrics(workdir: Path) -> list[dict]:
    """The whole lines of a run's log; a line torn by a kill is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole
