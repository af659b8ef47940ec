"""What a decoder costs before anything runs: parameters, FLOPs, bytes, and the rules of thumb.

Plain numbers or numpy arrays in and out, no jax. A scaling exponent depends on what is counted
(Pearce & Song 2024, Porian et al. 2024), so every count here goes by a named convention.

A `model` is a ``lm.config.ModelConfig``, or what ``model_columns`` makes of a table's columns.
"""

import dataclasses
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from lm.command import BadInput, one_of
from lm.config import (
    FLOPS_CONVENTIONS,
    RULES_BATCH,
    RULES_LEARNING_RATE,
    RULES_WARMUP,
    ModelConfig,
)

Number = Any  # an int, a float or a numpy array of either

DEFAULT_CONVENTION = "exact"  # how the project's own runs are accounted

_CACHE_BYTES = {  # of a value, and beside the values of a head
    "float32": (4, 0),
    "bfloat16": (2, 0),
    "float16": (2, 0),
    "int8": (1, 4),
}
_FEED_FORWARD_MATRICES = {"swiglu": 3, "geglu": 3, "gelu": 2, "relu": 2}


def model_columns(**columns: Any) -> SimpleNamespace:
    """A model whose sizes are arrays, one entry a row of a table. What is not given is the default.

    But ``n_kv_heads`` is then ``n_heads``, ``head_width`` is ``d_model / n_heads``, and ``d_ff`` is
    4 ``d_model``, or 8/3 ``d_model`` where the feed-forward layer is gated.
    """
    model = SimpleNamespace(**{f.name: f.default for f in dataclasses.fields(ModelConfig)})
    for name, values in columns.items():
        one_of("a model's column", name, list(vars(model)))
        is_text = np.asarray(values).dtype.kind in "US"
        setattr(model, name, values if is_text else np.asarray(values, np.int64))
    if "n_kv_heads" not in columns:
        model.n_kv_heads = model.n_heads
    if "head_width" not in columns:
        model.head_width = model.d_model // model.n_heads
    if "d_ff" not in columns:
        model.d_ff = 8 * model.d_model // _FEED_FORWARD_MATRICES[model.feed_forward]
    return model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by role. Their total is the initialised tree's, for every ``ModelConfig``."""

    embedding: Number  # V d
    positions: Number  # learned positions, T d; else 0
    attention: Number  # matrices of all layers: queries, keys, values, output
    feed_forward: Number  # matrices of all layers, and all experts
    routers: Number  # d E of each layer with experts
    norms: Number  # gains and, of LayerNorm, biases: blocks, queries and keys, the final norm
    biases: Number  # of queries, keys and values; of the experts' balance
    head: Number  # d V; where tied, the embedding once more in use but not in store
    tied: Number
    experts: Number  # the part of `feed_forward` in experts that are routed to
    idle_experts: Number  # the part of those that a token does not visit
    adapters: Number  # beside matrices; with them, nothing else is trained

    @property
    def total(self) -> Number:
        """What a checkpoint stores: a tied matrix counts once."""
        outside = self.embedding + self.positions + self.head * (1 - self.tied)
        return outside + self.non_embedding + self.adapters

    @property
    def non_embedding(self) -> Number:
        """Kaplan's N: the blocks and the final norm; no embedding, no positions, no head."""
        return self.attention + self.feed_forward + self.routers + self.norms + self.biases

    @property
    def blocks_and_head(self) -> Number:
        """This project's N, ``params`` in its tables: the blocks, the final norm and the head.

        That is every parameter that a token is multiplied with, so a tied head counts, and the
        look-up does not.
        """
        return self.non_embedding + self.head

    @property
    def active(self) -> Number:
        """The total without the experts that a token does not visit (Mixtral's "active")."""
        return self.total - self.idle_experts

    @property
    def active_blocks_and_head(self) -> Number:
        """``blocks_and_head`` likewise: ``active_params`` in this project's tables."""
        return self.blocks_and_head - self.idle_experts

    @property
    def matrices(self) -> Number:
        """The part of ``active_blocks_and_head`` in matrix products: no gains, no biases."""
        return self.attention + self.feed_forward - self.idle_experts + self.routers + self.head


def parameters(model: ModelConfig | SimpleNamespace, seq_len: Number = 0) -> ParameterCount:
    """The parameters of `model`. `seq_len` matters to learned positions only."""
    d, layers = model.d_model, model.n_layers
    queries, keys = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    a_norm = d * (1 if model.norm == "rms" else 2)
    # Two norms a block, and one before the head unless the last block ends with one.
    norms = a_norm * (2 * layers + (model.norm_position == "pre"))
    # A token visits top_k experts, under expert choice on average, and all that are shared.
    moe, matrices = model.moe, _FEED_FORWARD_MATRICES[model.feed_forward] * d
    with_experts = len(model.moe_layers) if moe.n_experts else 0
    an_expert = matrices * model.expert_d_ff if moe.n_experts else 0
    dense = (layers - with_experts) * matrices * model.d_ff
    return ParameterCount(
        embedding=model.vocab_size * d,
        positions=seq_len * d if model.position == "learned" else 0 * d,
        attention=layers * (d * (queries + 2 * keys) + queries * d),
        feed_forward=dense + with_experts * (moe.n_experts + moe.n_shared) * an_expert,
        routers=with_experts * d * moe.n_experts,
        norms=norms + layers * 2 * model.head_width * (model.qk_norm * 1),
        biases=layers * (queries + 2 * keys) * (model.qkv_bias * 1)
        + with_experts * moe.n_experts * (moe.bias_rate > 0),
        head=d * model.vocab_size,
        tied=model.tied * 1,
        experts=with_experts * moe.n_experts * an_expert,
        idle_experts=with_experts * (moe.n_experts - moe.top_k) * an_expert,
        adapters=_adapters(model),
    )


def _adapters(model: ModelConfig | SimpleNamespace) -> Number:
    d, ff = model.d_model, model.d_ff
    queries, keys = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    sums = {"query": d + queries, "key": d + keys, "value": d + keys, "out": queries + d}
    sums |= dict.fromkeys(
        ("up", "down", "gate")[: _FEED_FORWARD_MATRICES[model.feed_forward]], d + ff
    )
    each = sum(size for name, size in sums.items() if model.lora.adapts(name))
    return model.n_layers * model.lora.rank * each


def flops_per_token(
    model: ModelConfig | SimpleNamespace, seq_len: Number, convention: str = DEFAULT_CONVENTION
) -> Number:
    """Training FLOPs per token: 3 x the forward pass, a multiply-add being 2.

    A token is multiplied with the experts that it visits: N is what is active, and the products of
    an expert's empty slots are not counted, nor is a dropped token's saving.

    - ``6nd``: 6 x ``active_blocks_and_head``
    - ``kaplan``: 6 x ``non_embedding`` (Kaplan et al. 2020, C = 6 N D)
    - ``chinchilla``: Hoffmann et al. 2022, Appendix F, as its text has it: all T x T scores, a
      softmax at 3 FLOPs a score, and the embedding as if it were a matrix product. (Table A4 leaves
      out both embedding and head.) Written for multi-head attention and two feed-forward matrices;
      here it follows the model's own key/value heads and gate.
    - ``exact``: the matrix products of a plain implementation: blocks, head and all T x T scores.
      6 N' + 12 L T d_att, with N' = ``matrices`` and d_att = heads x width. The look-up is free;
      norms, softmax and activations are not counted. With adapters 4 N' + 6 of them: matrices that
      stay as they are have no gradient of their own.
    - ``exact_causal``: ``exact`` with only the scores that the mask keeps: (T + 1) / 2 keys a
      query, or fewer under a sliding window
    - ``exact_blocks``: ``exact`` without the head's product
    """
    one_of("the FLOPs convention", convention, FLOPS_CONVENTIONS)
    count = parameters(model, seq_len)
    if convention == "6nd":
        return 6.0 * count.active_blocks_and_head
    if convention == "kaplan":
        return 6.0 * (count.non_embedding - count.idle_experts)
    keys = seq_len
    if convention == "exact_causal":
        keys = _keys_per_query(seq_len, model.sliding_window)
    scores_and_values = 2 * 2.0 * model.n_layers * keys * model.n_heads * model.head_width
    matrices = count.matrices - count.head * (convention == "exact_blocks")
    forward = 2.0 * (matrices + count.adapters) + scores_and_values
    if convention == "chinchilla":
        forward = forward + 2.0 * count.embedding + 3.0 * model.n_layers * model.n_heads * seq_len
    return 3.0 * forward - 2.0 * matrices * (model.lora.rank > 0)


def _keys_per_query(seq_len: Number, window: Number) -> Number:
    """The mean over queries of min(1 + position, window); a window of 0 is none."""
    window = _keys_kept(seq_len, window)
    ramp = window * (window + 1) / 2  # the queries that don't fill the window yet
    return (ramp + (seq_len - window) * window) / seq_len


def _keys_kept(seq_len: Number, window: Number) -> Number:
    """min(seq_len, window); a window of 0 is none."""
    kept = np.where(np.asarray(window) == 0, seq_len, np.minimum(window, seq_len))
    return kept if kept.ndim else kept.item()


def training_flops(
    model: ModelConfig | SimpleNamespace,
    seq_len: Number,
    tokens: Number,
    convention: str = DEFAULT_CONVENTION,
) -> Number:
    """FLOPs of a run over `tokens` tokens in sequences of `seq_len`."""
    return flops_per_token(model, seq_len, convention) * tokens


def effective_parameters(model: ModelConfig | SimpleNamespace, seq_len: Number) -> Number:
    """N with the attention scores folded in, so that C = 6 N D holds exactly: ``exact`` / 6."""
    return flops_per_token(model, seq_len, "exact") / 6


def kv_cache_bytes(
    model: ModelConfig | SimpleNamespace, batch: Number, seq_len: Number, dtype: str = "bfloat16"
) -> Number:
    """Bytes of the keys and values of `batch` sequences of `seq_len` tokens.

    A sliding window bounds what is kept of a sequence. `dtype`: float32, bfloat16, float16, or int8
    with a float32 scale a head and token.
    """
    one_of("the cache's dtype", dtype, list(_CACHE_BYTES))
    per_value, per_head = _CACHE_BYTES[dtype]
    kept = _keys_kept(seq_len, model.sliding_window)
    per_head = per_head + model.head_width * per_value
    return 2 * model.n_layers * model.n_kv_heads * per_head * batch * kept


def weight_bytes(params: Number, bytes_per_value: int = 2) -> Number:
    """Bytes of the weights alone, by default in a 16-bit format."""
    return params * bytes_per_value


def optimizer_bytes(params: Number, gradients: bool = True) -> Number:
    """AdamW in float32: 4 bytes each for weight, both moments and, for a moment, the gradient."""
    return params * (16 if gradients else 12)


def learning_rate(
    rule: str, scale: Number, params: Number, tokens: Number, d_model: Number, base_width: Number
) -> Number:
    """The peak learning rate: `scale` itself under ``fixed``, else times the named rule's.

    - ``width``: base_width / d_model, muP's rule for the matrices (Yang et al. 2022, Table 3)
    - ``kaplan2020``: 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, Appendix D.1)
    - ``porian2024``: 3.7 N^-0.36 (Porian et al. 2024, at 20 tokens a parameter)
    - ``step_law``: 1.79 N^-0.713 D^0.307 (Li et al. 2025, Step Law)

    Raises ``BadInput`` where Kaplan's rule falls to zero, at N = 1.2e10.
    """
    one_of("the learning rate's rule", rule, RULES_LEARNING_RATE)
    if rule == "fixed":
        return scale
    if rule == "width":
        return scale * base_width / d_model
    if rule == "porian2024":
        return scale * 3.7 * params**-0.36
    if rule == "step_law":
        return scale * 1.79 * params**-0.713 * tokens**0.307
    rate = 0.003239 - 0.0001395 * np.log(params)
    if np.any(rate <= 0):
        largest = math.exp(0.003239 / 0.0001395)
        raise BadInput(
            f"learning rate rule 'kaplan2020' at N = {np.max(params):.3g}: must be below"
            f" {largest:.3g} parameters, where it reaches zero"
        )
    return scale * rate


def batch_tokens(rule: str, scale: Number, params: Number, tokens: Number) -> Number:
    """Tokens an optimizer step: `scale` itself under ``fixed``, else times the named rule's.

    - ``porian2024``: 0.7576 N^0.703 (Porian et al. 2024, at 20 tokens a parameter)
    - ``step_law``: 0.58 D^0.571 (Li et al. 2025, Step Law)
    """
    one_of("the batch's rule", rule, RULES_BATCH)
    if rule == "fixed":
        return scale
    return scale * (0.7576 * params**0.703 if rule == "porian2024" else 0.58 * tokens**0.571)


def warmup_tokens(
    rule: str, scale: Number, params: Number, tokens: Number, max_fraction: Number
) -> Number:
    """Tokens of linear warmup: `scale`, or `scale` x N under ``params``; at most a share of D.

    A fixed warmup is too long for small models; about N tokens is not (Porian et al. 2024).
    """
    one_of("the warmup's rule", rule, RULES_WARMUP)
    asked = scale if rule == "fixed" else scale * params
    shortened = np.minimum(asked, max_fraction * tokens)
    return shortened if shortened.ndim else float(shortened)


def round_batch(sequences: Number) -> Number:
    """The nearest (by ratio) of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    A study then meets few batch sizes, and compiles few programs.
    """
    sequences = np.maximum(np.asarray(sequences, np.float64), 1.0)
    below = 2.0 ** np.floor(np.log2(sequences))
    rungs = below[..., None] * np.array([1.0, 1.5, 2.0])
    rungs = np.where(rungs == 1.5, 1.0, rungs)  # the ladder has no rung between 1 and 2
    nearest = np.argmin(np.abs(np.log(rungs) - np.log(sequences)[..., None]), axis=-1)
    rounded = np.take_along_axis(rungs, nearest[..., None], axis=-1)[..., 0].astype(np.int64)
    return rounded if rounded.ndim else int(rounded)
