"""The schedule by its table, and a pipeline of small layers against the layers one by one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.command import BadInput
from lm.config import Config, replace
from lm.sharding.pipeline import (
    assignment,
    bubble_share,
    check_pipeline,
    n_iterations,
    pipelined,
)

SCHEDULES = [(2, 2, 1), (4, 4, 1), (8, 4, 1), (12, 4, 1), (4, 4, 2), (12, 4, 3), (6, 3, 4)]


def table(m, p, v):
    """{(stage, round, micro-batch): iteration}, from what the implementation asks."""
    result = {}
    for i in range(n_iterations(m, p, v)):
        for s in range(p):
            micro, round_ = assignment(i, s, m)
            if 0 <= round_ < v:
                assert (s, round_, micro) not in result
                result[s, round_, micro] = i
    return result


@pytest.mark.parametrize("m, p, v", SCHEDULES)
def test_the_schedule_does_all_work_once_and_in_order(m, p, v):
    when = table(m, p, v)
    assert when.keys() == {(s, r, j) for s in range(p) for r in range(v) for j in range(m)}
    for (s, r, j), i in when.items():
        if s:  # what the stage before gave in the last iteration
            assert when[s - 1, r, j] == i - 1
        elif r:  # what the last stage gave, in the round before
            assert when[p - 1, r - 1, j] < i


@pytest.mark.parametrize("m, p, v", SCHEDULES)
def test_the_bubble_is_what_the_papers_say(m, p, v):
    idle = p * n_iterations(m, p, v) - len(table(m, p, v))
    assert bubble_share(m, p, v) == pytest.approx(idle / (p * n_iterations(m, p, v)))
    assert bubble_share(m, p, v) == pytest.approx((p - 1) / (v * m + p - 1))


B, T, D = 2, 3, 8


def layer(x_BTD, params, shift_BT):
    y_BTD = x_BTD + jnp.tanh(x_BTD @ params["w"] + params["b"] + shift_BT[..., None])
    seen = {"layer": params["id"], "shift": shift_BT[0, 0], "square": jnp.mean(y_BTD**2)}
    return y_BTD, seen


def layers(params, x_BTD, shift_BT):
    return jax.lax.scan(functools.partial(layer, shift_BT=shift_BT), x_BTD, params)


def given(m, n_layers):
    draw = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(draw.normal(size=shape), jnp.float32)

    ids = jnp.arange(n_layers, dtype=jnp.float32)
    params = {"w": array(n_layers, D, D) / D**0.5, "b": array(n_layers, D), "id": ids}
    return params, array(m, B, T, D), array(m, B, T)


def loss(apply, params, x_MBTD, shift_MBT):
    """Of the outputs and of what the layers tell, so that both must carry their gradient."""
    y_MBTD, seen = apply(params, x_MBTD, shift_MBT)
    weights = jnp.arange(1.0, 1 + seen["square"].size).reshape(seen["square"].shape)
    return jnp.sum(jnp.sin(y_MBTD)) + jnp.sum(weights * seen["square"]), (y_MBTD, seen)


def one_by_one(params, x_MBTD, shift_MBT):
    return jax.lax.map(lambda micro: layers(params, *micro), (x_MBTD, shift_MBT))


def mesh_of(**axes):
    devices, auto = jax.devices()[: math.prod(axes.values())], (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=devices, axis_types=auto)


def assert_close(x, y):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * np.abs(y).max())


def run(m, p, v, n_layers, data=2):
    """(value, gradients) of the pipeline and of the layers one by one, and the compiled text."""
    params, x_MBTD, shift_MBT = given(m, n_layers)
    mesh = mesh_of(stage=p, data=data)
    held = jax.device_put(params, NamedSharding(mesh, PartitionSpec("stage")))
    spread = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "data")))
        for x in (x_MBTD, shift_MBT)
    ]
    pipeline = functools.partial(pipelined, layers, n_stages=p, rounds=v)

    def step(apply):
        return jax.jit(
            jax.value_and_grad(functools.partial(loss, apply), argnums=(0, 1), has_aux=True)
        )

    with jax.set_mesh(mesh):
        compiled = step(pipeline).lower(held, *spread).compile()
        found = compiled(held, *spread)
    return found, step(one_by_one)(params, x_MBTD, shift_MBT), compiled.as_text()


@pytest.mark.parametrize(
    "m, p, v, n_layers",
    [
        (4, 4, 1, 4),  # as many micro-batches as stages
        (6, 2, 1, 4),
        (4, 2, 2, 8),
        pytest.param(8, 4, 1, 8, marks=pytest.mark.slow),
        pytest.param(4, 4, 2, 16, marks=pytest.mark.slow),
        pytest.param(12, 4, 2, 8, marks=pytest.mark.slow),
        pytest.param(16, 4, 3, 12, marks=pytest.mark.slow),
        pytest.param(2, 2, 4, 16, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_is_the_layers_one_by_one(m, p, v, n_layers):
    found, wanted, text = run(m, p, v, n_layers)
    jax.tree.map(assert_close, found, wanted)
    (_, (_, seen)), _ = found
    np.testing.assert_array_equal(seen["layer"], np.tile(np.arange(n_layers), (m, 1)))
    np.testing.assert_array_equal(seen["shift"][:, 0], given(m, n_layers)[2][:, 0, 0])
    # Activations go from stage to stage, and no stage ever sees another one's parameters but
    # to hand them on: only what the layers tell (M, L) may be gathered.
    assert f"f32[1,{B // 2},{T},{D}]{{3,2,1,0}} collective-permute(" in text
    for shape in re.findall(r"= \(?f32\[([\d,]*)\]\S* (?:all-gather|all-to-all)\(", text):
        assert np.prod(list(map(int, shape.split(",")))) == m * n_layers
    permuted = re.findall(rf"f32\[([\d,]*),{D},{D}\]\S* collective-permute\(", text)
    assert bool(permuted) == (v > 1)


def test_one_pass_is_one_loop_of_the_counted_length():
    params, x_MBTD, shift_MBT = given(8, 8)
    with jax.set_mesh(mesh_of(stage=4)):
        jaxpr = jax.make_jaxpr(lambda *a: pipelined(layers, *a, 4, 2))(params, x_MBTD, shift_MBT)
    lengths = [e.params["length"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan"]
    assert lengths == [n_iterations(8, 4, 2)] == [19]


@pytest.mark.parametrize("m, n_layers, v", [(6, 8, 1), (8, 6, 1), (8, 4, 2)])
def test_what_does_not_divide_is_refused(m, n_layers, v):
    with pytest.raises(ValueError, match=f"{m} micro-batches, {n_layers} layers: 4 stages"):
        pipelined(layers, *given(m, n_layers), 4, v)


@pytest.mark.parametrize(
    "n_stages, changes, line",
    [
        (1, dict(mesh={"rounds": 2}), "mesh.rounds = 2 with mesh.stage = 1: must be 1, or more"),
        (2, dict(model={"scan_layers": False}), "model.scan_layers = False with mesh.stage = 2"),
        (8, {}, "scanned layers = 6 over mesh.stage x mesh.rounds = 8: must be a multiple, as 8"),
        (3, dict(mesh={"rounds": 4}), "layers = 6 over mesh.stage x mesh.rounds = 12: .* as 12"),
        (3, dict(train={"accumulation": 4}), "train.accumulation = 4 over mesh.stage = 3: .* as 6"),
        (2, dict(model={"moe": {"n_experts": 2, "every": 2}}), "scanned layers = 3 over .* as 4"),
    ],
)
def test_what_no_pipeline_can_hold_is_told_with_what_would(n_stages, changes, line):
    config = replace(
        Config(), model={"n_layers": 6, "scan_layers": True}, train={"accumulation": 6}
    )
    check_pipeline(config, 3)
    with pytest.raises(BadInput, match=line):
        check_pipeline(replace(config, **changes), n_stages)
