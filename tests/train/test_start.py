import contextlib
import dataclasses
import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from lm.checkpoint import Checkpoints, abstract_params, claim, load_config, load_params
from lm.command import BadInput
from lm.config import Config, DataConfig, MeshConfig, ModelConfig, replace
from lm.data import open_dataset, open_template
from lm.data.tokenizers import ByteTokenizer, train_bpe
from lm.generate.decode import Generator
from lm.generate.sampling import Sampling
from lm.interop.workdir import merge_weights
from lm.model import Decoder, cross_entropy
from lm.model.lora import NAMES
from lm.sharding import make_mesh
from lm.train import start
from lm.train.loop import train
from lm.train.step import Program

MODEL = ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24)
BYTES = ByteTokenizer()


def words(n=80, seed=0):
    """Questions whose answers are the words in capitals."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdef", k=3)) for _ in range(n)]


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    records = [{"prompt": word, "response": word.upper()} for word in words()]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, records)))
    return DataConfig(
        "chat",
        files=str(folder / "talk.jsonl"),
        seq_len=64,
        validation_tokens=64,
        data_dir=str(folder / "data"),
    )


@pytest.fixture(scope="module")
def base(text_data, tmp_path_factory):
    """A folder with parameters, as an imported one."""
    config = replace(
        Config(model=MODEL, data=text_data, mesh=MeshConfig(data=1)),
        train={"tokens": 512.0, "batch_tokens": 512.0, "steps_per_dispatch": 4},
    )
    workdir = tmp_path_factory.mktemp("runs") / "base"
    claim(workdir, config)
    checkpoints = Checkpoints(workdir)
    params = Program(config, one_device()).init(5).params
    checkpoints.save(0, {"params": params}, {"schema": 1})
    checkpoints.close()
    return workdir


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def tuned(base, talk, **model):
    """The config that goes on from ``base`` with conversations."""
    config = dataclasses.replace(load_config(base), data=talk, mesh=MeshConfig(data=8))
    return replace(config, model=model, train={"init_from": str(base)})


@pytest.mark.parametrize("mesh", [dict(data=1), dict(data=4, model=2, zero=3)], ids=str)
def test_the_first_parameters_are_the_folders_on_any_mesh(base, talk, tmp_path, mesh):
    config = replace(tuned(base, talk, lora={"rank": 2}), mesh=mesh)
    program = Program(
        config, make_mesh(config.mesh, jax.devices()[: 1 if mesh["data"] == 1 else 8])
    )
    fresh = program.init(0).params
    new = {key: np.array(x) for key, x in flatten_dict(fresh).items() if key[-1] in NAMES}
    saved = load_params(base, load_config(base), one_device())
    wanted = flatten_dict(jax.device_get(saved)) | new
    claim(tmp_path, config)
    found = start.params(config, program.mesh, fresh, tmp_path)
    assert flatten_dict(found).keys() == wanted.keys()
    for key, x in flatten_dict(found).items():
        np.testing.assert_array_equal(x, wanted[key])
    shardings = jax.tree.map(lambda x: x.sharding, found)
    assert shardings == jax.tree.map(lambda x: x.sharding, abstract_params(config, program.mesh))


def test_the_first_parameters_stay_what_they_were_whatever_becomes_of_the_folder(
    base, talk, tmp_path
):
    grows, run = tmp_path / "grows", tmp_path / "run"
    shutil.copytree(base, grows)
    config = replace(tuned(grows, talk), mesh={"data": 1})
    claim(run, config)
    wanted = load_params(base, load_config(base), one_device())
    fresh = jax.tree.map(jax.numpy.zeros_like, wanted)

    def first():
        return start.params(config, one_device(), jax.tree.map(jax.numpy.copy, fresh), run)

    first()
    with contextlib.closing(Checkpoints(grows)) as checkpoints:
        checkpoints.save(3, {"params": fresh}, {})
    jax.tree.map(np.testing.assert_array_equal, first(), wanted)
    longer = replace(config, train={"tokens": 1024.0})
    claim(run, longer, force=True)
    jax.tree.map(np.testing.assert_array_equal, first(), wanted)
    shutil.rmtree(grows / "checkpoints" / "0")
    with pytest.raises(
        BadInput, match="grows: holds no checkpoint of step 0, which this run began"
    ):
        first()
    claim(tmp_path / "another", config)
    found = start.params(config, one_device(), fresh, tmp_path / "another")
    assert not any(map(np.any, jax.tree.leaves(found)))


@pytest.mark.slow
def test_fine_tuning_is_a_run_that_begins_at_the_folders_loss(base, talk, tmp_path):
    """With a rate of next to nothing, the loss is that of the folder's parameters."""
    config = replace(tuned(base, talk, lora={"rank": 2}), optimizer={"learning_rate": 1e-9})
    result = train(config, tmp_path / "tuned")
    params = load_params(base, load_config(base), one_device())
    nats = tokens = 0.0
    for batch in open_dataset(talk).validation(8):
        logits = Decoder(MODEL, 64).apply(
            {"params": params}, batch.inputs_BT, batch.segments_BT, batch.positions_BT
        )
        nats += float(cross_entropy(logits, batch.targets_BT, batch.weights_BT))
        tokens += batch.weights_BT.sum()
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["validation_tokens"] == tokens < 64


def test_packed_conversations_are_as_if_each_were_alone(talk):
    """The loss is the answers' nats, summed by hand; and so is its gradient."""
    decoder = Decoder(MODEL, 64)
    params = meta.unbox(decoder.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"])
    wider = dataclasses.replace(talk, seq_len=128, validation_tokens=128)
    batch = open_dataset(wider).batch(0, 0, 2)
    assert batch.segments_BT.max() >= 2
    alone = []
    for inputs, targets, weights, segments, _ in zip(*batch, strict=True):
        for number in range(segments.max() + 1):
            mine = segments == number
            if weights[mine].any():
                alone.append((inputs[mine], targets[mine], np.flatnonzero(weights[mine])))
    texts = [BYTES.decode(targets[answer]) for _, targets, answer in alone]
    assert {text.removesuffix("<|endoftext|>") for text in texts} <= {w.upper() for w in words()}

    def packed(params):
        logits_BTV = decoder.apply(
            {"params": params}, batch.inputs_BT, batch.segments_BT, batch.positions_BT
        )
        return cross_entropy(logits_BTV, batch.targets_BT, batch.weights_BT)

    def of_one(params, row_T, target_T, is_answer_T):
        log_p_TV = jax.nn.log_softmax(decoder.apply({"params": params}, row_T[None])[0])
        return -jnp.sum(log_p_TV[jnp.arange(64), target_T] * is_answer_T)

    by_hand, each = jax.jit(jax.value_and_grad(of_one)), []
    for inputs, targets, answer in alone:
        row, target, is_answer = np.zeros((3, 64), np.int32)  # what comes after changes nothing
        row[: len(inputs)], target[: len(targets)], is_answer[answer] = inputs, targets, 1
        each.append(by_hand(params, row, target, is_answer))
    wanted, wanted_gradient = jax.tree.map(lambda *parts: sum(parts), *each)
    found, gradient = jax.jit(jax.value_and_grad(packed))(params)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        gradient,
        wanted_gradient,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train={"init_from": "nowhere"}), "nowhere: no run here"),
        (dict(model={"n_layers": 3}), "is another model .config.model.n_layers: 1 -> 3"),
        (dict(model={"norm_eps": 1e-3}), "config.model.norm_eps"),
        (dict(model={"scan_layers": True}), "config.model.scan_layers"),
    ],
    ids=str,
)
def test_another_model_is_refused_with_nothing_written(base, talk, tmp_path, change, message):
    config = replace(tuned(base, talk), **change)
    with pytest.raises(BadInput, match=message):
        train(config, tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


def test_what_may_differ(base, talk):
    settings = dict(remat="full", dtype="bfloat16", lora={"rank": 1})
    scaling = {"kind": "yarn", "factor": 2.0, "original_positions": 64}
    start.check(tuned(base, talk, rope_scaling=scaling, **settings), BYTES)


def test_positions_are_scaled_once(base, talk, tmp_path):
    """A folder's own scaling is part of its function."""
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    linear = {"kind": "linear", "factor": 2.0}
    scaled = replace(load_config(base), model={"rope_scaling": linear})
    claim(tmp_path, scaled)
    same = tuned(tmp_path, talk)
    start.check(same, BYTES)
    for other in ({"kind": "none", "factor": 1.0}, {"factor": 4.0}):
        with pytest.raises(BadInput, match="another model .config.model.rope_scaling"):
            start.check(replace(same, model={"rope_scaling": other}), BYTES)


def test_another_tokenizer_is_refused(base, talk, tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_bpe(["ab ab ab ab abc"], 259))
    path = str(tmp_path / "tokenizer.json")
    config = replace(tuned(base, talk), data={"tokenizer": path})
    with pytest.raises(
        BadInput, match="its tokenizer is bytes, not .*; set data.tokenizer = 'bytes'"
    ):
        train(config, tmp_path / "tuned")


def test_a_folder_with_adapters_of_its_own(base, talk, tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    theirs = replace(tuned(base, talk, lora={"rank": 2}), train={"init_from": ""})
    claim(tmp_path, theirs)
    same = replace(theirs, train={"init_from": str(tmp_path)})
    start.check(same, BYTES)
    with pytest.raises(BadInput, match="has adapters of its own; `python -m lm.interop merge`"):
        start.check(replace(same, model={"lora": {"rank": 3}}), BYTES)
    (tmp_path / "checkpoints" / "4").rmdir()
    with pytest.raises(BadInput, match="holds no checkpoint"):
        start.check(same, BYTES)


def _answers(config, workdir, asked):
    mesh = one_device()
    template = open_template(config.data, BYTES)
    prompts = [
        BYTES.encode_marked(template.render([{"role": "user", "content": w}], prompt=True))[0]
        for w in asked
    ]
    generator = Generator(
        *(config, load_params(workdir, config, mesh), 64, mesh, Sampling(temperature=0)),
        stop=[BYTES.end_of_text],
    )
    return [BYTES.decode(c.tokens) for c in generator([p.tolist() for p in prompts], 8)]


@pytest.mark.slow
def test_it_learns_to_answer_and_adapters_learn_to_answer_otherwise(base, talk, tmp_path):
    """Questions that were held out too: whole in capitals, then by adapters with a sign more."""
    asked = [w for w in words(200, seed=1) if w not in words()][:20]

    def right(config, workdir, wanted):
        return sum(f == w for f, w in zip(_answers(config, workdir, asked), wanted, strict=True))

    config = replace(
        tuned(base, talk),
        train={"tokens": 400 * 512.0, "steps_per_dispatch": 100},
        optimizer={"learning_rate": 0.01},
    )
    train(config, tmp_path / "whole")
    assert right(config, tmp_path / "whole", [w.upper() for w in asked]) >= 14

    records = [{"prompt": word, "response": word.upper() + "!"} for word in words()]
    (tmp_path / "louder.jsonl").write_text("\n".join(map(json.dumps, records)))
    louder = dataclasses.replace(talk, files=str(tmp_path / "louder.jsonl"))
    config = replace(
        tuned(tmp_path / "whole", louder, lora={"rank": 4}),
        train={"tokens": 200 * 512.0, "steps_per_dispatch": 100},
        optimizer={"learning_rate": 0.03},
    )
    wanted = [w.upper() + "!" for w in asked]
    assert right(replace(config, model={"lora": {"rank": 0}}), tmp_path / "whole", wanted) == 0
    train(config, tmp_path / "adapters")
    assert right(config, tmp_path / "adapters", wanted) >= 14

    # Nothing but the adapters has moved, and merged they answer as they did beside the matrices.
    before, beside = (
        load_params(tmp_path / name, load_config(tmp_path / name), one_device())
        for name in ("whole", "adapters")
    )
    for key, x in flatten_dict(before).items():
        np.testing.assert_array_equal(flatten_dict(beside)[key], x)
    (tmp_path / "merged").mkdir()
    merge_weights(tmp_path / "adapters", tmp_path / "merged")
    plain = load_config(tmp_path / "merged")
    merged = load_params(tmp_path / "merged", plain, one_device())
    tokens_BT = open_dataset(louder).batch(0, 0, 2).inputs_BT
    found, there = (
        Decoder(c.model, 64).apply({"params": p}, tokens_BT)
        for c, p in ((plain, merged), (config, beside))
    )
    np.testing.assert_allclose(found, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())
    answers = _answers(config, tmp_path / "adapters", asked)
    assert _answers(plain, tmp_path / "merged", asked) == answers
