"""The small study that is broken: its corpus, its launchers, and what it gives undisturbed."""

import csv
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

from lm.train.clock import timeless

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).parent / "config.py"
WORDS = "the of and to in a that is was he for it with as his on be at by i had not are but".split()


def command(folder: Path, *more: str) -> list[str]:
    """The command of the study in ``folder``."""
    data = prepared(folder)
    return [
        *(sys.executable, "-m", "lm.sweep", f"--config={CONFIG}", f"--workdir={folder / 'study'}"),
        *(f"--config.data.files={data / '*.txt'}", f"--config.data.data_dir={data / 'store'}"),
        *more,
    ]


def environment(folder: Path) -> dict[str, str]:
    """Of its processes. Compiled programs are kept beside the trials of a fault."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled")}
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **kept}


def prepared(folder: Path) -> Path:
    """The corpus of a fault's trials, beside them."""
    data = folder.parent / "data"
    if not data.is_dir():
        making, draw = data.with_suffix(".new"), random.Random(0)
        making.mkdir(parents=True, exist_ok=True)
        for i in range(60):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(100, 400)))
            (making / f"{i:02}.txt").write_text(text)
        making.rename(data)
    return data


def undisturbed(folder: Path) -> dict[str, str]:
    """The tables of the study that nobody broke, trained once for all trials of a fault."""
    calm = folder.parent / "undisturbed"
    done = subprocess.run(
        command(calm, "--backend=processes", "--workers=1"),
        env=environment(calm),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tables(calm / "study")


def tables(study: Path) -> dict[str, str]:
    """``runs.csv`` without its times, and ``curves.csv``."""
    with (study / "runs.csv").open() as file:
        rows = [timeless(row) for row in csv.DictReader(file)]
    return {
        "runs.csv": json.dumps(rows, indent=1),
        "curves.csv": (study / "curves.csv").read_text(),
    }


def results(folder: Path) -> int:
    """How many runs are done."""
    return len(list((folder / "study").glob("runs/*/result.json")))


def attempts(folder: Path) -> int:
    """How many leases there have been."""
    return len(list((folder / "study").glob("leases/*.json")))


class Watch(threading.Thread):
    """Sees every version of every result, and whether a table was ever torn."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self._study, self._over = folder / "study", threading.Event()
        self._versions: dict[str, set] = {}
        self._torn: set[str] = set()

    def run(self) -> None:
        while not self._over.wait(0.05):
            for path in self._study.glob("runs/*/result.json"):
                stat = path.stat()
                version = stat.st_ino, stat.st_mtime_ns
                self._versions.setdefault(path.parent.name, set()).add(version)
            for path in self._study.glob("*.csv"):
                text = path.read_text()
                commas = [line.count(",") for line in text.splitlines()]
                if not text.endswith("\n") or min(commas) < commas[0]:
                    self._torn.add(path.name)

    def end(self, wanted: dict[str, str]) -> list[str]:
        """What is wrong with the study, which should have given the tables ``wanted``."""
        self._over.set()
        self.join()
        again = sorted(name for name, versions in self._versions.items() if len(versions) > 1)
        begun = {path.name for path in (self._study / "runs").iterdir()}
        lost = sorted(begun - set(self._versions))
        found = tables(self._study)
        return [
            *([f"done twice: {', '.join(again)}"] if again else []),
            *([f"lost: {', '.join(lost)}"] if lost else []),
            *([f"torn: {', '.join(sorted(self._torn))}"] if self._torn else []),
            *(f"{name} differs" for name in wanted if found[name] != wanted[name]),
        ]
