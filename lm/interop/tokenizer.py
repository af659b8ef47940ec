"""Our tokenizers as files that ``transformers.AutoTokenizer`` reads."""

import json

from lm.data.chat import Template
from lm.data.tokenizers import END_OF_TEXT, ByteTokenizer, Tokenizer


def companions(
    tokenizer: Tokenizer, positions: int, template: Template | None = None
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a tokenizer; ``positions``: the longest text.

    And the ``template`` that its model has learned to answer in.
    """
    if isinstance(tokenizer, ByteTokenizer):
        content = bytes_json(tokenizer)
    else:
        content = tokenizer.content
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.decode([tokenizer.end_of_text]),
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    chat = {}
    if template:
        settings |= {name: token for name, token in template.special.items() if token}
        chat = {"chat_template.jinja": template.source.encode()}
    return chat | {
        "tokenizer.json": content.encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }


def bytes_json(tokenizer: ByteTokenizer) -> str:
    """The bytes as byte-level BPE without a merge: the same ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Each byte's letter in GPT-2's alphabet: the printable ones are themselves, the others follow.
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (i for i in range(256) if i not in plain)
    letters = {i: chr(i) for i in plain} | {i: chr(256 + n) for n, i in enumerate(others)}
    vocabulary = {letter: i for i, letter in letters.items()} | {END_OF_TEXT: tokenizer.end_of_text}
    result = Tokenizer(models.BPE(vocabulary, []))
    result.pre_tokenizer, result.decoder = split, decoders.ByteLevel()
    result.add_special_tokens([END_OF_TEXT])
    return result.to_str()
