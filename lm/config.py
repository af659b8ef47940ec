"""Every setting of a run, once: a ``ConfigDict`` at the edge, frozen dataclasses inside.

How a config is written in a file and overridden on the command line: ``lm/config_file.py``.
"""

import dataclasses
import math
import os
import typing
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from lm.command import BadInput, json_object, nearest, one_of

FLOPS_CONVENTIONS = ("6nd", "kaplan", "chinchilla", "exact", "exact_causal", "exact_blocks")
RULES_LEARNING_RATE = ("fixed", "width", "kaplan2020", "porian2024", "step_law")
RULES_BATCH = ("fixed", "porian2024", "step_law")
RULES_WARMUP = ("fixed", "params")
REMAT = ("none", "full", "dots", "dots_with_no_batch_dims", "offload")
ATTENTION_KERNELS = ("auto", "einsum", "cudnn", "splash")
LORA_TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3", "longrope")
MESH_AXES = ("replica", "stage", "data", "context", "model")


def _positive(section: str, values: Any, *names: str) -> None:
    for name in names:
        if not getattr(values, name) > 0:
            raise BadInput(f"{section}.{name} = {getattr(values, name)!r}: must be above 0")


def _not_negative(section: str, values: Any, *names: str) -> None:
    for name in names:
        if not getattr(values, name) >= 0:
            raise BadInput(f"{section}.{name} = {getattr(values, name)!r}: must be 0 or more")


def _divides(part: str, part_value: int, whole: str, whole_value: int) -> None:
    if whole_value % part_value:
        allowed = [d for d in range(1, whole_value + 1) if whole_value % d == 0]
        raise BadInput(
            f"{part} = {part_value}: must divide {whole} = {whole_value},"
            f" so one of {', '.join(map(str, allowed))}"
        )


@dataclass(frozen=True)
class MoeConfig:
    """A mixture of experts in the place of feed-forward layers; with no experts, none."""

    n_experts: int = 0  # 0: dense
    top_k: int = 2  # experts a token; under expert choice the mean of it
    routing: str = "token_choice"  # token_choice | expert_choice (Zhou et al. 2022; looks ahead)
    gate: str = "softmax"  # softmax | sigmoid
    renormalise: bool = True  # a token's gates sum to 1 (top_k of 2 or more)
    n_shared: int = 0  # experts that every token passes too, ungated, as one feed-forward layer
    granularity: int = 1  # an expert's width is model.d_ff over this, or
    expert_d_ff: int = 0  # this
    every: int = 1  # every n-th layer has experts
    first_dense: int = 0  # and none of the first ones
    # capacity: by capacity_factor, dropping what exceeds it | ragged: no drop, products of
    # ragged rows | auto: no drop, `ragged` on accelerators and room for all on CPU
    dispatch: str = "auto"
    capacity_factor: float = 1.25  # room of an expert over its fair share of a sequence
    jitter: float = 0.0  # the router's input is scaled by 1 +- this in training
    balance_coefficient: float = 0.01  # of the load-balancing loss, summed over layers
    z_coefficient: float = 0.0  # of the router's z-loss, summed over layers
    bias_rate: float = 0.0  # a step of the balance bias (aux-loss-free); 0: there is none
    dead_after: int = 1_000  # steps without a token after which an expert is warned of

    def __post_init__(self):
        names = ("top_k", "granularity", "every", "capacity_factor", "dead_after")
        _positive("model.moe", self, *names)
        names = ("n_experts", "n_shared", "expert_d_ff", "first_dense", "jitter", "bias_rate")
        _not_negative("model.moe", self, *names, "balance_coefficient", "z_coefficient")
        one_of("model.moe.routing", self.routing, ("token_choice", "expert_choice"))
        one_of("model.moe.gate", self.gate, ("softmax", "sigmoid"))
        one_of("model.moe.dispatch", self.dispatch, ("auto", "capacity", "ragged"))
        if self.jitter >= 1:
            raise BadInput(f"model.moe.jitter = {self.jitter}: must lie in [0, 1)")
        if self.n_experts and self.top_k > self.n_experts:
            raise BadInput(
                f"model.moe.top_k = {self.top_k}: must be at most"
                f" model.moe.n_experts = {self.n_experts}"
            )
        if self.routing == "expert_choice" and (self.dispatch == "ragged" or self.bias_rate):
            raise BadInput(
                f"model.moe.routing = 'expert_choice' with model.moe.dispatch = {self.dispatch!r},"
                f" model.moe.bias_rate = {self.bias_rate}: experts that choose are balanced and"
                " full, so it must be 'auto' or 'capacity', and 0"
            )


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary positions beyond pre-training's context; ``lm/model/rotary.py`` has the papers."""

    kind: str = "none"  # none | linear | ntk | yarn | llama3 | longrope
    factor: float = 1.0  # the context that is wanted over that of pre-training
    original_positions: int = 0  # the context of pre-training (yarn, llama3, longrope)
    # Of a column pair in that context: with more turns than `fast_turns` it stays as it is, with
    # fewer than `slow_turns` it is slowed by the factor (yarn, llama3). 0: the paper's, 32 and 4
    fast_turns: float = 0.0
    slow_turns: float = 1.0
    attention_factor: float = 0.0  # of queries and keys, each (yarn, longrope). 0: the paper's
    # longrope: by how much each pair is slowed where no sequence is longer than original_positions,
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()  # and where one may be

    def __post_init__(self):
        one_of("model.rope_scaling.kind", self.kind, ROPE_SCALINGS)
        _not_negative("model.rope_scaling", self, "fast_turns", "attention_factor")
        _positive("model.rope_scaling", self, "slow_turns")
        if not self.factor >= 1:
            raise BadInput(f"model.rope_scaling.factor = {self.factor}: must be 1 or more")
        if self.kind in ("yarn", "llama3", "longrope"):
            _positive("model.rope_scaling", self, "original_positions")
        if self.fast_turns and not self.fast_turns > self.slow_turns:
            raise BadInput(
                f"model.rope_scaling.fast_turns = {self.fast_turns}: must be above"
                f" model.rope_scaling.slow_turns = {self.slow_turns}"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside matrices that stay as they are (Hu et al. 2021); rank 0: none."""

    rank: int = 0
    alpha: float = 16.0  # an adapter counts alpha / rank times
    targets: tuple[str, ...] = LORA_TARGETS  # of attention, then of the feed-forward layers

    def __post_init__(self):
        _not_negative("model.lora", self, "rank")
        _positive("model.lora", self, "alpha")
        for name in self.targets:
            one_of("model.lora.targets", name, LORA_TARGETS)
        if self.rank and not self.targets:
            raise BadInput("model.lora.targets = (): must name a matrix, or model.lora.rank be 0")

    def adapts(self, name: str | None) -> bool:
        """Whether the matrix of this name has an adapter."""
        return self.rank > 0 and name in self.targets

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. The defaults are today's recipe, the alternatives the papers' comparisons."""

    vocab_size: int = 257  # at least the tokenizer's
    d_model: int = 64
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 4  # n_heads: MHA; 1: MQA; between: GQA
    head_width: int = 0  # 0: d_model / n_heads
    d_ff: int = 176
    feed_forward: str = "swiglu"  # swiglu | geglu | gelu | relu
    moe: MoeConfig = MoeConfig()
    norm: str = "rms"  # rms | layer
    norm_position: str = "pre"  # pre | post
    norm_eps: float = 1e-5
    zero_centred_gains: bool = False  # norms multiply by 1 + gain (Gemma)
    position: str = "rope"  # rope | sinusoidal | learned | none
    rope_base: float = 10_000.0
    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    scaled_embedding: bool = False  # the embedding is read times sqrt(d_model) (Gemma)
    tied: bool = False  # the head is the embedding, transposed
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0  # 0: full causal attention
    attention_soft_cap: float = 0.0  # 0: none
    logit_soft_cap: float = 0.0  # 0: none
    scan_layers: bool = False
    # What of a layer is kept for its backward pass: none (rematerialised: all is kept) | full (its
    # input alone) | dots | dots_with_no_batch_dims | offload (those, in the host's memory)
    remat: str = "none"
    dtype: str = "float32"  # of the computation: float32 | bfloat16; parameters stay float32
    quantization: str = "none"  # of the blocks' products: none | int8 | fp8
    attention_kernel: str = "auto"  # auto (by place) | einsum | cudnn | splash
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        _positive(
            "model",
            self,
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "d_ff",
            "norm_eps",
            "rope_base",
        )
        _not_negative(
            "model", self, "head_width", "sliding_window", "attention_soft_cap", "logit_soft_cap"
        )
        one_of("model.feed_forward", self.feed_forward, ("swiglu", "geglu", "gelu", "relu"))
        one_of("model.norm", self.norm, ("rms", "layer"))
        one_of("model.norm_position", self.norm_position, ("pre", "post"))
        one_of("model.position", self.position, ("rope", "sinusoidal", "learned", "none"))
        one_of("model.remat", self.remat, REMAT)
        one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
        one_of("model.quantization", self.quantization, ("none", "int8", "fp8"))
        one_of("model.attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
        _divides("model.n_kv_heads", self.n_kv_heads, "model.n_heads", self.n_heads)
        if self.moe.n_experts:
            self._check_experts()
        if not self.head_width:
            _divides("model.n_heads", self.n_heads, "model.d_model", self.d_model)
            object.__setattr__(self, "head_width", self.d_model // self.n_heads)
        if self.position == "rope" and self.head_width % 2:
            raise BadInput(
                f"model.head_width = {self.head_width}: must be even, since RoPE turns column pairs"
            )
        if self.position != "rope" and self.rope_scaling.kind != "none":
            raise BadInput(
                f"model.rope_scaling.kind = {self.rope_scaling.kind!r} with model.position ="
                f" {self.position!r}: it scales rotary positions, so that must be 'rope'"
            )
        if self.rope_scaling.kind == "ntk" and self.head_width == 2:
            raise BadInput("model.head_width = 2: must be above 2 under rope_scaling.kind 'ntk'")
        for name in ("short_factors", "long_factors"):
            given = getattr(self.rope_scaling, name)
            wanted = self.head_width // 2 if self.rope_scaling.kind == "longrope" else 0
            if len(given) != wanted or not all(factor > 0 for factor in given):
                raise BadInput(
                    f"model.rope_scaling.{name}: must be {wanted} numbers above 0, one for each"
                    f" column pair under 'longrope', not {len(given)}"
                )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise BadInput(
                f"model.d_model = {self.d_model}: must be even, since a sine goes with a cosine"
            )

    def _check_experts(self) -> None:
        moe = self.moe
        if not moe.expert_d_ff:
            _divides("model.moe.granularity", moe.granularity, "model.d_ff", self.d_ff)
        if moe.first_dense + moe.every > self.n_layers:
            raise BadInput(
                f"model.moe.first_dense = {moe.first_dense}, model.moe.every = {moe.every}: of"
                f" model.n_layers = {self.n_layers} none would have experts"
            )
        if self.lora.rank and {"gate", "up", "down"} & set(self.lora.targets):
            raise BadInput(
                f"model.lora.targets = {self.lora.targets}: experts have no adapters, so with"
                " model.moe it must be of query, key, value, out"
            )
        if self.scan_layers and (self.n_layers - moe.first_dense) % moe.every:
            raise BadInput(
                f"model.moe.every = {moe.every}: with model.scan_layers, it must divide"
                f" model.n_layers - model.moe.first_dense = {self.n_layers - moe.first_dense}"
            )

    @property
    def expert_d_ff(self) -> int:
        """An expert's width."""
        return self.moe.expert_d_ff or self.d_ff // self.moe.granularity

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that have experts: of those after the first dense ones, every n-th."""
        first, every = self.moe.first_dense, self.moe.every
        return tuple(range(first + every - 1, self.n_layers, every)) if self.moe.n_experts else ()


@dataclass(frozen=True)
class DataConfig:
    """What is read. One corpus by name, or a mixture of several with weights."""

    # pd_english | text, chat (read `files`) | mixture | a TFDS name with a text feature
    corpus: str = "pd_english"
    # corpus=text: a glob of .txt, .jsonl[.gz|.xz|.zst], .parquet; corpus=chat: of .jsonl with
    # {"messages": [{"role", "content"}, ...]} or {"prompt", "response"}, whose answers alone count
    files: str = ""
    # corpus=mixture: (name, "text:GLOB" or "chat:GLOB", weight) pairs
    mixture: tuple[tuple[str, float], ...] = ()
    tokenizer: str = "bytes"  # bytes | bpe:VOCAB_SIZE | a tokenizer.json
    chat_template: str = ""  # a file of Jinja ("": the tokenizer.json's own, else a plain one)
    seq_len: int = 128
    respect_documents: bool = False  # attention and loss do not cross documents
    validation_tokens: int = 262_144
    data_dir: str = "data"

    def __post_init__(self):
        _positive("data", self, "seq_len", "validation_tokens")
        if (self.corpus in ("text", "chat")) != bool(self.files):
            raise BadInput(
                f"data.files = {self.files!r} with data.corpus = {self.corpus!r}:"
                " files go with corpus 'text' or 'chat'"
            )
        if (self.corpus == "mixture") != bool(self.mixture):
            raise BadInput(
                f"data.mixture = {self.mixture!r} with data.corpus = {self.corpus!r}:"
                " a mixture goes with corpus 'mixture'"
            )
        for name, weight in self.mixture:
            if not weight > 0:
                raise BadInput(f"data.mixture: weight of {name!r} = {weight!r}: must be above 0")
        if self.has_chats and self.tokenizer.startswith("bpe:"):
            raise BadInput(
                f"data.tokenizer = {self.tokenizer!r}: with conversations it must be bytes or a"
                " tokenizer.json, that of the model which learns from them"
            )

    @property
    def has_chats(self) -> bool:
        """Whether some of it is conversations."""
        return any(
            name.partition(":")[0] == "chat" for name, _ in ((self.corpus, 1.0), *self.mixture)
        )

    @property
    def keeps_apart(self) -> bool:
        """Whether a row's documents don't see each other: conversations never do."""
        return self.respect_documents or self.has_chats


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. A number with a rule is that rule's scale, and under ``fixed`` the value itself."""

    learning_rate: float = 0.003
    learning_rate_rule: str = "fixed"  # fixed | width | kaplan2020 | porian2024 | step_law
    base_width: int = 32  # width: matrices' rate = learning_rate * base_width / d_model
    warmup: float = 0.1
    warmup_rule: str = "params"  # params: `warmup` tokens a parameter | fixed: `warmup` tokens
    warmup_max_fraction: float = 0.1  # and no more than this share of the run (above 1: outlasts)
    schedule: str = "cosine"  # cosine | wsd | constant
    final_fraction: float = 0.0  # the last rate over the peak
    decay_fraction: float = 0.2  # wsd: the share of the run that decays
    decay_tokens: int = 0  # cosine's length where it is not the run's own (0: the run's own)
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip_norm: float = 1.0  # 0: none

    def __post_init__(self):
        _positive("optimizer", self, "learning_rate", "base_width", "eps")
        _not_negative("optimizer", self, "warmup", "warmup_max_fraction", "weight_decay")
        _not_negative("optimizer", self, "clip_norm", "decay_tokens")
        one_of("optimizer.learning_rate_rule", self.learning_rate_rule, RULES_LEARNING_RATE)
        one_of("optimizer.warmup_rule", self.warmup_rule, RULES_WARMUP)
        one_of("optimizer.schedule", self.schedule, ("cosine", "wsd", "constant"))
        for name in ("final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(f"optimizer.{name} = {getattr(self, name)}: must lie in [0, 1]")
        if self.schedule == "wsd" and not 0 < self.decay_fraction < 1:
            raise BadInput(
                f"optimizer.decay_fraction = {self.decay_fraction}: must lie in (0, 1) under 'wsd'"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"optimizer.{name} = {getattr(self, name)}: must lie in [0, 1)")


@dataclass(frozen=True)
class TrainConfig:
    """One run: how long, in what bites, and how often it is looked at."""

    tokens: float = 2e6  # D; or
    flops: float = 0.0  # C: D follows as C / training FLOPs a token (0: `tokens` rules)
    flops_convention: str = "exact"  # what counts in `flops` and a sweep's budgets
    batch_tokens: float = 2_048.0  # tokens an optimizer step, or the scale of batch_rule
    batch_rule: str = "fixed"  # fixed | porian2024 | step_law
    accumulation: int = 1  # micro-batches an optimizer step; a pipeline's too
    loss_chunk: int = 0  # positions whose logits exist at a time (0: all)
    steps_per_dispatch: int = 16  # optimizer steps in one compiled call
    evaluate_every: int = 0  # optimizer steps between evaluations (0: at the end only)
    log_every: int = 100  # optimizer steps between lines of metrics.jsonl
    checkpoint_every: int = 0  # optimizer steps between checkpoints (0: at the end only, -1: none)
    keep_checkpoints: int = 2  # the newest so many; with 1 a damaged one has none to stand in
    keep_every: int = 0  # and for ever those at multiples of so many steps (0: none)
    # Steps whose loss or gradient is not finite are skipped. After so many in a row the run goes
    # back to the last checkpoint that was due, or else to its first state, with its rate times
    # rollback_rate, and after so many rollbacks ends as diverged
    skips_before_rollback: int = 5
    rollbacks: int = 3
    rollback_rate: float = 0.5
    spike_deviations: float = 6.0  # of a loss above the last ones' mean, told as a spike (0: none)
    tensorboard: bool = True  # event files beside metrics.jsonl
    init_from: str = ""  # a run's folder, or an imported one, whose parameters are the first
    track: str = ""  # what else gets them: wandb (extra `wandb`)
    seed: int = 0

    def __post_init__(self):
        _not_negative("train", self, "flops", "evaluate_every", "seed", "loss_chunk", "keep_every")
        _not_negative("train", self, "rollbacks", "spike_deviations")
        if self.checkpoint_every < -1:
            raise BadInput(f"train.checkpoint_every = {self.checkpoint_every}: must be -1 or more")
        _positive(
            "train",
            self,
            "tokens",
            "batch_tokens",
            "accumulation",
            "steps_per_dispatch",
            "log_every",
            "keep_checkpoints",
            "skips_before_rollback",
        )
        if not 0 < self.rollback_rate <= 1:
            raise BadInput(f"train.rollback_rate = {self.rollback_rate}: must lie in (0, 1]")
        one_of("train.batch_rule", self.batch_rule, RULES_BATCH)
        one_of("train.flops_convention", self.flops_convention, FLOPS_CONVENTIONS)
        if self.seed >= 2**32:
            raise BadInput(f"train.seed = {self.seed}: must be below 2**32")
        if self.track not in ("", "wandb"):
            raise BadInput(f"train.track = {self.track!r}: must be 'wandb', or '' for nothing")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 takes what the other axes leave."""

    replica: int = 1  # whole copies, of a slice each
    stage: int = 1  # pipeline stages
    data: int = -1
    context: int = 1  # chunks of a sequence
    model: int = 1
    # What is split over `data` too: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters
    zero: int = 0
    sequence_sharded: bool = False  # the residual stream and its norms are split over `model`
    rounds: int = 1  # times a micro-batch passes each stage: 1 GPipe, above circular
    experts: str = "model"  # the axis that experts lie on: model | data

    def __post_init__(self):
        for name in MESH_AXES:
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise BadInput(
                    f"mesh.{name} = {getattr(self, name)}: must be at least 1, or -1 for the rest"
                )
        rest = [f"mesh.{name}" for name in MESH_AXES if getattr(self, name) == -1]
        if len(rest) > 1:
            raise BadInput(f"{' = '.join(rest)} = -1: only one axis can take what is left")
        one_of("mesh.zero", self.zero, (0, 1, 2, 3))
        one_of("mesh.experts", self.experts, ("model", "data"))
        _positive("mesh", self, "rounds")


@dataclass(frozen=True)
class SweepConfig:
    """Budgets x sizes. Shapes are one family: n_layers = d_model / aspect, one head width."""

    budgets: tuple[float, ...] = ()  # training FLOPs, ascending
    sizes: int = 7  # runs a budget, log-spaced around the expected optimum
    spread: float = 6.0  # the smallest and largest size over the expected optimum
    first_optimum: float = 14_000.0  # expected N_opt of the lowest budget, parameters
    prior_exponent: float = 0.5  # N_opt ~ C^this until the budgets below have told
    widths: tuple[int, ...] = ()  # the ladder's d_model, ascending
    aspect: float = 16.0  # d_model / n_layers
    min_layers: int = 1  # and no fewer layers than these; with a large aspect, the depth of all
    head_width: int = 8
    query_group: int = 1  # query heads a KV head
    ff_ratio: float = 8 / 3  # d_ff / d_model
    ff_multiple: int = 8  # d_ff is rounded to this
    # or listed: (d_model, d_ff, head_width, n_heads, n_layers)
    shapes: tuple[tuple[int, int, int, int, int], ...] = ()
    seeds: int = 1  # runs of each (N, D)
    seeds_small: int = 1  # and of each (N, D) with N below `small`
    small: float = 50_000.0
    near: float = 0.0  # at `small` and above, `seeds` within this factor of the expected optimum
    branches: bool = False  # one stable run per N (schedule wsd) with a decay branch per budget

    def __post_init__(self):
        if any(b <= 0 for b in self.budgets) or list(self.budgets) != sorted(set(self.budgets)):
            raise BadInput(
                f"sweep.budgets = {self.budgets}: must be positive, ascending and different"
            )
        if list(self.widths) != sorted(set(self.widths)):
            raise BadInput(f"sweep.widths = {self.widths}: must be ascending and different")
        _positive(
            "sweep",
            self,
            "sizes",
            "first_optimum",
            "aspect",
            "min_layers",
            "head_width",
            "query_group",
            "ff_ratio",
            "ff_multiple",
        )
        _positive("sweep", self, "seeds", "seeds_small")
        _not_negative("sweep", self, "near")
        if not self.spread > 1:
            raise BadInput(f"sweep.spread = {self.spread}: must be above 1")
        for width in self.widths:
            if width % self.head_width:
                raise BadInput(
                    f"sweep.widths: {width} must be a multiple of"
                    f" sweep.head_width = {self.head_width}"
                )


@dataclass(frozen=True)
class Config:
    """A run, or with ``sweep.budgets`` a study."""

    name: str = "base"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self):
        if self.model.sliding_window > self.data.seq_len:
            raise BadInput(
                f"model.sliding_window = {self.model.sliding_window}:"
                f" must be at most data.seq_len = {self.data.seq_len}"
            )
        if self.train.loss_chunk:
            _divides("train.loss_chunk", self.train.loss_chunk, "data.seq_len", self.data.seq_len)
        if self.sweep.branches and self.optimizer.schedule != "wsd":
            raise BadInput(
                f"sweep.branches = True with optimizer.schedule = {self.optimizer.schedule!r}:"
                " branches need 'wsd'"
            )


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked form of ``config``, for config files to change and commands to override."""
    result = ml_collections.ConfigDict(dataclasses.asdict(config), convert_dict=True)
    if config.model.head_width * config.model.n_heads == config.model.d_model:
        result.model.head_width = 0  # follow d_model / n_heads when either is overridden
    return result.lock()


def from_config_dict(given: Any, kind: type = Config, path: str = "config") -> Any:
    """The frozen dataclass ``kind`` of a ``ConfigDict`` or dict, every key and type checked.

    Raises ``BadInput`` naming the key: unknown (with the nearest), wrongly typed, or impossible.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}
    types_of = typing.get_type_hints(kind)
    for key in given:
        if key not in known:
            raise BadInput(
                f"{path}.{key}: unknown key{nearest(key, known)} (known: {', '.join(known)})"
            )
    values = {}
    for key in given:
        expected = types_of[key]
        if dataclasses.is_dataclass(expected):
            if not hasattr(given[key], "keys"):
                raise BadInput(
                    f"{path}.{key} = {given[key]!r}: must be a section"
                    f" ({', '.join(f.name for f in dataclasses.fields(expected))})"
                )
            values[key] = from_config_dict(given[key], expected, f"{path}.{key}")
        else:
            values[key] = typed(given[key], expected, f"{path}.{key}")
    return kind(**values)


def read_config(path: str | os.PathLike, text: str | None = None) -> Config:
    """The config in a run's ``config.json`` or a study's ``study.json``, or in ``text`` of it.

    Raises ``BadInput`` naming file and key.
    """
    found = json_object(path, text).get("config")
    if not isinstance(found, dict):
        raise BadInput(f"{path}: key 'config' is missing; this is no run's and no study's")
    try:
        return from_config_dict(found)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def typed(value: Any, expected: Any, path: str) -> Any:
    """``value``, which JSON or a config file gave, as the type ``expected``, a tuple's entries too.

    Raises ``BadInput`` naming ``path``.
    """
    origin = typing.get_origin(expected)
    if origin is tuple:
        inner = typing.get_args(expected)
        if not isinstance(value, (tuple, list)):
            raise BadInput(f"{path} = {value!r}: must be a tuple, as ({value!r},)")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(typed(v, inner[0], f"{path}[{i}]") for i, v in enumerate(value))
        if len(value) != len(inner):
            raise BadInput(f"{path} = {value!r}: must have {len(inner)} entries")
        return tuple(
            typed(v, t, f"{path}[{i}]") for i, (v, t) in enumerate(zip(value, inner, strict=True))
        )
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, expected) or (expected is not bool and isinstance(value, bool)):
        raise BadInput(
            f"{path} = {value!r}: must be of type {expected.__name__}, not {type(value).__name__}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{path} = {value!r}: must be finite")
    return value


def to_dict(config: Any) -> dict:
    """Plain JSON-ready dict of a config (tuples become lists)."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return [to_dict(v) for v in config] if isinstance(config, (tuple, list)) else config


def differences(old: Any, new: Any, path: str = "config"):
    """Yields ``"config.a.b: old -> new"`` for each leaf that differs between two JSON trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield f"{path}: {old!r} -> {new!r}"


def check_vocabulary(config: Config, tokenizers: int) -> None:
    """Raises ``BadInput`` where the model has fewer ids than the tokenizer."""
    if config.model.vocab_size < tokenizers:
        raise BadInput(
            f"model.vocab_size = {config.model.vocab_size}: must be at least the tokenizer's"
            f" {tokenizers} ({config.data.tokenizer})"
        )


def replace(config: Config, **sections: Any) -> Config:
    """A copy with some settings changed: ``replace(config, model={"d_model": 32}, name="small")``.

    As on the command line, a head width that is ``d_model / n_heads`` follows either of them.
    """
    changed = to_config_dict(config).unlock()
    for section, values in sections.items():
        if isinstance(values, dict):
            values = {**changed[section].to_dict(), **values}
        changed[section] = values
    return from_config_dict(changed)
