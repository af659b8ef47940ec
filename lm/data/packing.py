"""Whole conversations packed into rows, each conversation in one row of an epoch."""

import bisect

import numpy as np

from lm.data.store import Store


def pack(lengths: np.ndarray, row: int) -> list[list[int]]:
    """Which items, of ``lengths`` up to ``row``, share a row: the longest first, each where it
    leaves the least room (best fit, decreasing: at most 11/9 of the fewest rows; Johnson 1973).
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in rows that are not full, and which; ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        at = bisect.bisect_left(room, (int(lengths[i]), -1))
        left, chosen = room.pop(at) if at < len(room) else (row, len(rows))
        if chosen == len(rows):
            rows.append([])
        rows[chosen].append(i)
        if left > lengths[i]:
            bisect.insort(room, (left - int(lengths[i]), chosen))
    return rows


class Packed:
    """A split's conversations as rows of ``row`` tokens, indexed as an array of windows is.

    A conversation longer than a row loses its end; one that then holds no answer is left out.
    """

    def __init__(self, store: Store, split: str, row: int):
        self.row = row
        self._tokens, self._answers = store.tokens[split], store.answers[split]
        lengths = store.lengths[split].astype(np.int64)
        self._starts = np.cumsum(lengths) - lengths
        n_bytes = -(-lengths // 8)  # each conversation's bits begin at a byte
        self._bit_starts = np.cumsum(n_bytes) - n_bytes
        self._lengths = np.minimum(lengths, row)
        too_long = np.flatnonzero(lengths > row)
        silent = [i for i in too_long if not self._is_answer(i)[1:].any()]
        self.cut, self.left_out = len(too_long) - len(silent), len(silent)
        kept = np.setdiff1d(np.arange(len(lengths)), silent)
        self.rows = [kept[row] for row in pack(self._lengths[kept], row)]
        self.filled = int(self._lengths[kept].sum())  # tokens

    def _is_answer(self, i: int) -> np.ndarray:
        n, start = int(self._lengths[i]), int(self._bit_starts[i])
        return np.unpackbits(self._answers[start : start - (-n // 8)], count=n)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """int32 (rows, 3, T + 1): tokens, whether each counts, and its conversation's number.

        What is left of a row is one more conversation, of which nothing counts.
        """
        result = np.zeros((len(index), 3, self.row), np.int32)
        for planes, i in zip(result, index, strict=True):
            planes[2] = len(self.rows[i])
            for number, (item, first, start, stop) in enumerate(self.spans(i)):
                planes[0, start:stop] = self._tokens[first : first + stop - start]
                planes[1, start:stop] = self._is_answer(item)
                planes[2, start:stop] = number
        return result

    def spans(self, index: int) -> list[tuple[int, int, int, int]]:
        """Of the conversations of one row: number, first token, and start and stop in the row."""
        items = self.rows[index]
        stops = np.cumsum(self._lengths[items])
        columns = (items, self._starts[items], stops - self._lengths[items], stops)
        return [tuple(map(int, span)) for span in zip(*columns, strict=True)]
