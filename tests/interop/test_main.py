"""The commands: weights in and out again; bad input in one line, with nothing written."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from lm import command
from lm.checkpoint import Checkpoints, claim, context, load_config, load_params
from lm.config import Config, MeshConfig, replace
from lm.data import open_tokenizer
from lm.data.tokenizers import END_OF_TEXT, ByteTokenizer, JsonTokenizer
from lm.interop import __main__ as interop
from lm.interop import to_transformers, write_folder
from lm.interop.tensors import pieces
from lm.interop.tokenizer import companions
from lm.model import Decoder
from lm.model.lora import NAMES
from lm.model.rotary import UNSCALED
from lm.sharding import make_mesh
from lm.train.loop import train
from tests.data.test_chat import folder as chat_folder  # noqa: F401
from tests.evaluate.test_scorer import saved
from tests.interop.test_tensors import random_params

GENERATION, MARKS = "generation_config", ("bos_token_id", "eos_token_id")


@pytest.fixture
def call(capsys):
    def call(*arguments):
        verbs = {"import": interop.import_, "export": interop.export, "merge": interop.merge}
        code = command.run(verbs, interop.FLAGS, interop.__doc__, ["lm.interop", *arguments])
        captured = capsys.readouterr()
        assert code == 0 or captured.err.count("\n") == 1
        return code, captured.out, captured.err

    return call


CONFIG = replace(
    Config(),
    model=dict(vocab_size=260, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24),
    data=dict(seq_len=32),
)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of random weights, and its tensors' file."""
    path = tmp_path / "theirs"
    path.mkdir()
    files = companions(ByteTokenizer(), 32)
    write_folder(
        path,
        to_transformers(CONFIG.model, 32),
        pieces(CONFIG.model, random_params(CONFIG)),
        files | {"chat_template.jinja": b"{{ x }}"},
        "bfloat16",
    )
    return path


@pytest.mark.parametrize("scan", [(), ("--scan_layers",)], ids=["unrolled", "scanned"])
def test_in_and_out_again_is_the_same_to_the_bit(call, folder, tmp_path, scan):
    code, out, _ = call("import", f"--from={folder}", f"--to={tmp_path / 'run'}", *scan)
    assert code == 0 and "parameters" in out
    config = load_config(tmp_path / "run")
    assert replace(config, model={"scan_layers": False}).model == CONFIG.model
    assert config.data.seq_len == 32 and config.model.scan_layers == bool(scan)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "imported"
    text = "naïve <|endoftext|>"
    np.testing.assert_array_equal(
        open_tokenizer(config.data).encode(text), ByteTokenizer().encode(text)
    )
    code, out, _ = call(
        "export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}", "--dtype=bfloat16"
    )
    assert code == 0 and "LlamaForCausalLM" in out
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert x.dtype == second[name].dtype and x.tobytes() == second[name].tobytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_trained_run_goes_out_and_in(call, tmp_path, text_data):
    config = replace(
        CONFIG, data=vars(text_data), train=dict(tokens=2_048, batch_tokens=512, tensorboard=False)
    )
    result = train(config, tmp_path / "run")
    code, _, err = call("export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
    assert code == 0, err
    code, _, err = call("import", f"--from={tmp_path / 'out'}", f"--to={tmp_path / 'again'}")
    assert code == 0, err
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = [
        load_params(tmp_path / name, load_config(tmp_path / name), mesh)
        for name in ("run", "again")
    ]
    jax.tree.map(np.testing.assert_array_equal, *params)
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["params"] == result["params"] and again["total_params"] == result["total_params"]


def marks(path):
    """bos_token_id and eos_token_id, which both files must tell alike."""
    files = [json.loads((path / f"{name}.json").read_text()) for name in ("config", GENERATION)]
    first, second = ([file[key] for key in MARKS] for file in files)
    assert first == second
    return first


@pytest.mark.parametrize(
    "in_config, in_generation, expected",
    [
        ({"bos_token_id": 7, "eos_token_id": [9, 256]}, None, [7, [9, 256]]),
        ({"bos_token_id": 7, "eos_token_id": 9}, {"eos_token_id": [3, 4], "top_k": 5}, [7, [3, 4]]),
        ({"bos_token_id": None, "eos_token_id": None}, None, [None, 256]),
    ],
)
def test_what_begins_and_ends_a_text_stays(
    call, folder, tmp_path, in_config, in_generation, expected
):
    change(folder, **in_config)
    if in_generation:
        (folder / f"{GENERATION}.json").write_text(json.dumps(in_generation))
    assert call("import", f"--from={folder}", f"--to={tmp_path / 'run'}")[0] == 0
    assert call("export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")[0] == 0
    assert marks(tmp_path / "out") == expected
    kept = json.loads((tmp_path / "out" / f"{GENERATION}.json").read_text())
    assert kept.get("top_k") == (in_generation or {}).get("top_k")


def test_a_turns_end_ends_a_text(call, chat_folder, tmp_path):  # noqa: F811
    """What was trained on conversations, from a model whose texts begin with token 6."""
    (chat_folder / f"{GENERATION}.json").write_text('{"bos_token_id": 6, "eos_token_id": 3}')
    tokenizer = JsonTokenizer(chat_folder / "tokenizer.json")
    turn, text = (tokenizer.encode_marked(name)[0][0] for name in ("<|im_end|>", END_OF_TEXT))
    data = dict(tokenizer=str(tokenizer.path), seq_len=32)
    chats = dict(data, corpus="chat", files="x.jsonl")
    for name, changes, ends in (("talk", chats, [turn, 3, text]), ("plain", data, [3, text])):
        config = replace(CONFIG, model=dict(vocab_size=310), data=changes)
        saved(tmp_path / name, config, random_params(config))
        assert call("export", f"--from={tmp_path / name}", f"--to={tmp_path / 'hf' / name}")[0] == 0
        assert marks(tmp_path / "hf" / name) == [6, ends]


def change(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def tokens(path, **settings):
    (path / "chat_template.jinja").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda path: change(path, eos_token_id="abc"), "eos_token_id[0] = 'abc': must be of type"),
        (lambda path: (path / f"{GENERATION}.json").write_bytes(b"\xff"), "not JSON"),
        (lambda path: (path / f"{GENERATION}.json").mkdir(), "is a folder; a file is needed"),
        (
            lambda path: (path / f"{GENERATION}.json").write_text('{"bos_token_id": [1, {}]}'),
            "bos_token_id[1] = {}: must be of type int",
        ),
        (lambda path: tokens(path, chat_template=[1]), "chat_template = [1]: must be of type str"),
        (lambda path: tokens(path, chat_template="{% if %}"), "the chat template: Expected an"),
        (lambda path: tokens(path, eos_token={"a": 1}), "eos_token = {'a': 1}: must be of type"),
        (lambda path: change(path, architectures=["GPT2LMHeadModel"]), "the architecture"),
        (lambda path: change(path, num_hidden_layers=3), "tensors are missing: model.layers.2."),
        (lambda path: change(path, num_hidden_layers=1), "tensors fit nowhere: model.layers.1."),
        (
            lambda path: change(path, intermediate_size=25),
            "has the shape (16, 24), must be (16, 25)",
        ),
        (lambda path: change(path, vocab_size=256), "the tokenizer has 257 ids, the embedding 256"),
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b"12"), "truncated or damaged"),
    ],
)
def test_bad_folders_are_2_one_line_and_nothing_is_left(call, folder, tmp_path, harm, says):
    harm(folder)
    code, _, err = call("import", f"--from={folder}", f"--to={tmp_path / 'run'}")
    assert code == 2 and says in err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


YARN = {"kind": "yarn", "original_positions": 32, "factor": 4.0}
LLAMA3 = {"kind": "llama3", "original_positions": 8, "factor": 32.0}


@pytest.mark.parametrize("scaling, positions", [(YARN, 128), (LLAMA3, 32)], ids=str)
def test_positions_stay_as_the_file_had_them(call, folder, tmp_path, scaling, positions):
    """Whatever the context of the model is."""
    model = replace(CONFIG, model={"rope_scaling": {**vars(UNSCALED), **scaling}}).model
    change(folder, **to_transformers(model, 32))
    assert call("import", f"--from={folder}", f"--to={tmp_path / 'run'}")[0] == 0
    assert context(tmp_path / "run") == positions
    assert call("export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")[0] == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 32


def test_the_context_of_what_was_tuned_goes_out(call, tmp_path):
    """Of adapters trained on shorter texts than the model, merged or not."""
    claim(tmp_path / "base", CONFIG)
    train = {"init_from": str(tmp_path / "base"), "loss_chunk": 12}
    tuned = replace(CONFIG, data={"seq_len": 12}, train=train, model={"lora": {"rank": 1}})
    saved(tmp_path / "run", tuned, random_params(tuned))
    assert call("merge", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'merged'}")[0] == 0
    assert load_config(tmp_path / "merged").data.seq_len == 32
    for name in ("run", "merged"):
        assert call("export", f"--from={tmp_path / name}", f"--to={tmp_path / 'hf' / name}")[0] == 0
        written = json.loads((tmp_path / "hf" / name / "config.json").read_text())
        assert written["max_position_embeddings"] == 32


def test_bad_arguments_are_2_and_one_line(call, folder, tmp_path):
    for arguments, says in (
        (["import", f"--from={folder}"], "--to is missing"),
        (["import", "--from=nowhere", f"--to={tmp_path / 'run'}"], "--from=nowhere: is not there"),
        (["import", f"--from={folder}", f"--to={folder}"], "is there already"),
        (
            ["import", f"--from={folder}", f"--to={tmp_path / 'x'}", "--dtype=float16"],
            "must be one",
        ),
        (["export", f"--from={tmp_path}", f"--to={tmp_path / 'x'}"], "no run here"),
        (["improt"], "did you mean 'import'?"),
        (["import", f"--from={folder}", f"--to={folder / 'config.json' / 'x'}"], "no folder can"),
        (["import", f"--from={folder}", "--to=/proc/x/y"], "no folder can be made there"),
    ):
        code, _, err = call(*arguments)
        assert code == 2 and says in err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_no_family_computes_is_not_exported(call, tmp_path):
    (tmp_path / "run").mkdir()
    config = replace(CONFIG, model={"norm": "layer"})
    claim(tmp_path / "run", config)
    code, _, err = call("export", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
    assert code == 2 and "no family of transformers computes this" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def adapted(request, tmp_path):
    """A run with adapters that were trained."""
    lora = dict(rank=3, alpha=6.0, targets=("query", "out", "down"))
    config = replace(CONFIG, model=dict(lora=lora, scan_layers=request.param))
    config = replace(config, mesh={"data": 1}, train={"init_from": "runs/base"})
    claim(tmp_path / "run", config)
    checkpoints = Checkpoints(tmp_path / "run")
    params = jax.tree.map(lambda x: 0.3 * x, random_params(config))
    checkpoints.save(1, {"params": params}, {"schema": 1})
    checkpoints.close()
    return tmp_path / "run", config, params


def test_adapters_are_merged_into_plain_weights(call, adapted, tmp_path):
    run, config, params = adapted
    code, told, _ = call("merge", f"--from={run}", f"--to={tmp_path / 'merged'}")
    assert code == 0 and "parameters" in told
    merged = load_config(tmp_path / "merged")
    plain_model = replace(CONFIG, model={"scan_layers": config.model.scan_layers}).model
    assert merged.model == plain_model and not merged.train.init_from
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    plain = load_params(tmp_path / "merged", merged, mesh)
    tokens_BT = np.arange(24).reshape(2, 12)
    found = Decoder(merged.model, 32).apply({"params": plain}, tokens_BT)
    wanted = Decoder(config.model, 32).apply({"params": params}, tokens_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    code, _, error = call("merge", f"--from={tmp_path / 'merged'}", f"--to={tmp_path / 'again'}")
    assert code == 2 and "has no adapters" in error and not (tmp_path / "again").exists()
    code, _, error = call(
        "export", "--adapters", f"--from={tmp_path / 'merged'}", f"--to={tmp_path / 'again'}"
    )
    assert code == 2 and "has no adapters" in error and not (tmp_path / "again").exists()


def test_exported_adapters_make_the_exported_weights(call, adapted, tmp_path):
    """W + alpha / r B A, as peft applies what it reads."""
    run, config, params = adapted
    assert call("export", f"--from={run}", f"--to={tmp_path / 'whole'}")[0] == 0
    assert call("export", "--adapters", f"--from={run}", f"--to={tmp_path / 'peft'}")[0] == 0
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    adapters = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["down_proj", "o_proj", "q_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 6.0, "LORA")
    assert settings["base_model_name_or_path"] == "base"
    assert len(adapters) == 2 * 2 * 3  # A and B, of two layers, of three matrices
    base = {name: piece() for name, (_, piece) in pieces(config.model, params).items()}
    for name, a in adapters.items():
        if name.endswith("lora_A.weight"):
            place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = adapters[name.replace("lora_A", "lora_B")]
            assert a.shape[0] == b.shape[1] == 3
            np.testing.assert_allclose(
                whole[f"{place}.weight"], base[f"{place}.weight"] + 2 * b @ a, atol=1e-6
            )


@pytest.mark.slow
def test_peft_itself_adds_them_to_the_base(call, adapted, tmp_path):
    needed = ("torch", "transformers", "peft")
    torch, transformers, peft = (
        pytest.importorskip(name, reason=f"{name} is not here; pip install '.[compare]'")
        for name in needed
    )
    run, config, params = adapted
    flat = {key: x for key, x in flatten_dict(params).items() if key[-1] not in NAMES}
    base = replace(config, model={"lora": {"rank": 0}}, train={"init_from": ""})
    saved(tmp_path / "base_run", base, unflatten_dict(flat))
    for name, given in (("base", "base_run"), ("whole", "run")):
        assert call("export", f"--from={tmp_path / given}", f"--to={tmp_path / name}")[0] == 0
    assert call("export", "--adapters", f"--from={run}", f"--to={tmp_path / 'peft'}")[0] == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens_BT = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain, wanted = (load(tmp_path / name)(tokens_BT).logits for name in ("base", "whole"))
        beside = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "peft")
        found = beside(tokens_BT).logits
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (plain - wanted).abs().max() > 0.1
