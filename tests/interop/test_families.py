"""config.json and the decoder's settings: what is said, what is meant, what is refused."""

import dataclasses
import math

import pytest

from lm.command import BadInput
from lm.config import ModelConfig, MoeConfig, RopeScalingConfig
from lm.interop.families import FAMILIES, canonical, from_transformers, to_transformers

LLAMA3 = {  # Llama 3.1 8B's own file, shortened
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def read(architecture=None, **changes):
    given = LLAMA3 | {"rope_scaling": None} | changes
    if architecture:
        given["architectures"] = [f"{architecture}ForCausalLM"]
    return from_transformers(given)[0]


def refusal(call, *arguments, **named):
    with pytest.raises(BadInput) as refused:
        call(*arguments, **named)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_llama_31():
    model, positions = from_transformers(LLAMA3)
    scaling = RopeScalingConfig("llama3", 8.0, 8192, fast_turns=4.0, slow_turns=1.0)
    assert positions == 131_072 and model == ModelConfig(
        vocab_size=128_256,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        rope_base=500_000.0,
        rope_scaling=scaling,
    )


def test_what_a_missing_key_means():
    sizes = {
        key: value
        for key, value in LLAMA3.items()
        if key not in ("rms_norm_eps", "rope_theta", "rope_scaling", "num_key_value_heads")
    }
    model, _ = from_transformers(sizes)
    assert model.norm_eps == 1e-6 and model.rope_base == 10_000 and not model.tied
    assert model.n_kv_heads == 32 and model.head_width == 128
    assert model.rope_scaling == RopeScalingConfig()
    gemma, _ = from_transformers(
        {k: v for k, v in sizes.items() if k != "hidden_act"}
        | {"architectures": ["GemmaForCausalLM"]}
    )
    assert gemma.tied and gemma.head_width == 256 and gemma.feed_forward == "geglu"
    assert gemma.scaled_embedding and gemma.zero_centred_gains


@pytest.mark.parametrize(
    "architecture, said, window",
    [
        ("Llama", {"sliding_window": 7}, 0),  # transformers reads it in no Llama
        ("Mistral", {"sliding_window": 7}, 7),
        ("Mistral", {"sliding_window": None}, 0),
        ("Mistral", {}, 4096),
        ("Mistral", {"sliding_window": 131_072}, 0),  # no sequence is longer
        ("Qwen2", {"sliding_window": 7}, 0),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}, 7),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 32}, 0),
        ("Qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}, 4096),
        ("Qwen3", {"sliding_window": 7, "layer_types": ["full_attention"] * 32}, 0),
    ],
)
def test_windows(architecture, said, window):
    assert read(architecture, **said).sliding_window == window


@pytest.mark.parametrize(
    "said, expected",
    [
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, (7.0, "none", 1.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (5e5, "linear", 2.0)),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32768}},
         (5e5, "yarn", 4.0)),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 64,
                           "long_factor": [2.0] * 64},
          "original_max_position_embeddings": 4096}, (5e5, "longrope", 32.0)),
    ],
)  # fmt: skip
def test_rotary_positions_in_the_spellings_of_the_years(said, expected):
    model = read(**said)
    scaling = model.rope_scaling
    assert (model.rope_base, scaling.kind, scaling.factor) == expected


@pytest.mark.parametrize(
    "said, says",
    [
        ({"architectures": ["LLamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": None}, "the architecture 'none': must be one of LlamaForCausalLM, "),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "wide"}, "model.d_model = 'wide': must be of type int"),
        ({"hidden_act": "relu2"}, "hidden_act = 'relu2': must be one of silu, gelu_pytorch_tanh"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),  # exact, of no Gemma
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "with mscale"),
        ({"num_key_value_heads": 5}, "must divide model.n_heads = 32"),
        ({"architectures": [3]}, "architectures[0] = 3: must be of type str"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings = '64': must be of type int"),
        ({"rope_scaling": ["linear"]}, "rope_scaling = ['linear']: must be of type dict"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type = ['linear']: must be of type"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
         "original_positions = 0: must be above 0"),
        ({"rope_theta": None}, "rope_base = None: must be of type float"),
        ({"hidden_act": None}, "hidden_act = None: must be one of"),
    ],
)  # fmt: skip
def test_what_the_decoder_has_not_is_refused_by_name(said, says):
    assert says in refusal(from_transformers, LLAMA3 | said)


WRONG = ["a", "", [], [3], [["a"]], {}, {"a": 1}, True, 0, -1, 1.5, math.nan, None]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_value_of_any_type_is_taken_or_refused(architecture):
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": None}
    sizes |= {"sliding_window": 7, "use_sliding_window": True, "hidden_activation": None}
    given = LLAMA3 | sizes | {"max_window_layers": 0, "architectures": [architecture]}
    rope = LLAMA3["rope_scaling"] | {"type": None}
    cases = [{key: value} for key in given for value in WRONG]
    cases += [{"rope_scaling": rope | {key: value}} for key in rope for value in WRONG]
    taken = 0
    for case in cases:
        try:
            from_transformers(given | case)
            taken += 1
        except BadInput as error:
            assert "\n" not in str(error)
    assert 0 < taken < len(cases) / 2


def test_layers_of_two_kinds_are_refused():
    said = {"use_sliding_window": True, "max_window_layers": 3}
    assert "must be one for all layers" in refusal(read, "Qwen2", **said)
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    assert "must be above 1" in refusal(read, "Mixtral", **experts)


SMALL = ModelConfig(d_model=32, n_heads=4, n_kv_heads=2, vocab_size=61)
EXPORTED = {
    "Llama": [
        {},
        {"tied": True, "feed_forward": "geglu", "head_width": 12, "norm_eps": 1e-3},
        {"rope_scaling": RopeScalingConfig("llama3", 8.0, 16)},
        {"rope_scaling": RopeScalingConfig("yarn", 8.0, 16, attention_factor=1.5)},
        {"rope_scaling": RopeScalingConfig("linear", 2.0)},
        {"rope_scaling": RopeScalingConfig("ntk", 2.0)},
        {"sliding_window": 64},  # as long as the sequence
        {"scan_layers": True, "remat": "full", "dtype": "bfloat16"},
    ],
    "Mistral": [{"sliding_window": 7}, {"d_model": 30, "head_width": 8}],
    "Qwen2": [{"qkv_bias": True}, {"qkv_bias": True, "sliding_window": 7}],
    "Qwen3": [{"qk_norm": True, "head_width": 12}],
    "Gemma": [
        {"scaled_embedding": True, "zero_centred_gains": True, "tied": True, "head_width": 12},
        {"scaled_embedding": True, "zero_centred_gains": True, "feed_forward": "geglu"},
    ],
    "Mixtral": [
        {"moe": MoeConfig(n_experts=4)},
        {"moe": MoeConfig(n_experts=4, granularity=2, jitter=0.1), "sliding_window": 7},
    ],
}


@pytest.mark.parametrize("architecture", EXPORTED)
def test_the_family_that_computes_the_same_is_found_and_read_back(architecture):
    for changes in EXPORTED[architecture]:
        model = dataclasses.replace(SMALL, **{"head_width": 0} | changes)
        written = to_transformers(model, 64)
        assert written["architectures"] == [f"{architecture}ForCausalLM"]
        assert written["model_type"] == architecture.lower()
        back, positions = from_transformers(written)
        assert canonical(back, 64) == canonical(model, 64) and positions == 64
    assert f"{architecture}ForCausalLM" in FAMILIES and len(EXPORTED) == len(FAMILIES)


def test_the_papers_defaults_are_written_out():
    scalings = {
        "yarn": {"attention_factor": 0.1 * math.log(8) + 1, "beta_fast": 32.0, "beta_slow": 1.0},
        "llama3": {"high_freq_factor": 4.0, "low_freq_factor": 1.0},
    }
    for kind, said in scalings.items():
        model = dataclasses.replace(SMALL, rope_scaling=RopeScalingConfig(kind, 8.0, 16))
        original = {"factor": 8.0, "original_max_position_embeddings": 16}
        assert to_transformers(model, 128)["rope_scaling"] == {"rope_type": kind} | original | said
    ntk = dataclasses.replace(SMALL, rope_scaling=RopeScalingConfig("ntk", 2.0))
    written = to_transformers(ntk, 128)
    assert written["rope_theta"] == 1e4 * 2 ** (8 / 6) and "rope_scaling" not in written


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"norm": "layer"}, "LlamaForCausalLM would with model.norm: 'layer' -> 'rms'"),
        ({"position": "learned"}, "model.position: 'learned' -> 'rope'"),
        ({"feed_forward": "relu"}, "model.feed_forward: 'relu' -> 'swiglu'"),
        ({"logit_soft_cap": 30.0}, "model.logit_soft_cap: 30.0 -> 0.0"),
        ({"qk_norm": True, "qkv_bias": True}, "Qwen2ForCausalLM would with model.qk_norm: True"),
        ({"scaled_embedding": True}, "model.scaled_embedding: True -> False"),
        ({"moe": MoeConfig(n_experts=4, n_shared=1)}, "MixtralForCausalLM would with model.moe"),
    ],
)
def test_what_no_family_computes_is_refused_by_name(changes, says):
    assert says in refusal(to_transformers, dataclasses.replace(SMALL, **changes), 64)
