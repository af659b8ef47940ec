"""A run that was killed while it wrote checkpoints ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.checkpoint import Checkpoints
from lm.config import Config, MeshConfig, ModelConfig, replace, to_dict
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # a reading on the mesh it had
def test_killed_while_it_writes_checkpoints_it_ends_bit_identical(text_data, tmp_path):
    config = Config(
        model=ModelConfig(vocab_size=264, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24),
        data=text_data,
        mesh=MeshConfig(data=1),
    )
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

    jax.tree.map(np.testing.assert_array_equal, final_state(killed), final_state(undisturbed))
    lines = [[timeless(line) for line in read_metrics(each)] for each in (killed, undisturbed)]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(1, 51))
    results = [json.loads((each / "result.json").read_text()) for each in (killed, undisturbed)]
    assert timeless(results[0]) == timeless(results[1])
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"40", "50"}
