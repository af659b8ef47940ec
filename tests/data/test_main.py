import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import command
from lm.data import __main__ as prepare
from lm.data import store

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny.py")


def arguments(folder, *more):
    return [
        "lm.data",
        f"--config={CONFIG}",
        "--config.data.corpus=text",
        f"--config.data.files={folder}/*.txt",
        f"--config.data.data_dir={folder}/data",
        "--config.data.seq_len=32",
        "--config.data.validation_tokens=64",
        *more,
    ]


@pytest.fixture
def folder(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: " + "some words " * (i % 13 + 5))
    return tmp_path


def run(argv):
    return command.run(prepare.main, prepare.FLAGS, prepare.__doc__, argv)


def test_prints_statistics(folder, capsys):
    assert run(arguments(folder)) == 0
    printed = capsys.readouterr().out
    assert "validation" in printed and "duplicates" in printed
    assert run(arguments(folder, "--json")) == 0
    statistics = json.loads(capsys.readouterr().out)
    (corpus,) = statistics["corpora"].values()
    documents = [corpus["sources"]["text"][s]["documents"] for s in ("train", "validation", "test")]
    assert sum(documents) == 100 and f" {documents[0]} " in printed


def test_bad_input_is_one_line_and_exit_2(folder, capsys):
    (folder / "bad.txt").write_bytes(b"\xff")
    assert run(arguments(folder)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{folder}/bad.txt: invalid UTF-8 at byte offset 0" in error
    assert not (folder / "data" / "stores").exists()


def test_full_disk_is_one_line_and_exit_1(folder, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    assert run(arguments(folder, "--config.data.files=" + str(folder / "1*.txt"))) == 0
    capsys.readouterr()
    monkeypatch.setattr(store.os, "fsync", full)
    monkeypatch.setattr("lm.data.local.write_atomically", lambda path, text: None)
    assert run(arguments(folder)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no space left" in error
    assert len(list((folder / "data" / "stores").iterdir())) == 1


def test_a_damaged_store_is_named(folder, capsys):
    assert run(arguments(folder)) == 0
    (path,) = (folder / "data" / "stores").glob("*/train.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert run(arguments(folder)) == 2
    assert f"{path}: damaged; delete" in capsys.readouterr().err


def test_two_processes_at_once_both_end_well(folder):
    argv = [sys.executable, "-m", *arguments(folder, "--config.data.tokenizer=bpe:280", "--json")]
    environment = os.environ | {"PYTHONPATH": str(Path(CONFIG).parents[1])}
    started = [
        subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [p.communicate(timeout=60) for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list((folder / "data" / "stores").iterdir())) == 1


def test_prepared_it_opens_without_tfds_or_jax(folder):
    assert run(arguments(folder)) == 0
    code = (
        "import sys, time; from lm.config import DataConfig; from lm.data import open_dataset;"
        "start = time.perf_counter();"
        f"d = open_dataset(DataConfig(corpus='text', files='{folder}/*.txt', seq_len=32,"
        f" validation_tokens=64, data_dir='{folder}/data')); d.batch(0, 0, 4);"
        "assert time.perf_counter() - start < 0.5;"
        "print(sorted({'jax', 'tensorflow', 'tensorflow_datasets', 'pyarrow', 'tokenizers'}"
        " & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(CONFIG).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr
