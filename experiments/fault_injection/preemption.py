"""SIGTERM to a training run at random times: it saves, and exits with the code for a retry."""

import random
import signal
import time
from pathlib import Path

from experiments.fault_injection import training
from lm.command import PREEMPTED

FAULT = "SIGTERM"
TIMES = 20
REQUIRED = "saved, exit code for retry, bit-identical end"
COLUMNS = ("faults", "most_seconds_to_exit", "most_lost_steps", "wrong")
SIGNALS = 4


def told(rows: list[dict]) -> str:
    """What the table says besides."""
    return f"out after {max(float(row['most_seconds_to_exit']) for row in rows)} s at most"


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """One run, sent four signals."""
    draw, calm = random.Random(f"preemption {number}"), training.undisturbed(folder)
    sent, slowest, most_lost, wrong = 0, 0.0, 0, []
    for _ in range(SIGNALS):
        process = training.start(training.command(folder), folder)
        if not training.resumed(process, folder):
            break
        target = training.logged(folder) + draw.randrange(2 * training.EVERY)
        training.wait_until(process, lambda: training.logged(folder) >= target)  # noqa: B023
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = process.wait()
        if code == 0:
            break  # it was done before
        sent += 1
        slowest = max(slowest, time.monotonic() - began)
        if code != PREEMPTED:
            wrong.append(f"exit code {code}")
        lost = training.logged(folder) - max(training.saved(folder), default=0)
        most_lost = max(most_lost, lost)
    code, told = training.finish(folder)
    if code:
        wrong.append(f"exit code {code} at the end: {told[-200:]}")
    if most_lost:
        wrong.append(f"{most_lost} steps not saved")
    return {
        "faults": sent,
        "most_seconds_to_exit": round(slowest, 1),
        "most_lost_steps": most_lost,
        "wrong": "; ".join(wrong + training.differences(folder, calm)),
    }
