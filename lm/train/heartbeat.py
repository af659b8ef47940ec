"""``heartbeat.json``: a run's last sign of life, for who looks from outside and for the next try.

``time`` (Unix), ``pid`` and ``host`` of the process, ``step`` of ``n_steps``, ``doing`` (a part of
``lm.train.clock``) and the ``seconds`` of each part so far.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.command import write_atomically
from lm.train.metrics import finite

SCHEMA = 1
SECONDS = 5.0  # between two


class Heartbeat:
    """A context in which a thread writes what ``tell`` returns, also while a program compiles."""

    def __init__(self, workdir: Path, tell: Callable[[], dict[str, Any]]):
        self._path, self._tell = workdir / "heartbeat.json", tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self._write()

    def _beat(self) -> None:
        while not self._stop.is_set():
            self._write()
            self._stop.wait(SECONDS)

    def _write(self) -> None:
        who = {"pid": os.getpid(), "host": socket.gethostname()}
        heartbeat = {"schema": SCHEMA, "time": time.time(), **who, **finite(self._tell())}
        with contextlib.suppress(OSError):  # the run itself finds a full disk, where it matters
            write_atomically(self._path, json.dumps(heartbeat, indent=1))


def read_heartbeat(workdir: Path) -> dict[str, Any]:
    """The last one; empty where there is none."""
    try:
        found = json.loads((workdir / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
