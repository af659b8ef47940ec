"""A GGUF file against the tensors that it was made of, written as llama.cpp's converter does."""

import jax
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from lm.command import BadInput
from lm.config import Config, MeshConfig, replace
from lm.data.tokenizers import JsonTokenizer
from lm.interop import GgufFile, from_transformers, load
from lm.interop.gguf_file import CUTS, KEYS, LAYER, OUTSIDE
from lm.interop.tensors import leaves
from lm.sharding import make_mesh
from tests.interop.test_tensors import random_params, theirs

gguf = pytest.importorskip("gguf", reason="gguf is not here; pip install '.[gguf]'")

MODEL = dict(
    vocab_size=300, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_width=16, d_ff=96
)
TOKENS = ["<|endoftext|>", "<|im_end|>"]


def interleaved(x, heads):
    """The rows of each head from halves to neighbouring pairs."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@pytest.fixture
def write(tmp_path):
    """``write(architecture, model, **changed) -> (path, config, the tensors in float32)``."""

    def write(
        architecture="llama", quantised=False, metadata=(), extra=(), cuts="smollm", **changes
    ):
        config = replace(Config(), model={**MODEL, **changes})
        model = config.model
        arrays = theirs(config, random_params(config)).arrays
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        values = {
            "embedding_length": model.d_model,
            "block_count": model.n_layers,
            "attention.head_count": model.n_heads,
            "attention.head_count_kv": model.n_kv_heads,
            "attention.key_length": model.head_width,
            "feed_forward_length": model.d_ff,
            "context_length": 128,
        }
        for key, value in values.items():
            writer.add_uint32(f"{architecture}.{key}", value)
        writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", model.norm_eps)
        writer.add_float32(f"{architecture}.rope.freq_base", model.rope_base)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = TOKENS + letters + ["Ġt", "he", "Ġthe"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cuts)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * len(TOKENS) + [1] * (len(tokens) - len(TOKENS)))
        writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
        writer.add_eos_token_id(1)
        writer.add_chat_template("{{ messages }}")
        for key, value in metadata:
            writer.add_string(key, value)
        back = {name: ours for ours, name in (OUTSIDE | _layers(model.n_layers)).items()}
        for name, x in [*arrays.items(), *extra]:
            stored = x
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                stored = interleaved(x, model.n_heads if "q_proj" in name else model.n_kv_heads)
            kind = gguf.GGMLQuantizationType.F32
            if quantised and x.ndim == 2:
                kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(stored, kind)
            writer.add_tensor(back.get(name, name), data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, config, arrays

    return write


def _layers(n):
    return {
        f"blk.{i}.{part}.{kind}": f"model.layers.{i}.{name}.{kind}"
        for i in range(n)
        for part, name in LAYER.items()
        for kind in ("weight", "bias")
    }


def read(path):
    source = GgufFile(path)
    model, positions = from_transformers(source.config)
    config = replace(Config(model=model), data={"seq_len": positions})
    params = load(source, config, make_mesh(MeshConfig(), jax.devices()[:1]))
    return config, theirs(config, params).arrays


@pytest.mark.parametrize(
    "architecture, changes",
    [
        ("llama", {"rope_base": 500.0, "tied": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
    ],
)
def test_config_and_tensors_are_those_that_were_written(write, architecture, changes):
    path, config, arrays = write(architecture, **changes)
    found, tensors = read(path)
    assert found.model == config.model and found.data.seq_len == 128
    assert GgufFile(path).config["eos_token_id"] == 1
    assert tensors.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(tensors[name], x, err_msg=name)


def test_quantised_rows_come_back_close(write):
    path, _, arrays = write(quantised=True)
    _, tensors = read(path)
    for name, x in arrays.items():
        error = np.abs(tensors[name] - x).max()
        # 127 steps to the largest of a block, the step itself in float16
        assert error <= np.abs(x).max() * (1 / 254 + 2**-11) and (error > 0) == (x.ndim == 2)


@pytest.mark.parametrize("cuts", CUTS)
def test_the_tokenizer_is_made_of_the_files_own_vocabulary(write, tmp_path, cuts):
    path, _, _ = write(cuts=cuts)
    files = GgufFile(path).companions()
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    text = "the 1234 the\n naïve ☃"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text == 0 and tokenizer.vocab_size == 2 + 256 + 3
    digits = [i for i in ids if tokenizer.decode([i]).isdigit()]
    assert tokenizer.decode(digits) == "1234" and len(digits) == 4
    assert " the" in [tokenizer.decode([i]) for i in ids]  # both merges, in their order
    assert b'"eos_token": "<|im_end|>"' in files["tokenizer_config.json"]
    assert b"{{ messages }}" in files["tokenizer_config.json"]


@pytest.mark.parametrize(
    "cuts, says, starts",
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True)]
    + [("llama-bpe", False, False)],
)
def test_a_text_starts_as_the_file_says(write, tmp_path, monkeypatch, cuts, says, starts):
    path, _, _ = write(cuts=cuts)
    file, get = GgufFile(path), GgufFile._get
    told = {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.add_bos_token": says}
    monkeypatch.setattr(GgufFile, "_get", lambda self, key: told.get(key, get(self, key)))
    (tmp_path / "tokenizer.json").write_bytes(file.companions()["tokenizer.json"])
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.prefix == ((0,) if starts else ())
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_digits_and_words_are_cut_as_the_file_says():
    cut = pre_tokenizers.Split(Regex(CUTS["llama-bpe"][0]), "isolated").pre_tokenize_str
    assert [piece for piece, _ in cut("I'LL pay 12345 now\n\n ok")] == [
        *("I", "'LL", " pay", " ", "123", "45", " now", "\n\n", " ok")
    ]
    cut = pre_tokenizers.Split(Regex(CUTS["qwen2"][0]), "isolated").pre_tokenize_str
    assert [piece for piece, _ in cut("a 12")] == ["a", " ", "1", "2"]


def test_what_is_not_known_is_refused_by_name(write, tmp_path):
    def refusal(*arguments, **named):
        with pytest.raises(BadInput) as refused:
            GgufFile(write(*arguments, **named)[0])
        return str(refused.value)

    assert "the architecture = 'gemma': must be one of llama, qwen2, qwen3" in refusal("gemma")
    scaled = [("llama.rope.scaling.type", "yarn")]
    assert "scaled rotary positions" in refusal(metadata=scaled)
    factors = [("rope_freqs.weight", np.ones(8, np.float32))]
    assert "the tensor rope_freqs.weight: is not known" in refusal(extra=factors)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match="x.gguf: not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")


def test_every_name_is_one_of_ours():
    config = replace(Config(), model={**MODEL, "qkv_bias": True, "qk_norm": True, "n_layers": 1})
    wanted = {
        name for leaf in leaves(config.model, random_params(config)) for name in leaf.names.values()
    }
    assert wanted <= set((OUTSIDE | _layers(1)).values()) and "rope_theta" in KEYS
