"""Batched, padded and over two devices against one row at a time on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lm.checkpoint import SCHEMA, Checkpoints, claim
from lm.command import BadInput
from lm.config import Config, MeshConfig, ModelConfig, RopeScalingConfig, replace
from lm.data.tokenizers import ByteTokenizer, JsonTokenizer, train_bpe
from lm.evaluate import Scorer
from lm.evaluate import scorer as module
from lm.generate.decode import Completion, Generator
from lm.generate.sampling import Sampling
from lm.model import Decoder
from lm.sharding import make_mesh
from tests.data.test_chat import with_tokenizer

CONFIG = Config(
    model=ModelConfig(vocab_size=264, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24)
)
CONFIG = replace(CONFIG, data={"seq_len": 48})
SHORT, LONG = (1.0, 1.0, 1.0, 1.0), (1.0, 9.0, 50.0, 99.0)
PAIRS = [
    ("To be, or", " not to be"),
    ("", "It was a"),
    ("a long text that goes on and on, for", " so long"),
    ("naïve ", "日"),
    ([1, 2, 3], [4, 5]),
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def made(config=CONFIG, mesh=None, **settings):
    decoder = Decoder(config.model, config.data.seq_len)
    params = jax.jit(decoder.init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    # As drawn, a small decoder is sure of nothing; a larger embedding tells texts apart.
    params = dict(meta.unbox(params))
    params["embedding"] = 4 * params["embedding"]
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:2])
    return Scorer(config, params, ByteTokenizer(), mesh, **settings), decoder, params


def run_of_ends(workdir):
    """A run's folder whose model writes nothing but what ends its turns, <|im_end|>, 281.

    That is not its end of text, and the settings of the weights know of neither.
    """
    config = Config(model=replace(CONFIG, model={"vocab_size": 307, "n_layers": 1}).model)
    config = replace(config, data={"seq_len": 32})
    _, _, params = made(config)
    params["embedding"] = jnp.full_like(params["embedding"], 100.0)
    params["head"] = {"kernel": jnp.zeros_like(params["head"]["kernel"]).at[:, 281].set(1.0)}
    (with_tokenizer(workdir) / "generation_config.json").write_text('{"eos_token_id": 7}')
    return saved(workdir, config, params)


def saved(workdir, config, params):
    """A run's folder with these parameters."""
    claim(workdir, config)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"params": params}, {"schema": SCHEMA})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def bytewise():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HEAD_ELEMENTS", 264 * 8)  # a few positions' logits at a time
        yield made(batch_tokens=64)  # and four rows of the smallest bucket


def alone(decoder, params, context, continuation):
    """log p of the whole next-token distribution at each token of the continuation, (n, V)."""
    tokens = [*context, *continuation]
    tokens_BT = jnp.zeros((1, 48), jnp.int32).at[0, : len(tokens) - 1].set(jnp.array(tokens[:-1]))
    log_p_TV = forward(decoder, params, tokens_BT)[0]
    return np.asarray(log_p_TV)[len(context) - 1 : len(tokens) - 1]


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, params, tokens_BT):
    return jax.nn.log_softmax(decoder.apply({"params": params}, tokens_BT))


def assert_exact(found, decoder, params, rows, atol=1e-5):
    for (context, continuation), scored in zip(rows, found, strict=True):
        log_p_nV = alone(decoder, params, context, continuation)
        chosen = log_p_nV[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(scored.token_log_probs, chosen, atol=atol)
        assert scored.log_prob == pytest.approx(chosen.sum(), abs=atol * len(chosen))
        hits = np.eye(log_p_nV.shape[1])[continuation]
        brier = np.square(np.exp(log_p_nV) - hits).sum(-1)
        np.testing.assert_allclose(scored.token_brier_scores, brier, atol=atol)
        assert scored.greedy == (log_p_nV.argmax(-1) == continuation).all()


def test_batched_is_exactly_unbatched(bytewise):
    scorer, decoder, params = bytewise
    rows = [scorer.encode_pair(*pair) for pair in PAIRS]
    assert_exact(scorer.log_likelihoods(PAIRS), decoder, params, rows)


def test_what_the_model_would_write_is_greedy(bytewise):
    scorer, *_ = bytewise
    prompt = list(b"To be, or not to be, that is: a question")
    (written,) = scorer.generate([prompt], 6)
    own = written.completion.tokens
    assert len(own) == 6
    other = [*own[:-1], (own[-1] + 1) % 256]
    first, second = scorer.log_likelihoods([(prompt, own), (prompt, other)])
    assert first.greedy and not second.greedy
    np.testing.assert_allclose(
        first.token_log_probs, written.completion.log_probabilities, atol=1e-5
    )


def test_the_settings_of_the_weights_and_the_caller_say_what_ends_a_text(tmp_path, monkeypatch):
    workdir = run_of_ends(tmp_path)
    monkeypatch.setattr(module, "Generator", lambda *given, stop: stop)
    for given, wanted in (((), [7]), ((281,), [7, 281])):
        assert Scorer.open(workdir, stop=given)._generator(8, Sampling()) == wanted


def test_longrope_judges_a_text_as_it_was_written(monkeypatch):
    """By the short factors up to the original 20 positions, by the long ones beyond."""
    scaling = RopeScalingConfig("longrope", 2.4, 20, short_factors=SHORT, long_factors=LONG)
    config = replace(CONFIG, model={"n_layers": 1, "rope_scaling": vars(scaling)})
    scorer, _, params = made(config)
    tokens = np.random.default_rng(0).integers(0, 256, 27).tolist()
    prompt = tokens[:14]
    writer = Generator(config, params, 20, scorer._mesh, Sampling(temperature=0))
    (written,) = writer([prompt], 6)
    (short,) = scorer.log_likelihoods([(prompt, written.tokens)])
    np.testing.assert_allclose(short.token_log_probs, written.log_probabilities, atol=1e-5)
    assert short.greedy

    def run(model, _, batch):
        judged[len(batch.inputs_BT[0])] = model.rope_scaling.long_factors
        return module.Judged(*[np.zeros(batch.inputs_BT.shape)] * 3)

    judged = {}
    monkeypatch.setattr(scorer, "_run", run)
    scorer.log_likelihoods([(tokens[:18], tokens[18 : 18 + n]) for n in (3, 4)])
    assert judged == {20: SHORT, 32: LONG}

    class Writer(list):
        def stream(self, prompts, *_, every):
            self.extend(map(len, prompts))
            yield [Completion([], [], True, 0.0)] * len(prompts)

    writers = {}
    monkeypatch.setattr(scorer, "_generator", lambda n, _: writers.setdefault(n, Writer()))
    scorer.generate([tokens[:15], prompt, tokens[:4]], 6)
    assert {n: sorted(set(rows)) for n, rows in writers.items()} == {20: [4, 14], 32: [15]}


def test_a_bucket_compiles_once(bytewise):
    scorer, *_ = bytewise
    scorer._run.clear_cache()
    scorer.log_likelihoods([("abc", "de")] * 3)
    scorer.log_likelihoods([("xy", "z"), ("abcdefgh", "ijk"), ("a", "b")])
    assert scorer._run._cache_size() == 1
    scorer.log_likelihoods([("a" * 30, "z")])
    assert scorer._run._cache_size() == 2


def test_contexts_are_cut_from_the_left_only_when_asked(bytewise):
    scorer, decoder, params = bytewise
    tokens = np.random.default_rng(0).integers(0, 256, 60).tolist()
    fits = (tokens[-49:-3], tokens[-3:])
    assert_exact(scorer.log_likelihoods([fits]), decoder, params, [fits])
    with pytest.raises(BadInput, match="must be at most 49 together"):
        scorer.log_likelihoods([(tokens[-50:-3], tokens[-3:])])
    assert_exact(
        scorer.log_likelihoods([(tokens[:-3], tokens[-3:])], cut=True), decoder, params, [fits]
    )
    with pytest.raises(BadInput, match="a continuation of 49"):
        scorer.log_likelihoods([(tokens[:11], tokens[11:])], cut=True)
    with pytest.raises(BadInput, match="at most 48 together"):
        scorer.generate([tokens], 4)
    short, cut = (scorer.generate([t], 4, cut=True)[0] for t in (tokens[-44:], tokens))
    assert short == cut


def test_pairs_are_encoded_together():
    """Blanks go with the continuation, whose tokens are the joint text's."""
    texts = ["the cat and the hat and the bat " * 9]
    tokenizer = JsonTokenizer.__new__(JsonTokenizer)
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(train_bpe(texts, 270))
    tokenizer.prefix, tokenizer.end_of_text = (), 256
    scorer = Scorer.__new__(Scorer)
    scorer.tokenizer, scorer._marked = tokenizer, False
    context, continuation = scorer.encode_pair("the cat ", "and")
    assert context == tokenizer.encode("the cat").tolist()
    assert continuation == tokenizer.encode(" and").tolist()
    assert scorer.encode_pair("", "the")[0] == [256]
    tokenizer.prefix = (7,)
    assert scorer.encode_pair("the", " cat")[0][0] == 7
    assert scorer.encode_pair("", "the")[0] == [7]


def test_special_tokens_by_name_only_when_asked():
    scorer = Scorer.__new__(Scorer)
    scorer.tokenizer, scorer._marked = ByteTokenizer(), False
    pair = ("<|endoftext|>a", "b")
    assert scorer.encode_pair(*pair) == (list(b"<|endoftext|>a"), list(b"b"))
    scorer._marked = True
    assert scorer.encode_pair(*pair) == ([256, *b"a"], list(b"b"))
    scorer.tokenizer.prefix = (256,)  # is there already
    assert scorer.encode_pair(*pair)[0] == [256, *b"a"]
    assert scorer.encode_pair("a", "b")[0] == [256, *b"a"]


@pytest.mark.slow
def test_experts_drop_nothing_whatever_the_batch():
    config = replace(
        CONFIG,
        model={"moe": {**vars(CONFIG.model.moe), "n_experts": 4, "capacity_factor": 0.5}},
    )
    config = replace(config, model={"moe": {**vars(config.model.moe), "dispatch": "capacity"}})
    scorer, _, params = made(config)
    free = replace(config, model={"moe": {**vars(config.model.moe), "dispatch": "auto"}})
    rows = [scorer.encode_pair(*pair) for pair in PAIRS]
    assert_exact(scorer.log_likelihoods(PAIRS), Decoder(free.model, 48), params, rows)
    looking = replace(config, model={"moe": {**vars(config.model.moe), "routing": "expert_choice"}})
    with pytest.raises(BadInput, match="'token_choice'"):
        made(looking)[0].log_likelihoods(PAIRS)


@pytest.mark.slow
def test_tensor_parallel_is_the_same():
    scorer, decoder, params = made(replace(CONFIG, mesh={"model": 2}), mesh=MeshConfig(model=2))
    rows = [scorer.encode_pair(*pair) for pair in PAIRS]
    assert_exact(scorer.log_likelihoods(PAIRS), decoder, params, rows)


@pytest.mark.slow
def test_generation_stops_at_a_text_and_keeps_the_order(bytewise):
    scorer, *_ = bytewise
    prompts = ["a longer prompt than", "It", "was", "longer than a word"]
    whole = scorer.generate(prompts, 8)
    assert [scorer.generate([p], 8)[0].text for p in prompts] == [g.text for g in whole]
    stop = whole[0].text[3]
    for full, cut in zip(whole, scorer.generate(prompts, 8, until=[stop, "never"]), strict=True):
        assert cut.text == full.text.split(stop)[0]
    drawn = [scorer.generate(prompts, 8, Sampling(), seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "pairs, line",
    [
        ([("a", "")], "a continuation of no tokens"),
        ([([], [1])], "a context of no tokens"),
        ([("a", [1])], "must be two texts"),
        ([([1], [264])], "a token 264: must be below the model's 264"),
    ],
)
def test_bad_pairs(bytewise, pairs, line):
    with pytest.raises(BadInput, match=line):
        bytewise[0].log_likelihoods(pairs)


@pytest.mark.parametrize(
    "model, settings, line",
    [
        ({"vocab_size": 200}, {}, "model.vocab_size = 200: must be at least the tokenizer's 257"),
        ({"position": "learned"}, {"max_length": 64}, "learned positions end at 48"),
    ],
)
def test_what_no_scorer_is_made_for(model, settings, line):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(BadInput, match=line):
        Scorer(replace(CONFIG, model=model), {}, ByteTokenizer(), mesh, **settings)
