"""From a prepared store to batches: ``batch(seed, step)`` is a pure function, on any host.

Axes: N steps, B rows of the global batch, T positions.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.command import BadInput, check_folder, write_atomically
from lm.config import DataConfig
from lm.data import chat, corpora, mixture, order, store, tokenizers
from lm.data.corpora import Corpus
from lm.data.packing import Packed
from lm.data.tokenizers import Tokenizer

Rows = slice | np.ndarray  # which rows of a batch: those that this host's devices hold
VALIDATION_SEED = 0  # the fixed choice of held-out windows, whatever a run's own seed


class Batch(NamedTuple):
    """int32 tokens; position t of ``targets_BT`` is the token after position t of ``inputs_BT``.

    ``weights_BT`` (float32, None = all 1) is 0 where a target does not count: in padding rows,
    where it belongs to another document than its input, and where it is no answer in a
    conversation. ``segments_BT`` numbers the documents of a row from 0 and ``positions_BT`` counts
    from each one's start (from the window's start for the first); both are None unless documents
    are kept apart.
    """

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray | None = None
    segments_BT: np.ndarray | None = None
    positions_BT: np.ndarray | None = None


class Source(NamedTuple):
    """One corpus: its share of the rows, its store, and each split as a view (window, T + 1).

    Conversations are packed into rows of T + 1 instead.
    """

    name: str
    weight: float
    store: store.Store
    windows: dict[str, np.ndarray | Packed]


class Dataset:
    """Windows of ``seq_len`` + 1 tokens at stride ``seq_len``, or rows of whole conversations.

    Made by ``open_dataset``.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, sources: list[Source]):
        self.config = config
        self.tokenizer = tokenizer
        self.sources = sources
        self.vocab_size: int = tokenizer.vocab_size
        self.token_bytes: np.ndarray = tokenizer.token_bytes  # int32[vocab_size]
        keys = [s.store.header["corpus_key"][:8] for s in sources]
        if len(sources) > 1:
            keys = [f"{key}*{s.weight:.6g}" for key, s in zip(keys, sources, strict=True)]
        self.fingerprint = (
            f"{config.corpus}:{'+'.join(keys)}/{config.tokenizer}:{tokenizer.fingerprint}"
        )
        self._weights = [s.weight for s in sources]
        # Where one source has conversations, every row says what counts and which document it is.
        self._has_chats = any(isinstance(s.windows["train"], Packed) for s in sources)

    @property
    def train_tokens(self) -> int:
        """Targets in one epoch of all sources."""
        return sum(self._targets(s) for s in self.sources)

    def _targets(self, source: Source) -> int:
        return len(source.windows["train"]) * self.config.seq_len

    @property
    def statistics(self) -> dict:
        """Documents, bytes and tokens per corpus, source and split, as in the stores' headers."""
        return {
            "schema": store.SCHEMA,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.vocab_size,
            "corpora": {
                s.name: {"weight": s.weight, "sources": s.store.header["sources"]}
                for s in self.sources
            },
        }

    def epochs(self, tokens: float) -> dict[str, float]:
        """Passes over each corpus in a run of ``tokens`` tokens."""
        sizes = {s.name: self._targets(s) for s in self.sources}
        return mixture.epochs(tokens, sizes, {s.name: s.weight for s in self.sources})

    def batch(self, seed: int, step: int, batch_size: int, rows: Rows = slice(None)) -> Batch:
        """The rows ``rows`` of the ``step``-th global batch of ``batch_size`` rows; axes B, T."""
        batch = self.batches(seed, step, 1, batch_size, rows)
        return Batch(*(None if x is None else x[0] for x in batch))

    def batches(
        self, seed: int, first_step: int, n_steps: int, batch_size: int, rows: Rows = slice(None)
    ) -> Batch:
        """The rows ``rows`` of ``n_steps`` consecutive batches in one gather; axes N, B, T.

        Every window of a corpus is read once an epoch, in an order drawn anew for each.
        """
        steps_N1 = np.arange(first_step, first_step + n_steps, dtype=np.int64)[:, None]
        rows_NB = steps_N1 * batch_size + np.arange(batch_size, dtype=np.int64)[rows]
        rows = self._train_rows(rows_NB.ravel(), seed)
        return self._batch(rows.reshape(*rows_NB.shape, *rows.shape[1:]))

    def _empty(self, n: int) -> np.ndarray:
        """Rows of nothing: int32 (n, T + 1), or with conversations (n, 3, T + 1)."""
        planes = (3,) if self._has_chats else ()
        return np.zeros((n, *planes, self.config.seq_len + 1), np.int32)

    def _read(self, source: Source, split: str, index: np.ndarray) -> np.ndarray:
        """Rows of a source, in the shape of ``_empty``: tokens, and what ``Packed`` gives too."""
        found = source.windows[split][index]
        if self._has_chats and found.ndim == 2:
            found = np.stack([found, np.ones_like(found), self._documents(found)], 1)
        return found

    def _documents(self, tokens: np.ndarray) -> np.ndarray:
        """The number of each token's document in its row; 0 where documents aren't respected."""
        # Only the mark itself ends a document: no text encodes to it.
        ends = (tokens == self.tokenizer.end_of_text) & self.config.respect_documents
        return np.cumsum(ends, axis=-1, dtype=np.int32) - ends

    def windows(self, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of rows, and which of its windows each is: where training reads them.

        Row r of step k is number k * batch_size + r.
        """
        source_of, window_of = mixture.assign(rows, self._weights, seed)
        for i, source in enumerate(self.sources):
            mine, n = source_of == i, len(source.windows["train"])
            epoch, index = np.divmod(window_of[mine], n)
            if epoch.size and epoch[0] == epoch[-1]:
                epoch = epoch[:1]  # almost always: one key instead of one a row
            window_of[mine] = order.permute(index, n, order.key(seed, i, epoch))
        return source_of, window_of

    def _train_rows(self, rows: np.ndarray, seed: int) -> np.ndarray:
        source_of, window_of = self.windows(rows, seed)
        result = self._empty(len(rows))
        for i, source in enumerate(self.sources):
            mine = source_of == i
            result[mine] = self._read(source, "train", window_of[mine])
        return result

    def _batch(self, rows: np.ndarray, weights: np.ndarray | None = None) -> Batch:
        """Of rows as ``_empty`` has them; ``weights`` (..., T) of their targets."""
        tokens = rows[..., 0, :] if self._has_chats else rows
        inputs, targets = tokens[..., :-1], tokens[..., 1:]
        if not self.config.keeps_apart:
            return Batch(inputs, targets, weights)
        documents = rows[..., 2, :] if self._has_chats else self._documents(tokens)
        segments = documents[..., :-1]
        within = (segments == documents[..., 1:]).astype(np.float32)
        if self._has_chats:
            within *= rows[..., 1, 1:]
        index = np.arange(inputs.shape[-1], dtype=np.int32)
        starts = np.zeros_like(inputs)
        starts[..., 1:] = np.where(segments[..., 1:] != segments[..., :-1], index[1:], 0)
        positions = index - np.maximum.accumulate(starts, axis=-1)
        weights = within if weights is None else weights * within
        return Batch(inputs, targets, weights, segments, positions)

    def validation(self, batch_size: int, rows: Rows = slice(None)) -> Iterator[Batch]:
        """The fixed validation windows: ``validation_tokens`` in all, corpora by weight.

        In batches of ``batch_size`` rows, of each the rows ``rows``. Weights are always there; the
        last batch is filled up with rows of weight 0.
        """
        return (batch for batch, *_ in self._held_out("validation", batch_size, rows))

    def test(self, batch_size: int, rows: Rows = slice(None)) -> Iterator[Batch]:
        """As ``validation``, of the test split (all of it where that has fewer tokens)."""
        return (batch for batch, *_ in self._held_out("test", batch_size, rows))

    def documents(
        self, split: str, batch_size: int
    ) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """The batches of ``validation``, of any split, and whose each target is.

        That is its source's place in ``sources``, (B,), and the number of its document among the
        source's, (B, T); rows that fill a batch up have source -1.
        """
        ends = [
            None
            if isinstance(source.windows[split], Packed)
            else np.flatnonzero(source.store.tokens[split] == self.tokenizer.end_of_text)
            for source in self.sources
        ]
        t = self.config.seq_len
        for batch, source_B, window_B in self._held_out(split, batch_size, slice(None)):
            document_BT = np.zeros(batch.targets_BT.shape, np.int64)
            for i, ends_of_source in enumerate(ends):
                mine, first = source_B == i, window_B[source_B == i, None] * t
                document_BT[mine] = (
                    first + batch.segments_BT[mine]
                    if ends_of_source is None
                    else np.searchsorted(ends_of_source, first + 1 + np.arange(t))
                )
            yield batch, source_B, document_BT

    def _held_out(
        self, split: str, batch_size: int, rows: Rows
    ) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Each batch, and of its rows the source (-1: none) and the window in it."""
        chosen = self._chosen(split)
        source_of = np.repeat(np.arange(len(chosen)), [len(windows) for windows in chosen])
        window_of = np.concatenate([np.sort(windows) for windows in chosen])
        for first in range(0, len(window_of), batch_size):
            places = np.arange(first, first + batch_size)[rows]
            there = places < len(window_of)
            places = np.where(there, places, 0)
            sources = np.where(there, source_of[places], -1)
            rows_there = self._empty(len(places))
            for i, source in enumerate(self.sources):
                mine = sources == i
                rows_there[mine] = self._read(source, split, window_of[places[mine]])
            weights = np.zeros((len(places), self.config.seq_len), np.float32)
            weights[there] = 1
            yield self._batch(rows_there, weights), sources, window_of[places]

    def _chosen(self, split: str) -> list[np.ndarray]:
        """The held-out windows of each corpus, drawn from the whole split and so all sources."""
        wanted = self.config.validation_tokens // self.config.seq_len
        result = []
        for i, source in enumerate(self.sources):
            n_windows = len(source.windows[split])
            n = min(round(wanted * source.weight), n_windows)
            keys = order.key(VALIDATION_SEED, i)
            result.append(order.permute(np.arange(n, dtype=np.int64), n_windows, keys))
        return result


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the corpora of ``config``, preparing what is missing (download, tokenizer, store).

    Prepared, it takes milliseconds and works offline. Raises ``BadInput`` with one line that names
    what is wrong, and ``OSError`` where the disk is full; neither leaves anything half-written
    behind.
    """
    check_folder("data.data_dir", config.data_dir, "data")
    data_dir, named = Path(config.data_dir), _named(config)
    total = sum(weight for _, weight in named)
    surveys: dict[str, store.Survey] = {}
    tokenizer = _tokenizer(config.tokenizer, [c for c, _ in named], data_dir, surveys)
    template = open_template(config, tokenizer) if config.has_chats else None
    sources = []
    for corpus, weight in named:
        if corpus.template:
            corpus = _written_by(corpus, template)
        opened = _opened(corpus, tokenizer, data_dir, surveys)
        windows = {s: _windows(opened, s, config.seq_len) for s in corpora.SPLITS}
        sources.append(Source(corpus.name, weight / total, opened, windows))
    _check(config, sources)
    for corpus, _ in named:
        corpus.remember()
    return Dataset(config, tokenizer, sources)


def open_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer alone; the corpora are touched where it is, or is to be, learned from them.

    Raises ``BadInput`` as ``open_dataset`` does.
    """
    learned = tokenizers.bpe_size(config.tokenizer) is not None
    named = [corpus for corpus, _ in _named(config)] if learned else []
    return _tokenizer(config.tokenizer, named, Path(config.data_dir), {})


def open_template(config: DataConfig, tokenizer: Tokenizer) -> chat.Template:
    """What writes conversations as text for ``tokenizer``, which ``config`` names."""
    return chat.open_template(config.tokenizer, tokenizer, config.chat_template)


def _written_by(corpus: Corpus, template: chat.Template) -> Corpus:
    key = hashlib.sha256(f"{corpus.key} {template.fingerprint}".encode()).hexdigest()
    return corpus._replace(key=key, template=template)


def _named(config: DataConfig) -> list[tuple[Corpus, float]]:
    """The corpora and their weights."""
    data_dir = Path(config.data_dir)
    if config.corpus != "mixture":
        return [(corpora.find(config.corpus, config.files, data_dir), 1.0)]
    named = [(corpora.find(name, "", data_dir), weight) for name, weight in config.mixture]
    if len({corpus.name for corpus, _ in named}) < len(named):
        raise BadInput("data.mixture: names a corpus twice; give it one weight")
    return named


def _tokenizer(
    name: str, named: list[Corpus], data_dir: Path, surveys: dict[str, store.Survey]
) -> Tokenizer:
    if name == "bytes":
        return tokenizers.ByteTokenizer()
    size = tokenizers.bpe_size(name)
    if size is None:
        if not name.endswith(".json"):
            raise BadInput(
                f"data.tokenizer = {name!r}: must be bytes, bpe:SIZE, or a tokenizer.json's path"
            )
        return tokenizers.JsonTokenizer(name)
    # One tokenizer for a whole mixture, learned from all of its training text.
    path = data_dir / "tokenizers" / f"bpe-{size}-{_joint_key(named)}.json"
    if not path.exists():
        with store.preparing(data_dir):
            if not path.exists():
                texts = (t for c in named for t in store.training_texts(c, _survey(c, surveys)))
                write_atomically(path, tokenizers.train_bpe(texts, size))
    return tokenizers.JsonTokenizer(path, name)


def _joint_key(named: list[Corpus]) -> str:
    return hashlib.sha256(" ".join(c.key for c in named).encode()).hexdigest()[:12]


def _survey(corpus: Corpus, surveys: dict[str, store.Survey]) -> store.Survey:
    if corpus.key not in surveys:
        surveys[corpus.key] = store.survey(corpus)
    return surveys[corpus.key]


def _opened(
    corpus: Corpus, tokenizer: Tokenizer, data_dir: Path, surveys: dict[str, store.Survey]
) -> store.Store:
    path = store.path_of(corpus, tokenizer, data_dir)
    if found := store.load(path):
        return found
    with store.preparing(data_dir):
        if not (found := store.load(path)):  # another process may have been first
            store.write(path, corpus, tokenizer, _survey(corpus, surveys))
            found = store.load(path)
    return found


def _windows(opened: store.Store, split: str, seq_len: int) -> np.ndarray | Packed:
    """View (window, T + 1) at stride T: the last token of a window is the first of the next."""
    if opened.lengths:
        return Packed(opened, split, seq_len + 1)
    tokens = opened.tokens[split]
    if len(tokens) < seq_len + 1:
        return np.empty((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def _check(config: DataConfig, sources: list[Source]) -> None:
    for source in sources:
        windows = source.windows
        for split in ("train", "validation"):
            if isinstance(windows[split], Packed) and not len(windows[split]):
                raise BadInput(
                    f"data.seq_len = {config.seq_len}: no conversation of {source.name}"
                    f" ({split}) comes to an answer within it"
                )
            if not len(windows[split]):
                tokens = min(len(source.store.tokens[s]) for s in ("train", "validation"))
                raise BadInput(
                    f"data.seq_len = {config.seq_len}: must be at most {tokens - 1}, since corpus"
                    f" {source.name} has {tokens} tokens in its smaller of train and validation"
                )
        # The largest setting that every source can serve at its weight.
        most = int(len(windows["validation"]) / source.weight) * config.seq_len
        if config.validation_tokens // config.seq_len * source.weight > len(windows["validation"]):
            raise BadInput(
                f"data.validation_tokens = {config.validation_tokens}: must be at most {most}, what"
                f" corpus {source.name} holds out at data.seq_len = {config.seq_len}"
            )
    if config.validation_tokens < config.seq_len:
        raise BadInput(
            f"data.validation_tokens = {config.validation_tokens}: must be at least"
            f" data.seq_len = {config.seq_len}"
        )
