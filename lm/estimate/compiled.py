"""Compiles the train step for TPUs that are not here, in a process of its own: ``compile_step``.

    python -m lm.estimate.compiled    reads the task from stdin as JSON, prints the answer as JSON

libtpu's compiler needs no TPU, but its environment must be set before jax is imported, it writes
on stderr as it likes, and it may end its process.
"""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lm.command import BadInput
from lm.config import Config, from_config_dict, to_dict
from lm.estimate.collectives import Collective, collectives
from lm.hardware import GIB, Topology, topology

# Without these libtpu looks for a TPU, and for the metadata server of its host.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class CompileError(RuntimeError):
    """The compiler failed, and not for want of memory."""


class Compiled(NamedTuple):
    """What libtpu's compiler says of one train step."""

    peak_bytes: float  # a chip's; where it does not fit, what it would need
    hbm_bytes: float  # a chip's, for programs
    collectives: list[Collective]  # empty where it does not fit
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.hbm_bytes


def compile_step(config: Config, on: Topology, sequences: int) -> Compiled:
    """Compiles the train step of `sequences` rows for the chips of `on`, which may take minutes.

    Raises:
      BadInput: libtpu is not installed, or the config does not go with the topology.
      CompileError: with the last line that the compiler wrote.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput(
            f"--topology={on.name}: compiling for TPUs needs libtpu, which is not installed:"
            " pip install -e '.[tpu]'; or give --nocompile for the estimate by arithmetic alone"
        )
    task = {"config": to_dict(config), "topology": on.name, "sequences": sequences}
    here = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "lm.estimate.compiled"],
        input=json.dumps(task),
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(f"compiling for {on.name} failed: {lines[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "bad_input" in answer:
        raise BadInput(answer["bad_input"])
    found = [Collective(**c | {"axes": tuple(c["axes"])}) for c in answer.pop("collectives")]
    return Compiled(**answer, collectives=found)


def devices(on: Topology) -> list:
    """Descriptions of the chips of `on`, as ``jax.make_mesh`` takes them; needs ``ENVIRONMENT``."""
    from jax.experimental import topologies

    options = {"num_slices": on.slices} if on.slices > 1 else {}
    if on.chip_name == "v4":  # its two cores are one device
        options["chip_config_name"] = "megacore"
    if on.n_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = on.name.rpartition("*")[2]
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


def _answer(task: dict) -> dict:
    import jax

    from lm.sharding import make_mesh
    from lm.train.step import Program

    on = topology(task["topology"])
    config = from_config_dict(task["config"])
    try:
        mesh = make_mesh(config.mesh, devices(on))
        program = Program(config, mesh)
        lowered = program.lower_train(task["sequences"])
    except BadInput as error:
        return {"bad_input": str(error)}
    started = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        peak, limit = _needed(str(error))
        if "temporaries" in str(error):  # XLA gave up before it counted what is passed in
            arrays = jax.tree.leaves(program.abstract_state)
            shardings = jax.tree.leaves(program.state_sharding)
            for x, sharding in zip(arrays, shardings, strict=True):
                peak += math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        found = []
    else:
        peak, limit = compiled.memory_analysis().peak_memory_in_bytes, on.chip.hbm_bytes
        found = collectives(compiled.as_text(), dict(mesh.shape))
    return {
        "peak_bytes": peak,
        "hbm_bytes": limit,
        "collectives": [c._asdict() for c in found],
        "compile_seconds": time.perf_counter() - started,
    }


def _needed(message: str) -> tuple[float, float]:
    """The bytes needed and those there are, of XLA's message, as "23.40G of 15.75G"."""
    sizes = re.findall(r"(\d+(?:\.\d+)?)([KMGT])", message)
    factors = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed, limit = (float(number) * factors[unit] for number, unit in sizes[:2])
    return needed, limit


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
