"""Published weights answer a question; opt-in, as it fetches 93 MB: LM_REAL_WEIGHTS=1."""

import json
import math
import os
from pathlib import Path

import pytest

from experiments.real_weights import run
from lm import arithmetic
from lm.checkpoint import load_config
from lm.data import open_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("LM_REAL_WEIGHTS"),
        reason="fetches 93 MB of weights; set LM_REAL_WEIGHTS=1",
    ),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    pytest.importorskip("gguf", reason="gguf is not here; pip install '.[gguf]'")
    folder = tmp_path_factory.mktemp("real_weights")
    data_dir = Path(os.environ.get("LM_DATA_DIR", folder))
    return run.imported(run.fetch(data_dir), folder / "run")


def test_the_config_is_smollm2s(workdir):
    config = load_config(workdir)
    model = config.model
    assert (model.n_layers, model.d_model, model.n_heads, model.n_kv_heads) == (30, 576, 9, 3)
    assert model.rope_base == 100_000 and model.tied and config.data.seq_len == 8192
    assert arithmetic.parameters(model).total == 134_515_008


def test_the_tokenizer_is_smollm2s(workdir):
    tokenizer = open_tokenizer(load_config(workdir).data)
    assert tokenizer.vocab_size == 49_152 and tokenizer.end_of_text == 0
    text = "The bridge of 1894 wasn't safe;\n\n  naïve 日本語"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 30
    assert sum(tokenizer.decode([i]).isdigit() for i in ids) == 4


def test_it_answers_in_english(workdir):
    assert "Paris" in run.answer(workdir)


def test_bits_per_byte_on_prose(workdir, tmp_path):
    data_dir = Path(os.environ.get("LM_DATA_DIR", tmp_path))
    speeches_BT = run.windows(workdir, data_dir, 4)["sotu"]
    prose = run.bits_per_byte(workdir, speeches_BT)["bits_per_byte"]
    assert 0.94 <= prose <= 1.05
    assert run.bits_per_byte(workdir, speeches_BT, turned=True)["bits_per_byte"] > 1.5 * prose


def test_under_lm_eval_it_knows_its_capitals(workdir, monkeypatch):
    """48 of them, of four choices each, and three texts, by committed task files."""
    pytest.importorskip("lm_eval", reason="lm-eval is not here; pip install '.[eval]'")
    from experiments.evaluation.run import TASKS, under_lm_eval

    monkeypatch.chdir(TASKS.parents[2])
    settings = dict(max_length=512, batch_tokens=2_048)
    found = under_lm_eval("lm", workdir=str(workdir.absolute()), **settings)
    assert len(found["nats"]) == 4 * 48 and found["metrics"]["lm_capitals acc,none"] > 0.9
    bits = found["metrics"]["lm_prose bits_per_byte,none"]
    assert 0.94 <= bits <= 1.05
    lines = (TASKS / "prose.jsonl").read_text().splitlines()
    n_bytes = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert bits == pytest.approx(-sum(found["prose"]) / math.log(2) / n_bytes)
