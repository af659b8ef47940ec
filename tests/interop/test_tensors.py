"""Weights under other names: nothing is lost, on any mesh, and little is held on the way."""

import functools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lm.checkpoint import abstract_params
from lm.command import BadInput
from lm.config import Config, MeshConfig, replace
from lm.interop import load, pieces
from lm.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")


BASE = replace(
    Config(),
    model=dict(vocab_size=24, d_model=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=24),
)
VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "biases": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True, "head_width": 6},
    "experts": {"moe": {"n_experts": 2}},
    "some_experts": {"moe": {"n_experts": 2, "every": 2}},
    "shallow_dense": {"moe": {"n_experts": 2, "first_dense": 2}},
    "some_after_dense": {"n_layers": 5, "moe": {"n_experts": 2, "every": 2, "first_dense": 1}},
}


class Arrays:
    """A source in memory."""

    def __init__(self, arrays):
        self.arrays = arrays

    @property
    def tensors(self):
        names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
        return {name: (x.shape, names[x.dtype.name]) for name, x in self.arrays.items()}

    def read(self, name, index):
        return self.arrays[name][index]


def with_model(changes):
    moe = {**vars(BASE.model.moe), **changes.get("moe", {})}
    return replace(BASE, model={**changes, "moe": moe})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def random_params(config):
    abstract = abstract_params(config, one_device())
    leaves, tree = jax.tree.flatten(abstract)
    draw = np.random.default_rng(0)
    values = [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(tree, values)


def theirs(config, params):
    return Arrays({name: get() for name, (_, get) in pieces(config.model, params).items()})


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", VARIANTS)
def test_out_and_in_again_is_the_same_to_the_bit(name, scan_layers):
    config = with_model({**VARIANTS[name], "scan_layers": scan_layers})
    params = random_params(config)
    source = theirs(config, params)
    shapes = {name: shape for name, (shape, _) in pieces(config.model, params).items()}
    assert shapes == {name: x.shape for name, x in source.arrays.items()}
    assert sum(x.size for x in source.arrays.values()) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    assert_same(load(source, config, one_device()), params)


def test_scanned_and_unrolled_are_the_same_tensors():
    unrolled = with_model(VARIANTS["some_after_dense"])
    source = theirs(unrolled, random_params(unrolled))
    scanned = replace(unrolled, model={"scan_layers": True})
    again = theirs(scanned, load(source, scanned, one_device()))
    assert_same(again.arrays, source.arrays)
    routed = {name.split(".")[2] for name in source.arrays if "moe" in name}
    assert routed == {"2", "4"}


def test_names_and_layouts_of_one_layer():
    config = with_model(VARIANTS["biases"])
    params = random_params(config)
    arrays = theirs(config, params).arrays
    attention = params["layer_2"]["attention"]
    layer = "model.layers.2."
    kernel = np.asarray(attention["query"]["kernel"])
    assert_same(arrays[layer + "self_attn.q_proj.weight"], kernel.T)
    assert_same(arrays[layer + "self_attn.v_proj.bias"], np.asarray(attention["value"]["bias"]))
    assert_same(arrays["model.embed_tokens.weight"], np.asarray(params["embedding"]))
    assert_same(arrays["lm_head.weight"], np.asarray(params["head"]["kernel"]).T)


@pytest.mark.parametrize(
    "name, axes",
    [
        ("qk_norm", dict(data=4, model=2, zero=3)),
        ("some_experts", dict(data=2, model=2, replica=2)),
        ("some_experts", dict(data=4, model=2, experts="data", zero=3)),
    ],
    ids=str,
)
def test_every_device_gets_its_own_part(name, axes, monkeypatch):
    if name == "qk_norm":  # each block's shape compiles on each device
        monkeypatch.setattr("lm.interop.tensors.SMALLEST_BLOCK", 1)
    config = with_model({**VARIANTS[name], "scan_layers": True, "head_width": 8})
    moe = {**vars(config.model.moe), "n_experts": 4 if config.model.moe.n_experts else 0}
    config = replace(config, model={"moe": moe}, mesh={**vars(MeshConfig()), **axes})
    params = random_params(config)
    mesh = make_mesh(config.mesh)
    placed = load(theirs(config, params), config, mesh)
    assert_same(placed, params)
    abstract = abstract_params(config, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, placed, abstract))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bits_are_read_exactly(dtype):
    source = theirs(BASE, random_params(BASE))
    source.arrays = {name: x.astype(dtype) for name, x in source.arrays.items()}
    again = theirs(BASE, load(source, BASE, one_device()))
    assert_same({name: x.astype(dtype) for name, x in again.arrays.items()}, source.arrays)


def test_what_fits_nowhere_is_told_by_name():
    params = random_params(BASE)
    q_proj, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"

    def refusal(config=BASE, drop=(), **changes):
        arrays = theirs(BASE, params).arrays | changes
        with pytest.raises(BadInput) as refused:
            load(Arrays({k: x for k, x in arrays.items() if k not in drop}), config, one_device())
        return str(refused.value)

    assert refusal(drop=[norm]) == f"tensors are missing: {norm}"
    assert refusal(drop=[norm, q_proj]).endswith("and 1 more")
    assert refusal(x=np.zeros(3, np.float32)) == "tensors fit nowhere: x"
    bias = {"model.layers.0.self_attn.o_proj.bias": np.zeros(16, np.float32)}
    assert "fit nowhere: model.layers.0.self_attn.o_proj.bias" in refusal(**bias)
    transposed = {q_proj: np.zeros((16, 17), np.float32)}
    assert "has the shape (16, 17), must be (16, 16)" in refusal(**transposed)
    assert "is I8, must be one of F32, BF16, F16" in refusal(**{norm: np.zeros(16, np.int8)})
    # What follows from the config is no weight, and a tied head may be stored once more.
    tied = replace(BASE, model={"tied": True})
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    load(Arrays(theirs(BASE, params).arrays | inverse), tied, one_device())
    biased = replace(
        BASE, model={"moe": {**vars(BASE.model.moe), "n_experts": 2, "bias_rate": 0.1}}
    )
    with pytest.raises(BadInput, match="the parameter layer/feed_forward/router/balance_bias: no"):
        pieces(biased.model, random_params(biased))


class Zeros:
    """A source that makes what is read of it, as a file would."""

    def __init__(self, config):
        self.tensors = {
            name: (shape, "BF16")
            for name, (shape, _) in pieces(
                config.model, abstract_params(config, one_device())
            ).items()
        }

    def read(self, name, index):
        shape, _ = self.tensors[name]
        return np.zeros([len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)],
                        ml_dtypes.bfloat16)  # fmt: skip


@functools.cache
def large(scan_layers):
    sizes = dict(vocab_size=4_000, d_model=512, n_layers=2, n_heads=4, d_ff=4_096, tied=True)
    return replace(BASE, model=dict(sizes, scan_layers=scan_layers, n_kv_heads=4))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_no_more_than_the_largest_tensor_is_held_on_the_way(scan_layers):
    config = large(scan_layers)
    source = Zeros(config)
    load(source, config, one_device())  # compiles
    largest = max(4 * int(np.prod(shape)) for shape, _ in source.tensors.values())
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    load(source, config, one_device())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert largest == 4 * 512 * 4096 and peak - before < 0.6 * largest


RESIDENT = """
import threading, time
import jax, numpy as np
from lm.config import replace
from tests.interop.test_tensors import Zeros, large, load, one_device

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l[:7] == "RssAnon") * 1024

config = large({scan})
source, mesh = Zeros(config), one_device()
kept = load(source, config, mesh)  # compiles; nothing is given back that could be used again
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
params = load(source, config, mesh)
done = True
thread.join()
placed = sum(x.nbytes for x in jax.tree.leaves(params))
largest = max(4 * int(np.prod(shape)) for shape, _ in source.tensors.values())
print((peak - before - placed) / largest)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_resident_memory_beyond_the_parameters(scan_layers):
    """Of the process itself, XLA's buffers included, in largest tensors of float32."""
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT.format(scan=scan_layers)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 1.2
