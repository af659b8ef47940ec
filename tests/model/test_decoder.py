"""The decoder against a plain float64 one, setting by setting, and what no setting may break."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import keystr, tree_map_with_path
from scipy.special import expit, softmax

from lm import arithmetic
from lm.config import ModelConfig, MoeConfig, RopeScalingConfig
from lm.model import Decoder, cross_entropy

T = 7
INPUTS_BT = np.random.default_rng(0).integers(11, size=(2, T))
BASE = ModelConfig(
    vocab_size=11,
    d_model=12,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_width=6,
    d_ff=20,
    rope_base=100.0,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def shapes(config, max_positions=T):
    """The parameters' shapes, without computing any."""
    decoder = Decoder(config, max_positions)
    inputs = jnp.zeros((1, 1), jnp.int32)
    return meta.unbox(jax.eval_shape(decoder.init, jax.random.key(0), inputs))["params"]


def weights(config):
    """Every leaf by its name, so that two configs agree on the leaves that they share."""

    def leaf(path, shape):
        rng = np.random.default_rng(zlib.crc32(keystr(path).encode()))
        values = rng.normal(size=shape.shape) / shape.shape[0] ** 0.5
        return jnp.asarray(values + (1 if "gain" in keystr(path) else 0), jnp.float32)

    return tree_map_with_path(leaf, shapes(config))


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, inputs_BT, segments_BT=None, positions_BT=None):
    return Decoder(config, T).apply({"params": params}, inputs_BT, segments_BT, positions_BT)


def logits(config, params=None, inputs_BT=INPUTS_BT, **named):
    params = weights(config) if params is None else params
    return np.asarray(apply(config, params, inputs_BT, **named))


# --- a decoder in numpy, one row and one head at a time ---


def norm(config, p, x, kind=None):
    gain = p["gain"] + config.zero_centred_gains
    if (kind or config.norm) == "layer":
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(
            x.var(-1, keepdims=True) + config.norm_eps
        ) * gain + p["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * gain


def turn(config, x, positions):
    half = config.head_width // 2
    angle = positions[:, None] * config.rope_base ** (-2 * np.arange(half) / config.head_width)
    factor, scaling = 1, config.rope_scaling
    if scaling.kind == "linear":
        angle = angle / scaling.factor
    if scaling.kind == "longrope":
        long = scaling.original_positions < T
        angle = angle / np.array(scaling.long_factors if long else scaling.short_factors)
        factor = np.sqrt(1 + np.log(scaling.factor) / np.log(scaling.original_positions))
    z = factor * (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], 1)


def cap(x, limit):
    return limit * np.tanh(x / limit) if limit else x


def attention(config, p, x, positions, mask):
    def project(name, head):
        columns = slice(head * config.head_width, (head + 1) * config.head_width)
        y = x @ p[name]["kernel"][:, columns]
        if config.qkv_bias:
            y = y + p[name]["bias"][columns]
        if config.qk_norm and name != "value":
            y = norm(config, p[f"{name}_norm"], y, "rms")
        return turn(config, y, positions) if config.position == "rope" and name != "value" else y

    heads = []
    for n in range(config.n_heads):
        k = n // (config.n_heads // config.n_kv_heads)
        scores = project("query", n) @ project("key", k).T / np.sqrt(config.head_width)
        scores = np.where(mask, cap(scores, config.attention_soft_cap), -np.inf)
        heads.append(softmax(scores, -1) @ project("value", k))
    return np.concatenate(heads, 1) @ p["out"]["kernel"]


def feed_forward(config, p, x):
    gelu = lambda y: y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3)))  # noqa: E731
    activation = {"swiglu": lambda y: y * expit(y), "relu": lambda y: np.maximum(y, 0)}
    activation = activation.get(config.feed_forward, gelu)
    up = x @ p["up"]["kernel"]
    hidden = activation(x @ p["gate"]["kernel"]) * up if "gate" in p else activation(up)
    return hidden @ p["down"]["kernel"]


def reference(config, params, inputs_BT=INPUTS_BT, segments_BT=None, positions_BT=None):
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = []
    for b, inputs in enumerate(inputs_BT):
        steps = np.arange(len(inputs))
        positions = steps if positions_BT is None else positions_BT[b]
        distance = steps[:, None] - steps[None]
        mask = (distance >= 0) & (distance < (config.sliding_window or T))
        if segments_BT is not None:
            mask &= segments_BT[b][:, None] == segments_BT[b][None]
        x = p["embedding"][inputs]
        if config.scaled_embedding:
            x = x * np.sqrt(config.d_model)
        if config.position == "learned":
            x = x + p["positions"][positions]
        if config.position == "sinusoidal":
            angle = positions[:, None] / 10_000 ** (
                2 * np.arange(config.d_model // 2) / config.d_model
            )
            x = x * np.sqrt(config.d_model)
            x[:, 0::2] += np.sin(angle)
            x[:, 1::2] += np.cos(angle)
        for i in range(config.n_layers):
            q = p[f"layer_{i}"]
            sublayers = (
                ("attention", attention, (positions, mask)),
                ("feed_forward", feed_forward, ()),
            )
            for name, sublayer, extra in sublayers:
                if config.norm_position == "pre":
                    y = norm(config, q[f"{name}_norm"], x)
                    x = x + sublayer(config, q[name], y, *extra)
                else:
                    y = x + sublayer(config, q[name], x, *extra)
                    x = norm(config, q[f"{name}_norm"], y)
        if config.norm_position == "pre":
            x = norm(config, p["final_norm"], x)
        head = p["embedding"].T if config.tied else p["head"]["kernel"]
        rows.append(cap(x @ head, config.logit_soft_cap))
    return np.stack(rows)


FACTORS = dict(short_factors=(1.1, 1.5, 2.0), long_factors=(1.0, 3.0, 9.0))
VARIANTS = {
    "base": {},
    "mha": dict(n_kv_heads=4),
    "mqa": dict(n_kv_heads=1),
    "head_width": dict(head_width=4),
    "layer_norm": dict(norm="layer"),
    "post_norm": dict(norm_position="post"),
    "norm_eps": dict(norm_eps=0.5),
    "sinusoidal": dict(position="sinusoidal"),
    "learned": dict(position="learned"),
    "no_positions": dict(position="none"),
    "rope_base": dict(rope_base=2.0),
    "linear": dict(rope_scaling=RopeScalingConfig("linear", 4.0)),
    "longrope": dict(rope_scaling=RopeScalingConfig("longrope", 4.0, T - 1, **FACTORS)),
    "longrope_short": dict(rope_scaling=RopeScalingConfig("longrope", 4.0, T, **FACTORS)),
    "geglu": dict(feed_forward="geglu"),
    "gelu": dict(feed_forward="gelu"),
    "relu": dict(feed_forward="relu"),
    "scaled_embedding": dict(scaled_embedding=True),
    "zero_centred_gains": dict(zero_centred_gains=True),
    "zero_centred_layer_norm": dict(zero_centred_gains=True, norm="layer"),
    "zero_centred_qk_norm": dict(zero_centred_gains=True, qk_norm=True),
    "tied": dict(tied=True),
    "qkv_bias": dict(qkv_bias=True),
    "qk_norm": dict(qk_norm=True),
    "sliding_window": dict(sliding_window=3),
    "attention_soft_cap": dict(attention_soft_cap=0.3),
    "logit_soft_cap": dict(logit_soft_cap=0.5),
    "2017": dict(norm="layer", norm_position="post", position="sinusoidal", feed_forward="relu"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_is_the_papers_function_and_changes_the_output(name):
    config = dataclasses.replace(BASE, **VARIANTS[name])
    ours = logits(config)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference(config, weights(config)), atol=3e-5)
    if name != "base":
        assert np.abs(ours - logits(BASE)).max() > 1e-2


# --- what no setting may break ---


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("segments", [None, [0, 0, 0, 1, 1, 1, 1]])
def test_causality_by_gradient(window, segments):
    """d logits[t] / d position embedding[s] is zero exactly where t may not see s."""
    config = dataclasses.replace(BASE, n_layers=1, position="learned", sliding_window=window)
    params, table = weights(config), weights(config)["positions"]
    segments_BT = None if segments is None else jnp.array([segments])

    @jax.jacrev
    def jacobian_TVSD(table_SD):
        variables = {"params": {**params, "positions": table_SD}}
        return Decoder(config, T).apply(variables, INPUTS_BT[:1], segments_BT)[0]

    seen_TS = np.abs(jax.jit(jacobian_TVSD)(table)).sum((1, 3)) > 0
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    allowed = (distance >= 0) & (distance < (window or T))
    if segments is not None:
        allowed &= np.array(segments)[:, None] == np.array(segments)[None]
    np.testing.assert_array_equal(seen_TS, allowed)


def test_later_tokens_change_nothing_before_them():
    changed = INPUTS_BT.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    before, after = logits(BASE), logits(BASE, inputs_BT=changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-4).all()


def test_a_packed_document_is_as_if_alone():
    segments_BT = np.array([[0, 0, 0, 1, 1, 1, 1]])
    positions_BT = np.array([[0, 1, 2, 0, 1, 2, 3]])
    inputs = INPUTS_BT[:1]
    for position in ("rope", "learned"):
        config = dataclasses.replace(BASE, position=position)
        packed = logits(config, None, inputs, segments_BT=segments_BT, positions_BT=positions_BT)
        np.testing.assert_allclose(packed[:, :3], logits(config, None, inputs[:, :3]), atol=1e-5)
        np.testing.assert_allclose(packed[:, 3:], logits(config, None, inputs[:, 3:]), atol=1e-5)
    assert np.abs(logits(BASE, None, inputs)[:, 3:] - packed[:, 3:]).max() > 1e-2


def test_rope_sees_differences_of_positions_alone():
    positions_BT = np.arange(T)[None]
    moved = logits(BASE, positions_BT=positions_BT + 40)
    np.testing.assert_allclose(moved, logits(BASE), atol=1e-4)
    stretched = logits(BASE, positions_BT=2 * positions_BT)
    assert np.abs(stretched - logits(BASE)).max() > 1e-2


def test_grouped_heads_are_all_heads_with_repeated_keys_and_values():
    all_heads = dataclasses.replace(BASE, n_kv_heads=4)
    params = weights(BASE)
    for i in range(BASE.n_layers):
        layer = params[f"layer_{i}"]["attention"]
        for name in ("key", "value"):
            kernel_DKH = layer[name]["kernel"].reshape(12, 2, 6)
            layer[name]["kernel"] = jnp.repeat(kernel_DKH, 2, 1).reshape(12, 24)
    np.testing.assert_allclose(logits(all_heads, params), logits(BASE), atol=1e-5)


def test_a_tied_head_is_the_embedding_transposed():
    tied = dataclasses.replace(BASE, tied=True)
    params = weights(BASE)
    params["head"]["kernel"] = params["embedding"].T
    np.testing.assert_allclose(logits(tied), logits(BASE, params), atol=1e-5)
    assert "head" not in shapes(tied)


def traced(config, params):
    """The compiled ``params -> (loss, gradient)`` and every equation of its trace."""

    def loss(params):
        logits_BTV = Decoder(config, T).apply({"params": params}, INPUTS_BT)
        return cross_entropy(logits_BTV, np.roll(INPUTS_BT, -1, 1)) / INPUTS_BT.size

    trace = jax.jit(jax.value_and_grad(loss)).trace(params)
    return trace.lower().compile(), list(equations(trace.jaxpr.jaxpr))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: x is None):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def stacked(params):
    """An unrolled model's parameters as a scanned model's."""
    layers = [params[f"layer_{i}"] for i in range(BASE.n_layers)]
    outside = {name: p for name, p in params.items() if not name.startswith("layer_")}
    return {**outside, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def test_scanned_and_rematerialised_layers_are_the_unrolled_ones():
    expected_loss, expected = traced(BASE, weights(BASE))[0](weights(BASE))
    for scan, remat in ((False, "full"), (True, "none"), (True, "full")):
        config = dataclasses.replace(BASE, scan_layers=scan, remat=remat)
        params = stacked(weights(BASE)) if scan else weights(BASE)
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, shapes(config))
        step, trace = traced(config, params)
        loss, gradient = step(params)
        assert loss == pytest.approx(float(expected_loss), abs=1e-6)
        wanted = stacked(expected) if scan else expected
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, wanted)
        # Each did what it says; two equal results alone would not tell.
        primitives = {equation.primitive.name for equation in trace}
        assert ("scan" in primitives, bool({"remat", "remat2", "checkpoint"} & primitives)) == (
            scan,
            remat == "full",
        )


def test_each_policy_keeps_less_than_the_one_before():
    """What waits for the backward pass, in bytes: of attention's own products too."""
    kept, traces = {}, {}
    for remat in ("none", "dots", "dots_with_no_batch_dims", "offload", "full"):
        config = dataclasses.replace(BASE, remat=remat, scan_layers=True)
        params = stacked(weights(BASE))

        def loss(params, config=config):
            return jnp.sum(apply(config, params, INPUTS_BT) ** 2)

        # The function that jax.vjp returns is a pytree, of what it needs.
        waiting = jax.tree.leaves(jax.eval_shape(lambda p, f=loss: jax.vjp(f, p)[1], params))
        kept[remat] = sum(x.size * x.dtype.itemsize for x in waiting)
        found = {x.shape for x in waiting}
        scores = (BASE.n_layers, len(INPUTS_BT), BASE.n_kv_heads, T * 2, T)  # two heads a group
        assert (scores in found) == (remat in ("none", "dots"))
        traces[remat] = str(jax.make_jaxpr(jax.grad(loss))(params))
    same = kept.pop("offload")
    assert list(kept.values()) == sorted(kept.values(), reverse=True) and len({*kept.values()}) == 4
    assert same == kept["dots_with_no_batch_dims"]  # but in the host's memory
    assert {remat for remat, text in traces.items() if "host" in text} == {"offload"}


@pytest.mark.parametrize("remat", ["dots", "dots_with_no_batch_dims", "offload"])
def test_what_is_kept_changes_no_gradient(remat):
    _, expected = traced(BASE, weights(BASE))[0](weights(BASE))
    step, _ = traced(dataclasses.replace(BASE, remat=remat), weights(BASE))
    _, gradient = step(weights(BASE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected)


def test_bfloat16_computes_in_bfloat16_close_to_float32():
    config = dataclasses.replace(BASE, dtype="bfloat16")
    params = weights(BASE)
    step, trace = traced(config, params)
    loss, gradient = step(params)
    exact_loss, exact = traced(BASE, params)[0](params)
    assert loss == pytest.approx(float(exact_loss), rel=5e-3) and loss != exact_loss
    flat, exact = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradient, exact)
    )
    assert flat.dtype == np.float32
    assert np.linalg.norm(flat - exact) < 0.03 * np.linalg.norm(exact)
    tied = dataclasses.replace(config, tied=True)
    trace += equations(jax.make_jaxpr(apply, 0)(tied, weights(tied), INPUTS_BT).jaxpr)
    products = [equation for equation in trace if equation.primitive.name == "dot_general"]
    assert {str(x.aval.dtype) for product in products for x in product.invars} == {"bfloat16"}
    assert logits(config).dtype == np.float32


def test_the_first_loss_is_that_of_guessing():
    config = dataclasses.replace(BASE, vocab_size=257, d_model=64, head_width=16, d_ff=176)
    inputs_BT = np.random.default_rng(0).integers(257, size=(4, T))
    decoder = Decoder(config, T)
    params = meta.unbox(jax.jit(decoder.init)(jax.random.key(0), inputs_BT))["params"]
    nats = cross_entropy(logits(config, params, inputs_BT), np.roll(inputs_BT, -1, 1))
    assert np.log(257) < nats / inputs_BT.size < np.log(257) + 1
    layer = params["layer_0"]
    for kernel in (layer["attention"]["out"]["kernel"], layer["feed_forward"]["down"]["kernel"]):
        deviation = (2 * config.n_layers * kernel.shape[0]) ** -0.5
        assert kernel.std() == pytest.approx(deviation, rel=0.03)
    assert params["embedding"].std() == pytest.approx(64**-0.5, rel=0.03)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        ModelConfig,
        vocab_size=st.integers(2, 40),
        d_model=st.sampled_from([8, 12]),
        n_layers=st.integers(2, 3),
        n_heads=st.just(4),
        n_kv_heads=st.sampled_from([1, 2, 4]),
        head_width=st.sampled_from([0, 2, 6]),
        d_ff=st.integers(1, 30),
        feed_forward=st.sampled_from(["swiglu", "geglu", "gelu", "relu"]),
        norm=st.sampled_from(["rms", "layer"]),
        norm_position=st.sampled_from(["pre", "post"]),
        position=st.sampled_from(["sinusoidal", "learned", "none"]),
        tied=st.booleans(),
        qkv_bias=st.booleans(),
        qk_norm=st.booleans(),
        scan_layers=st.booleans(),
        moe=st.one_of(
            st.just(MoeConfig()),
            st.builds(
                MoeConfig,
                n_experts=st.integers(2, 5),
                top_k=st.integers(1, 2),
                n_shared=st.integers(0, 2),
                expert_d_ff=st.integers(0, 7),
                first_dense=st.sampled_from([0, 0, 1]),
                bias_rate=st.sampled_from([0.0, 0.1]),
            ),
        ),
    ),
    st.integers(1, 9),
)
def test_the_tree_has_as_many_parameters_as_arithmetic_counts(config, seq_len):
    tree = shapes(config, seq_len)
    count = arithmetic.parameters(config, seq_len)
    sizes = {keystr(path): int(np.prod(x.shape)) for path, x in jax.tree.leaves_with_path(tree)}

    def of(*parts):
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    assert count.total == sum(sizes.values())
    assert count.embedding == of("'embedding'") and count.positions == of("'positions'")
    assert count.attention == of(*(f"'{n}']['kernel'" for n in ("query", "key", "value", "out")))
    assert count.routers == of("'router']['kernel'")
    assert count.feed_forward == of("'feed_forward']") - of("'router']")
    assert count.norms == of("norm'")
    balance = "'balance_bias'"
    assert count.biases == of(*(f"'{n}']['bias'" for n in ("query", "key", "value")), balance)
    assert count.head == (of("'embedding'") if config.tied else of("'head'"))


@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
def test_positions_beyond_the_last_are_refused(position):
    config = dataclasses.replace(BASE, position=position)
    with pytest.raises(ValueError, match=f"{T} positions: {position} ones end at {T - 1}"):
        Decoder(config, T - 1).init(jax.random.key(0), INPUTS_BT)
