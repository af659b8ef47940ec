import json

import pytest

from lm import command
from lm.checkpoint import load_config
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.data.tokenizers import ByteTokenizer
from lm.evaluate import Scorer
from lm.generate import __main__ as generate
from lm.generate.decode import Completion
from lm.train.loop import train
from tests.data.test_tokenizers import metaspace_json
from tests.evaluate.test_scorer import made, run_of_ends, saved


@pytest.fixture(scope="module")
def workdir(text_data, tmp_path_factory):
    """Forty steps: enough to spell words of the corpus."""
    config = Config(
        model=ModelConfig(vocab_size=264, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48),
        data=text_data,
        mesh=MeshConfig(data=8),
    )
    config = replace(
        config,
        train={"tokens": 40 * 512.0, "batch_tokens": 512.0, "tensorboard": False},
        optimizer={"learning_rate": 0.02},
    )
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    train(config, workdir)
    return workdir


def run(capsys, workdir, *argv):
    argv = ["generate", f"--workdir={workdir}", *argv]
    code = command.run(generate.main, generate.FLAGS, generate.__doc__, argv)
    return code, capsys.readouterr()


def test_the_command_streams_what_it_also_gives_as_json(capsys, workdir):
    given = ("--prompt=the ", "--max_tokens=24", "--temperature=0.5", "--seed=2")
    code, streamed = run(capsys, workdir, *given)
    assert code == 0 and streamed.out.startswith("the ")
    code, told = run(capsys, workdir, *given, "--json")
    told = json.loads(told.out)
    assert streamed.out == f"the {told['text']}\n"
    assert ByteTokenizer().decode(told["tokens"]) == told["text"]
    assert len(told["log_probabilities"]) == len(told["tokens"]) == 24


def test_a_chat_prompt_is_a_users_message(capsys, workdir, monkeypatch):
    from lm.generate import decode

    asked = []

    def spy(self, prompts, *rest, **named):
        asked.extend(prompts)
        return found(self, prompts, *rest, **named)

    found = decode.Generator.__call__
    monkeypatch.setattr(decode.Generator, "__call__", spy)
    code, told = run(capsys, workdir, "--prompt=the", "--chat", "--max_tokens=4", "--json")
    assert code == 0 and json.loads(told.out)["prompt"] == "the"
    end = ByteTokenizer().end_of_text
    wanted = [*b"<|user|>\nthe", end, *b"\n<|assistant|>\n"]
    assert asked == [wanted]


def test_what_ends_a_text(tmp_path):
    workdir = run_of_ends(tmp_path)
    for given, wanted in (((), [7]), (("--chat",), [7, 281]), (("--chat", "--stop=9"), [9])):
        generate.FLAGS.unparse_flags()
        generate.FLAGS(["generate", f"--workdir={workdir}", "--prompt=ab", *given])
        stop, *_ = generate._open(lambda *_, stop, cache_dtype: stop, None)
        assert stop == wanted


def test_samples_the_best_of_them_and_their_vote(capsys, workdir):
    given = ("--prompt=the ", "--prompt=he", "--max_tokens=6", "--samples=4", "--json")
    _, every = run(capsys, workdir, *given)
    every = [json.loads(line) for line in every.out.splitlines()]
    assert [sample["prompt"] for sample in every] == ["the "] * 4 + ["he"] * 4
    assert len({sample["text"] for sample in every}) > 1
    _, best = run(capsys, workdir, *given, "--best")
    best = [json.loads(line) for line in best.out.splitlines()]
    for samples, kept in zip((every[:4], every[4:]), best, strict=True):
        assert kept == max(samples, key=lambda s: sum(s["log_probabilities"]))
    _, vote = run(capsys, workdir, *given, "--vote=[a-z]")
    vote = json.loads(vote.out.splitlines()[0])
    last = [next((c for c in reversed(s["text"]) if c.isalpha()), None) for s in every[:4]]
    assert vote["answer"] in last and vote["share"] == last.count(vote["answer"]) / 4


@pytest.mark.parametrize(
    "argv, line",
    [
        ((), "--prompt is missing"),
        (("--prompt=a", "--top_p=0"), "top_p = 0.0: must be in (0, 1]"),
        (("--prompt=a", "--max_tokens=0"), "max_tokens = 0: must be at least 1"),
        (("--prompt=",), "an empty prompt: must have at least one token"),
        (("--prompt=a", "--samples=0"), "--samples=0: must be at least 1"),
        (("--prompt=a", "--vote=("), "--vote=(: not a regular expression"),
        (("--prompt=a\udcff",), "'\\udcff' in a text: is no character"),
        (("--prompt=a\udcff", "--chat"), "'\\udcff' in a text: is no character"),
        (("--prompt=a", "--seed=99999999999999999999"), "--seed=99999999999999999999"),
        (("--prompt=a", "--workdir=nowhere"), "nowhere: no run here"),
        (
            ("--prompt=a", "--prompt=" + 64 * "a"),
            "a prompt of 64 tokens: must be fewer than the 64",
        ),
    ],
)
def test_bad_input_is_one_line(capsys, workdir, argv, line):
    code, told = run(capsys, workdir, *argv)
    assert code == 2 and line in told.err and len(told.err.splitlines()) == 1
    assert told.out == ""


def test_the_context_ends_a_text(capsys, workdir, tmp_path, monkeypatch):
    """That of the run that was fine-tuned, too; sinusoidal positions have no other bound."""
    prompt = 60 * "a"
    code, told = run(
        capsys, workdir, f"--prompt={prompt}", "--prompt=a", "--max_tokens=9", "--json"
    )
    assert [len(json.loads(line)["tokens"]) for line in told.out.splitlines()] == [4, 4]
    (line,) = told.err.splitlines()
    assert code == 0 and "--max_tokens=9: ended after 4 tokens, where the model's" in line
    model = {"n_layers": 1, "position": "sinusoidal", "vocab_size": 257, "d_model": 16, "d_ff": 16}
    tuned = replace(load_config(workdir), model=model, train={"init_from": str(workdir)})
    tuned = replace(tuned, data={"seq_len": 16})
    tuned_run = saved(tmp_path / "run", tuned, made(tuned)[2])
    said = lambda self, prompts, n, seed: [Completion([65] * n, [0.0] * n, False, 0.0)]  # noqa: E731
    monkeypatch.setattr("lm.generate.decode.Generator.__call__", said)
    code, told = run(capsys, tuned_run, f"--prompt={prompt}", "--json")
    assert code == 0 and len(json.loads(told.out)["tokens"]) == 4
    code, told = run(capsys, tuned_run, "--prompt=" + 64 * "a")
    assert code == 2 and "the 64 positions" in told.err


def test_one_process_writes(capsys, workdir, monkeypatch):
    for name, value in {"COORDINATOR": "node0:8476", "PROCESSES": "2", "PROCESS": "1"}.items():
        monkeypatch.setenv(f"LM_{name}", value)
    code, told = run(capsys, workdir, "--prompt=a")
    assert code == 2 and "has 2 processes: texts are written by one" in told.err


def test_the_first_blank_of_what_follows_is_there(capsys, tmp_path):
    """SentencePiece's decoder drops a text's first blank, and every word here begins with one."""
    config = Config(model=ModelConfig(vocab_size=257, d_model=16, n_layers=1, d_ff=16))
    config = replace(config, data={"seq_len": 32})
    _, _, params = made(config)
    workdir = saved(tmp_path / "run", config, params)
    (workdir / "tokenizer.json").write_text(metaspace_json(257))
    given = ("--prompt=the cat", "--max_tokens=9")
    _, told = run(capsys, workdir, *given, "--json")
    text = json.loads(told.out)["text"]
    assert text.count(" ") == 9 and text.startswith(" ")
    assert run(capsys, workdir, *given)[1].out == f"the cat{text}\n"
    _, told = run(capsys, workdir, *given, "--vote=^ ")
    assert json.loads(told.out)["answer"] == " "
    (found,) = Scorer.open(workdir).generate(["the cat"], 9)
    assert found.text.startswith(" ")


def test_what_streams_is_told_once(capsys):
    """Bytes that are no character yet spoil those before them: so SentencePiece's decoder does."""
    texts = ["x\ufffd", "x日", "x\ufffd\ufffd\ufffd\ufffd", "x日本\ufffd"]
    stream = [[Completion([i], [0.0], False, 0.0)] for i in range(len(texts))]
    generate.FLAGS.unparse_flags()
    generate.FLAGS(["generate", "--prompt=a"])
    generate._print_growing(stream, lambda tokens: texts[tokens[0]])
    assert capsys.readouterr().out == "ax日本\ufffd\n"


def test_what_a_tokenizer_puts_before_a_text_is_there(capsys, workdir, monkeypatch):
    plain = run(capsys, workdir, "--prompt=he", "--max_tokens=8", "--json", "--temperature=0")
    monkeypatch.setattr(ByteTokenizer, "prefix", tuple(b"the cat and t"))
    started = run(capsys, workdir, "--prompt=he", "--max_tokens=8", "--json", "--temperature=0")
    monkeypatch.undo()
    given = ("--prompt=the cat and the", "--max_tokens=8", "--json", "--temperature=0")
    whole = run(capsys, workdir, *given)
    first, second, third = (json.loads(told.out) for _, told in (plain, started, whole))
    assert second["log_probabilities"] == pytest.approx(third["log_probabilities"], abs=1e-5)
    assert first["log_probabilities"] != pytest.approx(third["log_probabilities"], abs=1e-2)


def test_a_tokenizer_beyond_the_embedding(capsys, workdir, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 300)
    code, told = run(capsys, workdir, "--prompt=a")
    assert code == 2 and "model.vocab_size = 264: must be at least the tokenizer's 300" in told.err
