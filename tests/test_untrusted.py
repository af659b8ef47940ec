"""Nothing untrusted is executed: what runs, corpora and stores hold is read as data alone."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.checkpoint import load_params
from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.data import open_dataset
from lm.sharding import make_mesh
from lm.train.loop import train

ROOT = Path(__file__).parents[1]
# What makes objects of bytes, or code of text.
FORBIDDEN = (
    r"\b(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)\b|allow_pickle|torch\.load"
    r"|yaml\.(unsafe_)?load\(|(?<![\w.])(eval|exec)\(|extractall|unpack_archive|\.extract\("
)
unpickled = []


@pytest.fixture(scope="module")
def hook():
    """Notes every class that unpickling looks for, wherever it is done."""
    sys.addaudithook(
        lambda event, args: unpickled.append(args) if event == "pickle.find_class" else None
    )
    return unpickled


def test_no_source_unpickles_or_unpacks():
    found = [
        f"{path.relative_to(ROOT)}, line {i}: {line.strip()}"
        for folder in ("lm", "configs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(FORBIDDEN, line)
    ]
    assert found == []


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_a_run_its_resume_and_its_use_unpickle_nothing(text_data, tmp_path, hook):
    pickle.loads(pickle.dumps(Evil.__reduce__))
    assert hook  # it hears
    config = Config(
        model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24),
        data=replace(Config(), data=vars(text_data) | {"data_dir": str(tmp_path / "data")}).data,
        mesh=MeshConfig(data=8),
    )
    batches = {"batch_tokens": 512.0, "checkpoint_every": 2}
    shorter = replace(config, train={**batches, "tokens": 512.0 * 2})
    longer = replace(config, train={**batches, "tokens": 512.0 * 4})
    hook.clear()
    programs = {}
    train(shorter, tmp_path / "run", programs=programs)
    train(longer, tmp_path / "run", programs=programs, force=True)
    load_params(tmp_path / "run", longer, make_mesh(longer.mesh))
    assert hook == []


@pytest.mark.parametrize("name", ["header.json", "train.bin"])
def test_a_pickle_in_a_store_is_refused(text_data, tmp_path, hook, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(Config(), data=vars(text_data) | {"data_dir": str(tmp_path / "data")}).data
    open_dataset(config)
    (path,) = (tmp_path / "data" / "stores").iterdir()
    (path / name).unlink()
    with (path / name).open("wb") as file:
        np.save(file, np.array([Evil()], object), allow_pickle=True)
    hook.clear()
    with pytest.raises(BadInput, match=f"{name}.*damaged"):
        open_dataset(config)
    assert hook == [] and not (tmp_path / "evil").exists()
