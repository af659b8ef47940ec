"""Families of models as settings of the one decoder: config.json read, and written.

The keys are those of transformers' configurations, which also say what a missing key means.
"""

import dataclasses
from typing import Any, NamedTuple

from lm import config as configuration
from lm.command import BadInput, nearest
from lm.config import ModelConfig, MoeConfig, RopeScalingConfig
from lm.model import rotary

# Ours to theirs, in every family.
FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
MOE_FIELDS = {"n_experts": "num_local_experts", "top_k": "num_experts_per_tok"}
ROPE_FIELDS = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "attention_factor": "attention_factor",
}
ROPE_SCALINGS = {  # by kind; the names are both ours and theirs
    "linear": {"factor": "factor"},
    "yarn": ROPE_FIELDS | {"fast_turns": "beta_fast", "slow_turns": "beta_slow"},
    "llama3": {
        "factor": "factor",
        "original_positions": "original_max_position_embeddings",
        "fast_turns": "high_freq_factor",
        "slow_turns": "low_freq_factor",
    },
    "longrope": ROPE_FIELDS | {"short_factors": "short_factor", "long_factors": "long_factor"},
}
TYPES = {  # of what is computed with before the decoder's settings are made, which check the rest
    "architectures": tuple[str, ...],
    "hidden_activation": str,
    "hidden_act": str,
    "layer_types": tuple[str, ...],
    "max_position_embeddings": int,
    "max_window_layers": int,
    "num_hidden_layers": int,
    "original_max_position_embeddings": int,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "rope_type": str,
    "sliding_window": int,
    "type": str,
}
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
# What would change the function and that the decoder has not; missing is as good.
ONLY = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "use_bidirectional_attention": (False,),
}
# Settings of ours that say how, not what.
EXECUTION = ("scan_layers", "remat", "dtype", "quantization", "attention_kernel")
MOE_TRAINING = (
    *("granularity", "expert_d_ff", "capacity_factor", "jitter", "dead_after"),
    *("balance_coefficient", "z_coefficient"),
)


class Family(NamedTuple):
    """What sets a family apart from Llama."""

    settings: dict[str, Any] = {}  # of ModelConfig, which its config.json does not say
    missing: dict[str, Any] = {}  # what a missing key means
    windows: bool = False  # whether it reads sliding_window
    experts: bool = False


QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(missing={"sliding_window": 4096}, windows=True),
    "Qwen2ForCausalLM": Family({"qkv_bias": True}, QWEN, windows=True),
    "Qwen3ForCausalLM": Family({"qk_norm": True}, QWEN | {"head_dim": 128}, windows=True),
    "GemmaForCausalLM": Family(
        {"scaled_embedding": True, "zero_centred_gains": True},
        {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "MixtralForCausalLM": Family(
        missing={"rms_norm_eps": 1e-5, "rope_theta": 1e6}, windows=True, experts=True
    ),
}
MISSING = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def from_transformers(given: dict[str, Any]) -> tuple[ModelConfig, int]:
    """The decoder's settings and the longest sequence, of the content of a config.json.

    Raises:
      BadInput: an unknown architecture, a missing key, or a setting that the decoder has not.
    """
    said = _said(given)
    architecture = (said.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise BadInput(
            f"config.json: the architecture {architecture!r}: must be one of"
            f" {', '.join(FAMILIES)}{nearest(architecture, FAMILIES)}"
        )
    family = FAMILIES[architecture]
    missing = {k: v for k, v in (MISSING | family.missing).items() if k not in given}
    said = missing | said
    for key, allowed in ONLY.items():
        if key in said and said[key] not in allowed:
            raise BadInput(f"config.json: {key} = {said[key]!r}: is not known to the decoder")
    said.setdefault("num_key_value_heads", said.get("num_attention_heads"))
    said.setdefault("head_dim", 0)
    # Gemma's first files say `gelu` and mean its approximation, as transformers reads them.
    activation = said.get("hidden_activation", said.get("hidden_act"))
    known = ACTIVATIONS | ({"gelu": "geglu"} if "scaled_embedding" in family.settings else {})
    if activation not in known:
        raise BadInput(
            f"config.json: hidden_act = {activation!r}: must be one of {', '.join(known)}"
        )
    wanted = [*FIELDS.values(), "max_position_embeddings"]
    wanted += MOE_FIELDS.values() if family.experts else ()
    if lacking := [key for key in wanted if said.get(key) is None]:
        raise BadInput(f"config.json: has no {', '.join(lacking)}")
    base, scaling = _rope_from(said)
    positions = said["max_position_embeddings"]
    window = _window_from(said) if family.windows else 0
    values = {ours: said[theirs] for ours, theirs in FIELDS.items()}
    if family.experts:
        values["moe"] = {ours: said[theirs] for ours, theirs in MOE_FIELDS.items()}
        if values["moe"]["top_k"] == 1:  # its gate would be renormalised to 1, ours is Switch's
            raise BadInput("config.json: num_experts_per_tok = 1: must be above 1")
    values |= family.settings
    values |= {
        "feed_forward": known[activation],
        "rope_base": base,
        "rope_scaling": scaling,
        "sliding_window": window if window < positions else 0,
    }
    return configuration.from_config_dict(values, ModelConfig, "config.json as model"), positions


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """What is not null. Raises ``BadInput`` for another type than ``TYPES`` has."""
    said = {key: value for key, value in given.items() if value is not None}
    for key in said.keys() & TYPES.keys():
        said[key] = configuration.typed(said[key], TYPES[key], f"config.json: {key}")
    return said


def _window_from(said: dict[str, Any]) -> int:
    """The window of all layers. Raises ``BadInput`` where only some have one."""
    layers = said["num_hidden_layers"]
    window = said.get("sliding_window") if said.get("use_sliding_window", True) else None
    first = said.get("max_window_layers", 0)
    kinds = said.get("layer_types") or [
        "sliding_attention" if window and i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise BadInput("config.json: layer_types: must be one for all layers, of attention")
    return window if window and "sliding_attention" in kinds else 0


def _rope_from(said: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The base, and the section ``rope_scaling``."""
    given = (said.get("rope_scaling") or {}) | (said.get("rope_parameters") or {})
    given = {"rope_theta": said.get("rope_theta")} | _said(given)
    base, legacy = given.pop("rope_theta"), given.pop("type", "default")
    kind = given.pop("rope_type", legacy)
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if kind == "default":
        kind, names = "none", {}
    elif kind in ROPE_SCALINGS:
        names = ROPE_SCALINGS[kind]
    else:
        raise BadInput(
            f"config.json: rope_type = {kind!r}: must be one of default,"
            f" {', '.join(ROPE_SCALINGS)}{nearest(kind, ROPE_SCALINGS)}"
        )
    positions = said["max_position_embeddings"]
    original = "original_max_position_embeddings"
    if original in names.values():
        given.setdefault(original, said.get(original, positions))
        given.setdefault("factor", positions / (given[original] or 1))  # 0 is refused as ours
    if unknown := set(given) - set(names.values()):
        raise BadInput(f"config.json: {kind} rotary positions with {', '.join(sorted(unknown))}")
    values = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    return base, {"kind": kind, **values}


def to_transformers(model: ModelConfig, positions: int) -> dict[str, Any]:
    """The content of a config.json of the first family that computes the same.

    ``positions``: the longest sequence. Raises ``BadInput`` where there is no such family, naming
    the settings that the nearest one has not.
    """
    wanted, nearest_family = canonical(model, positions), None
    for architecture in FAMILIES:
        if architecture == "LlamaForCausalLM" and model.d_model % model.n_heads:
            continue  # transformers refuses it, of this family alone
        written = _written(wanted, positions, architecture)
        read = canonical(*from_transformers(written))
        unlike = list(
            configuration.differences(
                configuration.to_dict(wanted), configuration.to_dict(read), "model"
            )
        )
        if not unlike:
            return written
        if nearest_family is None or len(unlike) < len(nearest_family[1]):
            nearest_family = architecture, unlike
    raise BadInput(
        f"no family of transformers computes this; {nearest_family[0]} would with"
        f" {'; '.join(nearest_family[1])}"
    )


def canonical(model: ModelConfig, positions: int) -> ModelConfig:
    """``model`` with every setting that does not change its function at its default.

    What has two spellings gets one of them: NTK's scaling is a larger base, for one. No sequence is
    longer than ``positions``.
    """
    scaling, base = model.rope_scaling, model.rope_base
    if scaling.kind == "ntk":
        base *= scaling.factor ** (model.head_width / (model.head_width - 2))
    if scaling.kind in ("none", "ntk"):
        scaling = RopeScalingConfig()
    scaling = dataclasses.replace(
        scaling,
        fast_turns=scaling.fast_turns or rotary.FAST_TURNS.get(scaling.kind, 0.0),
        attention_factor=rotary.attention_factor(scaling),
    )
    moe, d_ff = MoeConfig(), model.d_ff
    if model.moe.n_experts:
        d_ff = model.expert_d_ff
        moe = dataclasses.replace(model.moe, **{n: getattr(moe, n) for n in MOE_TRAINING})
    plain = ModelConfig()
    return dataclasses.replace(
        model,
        **{name: getattr(plain, name) for name in EXECUTION},
        rope_base=base,
        rope_scaling=scaling,
        sliding_window=model.sliding_window if model.sliding_window < positions else 0,
        moe=moe,
        d_ff=d_ff,
    )


def _written(model: ModelConfig, positions: int, architecture: str) -> dict[str, Any]:
    """config.json for ``architecture``, of what it can say of a ``canonical`` model."""
    family = FAMILIES[architecture]
    back = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    written = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **{theirs: getattr(model, ours) for ours, theirs in FIELDS.items()},
        "hidden_act": back.get(model.feed_forward, "silu"),
        "max_position_embeddings": positions,
        "rope_theta": model.rope_base,
        "attention_bias": False,
    }
    if (names := ROPE_SCALINGS.get(model.rope_scaling.kind)) is not None:
        scaling = configuration.to_dict(model.rope_scaling)
        written["rope_scaling"] = {"rope_type": model.rope_scaling.kind} | {
            theirs: scaling[ours] for ours, theirs in names.items()
        }
    if family.windows:
        written["sliding_window"] = model.sliding_window or None
    if "use_sliding_window" in family.missing:
        written |= {"use_sliding_window": bool(model.sliding_window), "max_window_layers": 0}
    if family.experts:
        written |= {theirs: getattr(model.moe, ours) for ours, theirs in MOE_FIELDS.items()}
    return written
