"""Malformed input, fuzzed from valid input, is given to the real commands.

A trial is one input: its class by turns, what is broken in it drawn. Every class gives input that
no reading could accept; ``valid`` makes what they start from and sees it accepted.
"""

import contextlib
import hashlib
import importlib
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.fault_injection import malformed_configs, malformed_files, malformed_tables, study
from lm import command

FAULT = "malformed input: 60 configs, 20 corpora, 25 CSVs, 10 laws, 10 folders, fuzzed from valid"
TIMES = 125
REQUIRED = "one clear line that names what is wrong, exit 2, no traceback, nothing written"
COLUMNS = ("faults", "kind", "broken", "command", "own_process", "says", "wrong")
KINDS = {  # how many, the classes, and what makes the valid ones
    "config": (60, malformed_configs.CLASSES, malformed_configs.make_config),
    "corpus": (20, malformed_files.CORPORA, malformed_files.make_corpora),
    "csv": (25, malformed_tables.TABLES, malformed_tables.make_tables),
    "law": (10, malformed_tables.LAWS, malformed_tables.make_tables),
    "folder": (10, malformed_files.FOLDERS, malformed_files.make_folders),
}
OWN_PROCESS = 10  # every so many trials run as a process of their own too


class Outcome(NamedTuple):
    """Of a command."""

    code: int
    out: str
    err: str


def cannot_run() -> str:
    """Why not here, or an empty string."""
    return ""


def trial(number: int, folder: Path) -> dict:
    """One malformed input."""
    draw, (kind, broken, make) = random.Random(f"malformed {number}"), chosen(number)
    inputs = valid(kind, folder.parent)
    case = make(draw, folder, inputs)
    before = content(folder), content(inputs)
    outcome = called(case.command, case.arguments, folder)
    wrong = judged(outcome, case.names)
    if own_process := number % OWN_PROCESS == 0:
        again = started(case.command, case.arguments, folder)
        wrong += [f"as a process: {what}" for what in judged(again, case.names)]
        if again != outcome:
            wrong.append("another outcome as a process")
    if (content(folder), content(inputs)) != before:
        wrong.append("something was written")
    return {
        "faults": 1,
        "kind": kind,
        "broken": broken,
        "command": case.command,
        "own_process": int(own_process),
        "says": outcome.err.strip().replace(str(folder.parent), "DIR")[:300],
        "wrong": "; ".join(wrong),
    }


def chosen(number: int) -> tuple[str, str, Callable]:
    """(kind, class, what makes the input) of a trial."""
    for kind, (times, classes, _) in KINDS.items():
        if number < times:
            broken = list(classes)[number % len(classes)]
            return kind, broken, classes[broken]
        number -= times
    raise ValueError("no more trials")


def judged(outcome: Outcome, names: str) -> list[str]:
    """What is not as required."""
    lines = outcome.err.splitlines()
    return [
        *([f"exit code {outcome.code}"] if outcome.code != command.BAD_INPUT else []),
        *(["prints besides"] if outcome.out else []),
        *([f"{len(lines)} lines"] if len(lines) != 1 else []),
        *(["no error: line"] if not outcome.err.startswith("error: ") else []),
        *(["the line does not name " + names] if names not in outcome.err else []),
    ]


def called(name: str, arguments: list[str], folder: Path) -> Outcome:
    """The command in this process, as its own main does it, from ``folder``."""
    try:
        module = importlib.import_module(f"{name}.__main__")
    except ModuleNotFoundError:
        module = importlib.import_module(name)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.run(module.main, module.FLAGS, module.__doc__, [name, *arguments])
        except Exception as error:
            code = command.FAILED
            print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    return Outcome(code, out.getvalue(), err.getvalue())


def started(name: str, arguments: list[str], folder: Path) -> Outcome:
    """The command as a process of its own, from ``folder``."""
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=study.environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def content(folder: Path) -> dict[str, str]:
    """Every file and folder below ``folder``, with the hash of what it holds."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def valid(kind: str, folder: Path) -> Path:
    """The inputs that trials of a kind start from, made once and accepted by the commands."""
    inputs = folder / f"valid_{kind}"
    if not inputs.is_dir():
        making = folder / f"valid_{kind}.new"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        study.prepared(making)
        (making / "config.py").write_text(study.CONFIG.read_text())
        for name, arguments in KINDS[kind][2](making):
            done = called(name, arguments, making)
            assert done.code == 0, f"{name} {arguments}: {done.err}"
        making.rename(inputs)
    return inputs
