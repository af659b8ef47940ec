"""Anybody's run table as arrays: read, checked, and refused by name of column and rows.

Units: params in parameters, tokens in tokens, flops in training FLOPs, loss in nats per token.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lm.command import BadInput, nearest, one_of

MEASURES = ("params", "tokens", "flops", "loss")
FINISHED = ("", "done", "finished")  # the last is what W&B writes in its `State` column
ALIASES = {"run_id": ("Name", "name", "ID"), "status": ("State",)}  # of W&B's run-table export


@dataclass(frozen=True)
class RunTable:
    """Finished runs, one entry each, as float64 arrays of equal length.

    `columns` holds every other column of the table (float where all of it parses, else str);
    `excluded` says which rows were left out and why.
    """

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    run_id: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()

    @classmethod
    def from_arrays(cls, *, loss, params=None, tokens=None, flops=None, run_id=None, **columns):
        """A table from arrays in memory: `loss` and any two of the three, third from C = 6 N D.

        Checked like a file (rows are counted from 0). Raises BadInput.
        """
        given = {"params": params, "tokens": tokens, "flops": flops, "loss": loss}
        given = {name: np.asarray(v, float) for name, v in given.items() if v is not None}
        if run_id is not None:
            columns["run_id"] = np.asarray(run_id).astype(str)
        columns = {name: np.asarray(v) for name, v in columns.items()}
        lengths = {name: v.shape for name, v in (given | columns).items()}
        if len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
            raise BadInput(f"arrays must be of one axis and equal length, not {lengths}")
        return _checked(given, columns, [f"row {i}" for i in range(len(given["loss"]))], ())

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, rows: np.ndarray) -> "RunTable":
        """The rows where a boolean mask holds, or those of the given indices."""
        kept = {name: values[rows] for name, values in self.columns.items()}
        arrays = (getattr(self, name)[rows] for name in (*MEASURES, "run_id"))
        return RunTable(*arrays, columns=kept, excluded=self.excluded)


@dataclass(frozen=True)
class CurveTable:
    """Training curves in long form: one entry a logged point, as arrays of equal length.

    `params` is the run's size repeated along its points; a loss that was not logged is NaN.
    """

    run_id: np.ndarray
    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    train_loss: np.ndarray
    validation_loss: np.ndarray

    def of(self, runs: RunTable) -> "CurveTable":
        """The curves of these runs."""
        inside = np.isin(self.run_id, runs.run_id)
        return CurveTable(*(values[inside] for values in vars(self).values()))


def read_runs(
    paths: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    loss_unit: str = "nats",
) -> RunTable:
    """Reads run tables: CSV files, or folders holding runs.csv, joined in the order given.

    A CSV needs `loss` and any two of `params`, `tokens`, `flops`; the third follows from
    C = 6 N D. `columns` renames, ours to theirs: {"params": "Model Size"}. `loss_unit` is "nats" or
    "bits" per token; bits are converted. Rows whose `status` is not `done` (diverged, ...) are left
    out and named in `excluded`, as are those of column `rollbacks` above 0: such a run was trained
    at a lower rate than the others. Raises BadInput naming column and rows.
    """
    one_of("loss_unit", loss_unit, ("nats", "bits"))
    header, rows, labels = _read(paths, "runs.csv", columns or {})
    theirs = (columns or {}).get("loss", "loss")
    if loss_unit == "nats" and any(word in theirs.lower() for word in ("bit", "bpb", "bpc")):
        raise BadInput(f"loss is read from column {theirs!r}, which sounds like bits, not nats")

    kept, excluded = [], []
    rollbacks = _numbers("rollbacks", rows, labels, empty_is_nan=True)
    for i, row in enumerate(rows):
        fault = row.get("status", "").strip().lower()
        if fault in FINISHED:
            n = rollbacks[i]
            fault = f"rollbacks: {n:.0f}, so trained at a lower rate" if n > 0 else ""
        if not fault:
            kept.append(i)
        else:
            excluded.append(f"{row.get('run_id') or labels[i]}: {fault}")
    if not kept:
        raise BadInput(
            f"{_names(paths)}: none of the {len(rows)} rows has status done and no rollbacks"
        )
    rows, labels = [rows[i] for i in kept], [labels[i] for i in kept]

    given = {name: _numbers(name, rows, labels) for name in MEASURES if name in header}
    if loss_unit == "bits" and "loss" in given:
        given["loss"] = given["loss"] * math.log(2)
    others = {name: _column(name, rows) for name in header if name not in MEASURES}
    return _checked(given, others, labels, tuple(excluded), header)


def read_curves(
    paths: str | Path | Sequence[str | Path],
    runs: RunTable,
    columns: Mapping[str, str] | None = None,
) -> CurveTable:
    """Reads training curves: CSV files, or folders holding curves.csv; sizes by run_id from `runs`.

    Needs `run_id`, `tokens` or `flops`, and one of `train_loss`, `validation_loss`. Points of runs
    that are not in `runs` are left out. Raises BadInput naming column and rows.
    """
    header, rows, labels = _read(paths, "curves.csv", columns or {})
    if "run_id" not in header:
        raise BadInput(_missing("run_id", header))
    size = dict(zip(runs.run_id, runs.params, strict=True))
    known = [i for i, row in enumerate(rows) if row["run_id"] in size]
    if not known:
        raise BadInput(f"{_names(paths)}: no run_id of the curves is in the run table")
    rows, labels = [rows[i] for i in known], [labels[i] for i in known]
    run_id = np.array([row["run_id"] for row in rows])
    params = np.array([size[name] for name in run_id])
    cost = {n: _numbers(n, rows, labels) for n in ("tokens", "flops") if n in header}
    if not cost:
        raise BadInput(_missing("tokens", header))
    for name, values in cost.items():
        _refuse_rows(f"{name} must be above zero", ~(values >= 0), labels)
    tokens = cost["tokens"] if "tokens" in cost else cost["flops"] / (6 * params)
    flops = cost["flops"] if "flops" in cost else 6 * params * tokens
    losses = [n for n in ("train_loss", "validation_loss") if n in header]
    if not losses:
        raise BadInput(_missing("train_loss", header))
    empty = np.full(len(rows), np.nan)
    loss = {n: _numbers(n, rows, labels, empty_is_nan=True) for n in losses}
    return CurveTable(
        run_id, params, tokens, flops,
        loss.get("train_loss", empty), loss.get("validation_loss", empty),
    )  # fmt: skip


def _checked(given, others, labels, excluded, header=None) -> RunTable:
    """The table, once every check has passed."""
    header = list(header or (*given, *others))
    if "loss" not in given:
        raise BadInput(_missing("loss", header))
    if len(labels) == 0:
        raise BadInput("the table has no rows")
    missing = [name for name in ("params", "tokens", "flops") if name not in given]
    if len(missing) > 1:
        raise BadInput(
            f"{_missing(missing[0], header)}; any two of params, tokens, flops are needed"
        )
    for name, values in given.items():
        _refuse_rows(f"{name} is not a finite number", ~np.isfinite(values), labels)
        _refuse_rows(f"{name} must be above zero", values <= 0, labels)
    params, tokens, flops = (given.get(name) for name in ("params", "tokens", "flops"))
    if params is None:
        params = flops / (6 * tokens)
    elif tokens is None:
        tokens = flops / (6 * params)
    elif flops is None:
        flops = 6 * params * tokens
    loss = given["loss"]

    if np.all(tokens / params < 0.01):
        raise BadInput(
            "tokens / params is below 0.01 in every row: columns params and tokens look swapped"
        )
    ratio = np.median(flops / (6 * params * tokens))
    if not 0.01 < ratio < 100:
        raise BadInput(
            f"flops are {ratio:.3g} times 6 x params x tokens (median): another unit than FLOPs?"
        )
    run_id = others.pop("run_id", None)
    if run_id is not None:
        run_id = run_id.astype(str)
        _refuse_duplicates("run_id", run_id, labels)
    measured = list(zip(params, tokens, flops, loss, strict=True))
    _refuse_duplicates("params, tokens, flops and loss", measured, labels)
    tokenizers = sorted(set(map(str, others.get("tokenizer", ()))))
    if len(tokenizers) > 1:
        first = [labels[list(map(str, others["tokenizer"])).index(t)] for t in tokenizers]
        where = ", ".join(f"{t!r} ({r})" for t, r in zip(tokenizers, first, strict=True))
        raise BadInput(
            f"column tokenizer mixes {where}: loss per token cannot be compared across tokenizers"
        )
    _refuse_bits(loss, others, labels)
    return RunTable(
        params, tokens, flops, loss,
        run_id if run_id is not None else np.array(labels), others, tuple(excluded),
    )  # fmt: skip


def _refuse_bits(loss, others, labels) -> None:
    """A loss per token in nats is told from one in bits where another column of the table knows."""
    advice = "column loss looks like bits, not nats per token: give loss_unit='bits', or nats"

    def column(name):
        values = others.get(name)
        return values if values is not None and values.dtype.kind == "f" else None

    units = others.get("loss_unit")
    if units is not None:
        _refuse_rows(advice, np.array(["bit" in str(unit) for unit in units]), labels)
    bits_per_byte, perplexity, vocab = map(column, ("bits_per_byte", "perplexity", "vocab_size"))
    if bits_per_byte is not None and np.allclose(loss, bits_per_byte, rtol=1e-6, atol=0):
        raise BadInput(f"{advice} (it equals bits_per_byte in every row)")
    if perplexity is not None and np.allclose(loss, np.log2(perplexity), rtol=1e-3, atol=0):
        raise BadInput(f"{advice} (it equals log2(perplexity) in every row)")
    if vocab is not None and np.median(loss - np.log(np.maximum(vocab, 2))) > 0:
        raise BadInput(f"{advice} (it is above log(vocab_size), the loss of a uniform guess)")


def _read(paths, default, columns):
    """(header in our names, rows as dicts of text, labels): all files of `paths` in turn."""
    header, rows, labels = [], [], []
    paths = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    for path in paths:
        path = path / default if path.is_dir() else path
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            why = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot read {path}: {why}") from None
        if not lines:
            raise BadInput(f"{path} is empty")
        names = _renamed([name.strip() for name in lines[0]], columns, path)
        header += [name for name in names if name not in header]
        for number, line in enumerate(lines[1:], start=2):
            if not any(line):
                continue
            if len(line) != len(names):
                raise BadInput(f"{path} line {number}: {len(line)} fields, not {len(names)}")
            rows.append(dict(zip(names, line, strict=True)))
            labels.append(f"line {number}" if len(paths) == 1 else f"{path} line {number}")
    if not rows:
        raise BadInput(f"{_names(paths)}: no rows below the header")
    return header, rows, labels


def _renamed(names, columns, path):
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{path}: column {twice[0]!r} stands twice in the header")
    for ours, theirs in columns.items():
        if theirs not in names:
            raise BadInput(f"{path} has no column {theirs!r} (for {ours}){nearest(theirs, names)}")
    renames = {theirs: ours for ours, theirs in columns.items()}
    for ours, aliases in ALIASES.items():
        alias = next((a for a in aliases if a in names and a not in renames), None)
        if alias and ours not in names and ours not in columns:
            renames[alias] = ours
    # A column whose name another one takes over keeps its text under a name of its own.
    return [renames.get(n, f"{n} (not used)" if n in renames.values() else n) for n in names]


def _numbers(name, rows, labels, empty_is_nan=False):
    values, bad = np.full(len(rows), np.nan), np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        text = row.get(name, "").strip()
        try:
            values[i] = float(text) if text or not empty_is_nan else math.nan
        except ValueError:
            bad[i] = True
    _refuse_rows(f"column {name} holds something other than a number", bad, labels)
    return values


def _column(name, rows):
    text = [row.get(name, "") for row in rows]
    try:
        if name != "run_id":
            return np.array([float(t) if t.strip() else math.nan for t in text])
    except ValueError:
        pass
    return np.array(text)


def _refuse_rows(what, bad, labels) -> None:
    if np.any(bad):
        rows = [labels[i] for i in np.flatnonzero(bad)]
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise BadInput(f"{what}: {', '.join(rows[:5])}{more}")


def _refuse_duplicates(what, values, labels) -> None:
    seen = {}
    for value, label in zip(values, labels, strict=True):
        if value in seen:
            raise BadInput(f"duplicated run: {seen[value]} and {label} have the same {what}")
        seen[value] = label


def _missing(name, header) -> str:
    hint = nearest(name, header) or f"; columns are {', '.join(header)}"
    return f"no column {name!r}{hint} (rename with columns, {name}=THEIRS)"


def _names(paths) -> str:
    return str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths))
