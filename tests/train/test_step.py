import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import arithmetic
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.data import Batch
from lm.model import Decoder, cross_entropy, lora
from lm.sharding import make_mesh, placed
from lm.train.schedule import Schedule
from lm.train.step import Program

MODEL = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24)
CONFIG = replace(
    Config(model=MODEL, mesh=MeshConfig(data=1)),
    data={"seq_len": 8},
    train={"steps_per_dispatch": 4, "batch_tokens": 64.0},
)
SCHEDULE = Schedule(0.01, 1.0, 2.0, 2.0, 10.0, 0.0)


def batches(n=4, ragged=True):
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 32, (n, 8, 9)).astype(np.int32)
    weights = (draw.random((n, 8, 8)) < 0.6).astype(np.float32)
    weights[:, 0] = 0  # a row with nothing to predict
    return Batch(tokens[..., :-1], tokens[..., 1:], weights if ragged else None, None, None)


def train(config=CONFIG, devices=1, n_steps=4, given=None, dispatches=1):
    program = Program(config, make_mesh(config.mesh, jax.devices()[:devices]))
    state = program.init(seed=1)
    for _ in range(dispatches):
        state, metrics = program.train(state, program.put(given or batches()), n_steps, SCHEDULE)
    return jax.device_get(state), jax.device_get(metrics), program


@pytest.fixture(scope="module")
def plain():
    return train()


def assert_same(found, wanted, rtol=2e-4, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, wanted)


def test_the_first_step_is_adamw_on_the_mean_over_valid_tokens():
    """Against optax's own adamw, and a loss written out."""
    config = replace(CONFIG, optimizer={"weight_decay": 0.1, "clip_norm": 0.5, "beta2": 0.95})
    state, metrics, program = train(config, n_steps=1)
    batch = jax.tree.map(lambda x: x[0], batches())
    start = program.init(seed=1).params
    decoder = Decoder(MODEL, 8)

    def loss(params):
        log_p = jax.nn.log_softmax(decoder.apply({"params": params}, batch.inputs_BT))
        nats = -jnp.take_along_axis(log_p, batch.targets_BT[..., None], -1)[..., 0]
        return jnp.sum(nats * batch.weights_BT) / batch.weights_BT.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(start)
    matrices = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", start)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.005, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=matrices),
    )
    updates, _ = jax.jit(reference.update)(gradient, reference.init(start), start)
    assert_same(state.params, optax.apply_updates(start, updates), rtol=1e-4)
    assert metrics.loss[0] == pytest.approx(float(value), rel=1e-5)
    assert metrics.gradient_norm[0] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-4)
    assert metrics.learning_rate[0] == pytest.approx(0.005)


def test_under_width_only_matrices_are_scaled():
    still = SCHEDULE._replace(matrix_scale=0.0)
    program = Program(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    before = jax.device_get(program.init(seed=1).params)
    state, _ = program.train(program.init(seed=1), program.put(batches()), 4, still)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, jax.device_get(state.params))
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        assert value != (path[-1].key == "kernel"), path


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_is_token_exact_under_ragged_masks(plain, n):
    state, metrics, _ = train(replace(CONFIG, train={"accumulation": n}))
    np.testing.assert_allclose(metrics.loss, plain[1].loss, rtol=1e-5)
    assert_same(state.params, plain[0].params)


def test_one_step_a_dispatch_is_the_same_run(plain):
    program = plain[2]
    state = program.init(seed=1)
    losses = []
    for i in range(4):
        one = jax.tree.map(lambda x, i=i: np.roll(x, -i, axis=0), batches())
        state, metrics = program.train(state, program.put(one), 1, SCHEDULE)
        losses.append(float(metrics.loss[0]))
    np.testing.assert_array_equal(np.float32(losses), plain[1].loss)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), plain[0])


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(data=4, model=2), marks=pytest.mark.slow),
        dict(data=2, model=4),
        pytest.param(dict(data=8, zero=1), marks=pytest.mark.slow),
        pytest.param(dict(data=8, zero=3), marks=pytest.mark.slow),
        dict(data=4, context=2),
        dict(replica=2, data=2, model=2, zero=3, sequence_sharded=True),
    ],
)
def test_any_mesh_is_the_same_run(plain, mesh):
    config = replace(CONFIG, mesh=mesh)
    state, metrics, program = train(config, devices=8)
    np.testing.assert_allclose(metrics.loss, plain[1].loss, rtol=1e-5)
    assert_same(state.params, plain[0].params)
    up = program.init(seed=1).params["layer_0"]["feed_forward"]["up"]["kernel"]
    rows = 16 // (mesh["data"] if mesh.get("zero") == 3 else 1)
    assert {s.data.shape for s in up.addressable_shards} == {(rows, 24 // mesh.get("model", 1))}


@pytest.mark.parametrize("zero", [0, 3])
def test_under_zero_3_no_whole_kernel_waits_for_the_backward_pass(zero):
    config = replace(CONFIG, model={"scan_layers": True}, mesh={"data": 8, "zero": zero})
    program = Program(config, make_mesh(config.mesh))
    batch = jax.tree.map(lambda x: x[0], batches())
    with jax.set_mesh(program.mesh), placed(program.mesh, program.layout):
        gradient = jax.grad(lambda params: program._nats(params, batch))
        trace = jax.make_jaxpr(gradient)(program.init(seed=1).params)
    forward, _ = (e for e in trace.jaxpr.eqns if e.primitive.name == "scan")
    kept = [x.aval.shape for x in forward.outvars]
    assert ((2, 16, 24) in kept) == (zero == 0)  # two layers' `up`
    assert (2, 64, 24) in kept  # and its output, which nothing computes again


@pytest.mark.parametrize("chunk", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_the_loss_in_chunks_is_the_same_run(plain, chunk):
    state, metrics, _ = train(replace(CONFIG, train={"loss_chunk": chunk}))
    np.testing.assert_allclose(metrics.loss, plain[1].loss, rtol=1e-5)
    assert_same(state.params, plain[0].params)


def test_scan_and_remat_are_the_same_run(plain):
    for model in ({"remat": "full"}, {"scan_layers": True, "remat": "full"}):
        config = replace(CONFIG, model=model)
        program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
        state = program.init(seed=1)
        if config.model.scan_layers:
            layers = [plain[2].init(seed=1).params[f"layer_{i}"] for i in range(2)]
            params = {k: v for k, v in plain[2].init(seed=1).params.items() if "layer_" not in k}
            params["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
            state = state._replace(params=params)
        _, metrics = program.train(state, program.put(batches()), 4, SCHEDULE)
        np.testing.assert_allclose(metrics.loss, plain[1].loss, rtol=1e-5)


LORA = replace(CONFIG, model={"lora": {"rank": 4, "alpha": 8.0}})


@pytest.fixture(scope="module")
def adapted():
    return train(LORA)


def test_only_adapters_are_trained_and_have_optimizer_state(adapted):
    state, metrics, program = adapted
    start = jax.device_get(program.init(seed=1).params)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), start, state.params)
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        assert value == (path[-1].key in lora.NAMES), path
    count = arithmetic.parameters(LORA.model)
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(state.moments))
    assert n_bytes == 8 * count.adapters + 4  # two moments, and Adam's count of steps
    assert metrics.gradient_norm[0] > 0


@pytest.mark.slow
def test_adapters_after_one_step_are_adams(adapted):
    """Against optax's partition of the whole tree."""
    program = adapted[2]
    start = jax.device_get(program.init(seed=1).params)
    batch = jax.tree.map(lambda x: x[0], batches())

    def loss(params):
        logits = Decoder(LORA.model, 8).apply({"params": params}, batch.inputs_BT)
        return cross_entropy(logits, batch.targets_BT, batch.weights_BT) / batch.weights_BT.sum()

    labels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in lora.NAMES, start)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.005, 0.9, 0.99))
    reference = optax.partition({True: adam, False: optax.set_to_zero()}, labels)
    gradient = jax.jit(jax.grad(loss))(start)
    updates, _ = jax.jit(reference.update)(gradient, reference.init(start), start)
    state, _ = program.train(program.init(seed=1), program.put(batches()), 1, SCHEDULE)
    assert_same(jax.device_get(state.params), optax.apply_updates(start, updates), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        dict(mesh=dict(data=2, model=4)),
        dict(mesh=dict(data=4, model=2, zero=3)),
        dict(train=dict(accumulation=4)),
        dict(model=dict(remat="full")),
    ],
    ids=str,
)
def test_adapters_are_the_same_run_anywhere(adapted, change):
    config = replace(LORA, **change)
    state, metrics, program = train(config, devices=8 if "mesh" in change else 1)
    np.testing.assert_allclose(metrics.loss, adapted[1].loss, rtol=1e-5)
    assert_same(state.params, adapted[0].params)
    if "mesh" in change:
        up = program.init(seed=1).params["layer_0"]["feed_forward"]["up"]
        mesh = change["mesh"]
        rows = 16 // (mesh["data"] if mesh.get("zero") else 1)
        assert {s.data.shape for s in up["lora_a"].addressable_shards} == {(rows, 4)}
        columns = 24 // mesh["model"]
        assert {s.data.shape for s in up["lora_b"].addressable_shards} == {(4, columns)}


def test_nats_are_the_sum_of_the_training_loss(plain):
    program = plain[2]
    batch = jax.tree.map(lambda x: x[0], batches())
    params = program.init(seed=1).params
    logits = Decoder(MODEL, 8).apply({"params": params}, batch.inputs_BT)
    wanted = cross_entropy(logits, batch.targets_BT, batch.weights_BT)
    assert float(program.nats(params, program.put(batch))) == pytest.approx(float(wanted), rel=1e-5)
    assert plain[1].loss[0] == pytest.approx(float(wanted) / batch.weights_BT.sum(), rel=1e-5)


def test_runs_of_one_shape_share_a_program():
    longer = replace(CONFIG, train={"tokens": 9e9, "seed": 3}, optimizer={"learning_rate": 1.0})
    assert Program.key(longer) == Program.key(CONFIG)
    assert Program.key(replace(CONFIG, optimizer={"beta2": 0.5})) != Program.key(CONFIG)
    assert Program.key(replace(CONFIG, model={"d_ff": 32})) != Program.key(CONFIG)
