"""Conversations: records of messages, the template that writes them as text, whose each token is.

Only what the assistant says, with the mark that ends its turn, counts in the loss.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.command import BadInput, json_object
from lm.config import typed
from lm.data.tokenizers import Tokenizer

# For any tokenizer, bytes too: a turn is its role's name, the message, and the end of text.
DEFAULT = """\
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception("the role " ~ message.role ~ ": must be system, user or assistant") -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ eos_token ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a template may ask for


def messages_of(record: Any) -> str:
    """A record's messages as JSON: ``{"messages": [...]}`` or ``{"prompt", "response"}``.

    Raises ``BadInput`` for another shape, no answer, or an empty one.
    """
    if isinstance(record, dict) and "messages" not in record:
        pair = (("user", record.get("prompt")), ("assistant", record.get("response")))
        given = [{"role": role, "content": content} for role, content in pair]
    else:
        given = record.get("messages") if isinstance(record, dict) else None
    messages = []
    for message in given if isinstance(given, list) else [None]:
        parts = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else []
        if not parts or not all(isinstance(part, str) for part in parts):
            raise BadInput(
                "needs a list 'messages' of objects with strings 'role' and 'content',"
                " or strings 'prompt' and 'response'"
            )
        messages.append(dict(zip(("role", "content"), parts, strict=True)))
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers or messages[0]["role"] == "assistant":
        raise BadInput("must have a message of the assistant's, and not as its first")
    if not all(answer.strip() for answer in answers):
        raise BadInput("an empty response of the assistant's")
    return json.dumps(messages, ensure_ascii=False)


class _Generation(Extension):
    """``{% generation %}``, by which some templates mark what the assistant says, marks nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template(NamedTuple):
    """A chat template: Jinja, as transformers has them, and the special tokens that it may name."""

    source: str
    special: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Changes when what the template writes does."""
        content = json.dumps([self.source, self.special], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def render(self, messages: list[dict[str, str]], prompt: bool = False) -> str:
        """The text of a conversation; as ``prompt`` it ends where the assistant's turn begins.

        In a sandbox, as templates are other people's programs; the date is not there for them, so
        that the same conversation is always the same text. Raises ``BadInput`` where the template
        refuses the messages, or fails.
        """
        try:
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=prompt, **self.special
            )
        except Exception as error:  # whatever somebody's template may raise
            raise BadInput(f"the chat template: {error}") from error


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: str):
    raise jinja2.TemplateError(message)


def open_template(tokenizer_name: str, tokenizer: Tokenizer, path: str = "") -> Template:
    """The template at ``path``, else the one in the tokenizer.json's folder, else DEFAULT.

    In a folder it is chat_template.jinja, or a key of tokenizer_config.json. Raises ``BadInput``
    for a file that cannot be read, a template that is no Jinja and special tokens that are no text.
    """
    special = {"eos_token": tokenizer.decode([tokenizer.end_of_text]), "bos_token": ""}
    folder, source = Path(tokenizer_name).parent, None
    if tokenizer_name.endswith(".json") and (folder / "tokenizer_config.json").exists():
        special |= _settings(folder / "tokenizer_config.json")
        source = special.pop("chat_template", None)
    if tokenizer_name.endswith(".json") and (folder / "chat_template.jinja").exists():
        source = _read(folder / "chat_template.jinja")
    source = _read(Path(path)) if path else source or DEFAULT
    try:
        _compiled(source)
    except Exception as error:  # whatever somebody's template may raise
        raise BadInput(f"the chat template: {error}") from error
    return Template(source, special)


def _settings(path: Path) -> dict[str, str]:
    """Of a tokenizer_config.json, the special tokens and the template that are there."""
    settings, found = json_object(path), {}
    for name in (*SPECIAL, "chat_template"):
        value = settings.get(name)
        if isinstance(value, dict):  # an AddedToken
            value = value.get("content", value)
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            by_name = (entry.get("template") for entry in value if entry.get("name") == "default")
            value = next(by_name, None)  # of several templates
        if value:
            found[name] = typed(value, str, f"{path}: {name}")
    return found


def end_of_turn(template: Template, tokenizer: Tokenizer) -> list[int]:
    """The special token that ends the assistant's turn, which may not be the end of text; or none.

    So it is where the template refuses a plain conversation, or ends a turn with other text.
    """
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>"}]
    try:
        _, _, after = template.render(talk).rpartition("<answer>")
    except BadInput:
        return []
    ids = tokenizer.encode_marked(after.strip())[0].tolist()[:1]
    return ids if tokenizer.decode(ids) in tokenizer.special_names else []


def stops(workdir: Path, tokenizer: Tokenizer) -> list[int]:
    """Ids that end what a run's model writes: those that came with imported weights, or the end of
    text. What was trained from such weights ends a text in both ways.

    They are eos_token_id of the generation_config.json beside the tokenizer.json. Raises
    ``BadInput`` where that is no id and no list of them.
    """
    path = Path(getattr(tokenizer, "path", workdir / "tokenizer.json")).parent
    path /= "generation_config.json"
    said = json_object(path).get("eos_token_id") if path.exists() else None
    ids = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(i) is int for i in ids):
        raise BadInput(f"{path}: eos_token_id = {said!r}: must be an id, or a list of them")
    return ids if ids and path.parent == workdir else [*ids, tokenizer.end_of_text]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error


def encode(tokenizer: Tokenizer, template: Template, messages: str) -> tuple[np.ndarray, ...]:
    """Ids of a conversation (JSON of its messages), and which of them are the assistant's (bool).

    Raises ``BadInput`` for content that spells a special token, which the template alone may, and
    where the template writes an answer differently when more follows it.
    """
    messages = json.loads(messages)
    for message in messages:
        for name in tokenizer.special_names:
            if name in message["content"]:
                raise BadInput(f"a message holds {name!r}, a special token's name")
    text = template.render(messages)
    ids, starts = tokenizer.encode_marked(text)
    is_answer = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], prompt=True)
        # A line break after the mark that ends the turn is the template's; nobody waits for it.
        upto = template.render(messages[: i + 1]).rstrip()
        if not (upto.startswith(before) and text.startswith(upto)):
            raise BadInput(
                "the chat template writes an answer differently when more follows it; make each"
                " answer the last of a conversation of its own"
            )
        is_answer |= (starts >= len(before)) & (starts < len(upto))
    return ids, is_answer
