"""Breaks runs and sweeps on purpose, many times over, and counts what did not come out the same.

    python -m experiments.fault_injection.run [--only=FAULT] [--times=N] [--workdir=DIR] [--out=DIR]

Takes hours and may be stopped at any time: every trial is a row of ``results/FAULT.csv`` as soon as
it ended, and the same command goes on after the last one. Writes the table into README.md.

A fault is a file of this folder with ``FAULT`` (what it is), ``TIMES`` (how often), ``REQUIRED``
(what must hold), ``COLUMNS`` (of its rows), ``cannot_run()`` (why not here, or "") and
``trial(number, folder)``, which breaks something in the new ``folder`` and returns a dict of
``COLUMNS``: ``faults``, how many it did; ``wrong``, what then was not as required ("" for nothing);
and its measures. ``number`` seeds its choices. It may have ``told(rows)``, a phrase for the table.
"""

import csv
import importlib
import io
import json
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

from absl import flags

from lm import command
from lm.command import FAILED, one_of, write_atomically

HERE = Path(__file__).resolve().parent
FAULTS = (
    *("training_kills", "sweep_kills", "preemption", "damaged_checkpoints", "not_finite"),
    *("full_disk", "ray_node", "host_kills", "malformed"),
)
OF_ALL = ("trial", "code", "seconds")  # columns
COSTS = HERE.parent / "checkpoint_cost" / "results" / "checkpoint_cost.json"
BEGIN, END = "<!-- table: written by run.py -->\n", "<!-- end of table -->"

FLAGS = flags.FlagValues()
flags.DEFINE_string("only", "", f"One of {', '.join(FAULTS)}.", flag_values=FLAGS)
flags.DEFINE_integer("times", 0, "Of each fault (0: as its file says).", 0, flag_values=FLAGS)
flags.DEFINE_string("workdir", "runs/fault_injection", "Where it is broken.", flag_values=FLAGS)
flags.DEFINE_string("out", str(HERE), "Folder of results/ and README.md.", flag_values=FLAGS)


def main() -> int | None:
    out, names = Path(FLAGS.out), FAULTS
    if FLAGS.only:
        one_of("--only", FLAGS.only, FAULTS)
        names = (FLAGS.only,)
    for name in names:
        fault = load(name)
        if why := fault.cannot_run():
            print(f"{name}: skipped, {why}")
            continue
        inject(name, fault, FLAGS.times or fault.TIMES, Path(FLAGS.workdir).absolute(), out)
    rows = {name: read(out / "results" / f"{name}.csv") for name in FAULTS}
    table = as_table(rows)
    print(table, end="")
    readme = out / "README.md"
    if readme.exists():
        before, rest = readme.read_text().split(BEGIN)
        write_atomically(readme, before + BEGIN + table + END + rest.split(END)[1])
    return FAILED if any(row["wrong"] for found in rows.values() for row in found) else None


def load(name: str) -> ModuleType:
    """The module of a fault."""
    return importlib.import_module(f"experiments.fault_injection.{name}")


def inject(name: str, fault: ModuleType, times: int, workdir: Path, out: Path) -> None:
    """Trials until ``times`` faults were done, those of earlier calls counted."""
    path = out / "results" / f"{name}.csv"
    rows = read(path)
    while (done := sum(int(row["faults"]) for row in rows)) < times:
        number = len(rows)
        folder = workdir / name / str(number)
        shutil.rmtree(folder, ignore_errors=True)  # of a trial that was stopped
        folder.mkdir(parents=True)
        started = time.monotonic()
        try:
            row = fault.trial(number, folder)
        except Exception as error:
            traceback.print_exc()
            row = {"faults": 1, "wrong": f"{type(error).__name__}: {error}".split("\n")[0]}
        seconds = round(time.monotonic() - started, 1)
        row |= {"trial": number, "code": commit_of_code(), "seconds": seconds}
        rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, (*OF_ALL, *fault.COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue())
        wrong = row["wrong"] or "as required"
        print(f"{name} {number}: {done + row['faults']}/{times} faults, {wrong}", flush=True)
        if not row["wrong"]:
            shutil.rmtree(folder)


def commit_of_code() -> str:
    """The last commit that changed lm/, with a + where that has changed since; "" without git."""
    git = ["git", "-C", str(HERE.parents[1])]
    try:
        found = subprocess.run(
            [*git, "log", "-1", "--format=%h", "--", "lm"], capture_output=True, text=True
        ).stdout.strip()
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "lm"]).returncode == 1
    except OSError:
        return ""
    return found + "+" * dirty


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a fault so far."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def as_table(rows: dict[str, list[dict]]) -> str:
    """A line a fault: how often it was done, what was required and what came out."""
    lines = ["| fault | done | required | as required |", "|---|---|---|---|"]
    for name, found in rows.items():
        fault = load(name)
        done = sum(int(row["faults"]) for row in found)
        good = sum(not row["wrong"] for row in found)
        result = f"{good} of {len(found)} trials" if found else "not run"
        if found and hasattr(fault, "told"):
            result += f"; {fault.told(found)}"
        lines.append(f"| {fault.FAULT} | {done} of {fault.TIMES} | {fault.REQUIRED} | {result} |")
    codes = dict.fromkeys(
        row["code"] for found in rows.values() for row in found if row.get("code")
    )
    told = ["", f"Trials with lm/ as of commit {', '.join(codes)}."] if codes else []
    return "\n".join(lines + costs(COSTS) + told) + "\n"


def costs(path: Path) -> list[str]:
    """Lines of the table: what ``experiments/checkpoint_cost`` found."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    names = ("cost", "cost_error", "alone_cpu_cost")
    share, error, alone = (100 * found["saving"][name] for name in names)
    seconds = found["restoring"]["cold_seconds"]
    run, state = "(d=256, 8 layers, batch 16 x 64)", "a 100 M-parameter state"
    return [
        f"| a checkpoint every 100 steps {run} | cost | <= 5 % of step time"
        f" | {share:.1f} ± {error:.1f} %; {alone:.1f} % of CPU time, measured alone |",
        f"| restore of {state}, not in the page cache | cost | <= 5 s | {seconds:.1f} s |",
    ]


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
