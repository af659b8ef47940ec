"""The folder of a study: ``study.json``, ``leases/``, ``runs/<run_id>/``, and the tables.

A run is done when its ``result.json`` is there. ``runs.csv`` and ``curves.csv`` are made anew from
those files, so they hold no state of their own.
"""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lm.command import BadInput, json_object, write_atomically
from lm.config import Config, differences, read_config, to_dict
from lm.sweep.files import Bucket, Folder
from lm.sweep.leases import Leases
from lm.train.metrics import read_metrics

SCHEMA = 1
COLUMNS = (
    "run_id params non_embedding_params active_params tokens flops flops_convention loss"
    " bits_per_byte budget d_model n_layers n_heads n_kv_heads n_experts vocab_size tied seq_len"
    " batch_tokens learning_rate schedule seed corpus tokenizer epochs wall_seconds device status"
    " head_width d_ff n_steps warmup_tokens step_seconds compile_seconds evaluate_seconds"
    " data_seconds data optimizer checkpoint_seconds start_seconds lost_seconds other_seconds"
    " goodput rollbacks"
).split()
CURVE_COLUMNS = ("run_id", "tokens", "flops", "train_loss", "validation_loss")
EXPERT_COLUMNS = ("run_id", "tokens", "layer", "dropped_share", "router_entropy", "load")
POINTS_A_DECADE = 40  # of tokens, in curves.csv
EXPERT_POINTS = 50  # of a run, in experts.csv


class Store:
    """Reads and writes the folder of a study. ``owner``: as for ``Leases``.

    ``place`` is a path or a URL, the same from any machine and folder; ``workdir`` is where its
    files lie on this machine, which for a bucket is a copy.
    """

    def __init__(self, workdir: str | Path, owner: str = ""):
        remote = "://" in str(workdir)
        self.place = str(workdir) if remote else str(Path(workdir).absolute())
        self.files = Bucket(self.place) if remote else Folder(workdir)
        self.workdir = self.files.local
        self.leases = Leases(self.files, owner)
        self._rows: dict[str, dict] = {}
        self._curves: dict[str, list[tuple]] = {}
        self._loads: dict[str, list[tuple]] = {}

    def folder(self, run_id: str) -> Path:
        """The folder of one run."""
        return self.workdir / "runs" / run_id

    def claim(self, config: Config) -> None:
        """Makes the folder this study's own. Budgets may be added above the old ones.

        Raises ``BadInput`` where it holds another study, naming the keys that differ.
        """
        if self.files.read("study.json"):
            old = self.config()
            top, grown = len(old.sweep.budgets), config.sweep.budgets
            found, wanted = to_dict(old), to_dict(config)
            if grown[:top] == old.sweep.budgets:
                found["sweep"]["budgets"] = wanted["sweep"]["budgets"]
            if changed := list(differences(found, wanted)):
                raise BadInput(
                    f"{self.workdir} holds another study ({'; '.join(changed)}):"
                    " use another --workdir"
                )
        study = {"schema": SCHEMA, "config": to_dict(config)}
        self.files.write("study.json", json.dumps(study, indent=1))

    def config(self) -> Config:
        """The study's config. Raises ``BadInput`` where there is no study."""
        study = self.files.read("study.json")
        if not study:
            raise BadInput(f"--workdir={self.workdir}: no study here (study.json is missing)")
        return read_config(self.workdir / "study.json", study)

    def scan(self) -> None:
        """Reads the results that have come since the last look."""
        for run_id in set(self.files.finished()) - set(self._rows):
            self.files.fetch(_files(run_id))
            self._rows[run_id] = _row(self.folder(run_id))

    def publish(self, run_id: str) -> None:
        """Lets all see what was written of a run on this machine, its result last."""
        self.files.publish(_files(run_id))

    def rows(self) -> list[dict[str, Any]]:
        """One dict of ``COLUMNS`` a finished run, sorted by run_id; as of the last ``scan``."""
        return [self._rows[run_id] for run_id in sorted(self._rows)]

    def losses(self) -> dict[str, float]:
        """Loss of every finished run, nan where it diverged or, rolled back, had a lower rate."""
        return {
            row["run_id"]: row["loss"]
            if row["status"] == "done" and not row["rollbacks"]
            else math.nan
            for row in self.rows()
        }

    def write_tables(self) -> None:
        """Writes ``runs.csv``, ``curves.csv`` and, where runs have experts, ``experts.csv``.

        Of launchers that write at once the last one wins, so each looks again after it wrote.
        """
        n = -1
        while n < len(self._rows):
            n = len(self._rows)
            self._write_tables()
            self.scan()

    def _write_tables(self) -> None:
        rows = self.rows()
        for row in rows:
            if row["run_id"] not in self._curves:
                self._curves[row["run_id"]] = _curve(self.folder(row["run_id"]))
                self._loads[row["run_id"]] = _loads(self.folder(row["run_id"]))
        points = ((row["run_id"], *point) for row in rows for point in self._curves[row["run_id"]])
        tables = {
            "runs.csv": _csv(COLUMNS, ([row[c] for c in COLUMNS] for row in rows)),
            "curves.csv": _csv(CURVE_COLUMNS, points),
        }
        if loads := [line for row in rows for line in self._loads[row["run_id"]]]:
            tables["experts.csv"] = _csv(EXPERT_COLUMNS, loads)
        for name, text in tables.items():
            write_atomically(self.workdir / name, text)
        self.files.publish(list(tables))


def _files(run_id: str) -> list[str]:
    names = "log.txt", "config.json", "metrics.jsonl", "events.jsonl", "result.json"
    return [f"runs/{run_id}/{name}" for name in names]


def _csv(header, rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _row(folder: Path) -> dict[str, Any]:
    """The row of a finished run: what its config asked for and what its result says."""
    config = to_dict(read_config(folder / "config.json"))
    result = json_object(folder / "result.json")
    known = {
        **config["model"],
        **{name: config["data"][name] for name in ("seq_len", "corpus", "tokenizer")},
        "schedule": config["optimizer"]["schedule"],
        "seed": config["train"]["seed"],
        "budget": config["train"]["flops"],
        "optimizer": "adamw b1={beta1} b2={beta2} wd={weight_decay} clip={clip_norm}".format(
            **config["optimizer"]
        ),
        "n_experts": config["model"]["moe"]["n_experts"],
        **result,
        "run_id": folder.name,
    }
    if isinstance(known.get("epochs"), dict):  # by corpus: the one that is repeated most
        known["epochs"] = max(known["epochs"].values())
    return {name: known.get(name) for name in COLUMNS}


def _curve(folder: Path) -> list[tuple]:
    """(tokens, flops, train_loss, validation_loss) of a run, means over bins even in log tokens."""
    lines = [line for line in read_metrics(folder) if line.get("train_loss") is not None]
    bins: dict[tuple, list[dict]] = {}
    for line in lines:
        place = math.floor(POINTS_A_DECADE * math.log10(line["tokens"]))
        # A line that was validated stays as it is, so that its loss belongs to its tokens.
        bins.setdefault((place, line.get("validation_loss") and line["tokens"]), []).append(line)
    points = [
        (
            *(float(np.mean([line[name] for line in lines])) for name in CURVE_COLUMNS[1:4]),
            lines[-1].get("validation_loss"),
        )
        for lines in bins.values()
    ]
    return sorted(points, key=lambda point: point[0])


def _loads(folder: Path) -> list[tuple]:
    """``EXPERT_COLUMNS`` of a run's layers with experts, at even steps of its log."""
    lines = [line for line in read_metrics(folder) if "expert_load" in line]
    if not lines:
        return []
    chosen = np.unique(np.linspace(0, len(lines) - 1, EXPERT_POINTS).round().astype(int))
    rows, layers = [], read_config(folder / "config.json").model.moe_layers
    for line in (lines[i] for i in chosen):
        for j, layer in enumerate(layers):
            load = " ".join(f"{share:.4g}" for share in line["expert_load"][j])
            of_layer = (round(line[name][j], 5) for name in EXPERT_COLUMNS[3:5])
            rows.append((folder.name, line["tokens"], layer, *of_layer, load))
    return rows
