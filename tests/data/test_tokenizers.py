import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.command import BadInput
from lm.data import tokenizers

# The lecture's example: {low: 5, lower: 2, newest: 6, widest: 3}.
WORDS = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = tokenizers.ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_specials():
    tokenizer = tokenizers.ByteTokenizer()
    assert tokenizer.vocab_size == 257 and tokenizer.end_of_text == 256
    assert tokenizer.token_bytes.shape == (257,) and tokenizer.token_bytes[256] == 0
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert 256 not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode(list("é".encode()[:1])) == "\ufffd"


def test_bpe_worked_example():
    content = tokenizers.train_bpe(WORDS, 257 + 7)
    merges = [tuple(m) for m in json.loads(content)["model"]["merges"]]
    assert merges[:4] == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]
    # Count 6 ties; Hugging Face's takes (e, w) and (n, ew) where the lecture takes (n, e), (ne, w).
    assert merges[4:6] == [("e", "w"), ("n", "ew")]


def test_bpe_always_merges_a_most_frequent_pair():
    merges = json.loads(tokenizers.train_bpe(WORDS, 257 + 12))["model"]["merges"]
    words = {tuple(word): WORDS.count(word) for word in WORDS}
    merged_counts = []
    for first, second in merges:
        pairs = {}
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + count
        assert pairs[first, second] == max(pairs.values())
        merged_counts.append(pairs[first, second])
        words = {_merged(word, first, second): count for word, count in words.items()}
    assert merged_counts[:6] == [9, 9, 7, 7, 6, 6]


def _merged(word, first, second):
    result = []
    for part in word:
        if result and (result[-1], part) == (first, second):
            result[-1] += part
        else:
            result.append(part)
    return tuple(result)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    text = "In the beginning God created the heaven and the earth. Café, naïve, 日本語! " * 20
    path.write_text(tokenizers.train_bpe([text, "the lowest of the low " * 9], 300))
    return tokenizers.JsonTokenizer(path)


def test_bpe_size_is_the_size_asked_for(bpe):
    assert bpe.vocab_size == 300 and bpe.token_bytes.shape == (300,)
    assert bpe.token_bytes[bpe.end_of_text] == 0
    assert np.sum(bpe.token_bytes == 1) == 256


@given(st.text())
def test_bpe_round_trip_and_bytes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())


def test_half_of_a_surrogate_pair_is_refused(bpe):
    for tokenizer in (bpe, tokenizers.ByteTokenizer()):
        for encode in (tokenizer.encode, tokenizer.encode_marked):
            with pytest.raises(BadInput, match=r"'\\ud800' in a text: is no character"):
                encode("a\ud800b")


def test_bpe_saved_and_reloaded(bpe, tmp_path):
    again = tokenizers.JsonTokenizer(bpe.name)
    assert again.fingerprint == bpe.fingerprint
    texts = ["the heaven", "日本語", ""]
    for a, b in zip(bpe.encode_batch(texts), again.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(bpe.encode_batch(texts)[0], bpe.encode(texts[0]))


def test_end_of_text_inside_a_document_is_text(bpe):
    ids = bpe.encode("a <|endoftext|> b")
    assert bpe.end_of_text not in ids
    assert bpe.decode(ids) == "a <|endoftext|> b"


def gpt2_json():
    """A tokenizer.json as GPT-2's own: merges as strings, a byte-level post-processor."""

    def spell(text):
        return "".join(chr(288) if c == " " else c for c in text)

    alphabet = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet += [chr(256 + i) for i in range(68)]
    merges = [("l", "o"), ("lo", "w"), (spell(" "), "low"), ("e", "r")]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    vocabulary["<|endoftext|>"] = len(vocabulary)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": vocabulary["<|endoftext|>"], "content": "<|endoftext|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level | {"trim_offsets": False},
        "decoder": level | {"add_prefix_space": True},
        "model": {
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [" ".join(pair) for pair in merges],
        },
    }  # fmt: skip


def test_gpt2_format(tmp_path):
    path = tmp_path / "gpt2.json"
    path.write_text(json.dumps(gpt2_json()))
    tokenizer = tokenizers.JsonTokenizer(path)
    vocabulary = gpt2_json()["model"]["vocab"]
    assert tokenizer.vocab_size == 261 and tokenizer.end_of_text == 260
    ids = tokenizer.encode("low lower").tolist()
    assert ids == [vocabulary["low"], vocabulary["\u0120low"], vocabulary["er"]]
    assert tokenizer.decode(ids) == "low lower"
    assert tokenizer.token_bytes[ids].tolist() == [3, 4, 2]


def test_sentencepiece_vocabulary_bytes(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "\u2581hi": 5, "é": 6}
    special = [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False}
               for t, i in vocabulary.items() if i < 3]  # fmt: skip
    settings = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True,
                  "unk_token": "<unk>"},
    }  # fmt: skip
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    tokenizer = tokenizers.JsonTokenizer(path)
    assert tokenizer.end_of_text == 2
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 1, 1, 3, 2]


def metaspace_json(size=12):
    """Words as SentencePiece has them, blank first, and the bytes of 日; <s> stands before."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = ["<unk>", "<s>", "</s>", *(f"\u2581{w}" for w in "a the cat sat on 日".split())]
    pieces += ["<0xE6>", "<0x97>", "<0xA5>"]
    pieces += [f"\u2581w{i}" for i in range(len(pieces), size)]
    inner = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    inner.add_special_tokens(pieces[:3])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip, blank = decoders.Strip(" ", 1, 0), decoders.Replace("\u2581", " ")
    inner.decoder = decoders.Sequence([blank, decoders.ByteFallback(), decoders.Fuse(), strip])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return inner.to_str()


def test_what_follows_a_prompt_keeps_its_first_blank(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_text(metaspace_json())
    tokenizer = tokenizers.JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.prefix == (1,) and tokenizer.encode("the cat").tolist() == [4, 5]
    assert tokenizer.decode([6, 7]) == "sat on"
    for prompt in ([4, 5], [1, 4, 5], [4, 9, 10, 11]):  # 日 of three bytes at the end
        assert tokenizers.decode_after(tokenizer, prompt, [6, 7]) == " sat on"
        assert tokenizers.decode_after(tokenizer, prompt, []) == ""
    for one in (bpe, tokenizers.ByteTokenizer()):
        prompt, ids = one.encode("the ne"), one.encode("wer 日")
        assert tokenizers.decode_after(one, prompt, ids) == "wer 日"


def test_what_stands_before_a_text(bpe, tmp_path):
    """Llama's template has it, BERT's has something behind too; no document is encoded with it."""
    from tokenizers import Tokenizer, processors

    assert bpe.prefix == tokenizers.ByteTokenizer().prefix == ()
    for single in ("<|endoftext|> $A", "<|endoftext|> $A the"):
        inner = Tokenizer.from_str(bpe.content)
        known = [(name, inner.token_to_id(name)) for name in ("<|endoftext|>", "the")]
        assert None not in dict(known).values()
        inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
        inner.save(str(tmp_path / "tokenizer.json"))
        found = tokenizers.JsonTokenizer(tmp_path / "tokenizer.json")
        assert found.prefix == (found.end_of_text,)
        assert found.encode("the").tolist() == bpe.encode("the").tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "not a tokenizer.json"), ("{}", "not a tokenizer.json")],
)
def test_unreadable_file_is_named(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput, match=f"{path}: {message}"):
        tokenizers.JsonTokenizer(path)


def test_no_end_of_text_is_refused(tmp_path):
    settings = gpt2_json()
    settings["added_tokens"] = []
    del settings["model"]["vocab"]["<|endoftext|>"]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="no end of text"):
        tokenizers.JsonTokenizer(path)


def test_sizes():
    assert tokenizers.bpe_size("bpe:4096") == 4096
    assert tokenizers.bpe_size("bytes") is None
    with pytest.raises(BadInput, match="bpe:4096"):
        tokenizers.bpe_size("bpe:many")
    with pytest.raises(BadInput, match="at least 258"):
        tokenizers.train_bpe(WORDS, 200)
    with pytest.raises(BadInput, match="supports at most bpe:2"):
        tokenizers.train_bpe(WORDS, 5000)
