"""Results of experiments as files: figures and tables, each written whole or not at all."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lm.command import write_atomically

matplotlib.use("Agg")


def save(figure: Figure, path: Path, dpi: int = 110) -> None:
    """As PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def as_csv(rows: Iterable[Mapping | Sequence]) -> str:
    """Of mappings, whose keys name the columns, or of sequences, the first of them the header.

    Cells that are lists have blanks between.
    """
    rows = list(rows)
    if isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(name for row in rows for name in row))
        rows = [names, *([row.get(name, "") for name in names] for row in rows)]
    told = [[" ".join(map(str, x)) if isinstance(x, list) else x for x in row] for row in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(told)
    return text.getvalue()
