"""Which documents a row of a training batch was cut from: what to look at when a step goes bad."""

from typing import NamedTuple

import numpy as np

from lm.data.dataset import Dataset
from lm.data.packing import Packed

CHARACTERS, TOKENS = 120, 200  # of a document's start that are told, and decoded for it
CHUNK = 2**24  # tokens looked through at a time


class Excerpt(NamedTuple):
    """A document in a row."""

    source: str  # the corpus
    document: int  # its number among the corpus's training documents, from 0
    start: int  # of the row's targets, those from `start` to before `stop` are its
    stop: int
    text: str  # how it begins


def excerpts(dataset: Dataset, seed: int, step: int, batch_size: int, row: int) -> list[Excerpt]:
    """The documents of one row of ``dataset.batch(seed, step, batch_size)``, in order."""
    (i,), (window,) = dataset.windows(np.array([step * batch_size + row], np.int64), seed)
    source, n_targets = dataset.sources[i], dataset.config.seq_len
    tokens, windows = source.store.tokens["train"], source.windows["train"]
    if isinstance(windows, Packed):
        spans = windows.spans(int(window))
    else:
        first, mark = int(window) * n_targets, dataset.tokenizer.end_of_text
        spans = _spans(tokens, first, n_targets + 1, mark)
    found = []
    for document, begin, start, stop in spans:
        shown = tokens[begin : begin + TOKENS]
        ends = np.flatnonzero(shown == dataset.tokenizer.end_of_text)
        text = dataset.tokenizer.decode(shown[: ends[0]] if ends.size else shown)
        text = " ".join(text.split())[:CHARACTERS]
        # Of the first token there is no target.
        if stop - 1 > (start := max(0, start - 1)):
            found.append(Excerpt(source.name, document, start, stop - 1, text))
    return found


def _spans(tokens: np.ndarray, first: int, n: int, mark: int) -> list[tuple[int, int, int, int]]:
    """Of the documents in ``n`` tokens from ``first`` on: number, first token, and start and stop.

    The last two are places among the ``n``.
    """
    number = begin = 0
    for at in range(0, first, CHUNK):
        ends = np.flatnonzero(tokens[at : min(at + CHUNK, first)] == mark)
        number += ends.size
        begin = at + int(ends[-1]) + 1 if ends.size else begin
    stops = [int(end) + 1 for end in np.flatnonzero(tokens[first : first + n] == mark)]
    starts = [0, *stops]
    begins = [begin, *(first + stop for stop in stops)]
    pairs = zip(begins, starts, [*stops, n], strict=True)
    return [(number + i, b, start, stop) for i, (b, start, stop) in enumerate(pairs)]
