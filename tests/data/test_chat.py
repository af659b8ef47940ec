import json
from pathlib import Path

import numpy as np
import pytest

from lm.command import BadInput
from lm.config import DataConfig
from lm.data import chat, open_dataset
from lm.data.chat import (
    DEFAULT,
    Template,
    encode,
    end_of_turn,
    messages_of,
    open_template,
    stops,
)
from lm.data.tokenizers import END_OF_TEXT, ByteTokenizer, JsonTokenizer, train_bpe

BYTES = ByteTokenizer()
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3 has it: bos_token, stripped content, raise_exception, whitespace control.
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' ~ message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# As Mistral has it: no prompt of the assistant's, the system's message in the user's, tojson.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ {'system': m.content} | tojson }}{% continue %}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "default": DEFAULT}
MARKS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TALK = [
    {"role": "user", "content": "Name a city — in France."},
    {"role": "assistant", "content": "Paris, naïvely 日本."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Lyon\nor Nice"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def with_tokenizer(folder):
    """A tokenizer as published models have them: marks as special tokens, ids 300 to 306."""
    content = json.loads(train_bpe([" Paris user assistant Name a city in" * 9], 280))
    marks = [END_OF_TEXT, *MARKS, "<s>"]
    content["added_tokens"] = [
        dict(id=300 + i, content=mark, special=True, single_word=False, lstrip=False, rstrip=False)
        | {"normalized": False}
        for i, mark in enumerate(marks)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def opened(folder, source=None):
    path = folder / "tokenizer.json"
    tokenizer = JsonTokenizer(path)
    template = open_template(str(path), tokenizer)
    return tokenizer, template._replace(source=source or template.source)


def answers_of(tokenizer, template, messages=TALK):
    """The texts that count, each from where it begins to where it ends."""
    ids, is_answer = encode(tokenizer, template, json.dumps(messages))
    edges = np.flatnonzero(np.diff(np.r_[False, is_answer, False]))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)], tokenizer.decode(ids)


def test_the_default_template_with_bytes():
    template = open_template("bytes", BYTES)
    answers, text = answers_of(BYTES, template)
    assert answers == [f"Paris, naïvely 日本.{END_OF_TEXT}", f"Lyon\nor Nice{END_OF_TEXT}"]
    assert text == "".join(f"<|{m['role']}|>\n{m['content']}{END_OF_TEXT}\n" for m in TALK)
    ids, _ = encode(BYTES, template, json.dumps(TALK))
    assert (ids == BYTES.end_of_text).sum() == 4  # the token, not its letters
    assert template.render(TALK[:1], prompt=True).endswith("<|assistant|>\n")
    with pytest.raises(BadInput, match="the role tool: must be system, user or assistant"):
        template.render([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(
    ("name", "ends"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "<|im_end|>")],
)
def test_only_answers_count(folder, name, ends):
    tokenizer, template = opened(folder, TEMPLATES[name])
    answers, text = answers_of(tokenizer, template)
    assert [a.strip() for a in answers] == [
        f"{TALK[1]['content']}{ends}",
        f"{TALK[3]['content']}{ends}",
    ]
    assert text == template.render(TALK)
    assert ("Help." in text) == (name == "chatml")


@pytest.mark.parametrize(
    ("source", "ends"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA3, "<|eot_id|>"),
        (MISTRAL, "<|im_end|>"),
        (DEFAULT, "<|im_end|>"),
    ]
    + [("{{ messages[1].content }}\n<|eot_id|><s>", "<|eot_id|>")]
    + [("{{ messages[1].content }}\n\n###", ""), ("{{ raise_exception('no') }}", "")],
)
def test_what_ends_a_turn(folder, source, ends):
    tokenizer, template = opened(folder, source)
    assert tokenizer.decode(end_of_turn(template, tokenizer)) == ends
    assert end_of_turn(open_template("bytes", BYTES), BYTES) == [BYTES.end_of_text]


def test_what_ends_a_text(folder, tmp_path):
    """As the imported weights' settings say; trained from them, the end of text does too."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer, settings = opened(tmp_path, DEFAULT)[0], tmp_path / "generation_config.json"
    end = tokenizer.end_of_text
    assert stops(tmp_path, tokenizer) == [end] and stops(tmp_path, BYTES) == [256]
    for said, own, tuned in (
        ("[193, 256]", [193, 256], [193, 256, end]), ("7", [7], [7, end]), ("null", [end], [end])
    ):  # fmt: skip
        settings.write_text(f'{{"eos_token_id": {said}}}')
        assert [stops(tmp_path, tokenizer), stops(folder, tokenizer)] == [own, tuned]
    settings.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(BadInput, match="eos_token_id = '</s>': must be an id, or a list of them"):
        stops(tmp_path, tokenizer)


def test_the_folders_own_template_and_where_it_lies(folder, tmp_path):
    tokenizer, template = opened(folder)
    assert template.source == CHATML
    assert template.special == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "mine.jinja").write_text(LLAMA3)
    given = open_template(str(folder / "tokenizer.json"), tokenizer, str(tmp_path / "mine.jinja"))
    assert given.source == LLAMA3 and given.fingerprint != template.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)  # before the key, as in transformers
    assert open_template(str(tmp_path / "tokenizer.json"), tokenizer).source == MISTRAL
    with pytest.raises(BadInput, match="nowhere.jinja: cannot be read"):
        open_template("bytes", BYTES, "nowhere.jinja")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInput, match="tokenizer_config.json: not JSON"):
        open_template(str(tmp_path / "tokenizer.json"), tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_write_what_transformers_writes(folder, name, prompt):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not here; pip install '.[compare]'"
    )
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer, template = opened(folder, TEMPLATES[name])
    talk = [{"role": "system", "content": "Be <brief>."}, *TALK][: 2 if prompt else 5]
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt}
    text = theirs.apply_chat_template(talk, tokenize=False, **options)
    assert template.render(talk, prompt) == text
    ids = theirs.apply_chat_template(talk, **options, return_dict=False)
    assert tokenizer.encode_marked(text)[0].tolist() == ids
    if name == "llama3":  # which marks what the assistant says
        found = theirs.apply_chat_template(
            talk, **options, return_assistant_tokens_mask=True, return_dict=True
        )
        if not prompt:
            _, is_answer = encode(tokenizer, template, json.dumps(talk))
            assert is_answer.tolist() == list(map(bool, found["assistant_masks"]))


def test_templates_run_in_a_sandbox():
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{{ messages[7].content }}",
    ):
        with pytest.raises(BadInput, match="the chat template: "):
            Template(source, {}).render(TALK)


def test_what_a_template_may_not_do_to_an_answer():
    only_last = "{% for m in messages %}{{ m.content if loop.last else '' }}|{% endfor %}"
    with pytest.raises(BadInput, match="writes an answer differently when more follows it"):
        encode(BYTES, Template(only_last, {}), json.dumps(TALK))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "needs a list 'messages'"),
        ({"text": "a"}, "needs a list 'messages'"),
        ({"prompt": "a"}, "or strings 'prompt' and 'response'"),
        ({"prompt": "a", "response": 1}, "or strings 'prompt' and 'response'"),
        ({"messages": [{"role": "user", "content": [1]}]}, "strings 'role' and 'content'"),
        ({"messages": ["a"]}, "needs a list 'messages'"),
        ({"messages": []}, "must have a message of the assistant's"),
        ({"messages": TALK[:1]}, "must have a message of the assistant's"),
        ({"messages": TALK[1:]}, "and not as its first"),
        ({"prompt": "a", "response": " \n"}, "an empty response"),
    ],
)
def test_records_that_are_no_conversation(record, message):
    with pytest.raises(BadInput, match=message):
        messages_of(record)


def config_of(folder, records, **settings):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "talk.jsonl").write_text("\n".join(lines))
    settings = {"seq_len": 48, "validation_tokens": 48} | settings
    return DataConfig("chat", str(folder / "*.jsonl"), data_dir=str(folder / "data"), **settings)


def sums(n=60, words=("three", "twenty-one", "a hundred and eleven")):
    return [{"prompt": f"{i}?", "response": f"{words[i % 3]} {i}"} for i in range(n)]


def test_wrong_lines_are_named(tmp_path):
    for line, message in (
        ("{", "line 3: not JSON"),
        ({"prompt": "a", "response": ""}, "line 3: an empty response"),
        ({"prompt": END_OF_TEXT, "response": "a"}, "line 3: a message holds '<|endoftext|>'"),
        (
            {"messages": [{"role": "x", "content": ""}, TALK[1]]},
            "line 3: the chat template: the role x",
        ),
    ):
        with pytest.raises(BadInput, match=message):
            open_dataset(config_of(tmp_path, [*sums(2), line, *sums(60)[2:]]))
        assert not list(tmp_path.glob("data/stores/*"))
    with pytest.raises(BadInput, match="must be one of .jsonl, .jsonl.gz"):
        (tmp_path / "b.txt").write_text("b")
        open_dataset(DataConfig("chat", str(tmp_path / "b.txt"), data_dir=str(tmp_path / "data")))
    with pytest.raises(BadInput, match="with conversations it must be bytes or a tokenizer.json"):
        config_of(tmp_path, sums(), tokenizer="bpe:300")
    with pytest.raises(BadInput, match="no conversation of chat:.* comes to an answer within it"):
        open_dataset(config_of(tmp_path, sums(), seq_len=8, validation_tokens=8))


def conversations(batch):
    """Of every row its conversations: the text, and what of it is a target that counts."""
    result = []
    for inputs, targets, weights, segments, positions in zip(*batch, strict=True):
        for number in range(segments.max() + 1):
            mine = segments == number
            assert positions[mine].tolist() == list(range(mine.sum()))
            counted = targets[mine & (weights == 1)]
            result.append((BYTES.decode(inputs[mine]), BYTES.decode(counted)))
    return result


def test_rows_hold_whole_conversations_each_once_an_epoch(tmp_path):
    dataset = open_dataset(config_of(tmp_path, sums(200), seq_len=95, validation_tokens=95))
    rows = len(dataset.sources[0].windows["train"])
    epochs = dataset.batches(0, 0, 2, rows)
    seen = []
    for epoch in range(2):
        found = conversations([x[epoch] for x in epochs])
        answers = [counted for _, counted in found if counted]
        assert all(text.startswith("<|user|>\n") for text, counted in found if counted)
        assert all(END_OF_TEXT == a[-len(END_OF_TEXT) :] for a in answers)
        assert len(set(answers)) == len(answers)
        seen.append(sorted(answers))
    assert seen[0] == seen[1]
    assert not np.array_equal(epochs.inputs_BT[0], epochs.inputs_BT[1])
    held_out = []
    for batch in (*dataset.validation(4), *dataset.test(4)):
        held_out += [counted for _, counted in conversations(batch) if counted]
    assert not set(held_out) & set(seen[0])
    wanted = {f"{sums(200)[i]['response']}{END_OF_TEXT}" for i in range(200)}
    assert set(seen[0]) | set(held_out) <= wanted
    assert (
        len(seen[0])
        == dataset.statistics["corpora"][dataset.sources[0].name]["sources"]["chat"]["train"][
            "documents"
        ]
    )
    assert epochs.weights_BT.dtype == np.float32


def test_a_bit_a_token_and_only_for_conversations(tmp_path, text_data):
    opened = open_dataset(config_of(tmp_path, sums())).sources[0].store
    for split in ("train", "validation", "test"):
        lengths = opened.lengths[split]
        assert lengths.sum() == len(opened.tokens[split])
        assert opened.answers[split].nbytes == sum(-(-int(n) // 8) for n in lengths)
    assert {p.name for p in opened.path.iterdir()} >= {"train.answers.bin", "train.lengths.bin"}
    plain = open_dataset(text_data).sources[0].store
    assert not plain.answers and not list(plain.path.glob("*.*.bin"))
    Path(opened.path / "train.answers.bin").write_bytes(b"")
    with pytest.raises(BadInput, match="train.answers.bin: damaged"):
        open_dataset(config_of(tmp_path, sums()))


def test_a_mixture_of_conversations_and_text(tmp_path, text_data):
    talk = config_of(tmp_path, sums(), seq_len=64, validation_tokens=64)
    mixed = DataConfig(
        "mixture",
        mixture=((f"chat:{talk.files}", 1.0), (f"text:{text_data.files}", 1.0)),
        **{"seq_len": 64, "validation_tokens": 128, "data_dir": talk.data_dir},
    )
    batch = open_dataset(mixed).batch(0, 0, 8)
    is_talk = np.array([BYTES.decode(row).startswith("<|user|>") for row in batch.inputs_BT])
    assert is_talk.sum() == 4
    assert batch.weights_BT[~is_talk].min() == 1 and batch.segments_BT[~is_talk].max() == 0
    assert batch.weights_BT[is_talk].min() == 0


def test_the_template_is_part_of_the_stores_name(tmp_path):
    (tmp_path / "mine.jinja").write_text(DEFAULT.replace("|>\\n", "|>: "))
    plain = open_dataset(config_of(tmp_path, sums()))
    mine = open_dataset(config_of(tmp_path, sums(), chat_template=str(tmp_path / "mine.jinja")))
    assert mine.sources[0].store.path != plain.sources[0].store.path
    assert mine.fingerprint != plain.fingerprint
    assert "<|user|>: " in BYTES.decode(mine.batch(0, 0, 1).inputs_BT[0])


def test_the_date_is_not_there_for_templates():
    source = "{{ strftime_now('%d') if strftime_now is defined else '26 Jul 2024' }}"
    assert Template(source, {}).render(TALK) == "26 Jul 2024"
    assert chat.Template("{{ bos_token }}", {"bos_token": "<s>"}).render([]) == "<s>"
