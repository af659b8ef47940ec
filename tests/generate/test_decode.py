"""Decoding with the cache against the forward pass over everything so far."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from scipy.stats import chisquare

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.generate import decode
from lm.generate.decode import Completion, Generator, best, vote
from lm.generate.sampling import Sampling
from lm.model import Decoder, kv_cache
from lm.sharding import make_mesh

CONFIG = replace(
    Config(
        model=ModelConfig(
            vocab_size=19, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, rope_base=50.0
        ),
        mesh=MeshConfig(data=1),
    ),
    data={"seq_len": 32},
)
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8]]
GREEDY = Sampling(temperature=0)


@functools.cache
def weights(model):
    decoder = Decoder(model, 32)
    params = jax.jit(decoder.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    params = dict(meta.unbox(params))
    # As drawn, a small decoder is sure of nothing; a larger embedding tells texts apart.
    params["embedding"] = 3 * params["embedding"]
    if "head" in params:
        params["head"] = {"kernel": 3 * params["head"]["kernel"]}
    return decoder, params


def made(model=None, sampling=GREEDY, mesh=None, positions=32, **named):
    config = replace(CONFIG, model=model or {}, mesh=mesh or {})
    decoder, params = weights(config.model)
    mesh = make_mesh(config.mesh, jax.devices()[: 8 if mesh else 1])
    return Generator(config, params, positions, mesh, sampling, **named), decoder, params


@pytest.fixture(scope="module")
def greedy():
    return made()[0]


def uncached(decoder, params, tokens):
    """log p of every next token after each prefix, (T, V)."""
    padded_BT = jnp.zeros((1, 32), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
    return np.asarray(forward(decoder, params, padded_BT)[0, : len(tokens)])


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, params, tokens_BT):
    return jax.nn.log_softmax(decoder.apply({"params": params}, tokens_BT))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Many small programs run once each: their compilation is what these tests wait for."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_exact(found, decoder, params, prompts=PROMPTS, atol=1e-5):
    for prompt, completion in zip(prompts, found, strict=True):
        text = [*prompt, *completion.tokens]
        log_p_TV = uncached(decoder, params, text)[len(prompt) - 1 : -1]
        rows = np.arange(len(completion.tokens))
        expected = log_p_TV[rows, completion.tokens]
        np.testing.assert_allclose(completion.log_probabilities, expected, atol=atol)
        yield log_p_TV.argmax(-1).tolist() == completion.tokens


VARIANTS = {
    "gqa": {},
    "mha": dict(n_kv_heads=4),
    "mqa": dict(n_kv_heads=1),
    "window": dict(sliding_window=4),
    "scanned": dict(scan_layers=True, remat="full"),
    "scanned_experts": dict(
        scan_layers=True, sliding_window=4, moe=dict(n_experts=4, top_k=2, every=2)
    ),
    "learned": dict(position="learned"),
    "soft_caps": dict(attention_soft_cap=1.0, logit_soft_cap=2.0, tied=True),
    "experts": dict(moe=dict(n_experts=4, top_k=2, capacity_factor=0.5)),
    "post_norm": dict(norm_position="post", norm="layer", position="sinusoidal"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_token_is_as_likely_as_without_a_cache(name):
    generator, decoder, params = made(VARIANTS[name])
    found = generator(PROMPTS, 20)
    assert all(assert_exact(found, decoder, params))
    assert len({tuple(completion.tokens) for completion in found}) > 1
    assert [len(completion.tokens) for completion in found] == [20, 20, 20]


def weight(cache):
    return sum(x.nbytes for x in jax.tree.leaves(cache))


def rounded(x_BTKH, dtype):
    """The nearest numbers that the cache can hold, in float32."""
    if dtype == "bfloat16":
        return x_BTKH.astype(jnp.bfloat16).astype(jnp.float32)
    scale_BTK1 = jnp.abs(x_BTKH).max(-1, keepdims=True) / 127
    return jnp.round(x_BTKH / scale_BTK1) * scale_BTK1


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_smaller_cache_is_a_float32_one_of_rounded_numbers(dtype, greedy, monkeypatch):
    caches, exact, write = [], greedy(PROMPTS, 20), kv_cache.write

    def spy(run, params, text, cache, *rest):
        caches.append(weight(cache))
        return run(params, text, cache, *rest)

    smaller, *_ = made(cache_dtype=dtype)
    smaller._run_steps = functools.partial(spy, smaller._run_steps)
    found = smaller(PROMPTS, 20)
    assert caches == [arithmetic.kv_cache_bytes(CONFIG.model, 3, 32, dtype)]

    def write_rounded(cache, key_BTKH, value_BTKH, *rest):
        return write(cache, rounded(key_BTKH, dtype), rounded(value_BTKH, dtype), *rest)

    monkeypatch.setattr(kv_cache, "write", write_rounded)
    for one, other, plain in zip(found, made()[0](PROMPTS, 20), exact, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)
        off = np.abs(np.subtract(one.log_probabilities, plain.log_probabilities))
        assert off[0] == 0 and off.max() > 1e-4  # a prompt is computed, not read


def test_on_a_mesh_the_texts_are_the_same(greedy):
    prompts = [*PROMPTS, [11]]
    alone = greedy(prompts, 12)
    found = made(mesh=dict(data=4, model=2, zero=3))[0](prompts, 12)
    assert [c.tokens for c in found] == [c.tokens for c in alone]
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours_or_on_the_dispatch():
    generator, *_ = made(sampling=Sampling(top_p=0.9))
    together = generator(PROMPTS, 10, seed=3)
    *_, last = generator.stream(PROMPTS, 10, seed=3, every=3)
    assert last == together
    assert generator(PROMPTS, 10, seed=4) != together
    padded = [PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    assert generator(padded, 10, seed=3)[0].tokens == together[0].tokens


def test_texts_end_at_a_stop_token_and_streams_grow(greedy):
    plain = greedy(PROMPTS, 20)
    stop = plain[1].tokens[7]
    generator, *_ = made(stop=[stop])
    found = generator(PROMPTS, 20)
    for short, long in zip(found, plain, strict=True):
        n = long.tokens.index(stop) if stop in long.tokens else 20
        assert short.tokens == long.tokens[:n]
        assert len(short.log_probabilities) == n
        assert short.stopped == (n < 20)
        whole = sum(long.log_probabilities[: n + 1])  # with the stop token's
        assert short.log_probability == pytest.approx(whole, abs=1e-5)
    parts = [part[1].tokens for part in generator.stream(PROMPTS, 20, every=2)]
    assert parts[0] == found[1].tokens[:2]
    assert all(b[: len(a)] == a for a, b in zip(parts, parts[1:], strict=False))


def test_a_repeated_token_is_penalised(greedy):
    penalised, *_ = made(sampling=Sampling(temperature=0, repetition_penalty=50.0))
    assert len(set(greedy([PROMPTS[1]], 12)[0].tokens)) < 12
    text = [*PROMPTS[1], *penalised([PROMPTS[1]], 11)[0].tokens]
    new = text[len(PROMPTS[1]) :]
    assert len(set(new)) == 11 and not set(new) & set(PROMPTS[1])  # 18 of 19 tokens, once each


def test_draws_follow_the_model():
    """The first token over many rows of one prompt, against the model's own distribution."""
    n = 4_000
    for temperature, fits in ((1.0, True), (0.7, False)):
        generator, decoder, params = made(sampling=Sampling(temperature=temperature), positions=8)
        tokens = [c.tokens[0] for c in generator([PROMPTS[2]] * n, 1, seed=0)]
        p_V = np.exp(uncached(decoder, params, PROMPTS[2])[-1].astype(np.float64))
        counts = np.bincount(tokens, minlength=19)
        common = p_V * n > 5
        counts = [*counts[common], counts[~common].sum()]
        expected = np.array([*p_V[common], p_V[~common].sum()]) * n
        pvalue = chisquare(counts, expected / expected.sum() * n).pvalue
        assert (pvalue > 1e-3) == fits


def test_half_as_much_again_is_read_as_a_text_needs():
    generator, *_ = made(positions=4096)
    rooms = {n: generator._room(n) for n in range(1, 4097)}
    assert rooms[128] == 128 and rooms[129] == 192 and rooms[2048] == 2048
    assert all(n <= room <= max(128, 1.5 * n) for n, room in rooms.items())


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_cache_grows_with_the_text_not_with_the_room_there_is(monkeypatch, scan_layers):
    """From 9 tokens, in a batch whose prompts were padded to 16, to 23."""
    monkeypatch.setattr(decode, "SMALLEST_ROOM", 16)
    model = {"scan_layers": scan_layers}
    generator, *_ = made(model, positions=1000)
    sizes, run = [], generator._run_steps

    def spy(params, text, cache, *rest):
        sizes.append(jax.tree.leaves(cache)[0].shape[-2])
        return run(params, text, cache, *rest)

    generator._run_steps = spy
    found = generator(PROMPTS, 14)
    assert sizes == [16, 24]
    monkeypatch.setattr(decode, "SMALLEST_ROOM", 512)
    same, *_ = made(model, positions=1000)
    assert [c.tokens for c in same(PROMPTS, 14)] == [c.tokens for c in found]


def test_other_prompts_meet_compiled_programs(greedy):
    """Of up to 16 tokens, here; a seed, a number of tokens or of texts' ends compile nothing."""
    greedy(PROMPTS, 20)
    compiled = greedy._run_prefill, greedy._run_steps
    before = [program._cache_size() for program in compiled]
    greedy([[1] * 16, [2] * 11, [3]], 7, seed=5)
    list(greedy.stream([[4] * 10, [5], [6]], 3, every=2))
    assert [program._cache_size() for program in compiled] == before
    greedy([[1] * 17, [2], [3]], 1)
    assert [program._cache_size() for program in compiled] == [before[0] + 1, before[1]]


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", kv_cache.DTYPES)
def test_the_cache_weighs_what_arithmetic_says(dtype, window):
    for scan_layers in (False, True):
        model = replace(CONFIG, model={"scan_layers": scan_layers}).model
        params = weights(model)[1]
        model = replace(CONFIG, model={"sliding_window": window}).model
        cache = kv_cache.empty(model, params, 3, 32, dtype)
        assert weight(cache) == arithmetic.kv_cache_bytes(model, 3, 32, dtype)


@pytest.mark.parametrize(
    "prompts, max_tokens, line",
    [
        ([[1] * 30], 3, "a prompt of 30 tokens and max_tokens = 3: must be at most 32 together"),
        ([[]], 3, "an empty prompt"),
        ([[1]], 0, "max_tokens = 0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(greedy, prompts, max_tokens, line):
    with pytest.raises(BadInput, match=line):
        greedy(prompts, max_tokens)


def test_positions_that_were_not_learned_are_refused():
    with pytest.raises(BadInput, match="64 positions: learned ones end at 32"):
        made(dict(position="learned"), positions=64)
    with pytest.raises(BadInput, match="cache_dtype = 'int4': must be one of"):
        made(cache_dtype="int4")


def test_experts_that_see_the_whole_text_are_refused():
    with pytest.raises(BadInput, match="'expert_choice': must be 'token_choice' to generate"):
        made(dict(moe=dict(n_experts=4, routing="expert_choice")))


def test_a_vote_is_for_the_commonest_last_answer():
    texts = ["so 3, no: 4", "4", "it is 5", "none"]
    assert vote(texts, re.compile(r"\d")) == ("4", 0.5)
    assert vote(texts, re.compile(r"is (\d)")) == ("5", 0.25)
    assert vote(texts, re.compile("x")) == (None, 0.0)


def test_the_best_is_the_likeliest_together():
    unlikely, likely = (
        Completion([1, 2], [-1.0, -3.0], False, -4.0),
        Completion([3], [-3.0], True, -3.5),
    )
    empty = Completion([], [], True, -9.0)  # none of its tokens is unlikely, but to end there was
    assert best([unlikely, likely, empty]) is likely
