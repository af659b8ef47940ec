"""How the experts of a study's best run were used: ``experts.csv`` beside runs.csv.

Its rows are a layer at a time: run_id, tokens, layer, dropped_share, router_entropy, and load, the
experts' shares of the layer's choices with spaces between.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.scaling import RunTable

FULL_LOAD = 2.0  # times the fair share, at which a colour is full


class ExpertLoads(NamedTuple):
    """Of one run, at P points of its training and in L layers."""

    run_id: str
    tokens_P: np.ndarray
    layers_L: list[int]
    load_PLE: np.ndarray
    dropped_PL: np.ndarray


def read_expert_loads(paths: Sequence[str | Path], runs: RunTable) -> ExpertLoads | None:
    """The loads of the best run of the highest budget, from the tables beside ``paths``.

    None where no table has any.
    """
    rows = []
    for path in map(Path, paths):
        table = (path if path.is_dir() else path.parent) / "experts.csv"
        if table.exists():
            with table.open(newline="") as file:
                rows += list(csv.DictReader(file))
    known = np.isin(runs.run_id, [row["run_id"] for row in rows])
    if not known.any():
        return None
    top = known & (runs.flops > 0.9 * runs.flops[known].max())
    best = str(runs.run_id[top][np.argmin(runs.loss[top])])
    rows = [row for row in rows if row["run_id"] == best]
    rows.sort(key=lambda row: (float(row["tokens"]), int(row["layer"])))
    layers = sorted({int(row["layer"]) for row in rows})
    tokens = np.array([float(row["tokens"]) for row in rows[:: len(layers)]])
    load = np.array([[float(share) for share in row["load"].split()] for row in rows])
    dropped = np.array([float(row["dropped_share"]) for row in rows])
    shape = (len(tokens), len(layers))
    return ExpertLoads(best, tokens, layers, load.reshape(*shape, -1), dropped.reshape(shape))
