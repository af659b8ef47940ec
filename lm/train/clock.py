"""Where a run's time goes, summed over its pieces where it was stopped and gone on with."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

STEP, COMPILE, DATA, CHECKPOINT = "step", "compile", "data", "checkpoint"
EVALUATE, START, LOST, OTHER = "evaluate", "start", "lost", "other"
PARTS = (STEP, COMPILE, DATA, CHECKPOINT, EVALUATE, START, LOST, OTHER)
WORK = (STEP, DATA, EVALUATE)  # is done again after a kill; the rest was overhead
# Words in the names of what differs between two calls that are the same run.
TIMED = ("seconds", "per_second", "mfu", "goodput", "memory", "device")


class Clock:
    """Splits wall time into ``PARTS``, which sum to it: one of them runs at any time.

    compile: programs; data: waiting for batches; checkpoint: as long as it holds the loop up;
    start: opening, making or restoring the state; lost: steps, and what went with them, that are
    done again after a kill or a rollback. The time in which nobody trained is not counted.

    Args:
      last_seen: an earlier piece's ``seconds`` at its last sign of life.
      now: seconds.
    """

    def __init__(
        self, last_seen: Mapping[str, float] = {}, now: Callable[[], float] = time.perf_counter
    ):
        self._before = {part: last_seen.get(part, 0.0) for part in PARTS}
        self._seconds = dict(self._before)
        self._now, self._read = now, now()
        self._lock = threading.Lock()  # a heartbeat reads from its own thread
        self.part = OTHER  # that runs now
        self._worked = 0.0  # seconds of work before this piece

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Time within it is of ``part``, but for that of an ``on`` inside."""
        around = self.part
        self._go_to(part)
        try:
            yield
        finally:
            self._go_to(around)

    def _go_to(self, part: str) -> None:
        with self._lock:
            now = self._now()
            self._seconds[self.part] += now - self._read
            self._read, self.part = now, part

    def seconds(self) -> dict[str, float]:
        """Of each part, until now."""
        with self._lock:
            return self._seconds | {self.part: self._seconds[self.part] + self._now() - self._read}

    def work(self) -> float:
        """Seconds of this piece that brought the run on: its steps, and what goes with them."""
        return _sum(self.seconds(), (*WORK, CHECKPOINT)) - self._worked

    def go_on(self, saved: Mapping[str, float]) -> None:
        """From a checkpoint with the ``seconds`` as of it; empty where there was none."""
        if _sum(saved) > _sum(self._before):  # the sign of life was the older of the two
            with self._lock:
                for part in PARTS:
                    self._seconds[part] += saved.get(part, 0.0) - self._before[part]
        else:
            self._lose({part: self._before[part] - saved.get(part, 0.0) for part in WORK})
        self._worked = _sum(self.seconds(), (*WORK, CHECKPOINT))

    def count_as(self, part: str, other: str, seconds: float) -> None:
        """``seconds`` that were counted as the ``other`` part are ``part``'s."""
        with self._lock:
            self._seconds[other] -= seconds
            self._seconds[part] += seconds

    def roll_back(self, saved: Mapping[str, float]) -> None:
        """All work since ``saved``, the ``seconds`` as of a checkpoint, is lost; of none, all."""
        now = self.seconds()
        self._lose({part: now[part] - saved.get(part, 0.0) for part in WORK})
        # To before this piece, perhaps: what is done from there on brings the run on.
        self._worked = min(self._worked, _sum(self.seconds(), (*WORK, CHECKPOINT)))

    def _lose(self, seconds: Mapping[str, float]) -> None:
        for part, lost in seconds.items():
            self.count_as(LOST, part, lost)


def _sum(seconds: Mapping[str, float], parts: Sequence[str] = PARTS) -> float:
    return sum(seconds.get(part, 0.0) for part in parts)


def goodput(seconds: Mapping[str, float]) -> float | None:
    """The share of wall time that useful steps had; None of no time."""
    wall = _sum(seconds)
    return seconds[STEP] / wall if wall else None


def timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """A result, or a line of metrics, without what differs between two calls of the same run."""
    return {k: v for k, v in record.items() if not any(word in k for word in TIMED)}
