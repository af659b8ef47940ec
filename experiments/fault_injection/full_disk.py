"""A disk, a small tmpfs, that is full: of checkpoints, metrics, the token store or a study.

What is to fill up lies on the disk, beside a filler that leaves a drawn room; the rest lies
elsewhere. The command must stop with one line; with the filler gone, it goes on.
"""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from experiments.fault_injection import study, training
from lm.command import FAILED

FAULT = "disk full (a small tmpfs) in checkpoint, metrics, token store, run store"
TIMES = 12
REQUIRED = "clean stop, last good state intact, resumes after space is made"
COLUMNS = ("faults", "place", "free_kib", "step", "says", "wrong")
# Room that is left, in KiB: less than what is written there needs, and often enough to begin.
PLACES = {
    "checkpoint": (100, 1_200),
    "metrics": (24, 64),
    "token store": (4, 60),
    "run store": (40, 400),
}
SIZE_KIB = 16 * 1024


def cannot_run() -> str:
    """Why not here, or an empty string."""
    if os.geteuid():
        return "mounting a tmpfs needs root"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True)
    return "mounting a tmpfs is not allowed here" if tried.returncode else ""


def trial(number: int, folder: Path) -> dict:
    """One full disk."""
    place = list(PLACES)[number % len(PLACES)]
    room = random.Random(f"full disk {number}").randrange(*PLACES[place])
    of_study = place == "run store"
    calm = study.undisturbed(folder) if of_study else training.undisturbed(folder)
    with disk(folder / "disk"):
        command = prepared(place, folder)
        filler = folder / "disk/filler"
        filler.write_bytes(bytes((SIZE_KIB - room) << 10))
        full = run(command, folder)
        wrong, step = [], 0
        if full.returncode != FAILED:
            wrong.append(f"exit code {full.returncode}")
        # A sweep tells it of its runs, among what it prints, or as the reason why it ends.
        lines = (full.stdout * of_study + full.stderr).splitlines()
        says = [line for line in lines if "no space left" in line.lower()]
        if not says or "Traceback" in full.stderr or not of_study and len(lines) > 1:
            wrong.append(f"says {lines}")
        if not of_study:
            step = training.logged(folder)
            saved = training.saved(folder)
            if None in [training.state_hash(folder / "run", at) for at in saved]:
                wrong.append("unreadable checkpoints")
        half = list((folder / "disk").glob("**/stores/*/train.bin"))
        if place == "token store" and half:
            wrong.append("half a token store is left")
        filler.unlink()
        again = run(command, folder)
        if again.returncode:
            wrong.append(f"exit code {again.returncode} with space: {again.stderr[-200:]}")
        if of_study:
            found = study.tables(folder / "study")
            wrong += [f"{name} differs" for name in calm if found[name] != calm[name]]
        else:
            wrong += training.differences(folder, calm)
    return {
        "faults": 1,
        "place": place,
        "free_kib": room,
        "step": step,
        "says": says[0].partition(str(folder))[0].strip(": ") if says else "",
        "wrong": "; ".join(wrong),
    }


def prepared(place: str, folder: Path) -> list[str]:
    """Lays what is to fill up onto the disk. Returns the command."""
    if place == "run store":
        (folder / "disk/study").mkdir()
        (folder / "study").symlink_to(folder / "disk/study")
        return study.command(folder, "--backend=processes", "--workers=1")
    where = {"checkpoint": "run/checkpoints", "metrics": "run", "token store": "store"}[place]
    (folder / where).parent.mkdir(exist_ok=True)
    (folder / "disk/full").mkdir()
    (folder / where).symlink_to(folder / "disk/full")
    if place == "metrics":
        (folder / "checkpoints").mkdir()
        (folder / "run/checkpoints").symlink_to(folder / "checkpoints")
    more = [f"--config.data.data_dir={folder / 'store'}"] if place == "token store" else []
    return training.command(folder, *more)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """To its end."""
    environment = study.environment(folder)
    return subprocess.run(command, env=environment, cwd=study.ROOT, capture_output=True, text=True)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """An empty tmpfs at ``folder``."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE_KIB}k", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
