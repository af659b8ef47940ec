"""A GGUF file as if it were a Hugging Face folder, by the package ``gguf`` (the extra `gguf`).

Its matrices may be quantised; rows are brought back to float32 one block at a time.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lm.command import BadInput, one_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# config.json's keys to GGUF's, after the architecture's name.
KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
}
# GGUF's names to transformers'; {i} is the layer.
EMBEDDING = "model.embed_tokens.weight"
OUTSIDE = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How text is cut before its pieces are merged, by `tokenizer.ggml.pre`: regular expressions after
# one another, each of whose matches is a piece. GPT-2's own goes by its name.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "gpt-2": ("gpt-2",),
    "smollm": (r"\p{N}", "gpt-2"),
    "llama-bpe": (rf"{LETTERS}|\p{{N}}{{1,3}}|{OTHERS}",),
    "qwen2": (rf"{LETTERS}|\p{{N}}|{OTHERS}",),
}
CONTROL, USER_DEFINED = 3, 4  # types of token


class GgufFile:
    """A file to read from; a ``tensors.Source`` with the ``config`` and companions of a ``Folder``.

    Raises ``BadInput`` for a file that is damaged, or of an architecture or tokenizer unknown here.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise BadInput(f"{path}: needs the package gguf; pip install '.[gguf]'") from error
        self._dequantize = gguf.dequantize
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever reading past a damaged header raises
            raise BadInput(f"{path}: not a GGUF file ({error})") from error
        self._fields = reader.fields
        kind = self._get("general.architecture")
        one_of(f"{path}: the architecture", kind, list(ARCHITECTURES))
        if self._get(f"{kind}.expert_count"):
            raise BadInput(f"{path}: has experts; only dense models are read from GGUF files")
        given = {theirs: self._get(f"{kind}.{key}") for theirs, key in KEYS.items()}
        self._tensors = {_name(tensor.name): tensor for tensor in reader.tensors}
        self.tensors = {
            name: (tuple(int(n) for n in tensor.shape[::-1]), "F32")
            for name, tensor in self._tensors.items()
        }
        if None in self.tensors:
            raise BadInput(f"{path}: the tensor {self._tensors[None].name}: is not known here")
        if EMBEDDING not in self.tensors:
            raise BadInput(f"{path}: the tensor token_embd.weight: is missing")
        self.config = {key: value for key, value in given.items() if value is not None} | {
            "architectures": [ARCHITECTURES[kind]],
            "vocab_size": self.tensors[EMBEDDING][0][0],
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
        }
        if self._get(f"{kind}.rope.scaling.type") not in (None, "none"):
            raise BadInput(f"{path}: has scaled rotary positions; import the original folder")
        # llama.cpp turns neighbouring columns of a llama's heads, not the halves.
        queries = self.config.get("num_attention_heads")
        keys = self.config.get("num_key_value_heads", queries)
        self._heads = {"q_proj": queries, "k_proj": keys} if kind == "llama" else {}

    def _get(self, key: str) -> Any:
        field = self._fields.get(key)
        value = None if field is None else field.contents()
        # A float32's shortest digits: an epsilon of 1e-5, not of 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in float32."""
        tensor = self._tensors[name]
        rows: Any = index[0]
        for projection, heads in self._heads.items():
            if projection in name:
                pairs = np.arange(self.tensors[name][0][0]).reshape(heads, -1, 2)
                rows = pairs.swapaxes(1, 2).ravel()[rows]
        block = self._dequantize(tensor.data[rows], tensor.tensor_type)
        return block[(slice(None), *index[1:])]

    def companions(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json, made of the file's own vocabulary."""
        from tokenizers import (
            AddedToken,
            Regex,
            Tokenizer,
            decoders,
            models,
            pre_tokenizers,
            processors,
        )

        kind, cuts = self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre")
        one_of("the GGUF file's tokenizer", kind, ["gpt2"])
        one_of("the GGUF file's tokenizer.ggml.pre", cuts, list(CUTS))
        tokens = self._get("tokenizer.ggml.tokens")
        types = self._get("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in self._get("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        split = [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            if cut == "gpt-2"
            else pre_tokenizers.Split(Regex(cut), "isolated")
            for cut in CUTS[cuts]
        ]
        if CUTS[cuts][-1] != "gpt-2":
            split.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(
            [
                AddedToken(token, special=type_ == CONTROL, normalized=False)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ in (CONTROL, USER_DEFINED)
            ]
        )
        # llama.cpp's own default, where the file does not say.
        bos = self._get("tokenizer.ggml.bos_token_id")
        starts = self._get("tokenizer.ggml.add_bos_token")
        if bos is not None and (cuts == "llama-bpe" if starts is None else starts):
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
            )
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        for name in ("bos", "eos"):
            if (token := self._get(f"tokenizer.ggml.{name}_token_id")) is not None:
                settings[f"{name}_token"] = tokens[token]
        if template := self._get("tokenizer.chat_template"):
            settings["chat_template"] = template
        return {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
        }


def _name(name: str) -> str | None:
    """transformers' name of a GGUF tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if block != "blk" or part not in LAYER:
        return None
    return f"model.layers.{layer}.{LAYER[part]}.{kind}"
