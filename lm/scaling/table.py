"""Anybody's run table as arrays: read, checked, and refused by name of column and rows.

Units: params in parameters, tokens in tokens, flops in training FLOPs, loss in nats per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


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
        """A table from arrays in memory: `loss` and any two of the three, third from C = 6 N D."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, mask: np.ndarray) -> "RunTable":
        """The rows where `mask` (boolean, or indices) holds."""
        raise NotImplementedError


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


def read_runs(
    paths: str | Path | Sequence[str | Path],
    columns: Mapping[str, str] | None = None,
    loss_unit: str = "nats",
) -> RunTable:
    """Reads run tables: CSV files, or folders holding runs.csv, joined in the order given.

    A CSV needs `loss` and any two of `params`, `tokens`, `flops`; the third follows from C = 6 N D.
    `columns` renames, ours to theirs: {"params": "Model Size"}. `loss_unit` is "nats" or "bits" per
    token; bits are converted. Rows whose `status` is `diverged` are left out and named in `excluded`.
    Raises BadInput naming column and rows.
    """
    raise NotImplementedError


def read_curves(
    paths: str | Path | Sequence[str | Path],
    runs: RunTable,
    columns: Mapping[str, str] | None = None,
) -> CurveTable:
    """Reads training curves: CSV files, or folders holding curves.csv; sizes come from `runs` by run_id.

    Needs `run_id`, `tokens`, `flops` and one of `train_loss`, `validation_loss`. Points of runs that are
    not in `runs` are left out. Raises BadInput naming column and rows.
    """
    raise NotImplementedError
