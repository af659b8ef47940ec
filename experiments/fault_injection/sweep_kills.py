"""kill -9 of launchers and workers of one study, at random times.

Two launchers with a worker each share the study. A trial kills five times, whichever process it
meets; launchers are started again at once. Workers that it kills by themselves are two at most, as
a third death would rightly set the run aside.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

from experiments.fault_injection import study

FAULT = "`kill -9` of sweep launchers and workers at random times"
TIMES = 50
REQUIRED = "every run once, `runs.csv` equal to the undisturbed sweep's but for times"
COLUMNS = ("faults", "launchers", "workers", "runs", "attempts", "wrong")
KILLS, KILLS_OF_WORKERS = 5, 2


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return "" if Path("/proc/self/task").is_dir() else "needs /proc"


def trial(number: int, folder: Path) -> dict:
    """One study, killed five times."""
    draw, wanted = random.Random(f"sweep kills {number}"), study.undisturbed(folder)
    command = study.command(folder, "--backend=processes", "--workers=1")
    (folder / "study").mkdir()
    log = (folder / "launchers.log").open("w")

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            command, env=study.environment(folder), cwd=study.ROOT, stdout=log, stderr=log
        )

    watch = study.Watch(folder)
    watch.start()
    launchers, killed = [start(), start()], {"launchers": 0, "workers": 0}

    def under_way() -> list[int]:
        return [i for i in (0, 1) if launchers[i].poll() is None]

    def events() -> int:
        return study.attempts(folder) + study.results(folder)

    for _ in range(KILLS):
        # By what has happened, and a moment more: seconds alone would tell the machine's load.
        target = events() + draw.randint(0, 4)
        while events() < target and under_way():
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 3.0))
        a_worker = draw.random() < 0.5 and killed["workers"] < KILLS_OF_WORKERS
        if not (alive := under_way()):
            break
        i = draw.choice(alive)
        if a_worker and (workers := children(launchers[i].pid)):
            os.kill(workers[0], signal.SIGKILL)
            killed["workers"] += 1
        else:
            launchers[i].kill()
            launchers[i].wait()
            killed["launchers"] += 1
            launchers[i] = start()
    codes = [launcher.wait() for launcher in launchers]
    log.close()
    wrong = watch.end(wanted)
    if codes != [0, 0]:
        wrong.append(f"exit codes {codes}")
    return {
        "faults": sum(killed.values()),
        **killed,
        "runs": study.results(folder),
        "attempts": study.attempts(folder),
        "wrong": "; ".join(wrong),
    }


def children(pid: int) -> list[int]:
    """The processes that ``pid`` started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found
