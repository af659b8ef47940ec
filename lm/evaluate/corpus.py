"""Loss on text: in all, per source and per position, with standard errors between documents."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import data
from lm.command import BadInput, one_of
from lm.config import replace
from lm.data import corpora, store
from lm.evaluate.scorer import Scorer
from lm.score import Ratio, Score

DOCUMENTS = 64  # that are judged together


class Document(NamedTuple):
    """What a model made of one document: of every token that counts, in order."""

    source: str
    nats: np.ndarray
    n_bytes: np.ndarray
    positions: np.ndarray  # tokens before it that the model saw, less one


def held_out(
    scorer: Scorer, split: str = "validation", seq_len: int = 0, tokens: int = 0
) -> Iterator[Document]:
    """The windows of a run's own data: those that training evaluates, unless told otherwise.

    Args:
      split: train, validation or test.
      seq_len: of the windows (0: the run's own).
      tokens: how many in all (0: data.validation_tokens).

    A document that several windows hold a part of is one. Raises ``BadInput`` as
    ``lm.data.open_dataset`` does.
    """
    one_of("--split", split, corpora.SPLITS)
    given = {"seq_len": seq_len, "validation_tokens": tokens}
    config = replace(scorer.config, data={k: v for k, v in given.items() if v})
    if config.data.seq_len > scorer.max_length:
        raise BadInput(f"seq_len = {seq_len}: must be at most max_length = {scorer.max_length}")
    dataset = data.open_dataset(config.data)

    def pieces() -> Iterator[tuple[tuple[int, int], Document]]:
        rows = scorer.rows(config.data.seq_len)
        for batch, source_B, document_BT in dataset.documents(split, rows):
            nats_BT = -np.asarray(scorer.judge(batch).log_p_BT)
            for b in np.flatnonzero(source_B >= 0):
                counts = np.flatnonzero(batch.weights_BT[b])
                borders = np.flatnonzero(np.diff(document_BT[b, counts])) + 1
                for at in np.split(counts, borders):
                    key = (source_B[b], document_BT[b, at[0]])
                    n_bytes = dataset.token_bytes[batch.targets_BT[b, at]]
                    name = dataset.sources[source_B[b]].name
                    kept_apart = batch.positions_BT is not None
                    before = batch.positions_BT[b, at] if kept_apart else at
                    yield key, Document(name, nats_BT[b, at], n_bytes, before)

    for _, parts in itertools.groupby(pieces(), lambda piece: piece[0]):
        parts = [part for _, part in parts]
        yield Document(parts[0].source, *map(np.concatenate, list(zip(*parts, strict=True))[1:]))


def texts(
    scorer: Scorer, corpus: str, split: str = "all", stride: int = 0, most: int = 0
) -> Iterator[Document]:
    """Each document of a corpus on its own, as ``rolling`` cuts it.

    Args:
      corpus: as ``data.corpus`` (pd_english, text:GLOB, a TFDS name).
      split: all, or the part that ``lm.data`` would train on, validate or test with.
      stride: of windows of ``max_length`` tokens, for longer documents (0: ``max_length``).
      most: documents, the first ones (0: all).

    Raises ``BadInput`` for a corpus that is not there, or that holds conversations.
    """
    one_of("--split", split, ("all", *corpora.SPLITS))
    found = corpora.find(corpus, "", Path(scorer.config.data.data_dir))
    if found.template or corpus.startswith("chat"):
        raise BadInput(f"--corpus={corpus}: must be text; conversations are judged as a run's own")
    documents: Iterable[corpora.Document] = found.read()
    if split != "all":
        splits = store.survey(found).splits
        documents = (d for d, s in zip(found.read(), splits, strict=True) if s == split)
    documents = itertools.islice(documents, most or None)
    while chunk := list(itertools.islice(documents, DOCUMENTS)):
        encoded = scorer.tokenizer.encode_batch([document.text for document in chunk])
        pairs, owners = [], []
        for i, ids in enumerate(encoded):
            windows = rolling(scorer, ids.tolist(), stride)
            pairs += windows
            owners += [i] * len(windows)
        judged = list(zip(owners, pairs, scorer.log_likelihoods(pairs), strict=True))
        for i, parts in itertools.groupby(judged, lambda part: part[0]):
            nats, n_bytes, positions = [], [], []
            for _, (context, continuation), scored in parts:
                nats += scored.token_log_probs
                n_bytes.append(scorer.tokenizer.token_bytes[continuation])
                positions.append(len(context) - 1 + np.arange(len(continuation)))
            yield Document(
                chunk[i].source, -np.array(nats), np.concatenate(n_bytes), np.concatenate(positions)
            )


def rolling(
    scorer: Scorer, tokens: Sequence[int], stride: int = 0
) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) pairs in which each token of a text is judged once.

    Before the text stands what its tokenizer puts there, else end of text. A text beyond
    ``max_length`` is cut into windows of that length, of which each but the first judges ``stride``
    tokens more (0: ``max_length``, where only the last has a long context, as in lm-eval). Raises
    ``BadInput`` for a stride beyond ``max_length``.
    """
    length = scorer.max_length
    if not 0 <= stride <= length:
        raise BadInput(f"stride = {stride}: must lie in [1, {length}], or be 0")
    text = [*(scorer.tokenizer.prefix or (scorer.tokenizer.end_of_text,)), *tokens]
    first, end, pairs = len(text) - len(tokens), length + 1, []
    while first < len(text):
        end = min(end, len(text))
        pairs.append((text[max(0, end - 1 - length) : first], text[first:end]))
        first, end = end, end + (stride or length)
    return pairs


def summarise(documents: Iterable[Document], edges: Sequence[int] | None = None) -> dict[str, Any]:
    """What ``lm.evaluate --json`` tells of a corpus; errors are None with fewer than two documents.

    ``positions`` has an entry for each range of positions that begins at one of ``edges``
    (ascending from 0; default: 0, 1, 2, 4, 8, ...).
    """
    edges = np.array([0, *(1 << np.arange(31))] if edges is None else edges)
    loss, bits, by_position = Ratio(), Ratio(), Ratio(len(edges))
    sources: dict[str, tuple[Ratio, Ratio]] = {}
    for source, nats, n_bytes, positions in documents:
        total = float(nats.sum(dtype=np.float64))
        for of_loss, of_bits in ((loss, bits), sources.setdefault(source, (Ratio(), Ratio()))):
            of_loss.add(total, len(nats))
            of_bits.add(total / math.log(2), n_bytes.sum())
        bins = np.searchsorted(edges, positions, "right") - 1
        sums = (np.bincount(bins, weights, len(edges)) for weights in (nats, None))
        by_position.add(*sums)
    if not loss.n:
        raise BadInput("a corpus without a token to judge")
    columns = (by_position.value, by_position.standard_error, by_position.n, by_position.clusters)
    ends = [*(edges[1:] - 1), None]
    return {
        **_entry(loss, bits),
        "sources": {name: _entry(*ratios) for name, ratios in sorted(sources.items())},
        "positions": [
            {"first": int(first), "last": None if last is None else int(last), "loss": float(value),
             "standard_error": _number(error), "tokens": int(n), "documents": int(g)}
            for first, last, value, error, n, g in zip(edges, ends, *columns, strict=True)
            if n
        ],
    }  # fmt: skip


def _entry(loss: Ratio, bits: Ratio) -> dict[str, Any]:
    found = Score(float(loss.value), float(bits.value), int(loss.n))
    return {
        "loss": found.loss,
        "standard_error": _number(loss.standard_error),
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "bits_per_byte_standard_error": _number(bits.standard_error),
        "tokens": found.tokens,
        "bytes": int(bits.n),
        "documents": int(loss.clusters),
    }


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)
