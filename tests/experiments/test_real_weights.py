"""Published weights answer a question; opt-in, as it fetches 93 MB: LM_REAL_WEIGHTS=1."""

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
    return run.imported(run.fetch(folder), folder / "run")


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
    assert 0.8 < prose < 1.15
    assert run.bits_per_byte(workdir, speeches_BT, turned=True)["bits_per_byte"] > 1.5 * prose
