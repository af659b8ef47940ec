"""Quantised products against plain ones, and decoders that train with them."""

import functools
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.data import Batch
from lm.model import quantized
from lm.sharding import make_mesh, placed
from lm.train.schedule import Schedule
from lm.train.step import Program

# Of a sum of n products whose operands are each off by at most half a step, uniformly: a step is
# 1/127 of the row's largest entry, or 1/8 of the entry itself (1/4 in a gradient, 2 mantissa bits).
LARGEST_ERROR = {"int8": 0.012, "fp8": 0.07}
TYPES = {"int8": ("i8", "i8"), "fp8": ("f8E4M3FN", "f8E5M2")}


@pytest.fixture
def quick_compilation():
    """Many small programs run once each: their compilation is what these tests wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Layer(nn.Module):
    shape: tuple[int, ...]
    quantization: str
    sizes: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(1.0), self.shape)
        if self.sizes:
            return quantized.ragged_dot(x, kernel, jnp.array(self.sizes), self.quantization)
        return quantized.matmul(x, kernel, self.quantization)


def operands(text):
    """The two operands' types of every product in a lowered program."""
    found = re.findall(r"(?:dot_general|ragged_dot)[^\n]*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    return [tuple(shape.rsplit("x", 1)[-1] for shape in pair) for pair in found]


@pytest.mark.parametrize(
    ("rows", "kernel", "sizes", "quantization"),
    [
        ((24, 24), (24, 24), (), "int8"),  # an operand of the kernel's own shape is still no kernel
        ((2, 5, 16), (16, 24), (), "fp8"),
        ((4, 16, 16), (4, 16, 16), (), "int8"),
        ((32, 16), (4, 16, 24), (8, 4, 0, 20), "int8"),
        ((32, 16), (4, 16, 24), (8, 4, 0, 20), "fp8"),
    ],
)
def test_a_product_and_its_gradients_are_the_plain_ones_rounded(
    quick_compilation, rows, kernel, sizes, quantization
):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=rows), jnp.float32)
    results = {}
    for kind in ("none", quantization):
        layer = Layer(kernel, kind, sizes)
        variables = layer.init(jax.random.key(0), x)
        shape = jax.eval_shape(layer.apply, variables, x).shape
        g = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

        @jax.jit
        def both(variables, x, layer=layer, g=g):
            y, back = jax.vjp(layer.apply, variables, x)
            return y, *back(g)

        results[kind] = both(variables, x)
        types = operands(both.lower(variables, x).as_text())
    assert jax.tree.structure(results["none"]) == jax.tree.structure(results[quantization])
    found_and_plain = (jax.tree.leaves(results[kind]) for kind in (quantization, "none"))
    for found, plain in zip(*found_and_plain, strict=True):
        error = jnp.linalg.norm(found - plain) / jnp.linalg.norm(plain)
        assert 0 < error < LARGEST_ERROR[quantization]
    operand, gradient = TYPES[quantization]
    assert types[0] == (operand, operand)
    assert all(set(pair) == {operand, gradient} for pair in types[1:]) and len(types) == 3


MODEL = ModelConfig(vocab_size=32, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=24)
CONFIG = replace(
    Config(model=MODEL, mesh=MeshConfig(data=1)),
    data={"seq_len": 16},
    train={"steps_per_dispatch": 60, "batch_tokens": 256.0},
)


def walks():
    """A batch a step of walks of uneven stride, which a small decoder learns."""
    draw = np.random.default_rng(0)
    strides = draw.choice([1, 2, 3], size=(60, 16, 17), p=[0.8, 0.1, 0.1])
    tokens = (np.cumsum(strides, -1) % 32).astype(np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], None, None, None)


@functools.cache
def losses(quantization):
    config = replace(CONFIG, model={"quantization": quantization})
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    schedule = Schedule(0.01, 1.0, 5.0, 5.0, 60.0, 0.0)
    _, metrics = program.train(program.init(seed=1), program.put(walks()), 60, schedule)
    return np.asarray(metrics.loss)


@pytest.mark.parametrize("quantization", [pytest.param("int8", marks=pytest.mark.slow), "fp8"])
def test_a_decoder_trains_as_in_float32(quantization):
    plain, found = losses("none"), losses(quantization)
    assert plain[0] > 3.3 and plain[-10:].mean() < 1.6  # it did learn
    assert found[-10:].mean() == pytest.approx(plain[-10:].mean(), rel=0.03)
    assert np.abs(found - plain).max() > 1e-5  # and not by doing the same


def gradient(model, **mesh):
    """A function of parameters, traced and called under its program's mesh; the program."""
    config = replace(CONFIG, model=model, mesh=mesh)
    program = Program(config, make_mesh(config.mesh, jax.devices()[: config.mesh.data]))
    batch = jax.tree.map(lambda x: x[0], walks())
    return jax.jit(jax.grad(lambda params: program._nats(params, batch))), program


def gradient_text(model):
    function, program = gradient(model)
    with jax.set_mesh(program.mesh), placed(program.mesh, program.layout):
        return function.lower(program.abstract_state.params).as_text(), program


def test_over_devices_it_is_the_same_gradient(quick_compilation):
    """In fp8; int8's scale lays a row's extreme on a tie, which may fall either way."""
    found = []
    for mesh in ({"data": 1}, {"data": 4, "zero": 3}):
        function, program = gradient({"quantization": "fp8"}, **mesh)
        with jax.set_mesh(program.mesh), placed(program.mesh, program.layout):
            found.append(jax.device_get(function(program.init(seed=1).params)))
    one, four = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in found)
    assert np.linalg.norm(one - four) < 2e-3 * np.linalg.norm(one)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_the_blocks_products_are_quantised_and_no_others(quantization):
    text, program = gradient_text({"quantization": quantization})
    products = operands(text)
    operand, gradient = TYPES[quantization]
    # Query, key, value, out, gate, up, down; each forward, for the input and for the kernel.
    assert sum(operand in pair or gradient in pair for pair in products) == 3 * 7 * MODEL.n_layers
    assert sum(pair == ("f32", "f32") for pair in products) == 6 * MODEL.n_layers + 3
    plain = Program(CONFIG, program.mesh).abstract_state
    assert program.abstract_state == plain  # a checkpoint of either is one of both


@pytest.mark.parametrize("dispatch", ["capacity", "ragged"])
def test_experts_are_quantised_and_their_router_is_not(dispatch):
    moe = {"n_experts": 4, "top_k": 2, "dispatch": dispatch}
    kinds = {
        kind: operands(gradient_text({"quantization": kind, "moe": moe})[0])
        for kind in ("none", "int8")
    }
    found = sum(pair == ("i8", "i8") for pair in kinds["int8"])
    assert found == 3 * 7 * MODEL.n_layers
    assert len(kinds["int8"]) == len(kinds["none"])


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    quantized._provider.cache_clear()
    with pytest.raises(BadInput, match=r"model.quantization = 'int8': needs the extra quant"):
        gradient_text({"quantization": "int8"})
    quantized._provider.cache_clear()
