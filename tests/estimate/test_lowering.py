"""Every shipped config's real step, lowered for its intended slice without devices or libtpu."""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from lm.config import MESH_AXES, Config, replace
from lm.config_file import load
from lm.estimate.memory import device_memory, fuses_attention
from lm.estimate.study import largest_run, planned
from lm.hardware import HBM_BYTES, topology
from lm.sharding import axis_sizes, make_mesh
from lm.train.recipe import resolve
from lm.train.step import Program

ROOT = Path(__file__).parents[2]
INTENDED = {
    "configs/base.py": None,  # one device
    "configs/tiny.py": None,
    "configs/isoflop_cpu.py:quick": None,
    "configs/isoflop_tpu.py": "v5p:4x8x8",
    "configs/isoflop_tpu.py:1e20": "v5e:2x4",
    "configs/chinchilla.py": "v5p:4x8x8",
    "configs/chinchilla.py:44m": "v5e:2x4",
    "configs/chinchilla.py:16183m": "v5e:16x16",
    "configs/llama3.py:8b": "v5p:4x4x4",
    "configs/llama3.py:70b": "v5p:8x8x8",
    "configs/llama3.py:405b": "v5p:8x16x16",
    "configs/mixtral.py:tiny": None,
    "configs/mixtral.py:8x7b": "v5p:4x4x8",
    "configs/mixtral.py:8x22b": "v5p:8x8x8",
    "configs/deepseek_moe.py": "v5p:4x4x4",
    "configs/switch.py:base": "v5e:4x4",
    "configs/switch.py:large": "v5e:8x8",
}


def test_every_config_has_an_intended_slice():
    shipped = {f"configs/{path.name}" for path in ROOT.glob("configs/[!_]*.py")}
    # One's model is another run's; the other's GPUs are no slice, and lowered for below.
    shipped -= {"configs/finetune.py", "configs/isoflop_gpu.py"}
    assert shipped == {spec.partition(":")[0] for spec in INTENDED}


def smallest_run(config):
    return min(planned(config, config.sweep.budgets[0]), key=lambda run: run.model.d_model)


@pytest.fixture(params=[*INTENDED, "smallest of configs/isoflop_tpu.py"])
def placed(request, monkeypatch):
    """A config, its slice or None, its mesh axes' sizes and rows a step."""
    monkeypatch.chdir(ROOT)
    smallest, _, spec = request.param.rpartition(" of ")
    config = (smallest_run if smallest else largest_run)(load(spec))
    on = INTENDED[spec] and topology(INTENDED[spec])
    sizes = dict(zip(MESH_AXES, axis_sizes(config.mesh, on.n_chips if on else 1), strict=True))
    return config, on, sizes, resolve(config, sizes["replica"] * sizes["data"]).sequences


def device_bytes(tree, shardings):
    return sum(
        math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def test_lowers_and_gives_each_device_the_bytes_that_arithmetic_expects(placed):
    config, on, sizes, sequences = placed
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * 5)
    program = Program(config, mesh)
    assert "stablehlo.while" in program.lower_train(sequences).as_text()
    expected = device_memory(config, sizes, sequences)
    state, shardings = program.abstract_state, program.state_sharding
    assert device_bytes(state.params, shardings.params) == pytest.approx(expected.parameters)
    # And a count of steps.
    moments = device_bytes(state.moments, shardings.moments)
    assert moments == pytest.approx(expected.moments + 4)
    if config.mesh.zero == 3 and config.mesh.experts == "model":
        whole = sum(x.size * 4 for x in jax.tree.leaves(state.params))
        shares = sizes["data"] * sizes["model"]
        assert expected.parameters == pytest.approx(whole / shares, rel=0.02)


@pytest.mark.parametrize("run", [smallest_run, largest_run])
def test_the_gpu_study_lowers_with_cudnns_attention_and_fits_by_arithmetic(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lm.model.kernels.platform", lambda: "gpu")
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91_000
    )
    config = run(load("configs/isoflop_gpu.py"))
    mesh = make_mesh(config.mesh)  # of eight devices, which stand for the GPUs
    sequences = resolve(config, mesh.shape["data"]).sequences
    text = Program(config, mesh).lower_train(sequences, "cuda").as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    memory = device_memory(config, dict(mesh.shape), sequences)
    assert memory.total < HBM_BYTES["h100"]


@pytest.mark.parametrize("zero", [0, 3])
@pytest.mark.parametrize("experts", ["data", "model"])
def test_bytes_with_experts_on_either_axis_and_fewer_kv_heads_than_devices(experts, zero):
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": 2, "model": 4, "replica": 2}
    moe = {"n_experts": 4, "every": 2, "n_shared": 1}
    config = replace(
        Config(),
        model={"n_layers": 4, "n_kv_heads": 2, "vocab_size": 64, "scan_layers": True, "moe": moe},
        mesh={**sizes, "experts": experts, "zero": zero},
    )
    program = Program(config, AbstractMesh(tuple(sizes.values()), MESH_AXES))
    found = device_bytes(program.abstract_state.params, program.state_sharding.params)
    assert found == pytest.approx(device_memory(config, sizes, 8).parameters)


def test_fits_its_slice_by_arithmetic_and_lies_on_its_torus(placed):
    config, on, sizes, sequences = placed
    if on is None:
        return
    memory = device_memory(config, sizes, sequences, fuses_attention(config, sizes))
    assert memory.total < on.chip.hbm_bytes
    assert on.bandwidths(sizes) is not None
