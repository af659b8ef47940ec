"""NaN in a batch or in the gradient: of one step, of a few, of as many as make the run go back."""

import json
import math
import random
from collections import Counter
from pathlib import Path

from experiments.fault_injection import training
from lm.config import TrainConfig
from lm.train.events import read_events
from lm.train.metrics import read_metrics

FAULT = "NaN injected into a batch, a gradient"
TIMES = 10
REQUIRED = "skipped or rolled back, recorded"
COLUMNS = ("faults", "kind", "steps", "events", "status", "loss", "last_good_loss", "wrong")
K, R = TrainConfig.skips_before_rollback, TrainConfig.rollbacks
# What is not a number, in how many steps, and whether it is so again after a rollback; the events
# that must be recorded, and how the run must end.
KINDS = (
    ("batch", 1, "always", {"skipped": 1}, "done"),
    ("gradient", 1, "always", {"skipped": 1}, "done"),
    ("batch", K, "once", {"skipped": K, "rollback": 1}, "done"),
    (
        *("gradient", training.STEPS, "always"),
        {"skipped": K * (R + 1), "rollback": R, "diverged": 1},
        "diverged",
    ),
    ("batch", K - 1, "always", {"skipped": K - 1}, "done"),
)


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """One run with NaN in some steps."""
    draw = random.Random(f"not finite {number}")
    kind, n, how_often, recorded, status = KINDS[number % len(KINDS)]
    # After the first evaluation, and before the end.
    first = draw.randrange(training.EVALUATE_EVERY + 2, training.STEPS - 2 * K)
    last = min(first + n - 1, training.STEPS)
    command = training.command(folder)
    module = command.index("lm.train")
    poison = ["experiments.fault_injection.poisoned", kind, str(first), str(last), how_often]
    command[module : module + 1] = poison
    code = training.start(command, folder).wait()
    events, lines = read_events(folder / "run"), read_metrics(folder / "run")
    result = json.loads((folder / "run/result.json").read_text()) if code == 0 else {}
    skipped = [event for event in events if event["event"] == "skipped"]
    found = Counter(event["event"] for event in events)
    loss, good = result.get("loss"), result.get("last_good_loss")
    wrong = [
        *([f"exit code {code}: {training.printed(folder)[-200:]}"] if code else []),
        *([f"ends {result.get('status')}"] if result.get("status") != status else []),
        *([f"events {dict(found)}"] if found != recorded else []),
        *(["the first is of another step"] if not skipped or skipped[0]["step"] != first else []),
    ]
    if kind == "batch" and any([d["row"] for d in e["documents"]] != [0] for e in skipped):
        wrong.append("other documents are blamed")
    if status == "done":
        if loss is None or not math.isfinite(loss) or lines[-1]["step"] != training.STEPS:
            wrong.append("no finite loss at the end")
    elif loss is not None or good is None or not math.isfinite(good):
        wrong.append("the last good evaluation is not kept")
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        wrong.append("steps of the log are missing or twice")
    return {
        "faults": 1,
        "kind": kind,
        "steps": f"{first}-{last}" + (" once" if how_often == "once" else ""),
        "events": " ".join(f"{name}:{times}" for name, times in found.items()),
        "status": result.get("status"),
        "loss": loss,
        "last_good_loss": good,
        "wrong": "; ".join(wrong),
    }
