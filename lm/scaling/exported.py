"""Tables exported from W&B and TensorBoard, read as run and curve tables.

- W&B, the runs table (Export CSV): `Name` and `State` are known to `read_runs`; settings and
  results stand under `config:tokens`, `summary:loss` (or with a dot) and lose that prefix here.
- W&B, a line plot (Export CSV): `Step` (or `_step`), then one column `RUN - METRIC` a run. The
  columns `..__MIN` and `..__MAX` are left out.
- TensorBoard, scalars (download CSV): one file `run-RUN-tag-TAG.csv` a curve, columns
  `Wall time, Step, Value`.

A step becomes tokens by the run's own `batch_tokens` and FLOPs by its FLOPs a token.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.command import BadInput
from lm.scaling.table import CurveTable, RunTable, read_curves

_PREFIX = re.compile(r"^(summary|config)[:.]\s*")
_TENSORBOARD_FILE = re.compile(r"^run-(?P<run>.+)-tag-(?P<tag>.+)$")
_STEPS = ("Step", "_step", "step", "global_step")


def exported_columns(paths: Sequence[Path], columns: Mapping[str, str]) -> dict[str, str]:
    """`columns` (ours to theirs) and those that W&B exported as `summary:loss`, `config.tokens`."""
    found = dict(columns)
    for path in paths:
        header = _header(path / "runs.csv" if path.is_dir() else path)
        for name in header:
            ours = _PREFIX.sub("", name)
            if ours != name and ours not in header and name not in columns.values():
                found.setdefault(ours, name)
    return found


def read_any_curves(paths: Sequence[Path], runs: RunTable) -> CurveTable:
    """Curves of `runs` from curves.csv files (or folders holding one), or from exports as above.

    Metrics whose name holds `val` or `eval` are validation losses, other losses training losses; a
    metric without `loss` in its name is left out. Raises BadInput naming file and column.
    """
    files = [file for path in paths for file in _files(path)]
    exported = [file for file in files if "run_id" not in _header(file)]
    if not exported:
        return read_curves(list(paths), runs)
    if len(exported) < len(files):
        raise BadInput(f"{files[0]} and {exported[0]}: curves.csv and exports cannot be mixed")
    if "batch_tokens" not in runs.columns:
        raise BadInput("no column 'batch_tokens' in the run table: it turns steps into tokens")
    points: dict[tuple[int, float], list[float]] = {}
    place = {str(name): i for i, name in enumerate(runs.run_id)}
    for file in exported:
        for run, metric, steps, values in _series(file):
            which = 1 if re.search(r"val|eval", metric, re.IGNORECASE) else 0
            if "loss" in metric.lower() and run in place:
                for step, value in zip(steps, values, strict=True):
                    points.setdefault((place[run], step), [np.nan, np.nan])[which] = value
    if not points:
        raise BadInput(f"{exported[0]}: holds no loss of a run that is in the run table")
    order = sorted(points)
    rows = np.array([run for run, _ in order])
    tokens = np.array([step for _, step in order]) * runs.columns["batch_tokens"][rows]
    losses = np.array([points[key] for key in order])
    flops = tokens * (runs.flops / runs.tokens)[rows]
    return CurveTable(
        runs.run_id[rows], runs.params[rows], tokens, flops, losses[:, 0], losses[:, 1]
    )


def _series(file: Path):
    """(run, metric, steps, values) of each curve in an exported file."""
    header, *rows = _lines(file)
    step = next((name for name in _STEPS if name in header), None)
    if step is None:
        raise BadInput(f"{file}: no column run_id (curves.csv) and none of {', '.join(_STEPS)}")
    if "Value" in header:
        match = _TENSORBOARD_FILE.match(file.stem)
        if not match:
            raise BadInput(f"{file}: a TensorBoard scalar must be called run-RUN-tag-TAG.csv")
        columns = {"Value": (match["run"], match["tag"])}
    else:
        columns = {
            name: tuple(name.rsplit(" - ", 1))
            for name in header
            if " - " in name and not name.endswith(("__MIN", "__MAX"))
        }
    for name, (run, metric) in columns.items():
        try:
            pairs = [
                (float(row[header.index(step)]), float(row[header.index(name)]))
                for row in rows
                if row[header.index(name)].strip()
            ]
        except ValueError as error:
            raise BadInput(f"{file}, column {name!r}: {error}") from None
        pairs = [pair for pair in pairs if pair[0] > 0 and np.isfinite(pair[1])]
        yield run, metric, [s for s, _ in pairs], [v for _, v in pairs]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / "curves.csv").exists():
        return [path / "curves.csv"]
    files = sorted(path.glob("run-*-tag-*.csv"))
    if not files:
        raise BadInput(f"{path}: holds neither curves.csv nor run-*-tag-*.csv")
    return files


def _lines(file: Path) -> list[list[str]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = [row for row in csv.reader(opened) if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not rows:
        raise BadInput(f"{file} is empty")
    ragged = next((n for n, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
    if ragged:
        raise BadInput(
            f"{file} row {ragged}: {len(rows[ragged - 1])} fields, {len(rows[0])} in the header"
        )
    return rows


def _header(file: Path) -> list[str]:
    return [name.strip() for name in _lines(file)[0]]
