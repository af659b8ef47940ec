"""Against transformers itself: the same logits of the same folder, both ways (extra `compare`)."""

import jax
import numpy as np
import pytest
from flax.core import meta

from lm.config import Config, MeshConfig, replace
from lm.data.tokenizers import ByteTokenizer, JsonTokenizer, train_bpe
from lm.interop import Folder, from_transformers, load, pieces, to_transformers, write_folder
from lm.interop.tokenizer import companions
from lm.interop.workdir import export_weights
from lm.model import Decoder
from lm.sharding import make_mesh
from tests.data.test_chat import folder as chat_folder  # noqa: F401
from tests.evaluate.test_scorer import saved
from tests.interop.test_tensors import random_params

torch = pytest.importorskip("torch", reason="torch is not here; pip install '.[compare]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not here; pip install '.[compare]'"
)

T = 48
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-4,
)


def rope(kind, **settings):
    return {"rope_parameters": {"rope_theta": 500.0, "rope_type": kind, **settings}}


FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": (
        "Llama",
        rope(
            *("llama3",),
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, **rope("default"))),
    "linear": ("Llama", rope("linear", factor=4.0)),
    "yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "longrope": (
        "Llama",
        rope(
            *("longrope",),
            short_factor=[1.0, 1.1, 1.2, 1.3],
            long_factor=[1.0, 2.0, 3.0, 4.0],
            original_max_position_embeddings=16,
        ),
    ),
    "mistral": ("Mistral", dict(sliding_window=5, head_dim=12)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen3": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True)),
    "gemma": ("Gemma", dict(head_dim=12)),
}


def their_model(name):
    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for weight in model.parameters():  # theirs starts with gains of 1 and biases of 0: too tame
        torch.nn.init.normal_(weight, float(weight.ndim == 1), 0.15)
    return model


def our_config(folder):
    model, positions = from_transformers(folder.config)
    return replace(Config(model=model), data={"seq_len": positions})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


INPUTS_BT = np.random.default_rng(0).integers(61, size=(2, T))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_both_are_the_same_both_ways(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    folder = Folder(tmp_path / "theirs")
    config = our_config(folder)
    params = load(folder, config, one_device())
    ours_BTV = jax.jit(Decoder(config.model, 64).apply)({"params": params}, INPUTS_BT)
    with torch.no_grad():
        theirs_BTV = theirs(torch.tensor(INPUTS_BT)).logits.numpy()
    assert theirs_BTV.std() > 0.3
    np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=1e-4)

    (tmp_path / "ours").mkdir()
    written = to_transformers(config.model, 64)
    write_folder(tmp_path / "ours", written, pieces(config.model, params), {})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    assert again.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with torch.no_grad():
        assert np.array_equal(again(torch.tensor(INPUTS_BT)).logits.numpy(), theirs_BTV)


def test_what_we_train_with_scanned_layers_is_theirs_too(tmp_path):
    config = replace(
        Config(),
        model=dict(vocab_size=61, d_model=32, n_layers=2, d_ff=56, scan_layers=True),
        data=dict(seq_len=64),
    )
    decoder = Decoder(config.model, 64)
    params = meta.unbox(jax.jit(decoder.init)(jax.random.key(0), INPUTS_BT))["params"]
    write_folder(tmp_path, to_transformers(config.model, 64), pieces(config.model, params), {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs_BTV = theirs(torch.tensor(INPUTS_BT)).logits.numpy()
    np.testing.assert_allclose(decoder.apply({"params": params}, INPUTS_BT), theirs_BTV, atol=1e-4)


def test_their_generate_stops_where_a_turn_ends(chat_folder, tmp_path):  # noqa: F811
    """The seventh token of a greedy text takes the place of the end of a turn."""
    tokenizer = JsonTokenizer(chat_folder / "tokenizer.json")
    (turn,) = tokenizer.encode_marked("<|im_end|>")[0]
    config = replace(
        Config(),
        model=dict(vocab_size=310, d_model=32, n_layers=1, d_ff=56),
        data=dict(corpus="chat", files="x.jsonl", tokenizer=str(tokenizer.path), seq_len=64),
    )
    params = random_params(config)
    prompt = torch.tensor([[5, 6, 7]])
    for n in (None, 7):
        saved(tmp_path / f"run{n}", config, params)
        (tmp_path / f"{n}").mkdir()
        export_weights(tmp_path / f"run{n}", tmp_path / f"{n}")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}")
        mask = torch.ones_like(prompt)
        (text,) = theirs.generate(prompt, attention_mask=mask, max_new_tokens=20, do_sample=False)
        if n is None:
            texts = text[3:].tolist()
            assert len(texts) == 20 and turn not in texts
            swap = np.arange(310)
            swap[[turn, texts[6]]] = texts[6], turn
            params["embedding"] = params["embedding"][swap]
            params["head"]["kernel"] = params["head"]["kernel"][:, swap]
    assert text[3:].tolist() == [*texts[: texts.index(texts[6])], turn]


TEXT = "It cost 12 pounds;\n\tnaïve readers  said “no” — 日本語 🙂 I'll <|endoftext|> don't\x00\x7f"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_autotokenizer_reads_our_tokenizers(kind, tmp_path):
    ours = ByteTokenizer()
    if kind == "bpe":
        (tmp_path / "bpe.json").write_text(train_bpe([TEXT, "the cost of the cat " * 9] * 5, 280))
        ours = JsonTokenizer(tmp_path / "bpe.json")
    for name, content in companions(ours, 64).items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = TEXT.replace("<|endoftext|>", "")  # in theirs it is the end of text, in ours just text
    ids = ours.encode(plain).tolist()
    assert theirs(plain, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == plain and len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.end_of_text and theirs.model_max_length == 64
