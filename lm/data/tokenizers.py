"""Text to token ids and back: bytes, byte-level BPE, or any Hugging Face ``tokenizer.json``.

Every tokenizer has ``name, vocab_size, end_of_text, prefix, special_names, fingerprint,
token_bytes, encode, encode_batch, encode_marked, decode``. ``prefix`` is what its maker puts before
a text (Llama's <s>), which ``encode`` leaves out. ``token_bytes`` (int32[vocab_size]) is how many
bytes of text each id stands for, so that bits per byte = nats / (ln 2 * sum of token_bytes over the
targets); the end of text stands for none.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lm.command import BadInput

END_OF_TEXT = "<|endoftext|>"
# What other makers of tokenizers call it, in the order in which they are looked for.
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class ByteTokenizer:
    """UTF-8 bytes are ids 0..255, and ``<|endoftext|>`` is 256."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256
    prefix = ()
    fingerprint = "bytes-257"
    token_bytes = np.array([1] * 256 + [0], np.int32)
    special_names = (END_OF_TEXT,)

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint16[len(text in UTF-8)]; no end of text is added."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of ``text``, where a special token's name is that token, and the character at which
        each begins; int64 both."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for i, part in enumerate(text.split(END_OF_TEXT)):
            if i:
                ids.append(self.end_of_text)
                starts.append(at)
                at += len(END_OF_TEXT)
            for character in part:
                data = _utf8(character)
                ids += data
                starts += [at] * len(data)
                at += 1
        return np.array(ids, np.int64), np.array(starts, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; bytes that are not UTF-8 (a cut character) become U+FFFD.

        Ids beyond the tokenizer's, which a larger embedding has, are no text.
        """
        parts = []
        for i in np.asarray(ids, np.int64).tolist():
            if i <= self.end_of_text:
                parts.append(END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]))
        return b"".join(parts).decode(errors="replace")


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``: byte-level BPE (GPT-2's own format included) or any other.

    Documents are encoded as plain text: a special token's name inside a document is not that token.
    Raises ``BadInput`` naming ``path`` where it cannot be read or knows no end of text.
    """

    def __init__(self, path: str | Path, name: str | None = None):
        from tokenizers import Tokenizer  # 50 ms that byte-level runs need not pay

        path = Path(path)
        try:
            content = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(content)
        except OSError as error:
            raise BadInput(f"tokenizer {path}: cannot be read ({error.strerror})") from error
        except Exception as error:  # the Rust side raises bare Exception
            raise BadInput(f"tokenizer {path}: not a tokenizer.json ({error})") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.name = name or str(path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        known = [n for n in END_OF_TEXT_NAMES if n in vocabulary]
        if not known:
            raise BadInput(
                f"tokenizer {path}: has no end of text; one of {', '.join(END_OF_TEXT_NAMES)}"
            )
        self.end_of_text = vocabulary[known[0]]
        encode = self._tokenizer.encode
        plain, whole = (encode("a", add_special_tokens=added).ids for added in (False, True))
        self.prefix = tuple(whole[: whole.index(plain[0])]) if plain else ()
        self.path, self.content = path, content  # of the tokenizer.json
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:12]
        self.token_bytes = _token_bytes(json.loads(content), vocabulary, self.vocab_size)
        added = json.loads(content).get("added_tokens", [])
        self.special_names = tuple(t["content"] for t in added if t.get("special"))

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, uint32; no special token is added."""
        _utf8(text)
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def encode_marked(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As ``ByteTokenizer.encode_marked``."""
        _utf8(text)
        self._tokenizer.encode_special_tokens = False
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        starts = [start for start, _ in found.offsets]
        return np.array(found.ids, np.int64), np.array(starts, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens by name."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


Tokenizer = ByteTokenizer | JsonTokenizer


def _utf8(text: str) -> bytes:
    """Raises ``BadInput`` for half of a surrogate pair, as a flag's bad bytes become."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{text[error.start]!r} in a text: is no character") from error


def decode_after(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Text of ``ids`` that follow ``prompt``: alone, SentencePiece's would lose a first blank."""
    return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


def _token_bytes(settings: dict, vocabulary: dict[str, int], vocab_size: int) -> np.ndarray:
    """Bytes that each id stands for, by the vocabulary's way of spelling; 0 for specials."""
    special = {t["content"] for t in settings.get("added_tokens", []) if t.get("special")}
    byte_level = '"ByteLevel"' in json.dumps(
        [settings.get("pre_tokenizer"), settings.get("decoder")]
    )
    added = {t["content"] for t in settings.get("added_tokens", [])}
    result = np.zeros(vocab_size, np.int32)
    for token, i in vocabulary.items():
        if token in special:
            continue
        if token in added:
            result[i] = len(token.encode())
        elif byte_level:
            result[i] = len(token)  # GPT-2's alphabet spells each byte as one character
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            result[i] = 1  # SentencePiece's byte fallback
        else:  # SentencePiece spells a space as U+2581, WordPiece a continuation as ##
            result[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
    return result


def train_bpe(texts: Iterable[str], vocab_size: int, smallest_count: int = 2) -> str:
    """Learns byte-level BPE of ``vocab_size`` ids; returns the content of a ``tokenizer.json``.

    The 256 bytes and ``<|endoftext|>`` count. Raises ``BadInput`` where ``texts`` hold too few
    pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise BadInput(f"tokenizer bpe:{vocab_size}: must be at least 258 (256 bytes, one special)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=smallest_count,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise BadInput(
            f"tokenizer bpe:{vocab_size}: the training text supports at most bpe:{reached}"
        )
    return tokenizer.to_str()


def bpe_size(name: str) -> int | None:
    """The vocabulary size in ``bpe:SIZE``, or None where ``name`` is another kind of tokenizer."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return None
    if not size.isdigit():
        raise BadInput(f"data.tokenizer = {name!r}: must look like bpe:4096")
    return int(size)
