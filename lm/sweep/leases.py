"""Who trains which run: leases that are told by their names, so that nothing is ever locked.

The N-th attempt at a run is ``leases/RUN_ID.N.json``. It is created exclusively, and only after
attempt N - 1 has ended, has not been renewed in time, or has lost its process: so of all workers
one gets the run. Only its holder writes it again. Files are neither renamed, removed nor appended
to, and what an object store cannot do is not asked for.

A holder that was cut off may train on while another takes its run over. Where both see the run's
folder, the second waits there for the first one's end (the lock of ``lm.checkpoint``); elsewhere
time is wasted and nothing else: the same config gives the same result.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm.sweep.files import Folder

SCHEMA = 1
SECONDS = 60.0  # a lease that is not renewed lasts; clocks of hosts may differ by half of it
DEATHS = 3  # of its workers, that set a run aside


@dataclass(frozen=True)
class Attempt:
    """A lease, and how it ended."""

    owner: str
    process: str  # the holder's, as ``_identity`` tells it
    nonce: str
    expires: float  # Unix time
    end: str | None = None  # done | failed | died (its worker) | interrupted | forgiven
    reason: str = ""
    log_tail: tuple[str, ...] = ()
    progress: dict[str, Any] = field(default_factory=dict)  # as of the last renewal


class Leases:
    """The leases of a study's runs, as one worker or launcher sees them.

    Args:
      files: where the study is kept.
      owner: a name that outlives the process where an engine starts it again elsewhere; what an
        earlier process of this name still held is free.
    """

    def __init__(self, files: Folder, owner: str = ""):
        self._files = files
        self._nonce = uuid.uuid4().hex  # of this process
        # Containers may share a host's name and their processes a number: no name is two's.
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}:{self._nonce[:6]}"
        self._attempts: dict[str, list[Attempt]] = {}
        self._held: dict[str, tuple[int, Attempt]] = {}  # run_id -> (N, it)
        self._writing = threading.Lock()  # a renewal must not undo an end

    def look(self, done: Container[str] = ()) -> None:
        """Reads what is new of the runs that are not ``done``."""
        counts: dict[str, int] = {}
        for name in self._files.names("leases"):
            run_id, _, n = name.removeprefix("leases/").removesuffix(".json").rpartition(".")
            if n.isdigit() and run_id not in done:
                counts[run_id] = max(int(n), counts.get(run_id, 0))
        for run_id, count in counts.items():
            self._read(run_id, count)

    def state(self, run_id: str) -> str:
        """One of "waiting", "running", "failed" and "set aside", as of the last look.

        "running" is also a run that has just ended well, as its result may not be seen yet.
        """
        attempts = self._attempts.get(run_id)
        if not attempts:
            return "waiting"
        if run_id in self._held or self._live(attempts[-1]):
            return "running"
        if self.deaths(run_id) >= DEATHS:
            return "set aside"
        return "failed" if attempts[-1].end == "failed" else "waiting"

    def deaths(self, run_id: str) -> int:
        """How many workers a run has killed since it was last forgiven for being set aside."""
        deaths = 0
        for attempt in self._attempts.get(run_id, ()):
            if attempt.end == "forgiven" and deaths >= DEATHS:  # and not for having failed
                deaths = 0
            deaths += attempt.end == "died"
        return deaths

    def last(self, run_id: str) -> Attempt:
        """The newest attempt at a run that has one."""
        return self._attempts[run_id][-1]

    def claim(self, run_id: str) -> bool:
        """Takes a run that waits; False where it does not, or another was faster."""
        self._read(run_id, len(self._attempts.get(run_id, ())))
        while self.state(run_id) == "waiting":
            process, expires = _identity(os.getpid()), time.time() + SECONDS
            attempt = Attempt(self._owner, process, self._nonce, expires)
            if self._add(run_id, attempt):
                self._held[run_id] = len(self._attempts[run_id]), attempt
                return True
            self._read(run_id, len(self._attempts[run_id]) + 1)
        return False

    def note(self, run_id: str, progress: dict[str, Any]) -> None:
        """Tells, with the next renewal, how far a held run has come."""
        n, attempt = self._held[run_id]
        self._held[run_id] = n, dataclasses.replace(attempt, progress=progress)

    def end(self, run_id: str, how: str, reason: str = "", log_tail: tuple[str, ...] = ()) -> None:
        """Gives a held run back, telling how its attempt ended."""
        with self._writing:
            n, attempt = self._held.pop(run_id)
            ended = dataclasses.replace(attempt, end=how, reason=reason, log_tail=log_tail)
            self._attempts[run_id][n - 1] = ended
            self._write(run_id, n, ended)

    def forgive(self, run_id: str) -> None:
        """Lets a run that failed or was set aside be tried again."""
        self._add(run_id, Attempt(self._owner, "", self._nonce, 0.0, end="forgiven"))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renews what is held while the context lasts; what is held at its end was interrupted."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(SECONDS / 4):
                with self._writing, contextlib.suppress(OSError):  # the next time, then
                    for run_id, (n, attempt) in list(self._held.items()):  # claims go on
                        self._write(run_id, n, attempt)

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with contextlib.suppress(OSError):  # it expires, then
                for run_id in list(self._held):
                    self.end(run_id, "interrupted")

    def _live(self, attempt: Attempt) -> bool:
        if attempt.end not in (None, "done") or attempt.expires < time.time():
            return False
        if attempt.end == "done" or attempt.nonce == self._nonce:
            return True
        return attempt.owner != self._owner and not _gone(attempt.process)

    def _read(self, run_id: str, count: int) -> None:
        """Reads attempts up to ``count``: those that are new, and the last where it had no end."""
        known = self._attempts.setdefault(run_id, [])
        if known and known[-1].end is None and run_id not in self._held:
            known[-1] = self._parse(run_id, len(known)) or known[-1]
        for n in range(len(known) + 1, count + 1):
            # One that is made and not yet written counts as a lease that begins now.
            begun = Attempt("", "", "", time.time() + SECONDS)
            known.append(self._parse(run_id, n) or begun)

    def _parse(self, run_id: str, n: int) -> Attempt | None:
        try:
            fields = json.loads(self._files.read(_name(run_id, n)) or "")
        except json.JSONDecodeError:
            return None
        del fields["schema"]
        return Attempt(**{**fields, "log_tail": tuple(fields["log_tail"])})

    def _add(self, run_id: str, attempt: Attempt) -> bool:
        attempts = self._attempts.setdefault(run_id, [])
        if not self._files.create(_name(run_id, len(attempts) + 1), _text(attempt)):
            return False
        attempts.append(attempt)
        return True

    def _write(self, run_id: str, n: int, attempt: Attempt) -> None:
        renewed = dataclasses.replace(attempt, expires=time.time() + SECONDS)
        self._files.write(_name(run_id, n), _text(renewed))


def _name(run_id: str, n: int) -> str:
    return f"leases/{run_id}.{n}.json"


def _text(attempt: Attempt) -> str:
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(attempt)})


def _identity(pid: int) -> str:
    """As "boot namespace pid start", which no other process ever has; "" where there is no /proc.

    By it a lease whose holder was killed on this machine is free at once.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if stat[0] in "ZX":  # killed, and not yet waited for by its parent
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {stat[19]}"
    except OSError:
        return ""


def _gone(process: str) -> bool:
    """True where it was a process of this machine that is there no longer."""
    here = _identity(os.getpid()).split()
    if not process or process.split()[:2] != here[:2]:
        return False
    return _identity(int(process.split()[2])) != process
