"""Whatever happens to a run and its checkpoints, it ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.checkpoint import Checkpoints
from lm.command import InUse
from lm.config import Config, MeshConfig, ModelConfig, replace, to_dict
from lm.train import loop
from lm.train.clock import timeless
from lm.train.metrics import read_metrics

SCRIPT = """
import json, os, signal, sys, threading
from pathlib import Path
from lm import checksums
from lm.config import from_config_dict
from lm.train.loop import train

config, workdir, stage, step = sys.argv[1:]
unfinished = Path(workdir, "checkpoints", f"{step}.orbax-checkpoint-tmp")
write = checksums.write

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_while_arrays_are_written():
    while not list(unfinished.glob("state*/**/d/*")):
        pass
    die()

def write_and_die(folder):
    if folder.name != unfinished.name:
        return write(folder)
    if stage == "no checksums":
        die()
    write(folder)
    if stage == "old steps not removed":
        os.rename(folder, folder.with_name(step))
    die()

if stage == "arrays":
    threading.Thread(target=die_while_arrays_are_written, daemon=True).start()
elif stage:
    checksums.write = write_and_die
train(from_config_dict(json.loads(config)), workdir)
"""
KILLS = {"arrays": 10, "no checksums": 20, "no name": 30, "old steps not removed": 40}


@pytest.fixture(scope="module")
def config(text_data):
    return Config(
        model=ModelConfig(vocab_size=264, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24),
        data=text_data,
        mesh=MeshConfig(data=1),
    )


def run(config, workdir, compiled, stage="", step=0):
    command = [sys.executable, "-c", SCRIPT, json.dumps(to_dict(config)), str(workdir), stage]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run([*command, str(step)], env=environment, capture_output=True, text=True)


def final_state(workdir):
    """Every array of the last checkpoint, with Orbax's own reading of what is there."""
    import orbax.checkpoint as ocp

    folder = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return ocp.PyTreeCheckpointer().restore(folder / "state")


def assert_same_end(found, wanted, n_steps):
    jax.tree.map(np.testing.assert_array_equal, final_state(found), final_state(wanted))
    lines = [[timeless(line) for line in read_metrics(each)] for each in (found, wanted)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, n_steps + 1))
    results = [json.loads((each / "result.json").read_text()) for each in (found, wanted)]
    assert timeless(results[0]) == timeless(results[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # a reading on the mesh it had
def test_killed_while_it_writes_checkpoints_it_ends_bit_identical(config, tmp_path):
    train = {"tokens": 256.0 * 50, "batch_tokens": 256.0, "checkpoint_every": 10, "log_every": 1}
    config = replace(config, train={**train, "steps_per_dispatch": 4, "evaluate_every": 15})
    undisturbed, killed, compiled = (tmp_path / name for name in ("whole", "killed", "compiled"))
    done = run(config, undisturbed, compiled)
    assert done.returncode == 0, done.stderr

    for stage, step in KILLS.items():
        died = run(config, killed, compiled, stage, step)
        assert died.returncode == -9, (stage, died.stderr)
        newest = step if stage == "old steps not removed" else step - 10
        checkpoints = Checkpoints(killed)
        assert checkpoints._whole(lambda at: True) == (newest or None), stage
        assert not checkpoints.damaged
        checkpoints.close()
    assert run(config, killed, compiled).returncode == 0

    assert_same_end(killed, undisturbed, n_steps=50)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"40", "50"}


@pytest.fixture(scope="module")
def short(config):
    train = {"tokens": 1024.0 * 12, "batch_tokens": 1024.0, "checkpoint_every": 4, "log_every": 1}
    train |= {"steps_per_dispatch": 4, "tensorboard": False, "keep_checkpoints": 3}
    return replace(config, mesh={"data": 8}, train=train)


@pytest.fixture(scope="module")
def undisturbed(short, tmp_path_factory):
    """(programs, the folder of the run)"""
    programs, folder = {}, tmp_path_factory.mktemp("undisturbed")
    loop.train(short, folder, programs=programs)
    return programs, folder


class Died(Exception):
    pass


def die_at(step):
    def progress(at):
        if at.step == step:
            raise Died

    return progress


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("damaged, resumed", [((8,), 4), ((8, 4), 0)], ids=str)
def test_with_damaged_checkpoints_it_ends_the_same(
    short, undisturbed, tmp_path, damaged, resumed, capfd
):
    programs, wanted = undisturbed
    with pytest.raises(Died):
        loop.train(short, tmp_path, programs=programs, progress=die_at(12))
    for step in damaged:
        path = tmp_path / "checkpoints" / str(step) / "meta" / "metadata"
        path.write_bytes(path.read_bytes()[:-1])
    begun = []
    capfd.readouterr()
    loop.train(short, tmp_path, programs=programs, progress=begun.append)
    assert begun[0].step == resumed + 1
    said = capfd.readouterr().err.splitlines()
    assert [
        f"checkpoints/{step}: damaged, meta/metadata has" in line
        for step, line in zip(damaged, said, strict=True)
    ] == [True] * len(damaged)
    assert_same_end(tmp_path, wanted, n_steps=12)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"], e["checkpoint"]) for e in events] == [
        ("damaged_checkpoint", resumed, step) for step in sorted(damaged)
    ]
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4", "8", "12"}


def test_the_second_process_in_a_folder_is_refused_and_the_first_goes_on(
    short, undisturbed, tmp_path
):
    programs, wanted = undisturbed
    refused = []

    def begin_another(at):
        with pytest.raises(InUse, match=f"process {os.getpid()} of "):
            loop.train(short, tmp_path, programs=programs)
        refused.append(at.step)

    result = loop.train(short, tmp_path, programs=programs, progress=begin_another)
    assert {4, 8, 12} <= set(refused)
    assert timeless(result) == timeless(json.loads((wanted / "result.json").read_text()))
