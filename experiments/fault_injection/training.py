"""The small run that is broken: its command, what it ends with, and whether it did so again."""

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments.fault_injection import study
from lm.checkpoint import Checkpoints, abstract_like, load_config
from lm.sharding import make_mesh
from lm.train.clock import timeless
from lm.train.metrics import read_metrics
from lm.train.step import Program

EVERY, EVALUATE_EVERY, STEPS = 25, 100, 250
SETTINGS = {
    "model.d_model": 32,
    "model.n_layers": 2,
    "model.d_ff": 88,
    "train.batch_tokens": 1_024,
    "train.tokens": 1_024 * STEPS,
    "train.checkpoint_every": EVERY,
    "train.evaluate_every": EVALUATE_EVERY,
    "train.log_every": 1,
}


def command(folder: Path, *more: str, **settings) -> list[str]:
    """The command of the run in ``folder``; ``settings`` as ``train__log_every=2``."""
    data = study.prepared(folder)
    given = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    return [
        *(sys.executable, "-m", "lm.train", f"--config={study.CONFIG}"),
        *(f"--workdir={folder / 'run'}", f"--config.data.files={data / '*.txt'}"),
        f"--config.data.data_dir={data / 'store'}",
        *(f"--config.{name}={value}" for name, value in given.items()),
        *more,
    ]


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    """Starts it; what it prints goes to the end of ``log.txt``."""
    with (folder / "log.txt").open("a") as log:
        environment = study.environment(folder) | variables
        return subprocess.Popen(command, env=environment, cwd=study.ROOT, stdout=log, stderr=log)


def resumed(process: subprocess.Popen, folder: Path) -> bool:
    """Waits until the process has opened its log anew; False where it ended before."""
    log = folder / "run/metrics.jsonl"
    before = log.stat().st_ino if log.exists() else None
    return wait_until(process, lambda: log.exists() and log.stat().st_ino != before)


def finish(folder: Path, *more: str, **settings) -> tuple[int, str]:
    """Runs the command to its end. Returns the exit code and what it printed."""
    before = len(printed(folder))
    code = start(command(folder, *more, **settings), folder).wait()
    return code, printed(folder)[before:]


def printed(folder: Path) -> str:
    """All that the run's processes have printed."""
    log = folder / "log.txt"
    return log.read_text() if log.exists() else ""


def undisturbed(folder: Path) -> Path:
    """The folder of the run that nobody broke, trained once for all trials of a fault."""
    calm = folder.parent / "undisturbed"
    if not (calm / "run/result.json").exists():
        shutil.rmtree(calm, ignore_errors=True)
        calm.mkdir(parents=True)
        code, told = finish(calm)
        assert code == 0, told
    return calm


def differences(folder: Path, calm: Path) -> list[str]:
    """In what the run's end is not bit by bit that of the undisturbed one."""
    wrong = []
    if not (folder / "run/result.json").exists():
        return ["no result"]
    found, wanted = (ending(at / "run") for at in (folder, calm))
    steps = [line["step"] for line in found["metrics"]]
    if steps != [line["step"] for line in wanted["metrics"]]:
        wrong.append("steps of the log are missing or twice")
    return wrong + [f"{name} differ" for name in wanted if found[name] != wanted[name]]


def ending(workdir: Path) -> dict:
    """The result and metrics but for times, and a hash of parameters and optimizer state."""
    return {
        "result": timeless(json.loads((workdir / "result.json").read_text())),
        "metrics": [timeless(line) for line in read_metrics(workdir)],
        "state": state_hash(workdir),
    }


def restored(workdir: Path, step: int | None = None):
    """The state in the checkpoint of ``step``, or in the newest whole one; None of none."""
    checkpoints = Checkpoints(workdir)
    try:
        found = checkpoints.restore(abstract(workdir), step)
    finally:
        checkpoints.close()
    return found and found[0]


def newest_whole(workdir: Path) -> int | None:
    """The step from which a resumed run goes on."""
    found = restored(workdir)
    return found and int(found.step)


def state_hash(workdir: Path, step: int | None = None) -> str | None:
    """Of every array in a checkpoint; None where it cannot be read."""
    if (found := restored(workdir, step)) is None:
        return None
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(found):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@functools.cache
def _abstract(text: str, workdir: Path):
    config = load_config(workdir)
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    return abstract_like(program.abstract_state, program.state_sharding)


def abstract(workdir: Path):
    """Shapes and dtypes of the run's state."""
    return _abstract((workdir / "config.json").read_text(), workdir)


def saved(folder: Path) -> list[int]:
    """The steps whose checkpoints are finished, ascending."""
    paths = (folder / "run/checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def writing(folder: Path) -> set[str]:
    """The checkpoints that are being written."""
    return {path.name for path in (folder / "run/checkpoints").glob("*.orbax-checkpoint-tmp*")}


def logged(folder: Path) -> int:
    """The last step in the log."""
    lines = read_metrics(folder / "run")
    return lines[-1]["step"] if lines else 0


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """Looks every few milliseconds until it happened; False where the process ended before."""
    while not happened():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True
