"""The run folder as hosts share it, and as decoding and evaluation open it."""

import contextlib
import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import checksums
from lm.checkpoint import (
    Checkpoints,
    abstract_like,
    abstract_params,
    check_shared,
    claim,
    context,
    load_config,
    load_params,
)
from lm.command import BadInput, InUse
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


def increased(tree):
    return jax.tree.map(lambda x: x + 1 if jax.numpy.issubdtype(x.dtype, float) else x, tree)


@pytest.fixture
def workdir(tmp_path, state):
    claim(tmp_path, CONFIG)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, increased(state), {"at": 1})
    checkpoints.save(7, state, {"at": 7})
    checkpoints.close()
    return tmp_path


def test_a_host_that_sees_another_folder_than_process_0_is_told_so(tmp_path):
    with pytest.raises(BadInput, match="need a folder that all hosts share"):
        check_shared(tmp_path)
    claim(tmp_path, Config())
    check_shared(tmp_path)


@pytest.mark.parametrize(
    "scaling, positions",
    [
        ({}, 64),
        ({"kind": "yarn", "original_positions": 64, "factor": 2.0}, 128),
        ({"kind": "yarn", "original_positions": 16, "factor": 2.0}, 64),
        ({"kind": "llama3", "original_positions": 64, "factor": 2.0}, 64),
        ({"kind": "linear", "original_positions": 64, "factor": 2.0}, 64),
        ({"original_positions": 64, "factor": 2.0}, 64),
    ],
)
def test_the_context_is_that_of_training_or_of_scaled_positions(tmp_path, scaling, positions):
    model = {"rope_scaling": {**vars(CONFIG.model.rope_scaling), **scaling}}
    claim(tmp_path, replace(CONFIG, model=model, data={"seq_len": 64}))
    assert context(tmp_path) == positions


def test_the_context_is_that_of_the_run_begun_from_wherever_that_is_now(tmp_path, monkeypatch):
    claim(tmp_path / "base", replace(CONFIG, data={"seq_len": 64}))
    short = replace(CONFIG, data={"seq_len": 16})
    tuned, itself = (replace(short, train={"init_from": name}) for name in ("base", "itself"))
    monkeypatch.chdir(tmp_path)
    claim(Path("tuned"), tuned)
    claim(Path("again"), replace(short, train={"init_from": "tuned"}))
    for name in ("base", "tuned"):
        Path(name, "config.json").write_text("no longer JSON")
    monkeypatch.chdir("/")
    assert context(tmp_path / "again") == 64
    claim(tmp_path / "again", replace(short, train={"init_from": "tuned"}))  # it goes on
    assert context(tmp_path / "again") == 64
    claim(tmp_path / "itself", itself)
    assert context(tmp_path / "itself") == 16
    config = tmp_path / "itself" / "config.json"
    config.write_text(config.read_text().replace('"context": 16', '"context": "16"'))
    with pytest.raises(BadInput, match="config.json: context = '16': must be of type int"):
        context(tmp_path / "itself")


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


def shares(state):
    """The state's shapes, dtypes and shardings."""
    return abstract_like(state, jax.tree.map(lambda x: x.sharding, state))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink], ids=lambda f: f.__name__)
def test_damage_to_any_file_of_a_step_is_found_and_the_step_before_used(
    workdir, state, damage, capfd
):
    step = workdir / "checkpoints" / "7"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    kinds = {path.name for path in files}
    assert {"checksums.json", "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"} < kinds
    assert (step / "meta" / "metadata").exists() and list(step.rglob("d/*"))
    params = abstract_params(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    for path in files:
        content = path.read_bytes()
        damage(path)
        checkpoints = Checkpoints(workdir)
        at, found = checkpoints.restore_params(params)
        assert at == 1
        jax.tree.map(np.testing.assert_array_equal, found, increased(state.params))
        assert list(checkpoints.damaged) == [7]
        (said,) = capfd.readouterr().err.splitlines()
        assert said == f"warning: {step}: damaged, {checkpoints.damaged[7]}; passed over"
        assert path.relative_to(step).as_posix() in said
        checkpoints.close()
        path.write_bytes(content)


def test_a_damaged_step_is_removed_when_the_next_is_saved(workdir, state):
    flip_a_bit(workdir / "checkpoints" / "7" / "meta" / "metadata")
    checkpoints = Checkpoints(workdir)
    found, meta = checkpoints.restore(shares(state))
    assert meta == {"at": 1} and checkpoints.damaged.keys() == {7}
    assert (workdir / "checkpoints" / "7").exists()  # until there is a better one
    checkpoints.save(7, increased(found), {"at": "7 again"})
    checkpoints.save(9, increased(found), {"at": 9})
    checkpoints.close()
    checkpoints = Checkpoints(workdir)
    assert checkpoints.restore(shares(state), 7)[1] == {"at": "7 again"}
    assert checkpoints.restore(shares(state))[1] == {"at": 9}
    assert checkpoints.damaged == {}
    checkpoints.close()


def test_where_all_are_damaged_there_is_none(workdir, state):
    for step in ("1", "7"):
        flip_a_bit(workdir / "checkpoints" / step / "checksums.json")
    checkpoints = Checkpoints(workdir)
    assert checkpoints.restore(shares(state)) is None and checkpoints.damaged.keys() == {1, 7}
    checkpoints.close()
    with pytest.raises(BadInput, match="holds no checkpoint that is whole"):
        load_params(workdir, CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))


def test_a_kill_amid_a_removal_leaves_nothing_that_looks_damaged(workdir, state, monkeypatch):
    def killed(path, **_):
        for file in Path(path).rglob("checksums.json"):
            file.unlink()
        raise KeyboardInterrupt

    checkpoints = Checkpoints(workdir)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoints.roll_back(shares(state), before=9)  # to the first state: none was due
    with contextlib.ExitStack() as lock:
        claim(workdir, CONFIG, lock=lock)
        checkpoints = Checkpoints(workdir)
        assert checkpoints.restore(shares(state)) is None and not checkpoints.damaged
        checkpoints.close()
    assert not list((workdir / "checkpoints").iterdir())


def test_without_any_checksums_all_are_damaged(workdir, state):
    for step in ("1", "7"):
        (workdir / "checkpoints" / step / "checksums.json").unlink()
    checkpoints = Checkpoints(workdir)
    assert checkpoints.restore(shares(state)) is None
    assert checkpoints.damaged == {at: "checksums.json is missing" for at in (1, 7)}
    checkpoints.close()


def test_those_of_an_older_version_are_not_restored_and_not_removed(workdir, state):
    """It wrote no checksums: the run would begin anew, and remove them at its first save."""
    for step in ("1", "7"):
        (workdir / "checkpoints" / step / "checksums.json").unlink()
        (workdir / "checkpoints" / step / "meta" / "metadata").write_text('{"schema": 1}')
    before = sorted(workdir.rglob("*"))
    checkpoints = Checkpoints(workdir, period=1)
    for read in (checkpoints.restore, lambda abstract: checkpoints.roll_back(abstract, before=9)):
        with pytest.raises(BadInput, match="no checkpoint has its checksums.json: written by an"):
            read(shares(state))
    checkpoints.close()
    assert sorted(workdir.rglob("*")) == before


def test_a_state_of_another_shape_is_not_made_to_fit(workdir, state):
    other = replace(CONFIG, model={"d_ff": 32})
    wanted = Program(other, make_mesh(CONFIG.mesh, jax.devices()[:1])).init(0)
    checkpoints = Checkpoints(workdir)
    with pytest.raises(ValueError, match="shape"):
        checkpoints.restore(shares(wanted))
    checkpoints.close()


def test_the_newest_are_kept_and_chosen_ones_for_ever(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, kept_step=3, newest=2, every=4)
    for step in range(1, 12):
        checkpoints.save(step, {"params": state.params["final_norm"]}, {})
    checkpoints.close()
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"3", "4", "8", "10", "11"}


def test_a_step_has_its_checksums_before_its_name(tmp_path, state, monkeypatch):
    """So that a kill at any moment leaves a step that is whole, or none."""
    seen = []

    def write(folder):
        seen.append((folder.name, sorted(path.name for path in folder.iterdir())))
        raise KeyboardInterrupt

    monkeypatch.setattr(checksums, "write", write)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, {"params": state.params["final_norm"]}, {})
    with pytest.raises(KeyboardInterrupt):
        checkpoints.close()
    assert seen == [("5.orbax-checkpoint-tmp", ["_CHECKPOINT_METADATA", "meta", "state"])]
    assert not (tmp_path / "checkpoints" / "5").exists()


def test_a_full_disk_ends_a_write_and_nothing_else(workdir, state, monkeypatch):
    def full(folder):
        raise ValueError(f"RESOURCE_EXHAUSTED: {folder}: [OS error 28: No space left on device]")

    checkpoints = Checkpoints(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "write", full)
        checkpoints.save(9, state, {})
        with pytest.raises(OSError, match="No space left") as error:
            checkpoints.close()
    assert error.value.errno == errno.ENOSPC and error.value.filename.endswith("checkpoints")
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "7"]
    checkpoints = Checkpoints(workdir)
    assert checkpoints.restore(shares(state))[1] == {"at": 7}
    checkpoints.save(9, state, {"at": 9})  # after space was made
    checkpoints.close()
    assert (workdir / "checkpoints" / "9" / "checksums.json").exists()


def test_a_disk_with_too_little_room_is_not_written_to(workdir, state, monkeypatch):
    free = shutil.disk_usage(workdir)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    before = sorted(workdir.rglob("*"))
    checkpoints = Checkpoints(workdir)
    with pytest.raises(OSError, match="No space left") as error:
        checkpoints.save(9, state, {})
    assert error.value.errno == errno.ENOSPC and error.value.filename.endswith("checkpoints")
    checkpoints.close()
    assert sorted(workdir.rglob("*")) == before


def test_a_folder_is_one_process_own_until_it_ends(tmp_path):
    with contextlib.ExitStack() as lock:
        assert claim(tmp_path, CONFIG, lock=lock) is None
        with contextlib.ExitStack() as second, pytest.raises(InUse) as refused:
            claim(tmp_path, CONFIG, lock=second)
        assert f"process {os.getpid()} of {socket.gethostname()}, since 20" in str(refused.value)
        (tmp_path / "result.json").write_text('{"loss": 2}')
        with contextlib.ExitStack() as second:  # who wants the result need not wait
            assert claim(tmp_path, CONFIG, lock=second) == {"loss": 2}
    (tmp_path / "result.json").unlink()
    with contextlib.ExitStack() as lock:
        assert claim(tmp_path, CONFIG, lock=lock) is None


def test_a_killed_process_leaves_no_lock_and_nothing_unfinished(tmp_path):
    script = (
        "import contextlib, pathlib, sys, time; from lm.checkpoint import claim;"
        " from lm.config import Config; lock = contextlib.ExitStack();"
        " claim(pathlib.Path(sys.argv[1]), Config(), lock=lock); print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        unfinished = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
        unfinished.mkdir(parents=True)
        with contextlib.ExitStack() as lock, pytest.raises(InUse, match=f"{process.pid}"):
            claim(tmp_path, Config(), lock=lock)
        assert unfinished.exists()
        process.kill()
    with contextlib.ExitStack() as lock:
        assert claim(tmp_path, Config(), lock=lock) is None
        assert not unfinished.exists()
