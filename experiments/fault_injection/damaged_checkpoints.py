"""A file of a run's newest checkpoint is truncated, removed, or has one bit flipped."""

import random
import shutil
from pathlib import Path

from experiments.fault_injection import training

FAULT = "a checkpoint file truncated, removed, one bit flipped"
TIMES = 30
REQUIRED = "detected, previous used"
COLUMNS = ("faults", "damage", "file", "bytes", "says", "wrong")
DAMAGES = ("truncated", "removed", "flipped")


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """A run that was killed half-way is gone on with after one file was damaged."""
    draw, calm = random.Random(f"damaged checkpoints {number}"), training.undisturbed(folder)
    shutil.copytree(half_way(folder) / "run", folder / "run")
    previous, newest = training.saved(folder)[-2:]
    step = folder / "run/checkpoints" / str(newest)
    file = draw.choice(sorted(path for path in step.rglob("*") if path.is_file()))
    size, damage = file.stat().st_size, DAMAGES[number % len(DAMAGES)]
    if damage == "removed" or not size:
        file.unlink()
    elif damage == "truncated":
        with file.open("r+b") as opened:
            opened.truncate(draw.randrange(size))
    else:
        content = bytearray(file.read_bytes())
        content[draw.randrange(size)] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    wrong = []
    if (used := training.newest_whole(folder / "run")) != previous:
        wrong.append(f"checkpoint {used} used, not {previous}")
    code, told = training.finish(folder)
    says = [line for line in told.splitlines() if "passed over" in line]
    if code:
        wrong.append(f"exit code {code}: {told[-200:]}")
    if len(says) != 1 or f"/{newest}: " not in says[0]:
        wrong.append(f"says {says}")
    return {
        "faults": 1,
        "damage": damage,
        "file": str(file.relative_to(step)),
        "bytes": size,
        "says": says[0].partition("/checkpoints/")[2] if says else "",
        "wrong": "; ".join(wrong + training.differences(folder, calm)),
    }


def half_way(folder: Path) -> Path:
    """The folder of a run that was killed half-way, made once for all trials."""
    half = folder.parent / "half_way"
    if not half.is_dir():
        making = folder.parent / "half_way.new"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        process = training.start(training.command(making), making)
        wanted = training.STEPS // 2
        assert training.wait_until(process, lambda: max(training.saved(making), default=0) > wanted)
        process.kill()
        process.wait()
        making.rename(half)
    return half
