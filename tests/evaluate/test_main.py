"""The command: what it tells of a trained run, and bad input in one line."""

import json

import pytest

from lm import command
from lm.config import replace
from lm.evaluate import __main__ as evaluate
from lm.train.loop import train
from tests.evaluate.test_scorer import CONFIG, made, saved

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(text_data):
    config = replace(CONFIG, model={"n_layers": 1}, data=vars(text_data))
    return replace(config, train={"tokens": 1024.0, "batch_tokens": 512.0, "tensorboard": False})


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "drawn", config, made(config)[2])


def run(capsys, workdir, *argv):
    argv = ["evaluate", f"--workdir={workdir}", *argv]
    code = command.run(evaluate.main, evaluate.FLAGS, evaluate.__doc__, argv)
    return code, capsys.readouterr()


@pytest.mark.slow
def test_the_loss_is_the_one_that_training_told(capsys, config, tmp_path):
    result = train(config, tmp_path)
    code, told = run(capsys, tmp_path, "--json")
    told = json.loads(told.out)
    assert code == 0
    assert told["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert told["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert told["tokens"] == result["validation_tokens"]
    assert 0 < told["standard_error"] < 0.1
    assert told["schema"] == 1 and len(told["sources"]) == 1


def test_corpora_and_tasks_as_tables(capsys, workdir, text_data, tmp_path):
    corpus = f"--corpus=text:{text_data.files}"
    _, other = run(capsys, workdir, corpus, "--documents=3", "--json")
    other = json.loads(other.out)
    assert other["documents"] == 3
    assert other.keys() >= {"loss", "perplexity", "bits_per_byte", "tokens", "standard_error"}
    task = tmp_path / "sky.jsonl"
    task.write_text(
        '{"prompt": "Sky?", "choices": ["blue", "red"], "answer": 0}\n'
        '{"prompt": "Grass?", "choices": ["blue", "green"], "answer": "green"}\n'
    )
    records = tmp_path / "records.jsonl"
    code, told = run(
        capsys, workdir, corpus, "--documents=3", f"--task={task}", "--shots=1",
        "--between=\\n", f"--records={records}",
    )  # fmt: skip
    assert code == 0
    for part in ("nats a token", "all", "by position:", "sky: 2 questions", "brier_score"):
        assert part in told.out
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["example"] for line in lines] == [0, 1] and lines[0]["task"] == "sky"
    _, alone = run(capsys, workdir, f"--task={task}", "--json")
    assert set(json.loads(alone.out)) == {"schema", "tasks"}


@pytest.mark.parametrize(
    "argv, line",
    [
        (("--workdir=nowhere",), "nowhere: no run here"),
        (("--split=dev",), "must be one of train, validation, test"),
        (("--corpus=text:none/*.txt",), "no file matches"),
        (("--tokens=-1",), "--tokens=-1: must be 0 or more"),
        (("--tokens=100000000",), "data.validation_tokens = 100000000: must be at most"),
        (("--task=none.jsonl",), "none.jsonl: cannot be read"),
        (("--task={sums}", "--task={sums}"), "there is a task sums already; names must differ"),
        (("--shots=2",), "--shots goes with --task, which is not given"),
        (("--documents=2",), "--documents goes with --corpus, which is not given"),
        (("--task={sums}", "--shots=2"), "shots = 2: there are 1 other questions"),
        (("--task={sums}", "--answer=("), "--answer=(: not a regular expression"),
        (("--task={sums}", "--samples=3"), "samples = 3 at temperature 0"),
        (("--task={sums}", "--max_tokens=0"), "max_tokens = 0: must be at least 1"),
        (("--task={sums}", "--max_tokens=99"), "must be at most 64 together"),
        (("--task={sums}", "--reasoning"), "without 'reasoning'"),
        (("--task={sums}", "--split=bogus"), "--split does not go with --task alone"),
        (("--task={sums}", "--tokens=5"), "--tokens goes with the run's own data"),
        (("--corpus=text:*.txt", "--tokens=5"), "--tokens goes with the run's own data"),
        (("--task={sums}", "--seed=-1"), "--seed=-1"),
        (("--task={sums}", "--shots=1", "--shots_seed=-1"), "--shots_seed=-1"),
        (("--task={sums}", "--records={folder}"), "cannot be written (Is a directory)"),
        (("--task={sums}", "--records={sums}/a/b"), "cannot be written (Not a directory)"),
        (("--task={sums}", "--records=" + 250 * "r"), "cannot be written (File name too long)"),
        (("--task={sums}", "--shots=1", "--gap=\udcff"), "'\\udcff' in a text: is no character"),
    ],
)
def test_bad_input_is_one_line(capsys, workdir, tmp_path, argv, line):
    sums = tmp_path / "sums.jsonl"
    sums.write_text('{"prompt": "1+1=", "target": "2"}\n{"prompt": "2+2=", "target": "4"}\n')
    code, told = run(capsys, workdir, *(arg.format(sums=sums, folder=tmp_path) for arg in argv))
    assert code == 2 and line in told.err and len(told.err.splitlines()) == 1
    assert told.out == ""
