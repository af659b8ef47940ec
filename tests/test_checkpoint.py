"""The run folder as hosts share it, and as decoding and evaluation open it."""

import jax
import numpy as np
import pytest

from lm.checkpoint import (
    Checkpoints,
    abstract_params,
    check_shared,
    claim,
    load_config,
    load_params,
)
from lm.command import BadInput
from lm.config import Config, MeshConfig, replace
from lm.data.tokenizers import ByteTokenizer
from lm.interop.tokenizer import bytes_json
from lm.sharding import make_mesh
from lm.train.step import Program

CONFIG = replace(
    Config(),
    model=dict(vocab_size=258, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=24),
    mesh={"data": 1},
)


@pytest.fixture(scope="module")
def state():
    return Program(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1])).init(0)


@pytest.fixture
def workdir(tmp_path, state):
    claim(tmp_path, CONFIG)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state._replace(params=jax.tree.map(lambda x: x + 1, state.params)), {})
    checkpoints.save(7, state, {})
    checkpoints.close()
    return tmp_path


def test_a_host_that_sees_another_folder_than_process_0_is_told_so(tmp_path):
    with pytest.raises(BadInput, match="need a folder that all hosts share"):
        check_shared(tmp_path)
    claim(tmp_path, Config())
    check_shared(tmp_path)


@pytest.mark.parametrize("axes", [dict(data=1), dict(data=4, model=2, zero=3)], ids=str)
def test_the_newest_states_parameters_alone_on_any_mesh(workdir, state, axes):
    config = replace(load_config(workdir), mesh={**vars(MeshConfig()), **axes})
    mesh = make_mesh(config.mesh, jax.devices()[: 8 if axes["data"] > 1 else 1])
    params = load_params(workdir, config, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    wanted = abstract_params(config, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, params, wanted))


def test_imported_weights_have_no_training_state(tmp_path, state):
    claim(tmp_path, CONFIG)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"params": state.params}, {})
    checkpoints.close()
    params = load_params(tmp_path, CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_a_folder_reads_text_with_its_own_tokenizer(workdir):
    assert load_config(workdir) == CONFIG
    (workdir / "tokenizer.json").write_text(bytes_json(ByteTokenizer()))
    config = load_config(workdir)
    assert config.data.tokenizer == str(workdir / "tokenizer.json")
    assert replace(config, data={"tokenizer": "bytes"}) == CONFIG


def test_folders_without_a_checkpoint_are_refused(tmp_path, workdir):
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="holds no checkpoint"):
        load_params(empty, CONFIG, mesh)
    assert list(empty.iterdir()) == []
    (empty / "checkpoints").mkdir()
    with pytest.raises(BadInput, match="holds no checkpoint"):
        load_params(empty, CONFIG, mesh)
