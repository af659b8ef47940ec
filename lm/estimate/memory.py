"""Bytes of one device in training, from the config alone: what lives at the step's peak. No jax.

Activations are counted as Korthikanti et al. 2022 do ("Reducing activation recomputation in large
transformer models", eq. 1 and 2): by what each product and norm keeps for its backward pass. Here
for this decoder, without dropout's masks, and with what jax's autodiff keeps, which is more.
"""

import math
from typing import NamedTuple

from lm import arithmetic
from lm.arithmetic import ParameterCount
from lm.config import Config, ModelConfig

FLOAT32 = 4
GATED = ("swiglu", "geglu")


class Memory(NamedTuple):
    """Bytes of one device at the moment of a step when most are in use."""

    parameters: float  # float32
    moments: float  # AdamW's two, float32
    activations: float  # what all layers keep for the backward pass
    gradients: float
    working: float  # of the head and loss, or of one layer's backward pass; with gathered weights

    @property
    def total(self) -> float:
        return sum(self)


def device_memory(
    config: Config, sizes: dict[str, int], sequences: int, fused_attention: bool = True
) -> Memory:
    """The bytes of one device of a mesh.

    Args:
      sizes: devices along each mesh axis (``lm.config.MESH_AXES``).
      sequences: rows of the global batch.
      fused_attention: whether no scores are kept, as in splash and cuDNN.
    """
    model, mesh, train, data = config.model, config.mesh, config.train, config.data
    stages, layers = sizes["stage"], model.n_layers / sizes["stage"]
    width = compute_width(model)
    whole, split = stored_parameters(config, sizes)
    a_layer = blocks_per_device(config, sizes) / layers
    head = model.d_model * model.vocab_size / sizes["model"]

    shards = sizes["replica"] * sizes["data"] * sizes["context"]
    tokens = sequences * data.seq_len / shards / train.accumulation
    scores = 0 if fused_attention else data.seq_len
    kept = kept_bytes(model, sizes, mesh.sequence_sharded, scores, mesh.experts)
    # A pipeline keeps every micro-batch until its own backward pass.
    in_flight = train.accumulation + stages - 1 if stages > 1 else 1

    # Micro-batches are summed in float32. Else gradients go to the optimizer, and lie as it does.
    accumulates = train.accumulation > 1 and stages == 1
    summed = FLOAT32 * (split if mesh.zero >= 2 else whole) * accumulates
    # At the loss: float32 logits, their gradient, and the gradient of the head's matrix.
    chunk = min(1.0, (train.loss_chunk or data.seq_len) / data.seq_len)
    logits = (FLOAT32 + width) * tokens * chunk * model.vocab_size / sizes["model"]
    at_loss = summed + width * head, logits + width * head * (mesh.zero >= 3)
    # At a layer: what one keeps without rematerialisation, and its scores in float32. Under ZeRO 3
    # one layer's weights are in use and the next one's on their way.
    of_scores = 2 * FLOAT32 * scores * model.n_heads / sizes["model"]
    at_layer = (
        summed + FLOAT32 * (split if mesh.zero >= 1 else whole),
        tokens * (kept["none"] + of_scores) + 2 * width * a_layer * (mesh.zero >= 3),
    )
    # Without rematerialisation a layer keeps its weights as cast, which ZeRO 3 gathers again.
    casts = model.remat == "none" and mesh.zero < 3 and width < FLOAT32
    return Memory(
        FLOAT32 * (split if mesh.zero >= 3 else whole),
        2 * FLOAT32 * (split if mesh.zero >= 1 else whole),
        layers * (tokens * kept[model.remat] * in_flight + width * a_layer * casts),
        *max(at_loss, at_layer, key=sum),
    )


def fuses_attention(config: Config, sizes: dict[str, int]) -> bool:
    """Whether a TPU's attention keeps no scores: ``lm.model.kernels`` has splash in its place."""
    whole_blocks = config.data.seq_len % (128 * sizes["context"]) == 0
    return config.model.attention_kernel in ("auto", "splash") and whole_blocks


def compute_width(model: ModelConfig) -> int:
    """Bytes of a number in the computation."""
    return 2 if model.dtype == "bfloat16" else FLOAT32


def kept_bytes(
    model: ModelConfig,
    sizes: dict[str, int],
    sequence_sharded: bool = False,
    scores: int = 0,
    experts: str = "model",
) -> dict[str, float]:
    """Bytes a token that a device keeps of one layer for its backward pass, by ``model.remat``.

    `scores`: keys a query, where an unfused attention keeps its scores. `experts`: their axis.
    """
    n = sizes["model"]
    width = compute_width(model)
    stream = model.d_model / (n if sequence_sharded else 1)  # the residual, between sublayers
    queries = model.n_heads * model.head_width / n
    keys_values = 2 * model.n_kv_heads * model.head_width
    keys_values /= 1 if model.n_kv_heads % n else n
    scores = scores * model.n_heads / n
    hidden = _feed_forward_width(model, n, experts)
    gated = model.feed_forward in GATED
    dots = queries + keys_values + (2 if gated else 1) * hidden
    outputs = 2 * model.d_model  # of the two sublayers
    # Autodiff's own: of a norm three float32 arrays and what the sublayer reads; of attention its
    # output twice, as the kernel and as the product has it; of a gate's SiLU three arrays.
    norms = 2 * (3 * FLOAT32 * stream + width * model.d_model)
    hiddens = (6 if gated else 3) * hidden
    return {
        "none": norms + width * (3 * queries + keys_values + scores + hiddens),
        "full": width * stream,
        # With the products that have batch axes: the float32 scores, and attention's output.
        "dots": width * (stream + dots + outputs + queries) + FLOAT32 * scores,
        "dots_with_no_batch_dims": width * (stream + dots + outputs),
        "offload": width * stream,
    }


def _feed_forward_width(model: ModelConfig, n: int, experts: str) -> float:
    """Hidden features a token has on a device in a layer, with the experts' room; the mean.

    `n` devices along ``model``. By slots (capacity, or room for all) the experts' features divide
    over them; ragged, each device has a row for every choice, whosever expert it is.
    """
    moe = model.moe
    share = len(model.moe_layers) / model.n_layers
    if not moe.n_experts:
        return model.d_ff / n
    if moe.dispatch == "capacity":
        room = moe.top_k * moe.capacity_factor / n
    else:
        room = moe.n_experts / n if experts == "data" else moe.top_k
    return (1 - share) * model.d_ff / n + share * (room + moe.n_shared / n) * model.expert_d_ff


def stored_parameters(config: Config, sizes: dict[str, int]) -> tuple[float, float]:
    """Parameters on one device: without ZeRO's split over ``data``, and with it."""
    model = config.model
    count = arithmetic.parameters(model, config.data.seq_len)
    ends = (count.embedding + count.head * (1 - count.tied)) / sizes["model"]
    rest = count.positions + count.norms - _block_norms(model, count)
    whole = ends + rest + blocks_per_device(config, sizes)
    by_data = experts_per_device(config, sizes) if config.mesh.experts == "data" else 0.0
    return whole, (whole - by_data) / sizes["data"] + by_data


def blocks_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Parameters of a device's layers, without ZeRO's split over ``data``."""
    model, n = config.model, sizes["model"]
    count = arithmetic.parameters(model, config.data.seq_len)
    keys_values = count.attention * model.n_kv_heads / (model.n_heads + model.n_kv_heads)
    replicated = keys_values if model.n_kv_heads % n else 0  # fewer heads than devices
    dense = count.feed_forward - count.experts
    split = (count.attention - replicated + dense) / n
    rest = replicated + count.routers + count.biases + _block_norms(model, count)
    return (split + rest) / sizes["stage"] + experts_per_device(config, sizes)


def experts_per_device(config: Config, sizes: dict[str, int]) -> float:
    """Parameters of a device's experts, without ZeRO's split."""
    axes = ("data", "model") if config.mesh.experts == "data" else ("model",)
    devices = math.prod(sizes[axis] for axis in axes) * sizes["stage"]
    return arithmetic.parameters(config.model).experts / devices


def _block_norms(model: ModelConfig, count: ParameterCount) -> float:
    last = model.d_model * (1 if model.norm == "rms" else 2) * (model.norm_position == "pre")
    return count.norms - last
