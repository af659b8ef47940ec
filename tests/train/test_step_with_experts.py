"""The step of a decoder with experts: both losses once, on any mesh, and where rows travel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, MoeConfig, replace
from lm.data import Batch
from lm.model import Decoder, cross_entropy
from lm.sharding import make_mesh
from lm.train.schedule import Schedule
from lm.train.step import Program, State

MOE = MoeConfig(
    n_experts=8, top_k=2, granularity=2, dispatch="capacity", capacity_factor=1.0,
    balance_coefficient=0.1, z_coefficient=0.01, bias_rate=0.01,
)  # fmt: skip
CONFIG = replace(
    Config(
        model=ModelConfig(
            vocab_size=32, d_model=16, n_layers=2, n_heads=8, n_kv_heads=8, d_ff=32, moe=MOE
        ),
        mesh=MeshConfig(data=1),
    ),
    data={"seq_len": 8},
    optimizer={"eps": 1e-4},  # Adam's direction of a gradient near 0 would be noise
    train={"steps_per_dispatch": 3, "batch_tokens": 64.0},
)
SCHEDULE = Schedule(0.01, 1.0, 2.0, 2.0, 10.0, 0.0)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_moe(config=CONFIG, **changes):
    moe = {**vars(config.model.moe), **changes}
    return replace(config, model={"moe": moe})


def batches(n=3):
    tokens = np.random.default_rng(0).integers(0, 32, (n, 8, 9)).astype(np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:])


def train(config=CONFIG, devices=1, n_steps=3):
    program = Program(config, make_mesh(config.mesh, jax.devices()[:devices]))
    state, metrics = program.train(program.init(seed=1), program.put(batches()), n_steps, SCHEDULE)
    return jax.device_get(state), jax.device_get(metrics), program


@functools.cache
def plain(dispatch="capacity"):
    return train(with_moe(dispatch=dispatch))[:2]


def assert_same(found, wanted, rtol=2e-4, atol=5e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, wanted)


MESHES = {
    "experts over data, each over model": dict(data=4, model=2, zero=3, experts="data"),
    "experts over model, rows over data": dict(data=2, model=4),
    "experts over data": dict(data=8, experts="data"),
    "experts over model": dict(data=1, model=8),
    "rows over data": dict(data=8),
    "zero": dict(data=4, model=2, zero=3),
    "replicas": dict(replica=2, data=2, model=2, zero=2, experts="data", sequence_sharded=True),
    "context": dict(data=4, context=2),
}
QUICK = "experts over model, rows over data"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(MESHES) if name != QUICK]


@pytest.mark.parametrize("name", [QUICK, *SLOW])
def test_any_mesh_is_the_same_run(name):
    """Losses, weights and statistics, which so are the whole batch's and no shard's."""
    state, metrics, _ = train(replace(CONFIG, mesh=MESHES[name]), devices=8)
    wanted_state, wanted = plain()
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-5)
    assert_same(metrics.routing, wanted.routing)
    assert_same(state.params, wanted_state.params)
    assert np.all(wanted.routing.dropped > 0.05)  # there was something to get wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [dict(data=8), dict(data=2, model=4), dict(data=4, model=2, zero=3)]
)
def test_ragged_rows_on_any_mesh_are_the_same_run(mesh):
    state, metrics, _ = train(replace(with_moe(dispatch="ragged"), mesh=mesh), devices=8)
    np.testing.assert_allclose(metrics.loss, plain("ragged")[1].loss, rtol=1e-5)
    assert_same(metrics.routing, plain("ragged")[1].routing)
    assert_same(state.params, plain("ragged")[0].params)
    assert np.all(metrics.routing.dropped == 0)


def collectives(config):
    """Names and numbers of the compiled step's collectives."""
    program = Program(config, make_mesh(config.mesh, jax.devices()[:8]))
    text = program.lower_train(8).compile().as_text()
    names = ("all-to-all", "all-gather", "all-reduce", "collective-permute")
    return {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}


def test_experts_over_data_exchange_rows_and_over_model_do_not():
    """Where experts and rows share an axis, rows go to their expert and back, forward and backward.

    Nothing else is gathered, neither scores nor experts. Over ``model`` every device has all rows
    of its share of the batch already: it takes those of its experts, and the results are put
    together.
    """
    config = replace(CONFIG, model={"n_layers": 1}, train={"steps_per_dispatch": 1})
    found = collectives(replace(config, mesh=dict(data=8, experts="data")))
    assert found["all-to-all"] == 4 and found["all-gather"] == 0
    chosen_by_experts = with_moe(config, routing="expert_choice", bias_rate=0.0)
    found = collectives(replace(chosen_by_experts, mesh=dict(data=8, experts="data")))
    assert found["all-to-all"] == 4 and found["all-gather"] == 0
    found = collectives(replace(config, mesh=dict(data=1, model=8)))
    assert found["all-to-all"] == 0 and found["all-reduce"] > 0


@pytest.mark.slow
def test_both_losses_teach_and_cross_entropy_alone_is_told():
    """Against the gradient of the sum written out, of a batch and of two micro-batches."""
    config = with_moe(replace(CONFIG, model={"n_layers": 1}), bias_rate=0.0)
    batch = jax.tree.map(lambda x: x[0], batches())
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    params, decoder = program.init(seed=1).params, Decoder(config.model, 8)

    def gradient(parts):
        def loss(params):
            nats = charge = 0.0
            for rows in parts:
                apply = functools.partial(decoder.apply, {"params": params}, batch.inputs_BT[rows])
                nats += cross_entropy(apply(), batch.targets_BT[rows]) / batch.targets_BT.size
                routing = apply(method="hidden")[1]
                layers = routing.balance_loss * 0.1 + routing.z_loss * 0.01
                charge += jnp.sum(layers) / len(parts)
            return nats + charge, nats

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    whole, halves = [slice(None)], [slice(0, None, 2), slice(1, None, 2)]
    for n, parts in ((1, whole), (2, halves)):  # each half its own statistics
        program = Program(replace(config, train={"accumulation": n}), program.mesh)
        wanted, nats = gradient(parts)
        with jax.set_mesh(program.mesh):
            loss, _, found = jax.jit(program._mean_gradient)(State(0, params, None), batch)
        assert_same(found, wanted, atol=1e-6)
        assert loss == pytest.approx(float(nats), rel=1e-5)
    # The halves' statistics are not the whole's: sum f P does not add up.
    one, two = gradient(whole)[0], gradient(halves)[0]
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, one, two)))


def scanned(params, every):
    """Layer 0 as it is; the others, of which every n-th has experts, stacked."""
    n = sum(name[:6] == "layer_" for name in params)
    periods = [
        {f"layer_{i}": params[f"layer_{first + i}"] for i in range(every)}
        for first in range(1, n, every)
    ]
    periods = periods if every > 1 else [period["layer_0"] for period in periods]
    outside = {name: p for name, p in params.items() if name[:6] != "layer_" or name == "layer_0"}
    return {**outside, "layers": jax.tree.map(lambda *x: jnp.stack(x), *periods)}


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_scanned_and_rematerialised_layers_say_and_learn_the_same(every):
    n_layers = 1 + 2 * every
    config = with_moe(replace(CONFIG, model={"n_layers": n_layers}), every=every, first_dense=1)
    plain = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    params, batch = plain.init(seed=1).params, jax.tree.map(lambda x: x[0], batches())
    routed = ["router" in params[f"layer_{i}"]["feed_forward"] for i in range(n_layers)]
    assert routed == ([False, True, True] if every == 1 else [False, False, True, False, True])

    def told(params, **model):
        program = Program(replace(config, model=model), make_mesh(config.mesh, jax.devices()[:1]))
        with jax.set_mesh(program.mesh):
            return jax.jit(program._mean_gradient)(State(0, params, None), batch)

    loss, routing, gradient = told(params)
    assert routing.load_E.shape == (2, 8)
    assert_same(told(params, remat="full"), (loss, routing, gradient), atol=1e-6)
    for remat in ("full",) if every == 1 else ("none", "full"):
        found = told(scanned(params, every), scan_layers=True, remat=remat)
        assert_same(found, (loss, routing, scanned(gradient, every)), atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_the_balance_bias_goes_to_the_experts_that_had_fewer_tokens(scan):
    config = replace(with_moe(balance_coefficient=0.0), model={"scan_layers": scan})
    state, metrics, program = train(config, n_steps=1)
    load_LE = metrics.routing.load_E[0]
    layers = [state.params[f"layer_{i}"] for i in (0, 1)] if not scan else [state.params["layers"]]
    bias = np.array([layer["feed_forward"]["router"]["balance_bias"] for layer in layers])
    np.testing.assert_allclose(bias.reshape(2, 8), 0.01 * np.sign(1 / 8 - load_LE), atol=1e-9)
    assert len(np.unique(bias)) > 1


@pytest.mark.slow
def test_jitter_is_the_steps_own_and_scoring_has_none():
    config = with_moe(jitter=0.3)
    _, told, program = train(config)
    assert np.all(told.loss != plain()[1].loss)
    state = program.init(seed=1)  # one step a time, as after a resume
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: np.roll(x, -i, axis=0), batches())
        state, metrics = program.train(state, program.put(one), 1, SCHEDULE)
        assert metrics.loss[0] == told.loss[i]
    batch = jax.tree.map(lambda x: x[0], batches())
    without = Program(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    params = without.init(seed=1).params
    assert program.nats(params, program.put(batch)) == pytest.approx(
        float(without.nats(params, without.put(batch))), rel=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("first_dense", [0, 1])
def test_a_pipeline_has_its_micro_batches_statistics(first_dense):
    model = {"scan_layers": True, "n_layers": 2 + first_dense}
    config = replace(with_moe(first_dense=first_dense), model=model, train={"accumulation": 2})
    piped = replace(config, mesh=dict(stage=2, data=2, model=2))
    (state, metrics, _), (wanted_state, wanted, _) = train(piped, devices=8), train(config)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-5)
    assert_same(metrics.routing, wanted.routing)
    assert_same(state.params, wanted_state.params)
    if first_dense:
        jittered = with_moe(piped, first_dense=1, jitter=0.3)
        assert np.all(train(jittered, devices=8)[1].loss != metrics.loss)


@pytest.mark.parametrize(
    "moe, mesh, why",
    [
        (dict(n_experts=6), dict(data=8, experts="data"), "n_experts = 6 over mesh.data = 8"),
        (dict(n_experts=12), dict(data=1, model=8), "n_experts = 12 over mesh.model = 8"),
        (dict(dispatch="ragged"), dict(data=8, experts="data"), "'ragged' with mesh.experts"),
    ],
)
def test_what_cannot_lie_on_the_mesh_is_refused(moe, mesh, why):
    config = replace(with_moe(**moe), mesh=mesh, model={"scan_layers": True})
    with pytest.raises(BadInput, match=why):
        Program(config, make_mesh(config.mesh, jax.devices()))
