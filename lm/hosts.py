"""Many processes, one run: how they find each other, agree and end together.

Who they are stands in the environment: LM_COORDINATOR=HOST:PORT (a free port of process 0's host),
LM_PROCESSES and LM_PROCESS, or what SLURM's srun or a TPU pod sets. A process alone pays nothing:
all of this then does what it would without the others.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

from lm import command, watch
from lm.command import BadInput

VARIABLES = ("LM_COORDINATOR", "LM_PROCESSES", "LM_PROCESS")
HEARTBEAT_SECONDS = 50  # jax's own, which names nobody: behind the watch's
# How a launcher stops a run. An engine may have sent SIGTERM to all processes, and a second one
# would not let the run save.
STOP = signal.SIGUSR1
FAILING_SECONDS = 15.0  # that processes may fail apart and still have failed together
# By the names that they are told by.
REFUSALS = {kind.__name__: kind for kind in (BadInput, *BadInput.__subclasses__())}


class Cluster(NamedTuple):
    """This process among ``n``; process 0's watch listens on ``host``:``port``."""

    index: int
    n: int
    host: str
    port: int
    local_devices: list[int] | None = None  # None: all that are here


def cluster(environment: Mapping[str, str]) -> Cluster | None:
    """What the environment says, or None where this process is alone.

    Raises ``BadInput`` where a part of it is missing or wrong.
    """
    given = {name: environment[name] for name in VARIABLES if name in environment}
    if given:
        found = _explicit(given)
    elif _slurm_step(environment) or _on_tpu(environment):
        found = _detected(environment)
    else:
        return None
    return found if found.n > 1 else None


def _explicit(given: dict[str, str]) -> Cluster:
    if missing := [name for name in VARIABLES if name not in given]:
        raise BadInput(f"{', '.join(given)} without {', '.join(missing)}: set all three or none")
    address, n, index = (given[name] for name in VARIABLES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise BadInput(f"LM_COORDINATOR = {address!r}: must be HOST:PORT, as node0:8476")
    if not n.isdecimal() or int(n) < 1:
        raise BadInput(f"LM_PROCESSES = {n!r}: must be a whole number, 1 or more")
    if not index.isdecimal() or int(index) >= int(n):
        raise BadInput(f"LM_PROCESS = {index!r}: must be one of 0 to {int(n) - 1}")
    return Cluster(int(index), int(n), host.strip("[]"), int(port))


def _slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this, as one of several tasks."""
    return "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1


def _on_tpu(environment: Mapping[str, str]) -> bool:
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu") or not find_spec("libtpu"):
        return False  # without the second that importing jax takes
    from jax._src import cloud_tpu_init  # no public name says so

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _detected(environment: Mapping[str, str]) -> Cluster:
    """What jax finds of a SLURM step or TPU pod; ``jax.distributed`` tells nobody the address."""
    from jax._src.clusters import ClusterEnv

    address, n, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        *(None, None, None, None, None, int(watch.JOINING_SECONDS))
    )
    if environment.get("SLURM_NTASKS") == environment.get("SLURM_STEP_NUM_NODES"):
        devices = None  # one task a node: jax would give it one device
    host, _, port = address.rpartition(":")
    return Cluster(index, n, host, int(port), devices)


class _Link:
    """This process's end of the line to its watch."""

    def __init__(self, found: Cluster):
        self.index, self.n = found.index, found.n
        self.name = f"process {found.index} ({socket.gethostname()})"
        self.words: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.at_end: Callable[[int, str], None] = lambda code, reason: None
        arguments = (found.index, found.n, found.host, found.port)
        self._left = False
        self._watch = subprocess.Popen(
            [sys.executable, "-I", watch.__file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to act on
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.words.get()  # "ready"

    def _listen(self) -> None:
        for line in self._watch.stdout:
            word = json.loads(line)
            if "end" in word:
                with contextlib.suppress(Exception):
                    self.at_end(word["end"], word["reason"])
                os._exit(word["end"])
            self.words.put(word)
        if not self._left:
            print(f"error: the watch of {self.name} died", file=sys.stderr, flush=True)
            os._exit(command.FAILED)

    def say(self, word: dict) -> None:
        """To the watch."""
        self._watch.stdin.write(json.dumps(word) + "\n")
        self._watch.stdin.flush()

    def leave(self) -> None:
        """Says that this process has done its part."""
        self._left = True
        self.say({"left": True})
        self._watch.wait()


_link: _Link | None = None  # as jax's own state: one a process


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it this process is one of those that the environment tells of; SIGTERM interrupts it.

    To be entered before jax computes anything. When a process fails, is killed or loses its host,
    all others exit within a minute, saying which it was; then this does not return.

    Raises ``BadInput`` where the environment is wrong.
    """
    global _link
    found = cluster(os.environ)
    if found is None:
        with _interrupted_by_sigterm():
            yield
        return
    _link = _Link(found)
    with ending_all():
        import jax

        # A pre-empted process ends as an interrupted one; jax would keep the signal to itself.
        jax.config.update("jax_enable_preemption_service", False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        jax.distributed.initialize(
            f"{found.host}:{agree(_free_port)}",
            found.n,
            found.index,
            local_device_ids=found.local_devices,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        yield
        jax.distributed.shutdown()  # waits for all
    _link.leave()
    _link = None


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """A pre-empted process ends as one that Ctrl-C interrupted."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def preemptible() -> Iterator[Callable[[], bool]]:
    """Within it the first SIGTERM or SIGINT is only noted; a second ends all processes at once.

    ``STOP`` is only noted, always. Yields what tells whether any process was signalled: all call
    it, in one order.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: any_of(False)
        return
    noted, ends = threading.Event(), (signal.SIGTERM, signal.SIGINT)
    hears, wakes = socket.socketpair()
    wakes.setblocking(False)

    def listen() -> None:
        # Handlers wait for the main thread, which may wait for a device or a compiler.
        signalled = False
        while number := hears.recv(1):
            if number[0] in ends and signalled:
                _end_all(KeyboardInterrupt()) if _link else os._exit(command.PREEMPTED)
            signalled = signalled or number[0] in ends
            if number[0] in (*ends, STOP):
                noted.set()
        hears.close()

    threading.Thread(target=listen, daemon=True).start()
    handlers = [(number, signal.signal(number, lambda *_: None)) for number in (*ends, STOP)]
    woken = signal.set_wakeup_fd(wakes.fileno())
    try:
        yield lambda: any_of(noted.is_set())
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers:
            signal.signal(number, handler)
        wakes.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all: process 0."""
    return _link is None or _link.index == 0


def agree(decide: Callable[[], Any]) -> Any:
    """What ``decide`` returns (or raises as ``BadInput``) in process 0, in every process.

    All call it, in one order, and wait for all; the value must be one that JSON holds.
    """
    return _agree(lambda said: decide(), None)


def any_of(flag: bool) -> bool:
    """Whether any process gives True. All call it, in one order, and wait for all."""
    return _agree(any, flag)


def _agree(decide: Callable[[list], Any], says: Any, seconds: float | None = None) -> Any:
    """``agree`` on what process 0 makes of what each process ``says``.

    Raises ``queue.Empty`` where the others don't come within ``seconds``. Processes that say
    ``_HAVE_FAILED`` agree only with one another. Where just some do, nobody is answered: those that
    failed have False in process 0, and elsewhere wait until ``seconds`` are over, and then end all.
    """
    if _link is None:
        return decide([says])
    if _link.index:
        _link.say({"here": _link.index, "says": says})
        word = _link.words.get(timeout=seconds)["agreed"]
    else:
        said = [says, *(_link.words.get(timeout=seconds)["says"] for _ in range(1, _link.n))]
        if _HAVE_FAILED in said and set(said) != {_HAVE_FAILED}:
            if says == _HAVE_FAILED:
                return False  # and nobody is answered: others have asked for something else
            threading.Event().wait()  # for the end that the others make of it
        with ending_all():
            try:
                word = {"value": decide(said)}
            except BadInput as error:
                word = {"refused": [type(error).__name__, str(error)]}
            _link.say({"agreed": word})
    if "refused" in word:
        kind, reason = word["refused"]
        raise REFUSALS[kind](reason)
    return word["value"]


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Turns an error in it into the end of all processes, at once: the others would wait for ever.

    A process alone raises the error.
    """
    try:
        yield
    except BaseException as error:
        if _link is None:
            raise
        _end_all(error)


_HAVE_FAILED = "have failed"


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raises an error in it where all processes have one; else it is the end of all processes.

    So what fails alike everywhere, as a model that finds no memory, can be gone on from.
    """
    failed = None
    with ending_all():
        try:
            yield
        except Exception as error:
            if not _all_fail():
                raise
            failed = error
    if failed:
        raise failed


def _all_fail() -> bool:
    try:
        return _agree(lambda said: True, _HAVE_FAILED, FAILING_SECONDS)
    except queue.Empty:
        return False


def at_end(tell: Callable[[int, str], None]) -> None:
    """Calls ``tell`` with the exit code and the reason before all processes end together."""
    if _link:
        _link.at_end = tell


def _end_all(error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        code, reason = command.PREEMPTED, "interrupted; the same command goes on"
        print(reason, flush=True)
    elif isinstance(error, BadInput):
        code, reason = command.BAD_INPUT, str(error)
        print(f"error: {reason}", file=sys.stderr, flush=True)
    elif reason := command.disk_trouble(error):
        code = command.FAILED
        print(f"error: {reason}", file=sys.stderr, flush=True)
    else:
        code, reason = command.FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        traceback.print_exception(error)
        # Where another's death broke this process, the watch says so and ends it meanwhile.
        time.sleep(2 * watch.GRACE_SECONDS)
    _link.say({"failed": [code, f"{_link.name}: {reason}"]})
    while True:
        time.sleep(1)  # the watch ends this process
