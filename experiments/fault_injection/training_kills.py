"""kill -9 of a training run at random times, some of them inside a checkpoint's write.

A trial is a run that is killed five times, started again each time, and then left to end. For a
kill inside a write a checkpoint's temporary folder is awaited, which must still be there when the
process is dead.
"""

import random
import subprocess
import time
from pathlib import Path

from experiments.fault_injection import training

FAULT = "`kill -9` of a training run at random times, at least 15 aimed inside a checkpoint write"
TIMES = 50
REQUIRED = "bit-identical end, 0 unreadable checkpoints"
COLUMNS = ("faults", "starting", "inside_writes", "most_lost_steps", "unreadable", "wrong")
MOMENTS = ("writing", "any", "writing", "any", "starting")


def told(rows: list[dict]) -> str:
    """What the table says besides."""
    inside = sum(int(row["inside_writes"]) for row in rows)
    lost = max(int(row["most_lost_steps"]) for row in rows)
    return f"{inside} inside a write; at most {lost} steps lost, at an interval of {training.EVERY}"


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """One run, killed five times."""
    draw, calm = random.Random(f"training kills {number}"), training.undisturbed(folder)
    counts = dict.fromkeys(("faults", "starting", "inside_writes", "unreadable"), 0)
    most_lost, wrong = 0, []
    for moment in draw.sample(MOMENTS, len(MOMENTS)):
        process = training.start(training.command(folder), folder)
        if not _await(moment, draw, process, folder):
            break  # it was done before
        process.kill()
        process.wait()
        unfinished, steps = training.writing(folder), training.saved(folder)
        counts["faults"] += 1
        counts["starting"] += moment == "starting"
        counts["inside_writes"] += bool(unfinished)
        hashes = [training.state_hash(folder / "run", step) for step in steps]
        counts["unreadable"] += hashes.count(None)
        lost = training.logged(folder) - max(steps, default=0)
        most_lost = max(most_lost, lost)
        # Steps go on while a checkpoint is written; until it is, the one before is the newest. They
        # go on for an interval at most, since the next write waits for it. The write's folder does
        # not tell: it may not be there yet.
        if lost > 2 * training.EVERY:
            wrong.append(f"{lost} steps lost")
    code, told = training.finish(folder)
    if code:
        wrong.append(f"exit code {code}: {told[-200:]}")
    if counts["unreadable"]:
        wrong.append("unreadable checkpoints")
    wrong += training.differences(folder, calm)
    return {**counts, "most_lost_steps": most_lost, "wrong": "; ".join(wrong)}


def _await(moment: str, draw: random.Random, process: subprocess.Popen, folder: Path) -> bool:
    """False where the process ended before."""
    if moment == "starting":
        time.sleep(draw.uniform(0, 5))
    elif not training.resumed(process, folder):
        return False
    elif moment == "any":
        # By steps, and a moment more: seconds alone would tell the machine's load.
        target = training.logged(folder) + draw.randrange(2 * training.EVERY)
        training.wait_until(process, lambda: training.logged(folder) >= target)
        time.sleep(draw.uniform(0, 0.05))
    else:
        whole = len(training.saved(folder)) and draw.randrange(2)
        for _ in range(whole):  # checkpoints that are left to be written
            newest = max(training.saved(folder))
            training.wait_until(process, lambda: max(training.saved(folder)) > newest)  # noqa: B023
        training.wait_until(process, lambda: bool(training.writing(folder)))
        time.sleep(draw.uniform(0, 0.03))
    return process.poll() is None
