"""kill -9 of one of two processes that train one run together, as two hosts do."""

import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from experiments.fault_injection import training

FAULT = "one of two hosts killed"
TIMES = 5
REQUIRED = "other exits < 60 s, resumes to the same result"
COLUMNS = ("faults", "victim", "step", "other_exits_after_seconds", "other_says", "wrong")


def told(rows: list[dict]) -> str:
    """What the table says besides."""
    return f"out after {max(float(row['other_exits_after_seconds']) for row in rows)} s at most"


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """One run of two processes, one of them killed; then the same commands again."""
    draw, calm = random.Random(f"host kills {number}"), undisturbed(folder)
    pair, victim = start(folder), number % 2
    training.resumed(pair[0], folder)
    target = draw.randrange(training.EVERY, training.STEPS - training.EVERY)
    training.wait_until(pair[0], lambda: training.logged(folder) >= target)
    time.sleep(draw.uniform(0, 0.3))
    pair[victim].kill()
    killed, step = time.monotonic(), training.logged(folder)
    try:
        code = pair[1 - victim].wait(timeout=120)
    except subprocess.TimeoutExpired:
        pair[1 - victim].kill()
        code = pair[1 - victim].wait()
    seconds = round(time.monotonic() - killed, 1)
    pair[victim].wait()
    named = f"error: process {victim} ({socket.gethostname()}) died"
    says = [line for line in training.printed(folder).splitlines() if line.startswith("error: ")]
    codes = [process.wait() for process in start(folder)]
    wrong = [
        *([f"the other exits {code}"] if code in (0, -signal.SIGKILL) else []),
        *([f"after {seconds} s"] if seconds > 60 else []),
        *([f"says {says}"] if not any(line.startswith(named) for line in says) else []),
        *([f"exit codes {codes} at the end"] if codes != [0, 0] else []),
        *training.differences(folder, calm),
    ]
    return {
        "faults": 1,
        "victim": victim,
        "step": step,
        "other_exits_after_seconds": seconds,
        "other_says": says[0].replace(socket.gethostname(), "HOST") if says else "",
        "wrong": "; ".join(wrong),
    }


def start(folder: Path) -> list[subprocess.Popen]:
    """Both processes, of one device each."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    shared = {"LM_COORDINATOR": address, "LM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    command = training.command(folder)
    return [training.start(command, folder, **shared, LM_PROCESS=str(i)) for i in range(2)]


def undisturbed(folder: Path) -> Path:
    """The folder of the pair's run that nobody broke, made once for all trials."""
    calm = folder.parent / "undisturbed"
    if not (calm / "run/result.json").exists():
        shutil.rmtree(calm, ignore_errors=True)
        calm.mkdir()
        codes = [process.wait() for process in start(calm)]
        assert codes == [0, 0], training.printed(calm)
    return calm
