"""The least time that an optimizer step can take on a slice: compute, memory, links. No jax.

A bound, by Williams et al. 2009, not a simulation; ``ASSUMPTIONS`` says what it takes for granted.
"""

from typing import NamedTuple

from lm import arithmetic
from lm.config import Config
from lm.estimate.memory import (
    FLOAT32,
    compute_width,
    experts_per_device,
    kept_bytes,
    stored_parameters,
)
from lm.hardware import Topology

ASSUMPTIONS = (
    "matrix products run at the chip's peak; a fused attention skips what the mask hides",
    "what rematerialisation computes again is counted, in the time and not in the MFU",
    "HBM moves a weight once a pass, the optimizer's state once, what a layer keeps three times",
    "HBM's time adds to that of products: norms, rotations and updates are passes of their own",
    "the data axis's collectives overlap both: the longer counts",
    "collectives over model and context overlap nothing; a pipeline adds its bubble",
    "collectives use all links of their axis, in both directions, at the data sheet's rate",
    "predicted: the bound over the share of it that MaxText's published runs on this chip reach",
)
# That share, in tokens a second: v5e, MaxText's 64B on 256 chips; v5p, its 128B on 128 and Llama 2
# 70B on 512; v6e, Llama 3.1 8B, 70B and 405B on 256 and 512. experiments/tpu_fit has the settings.
# For v4 none is published with its settings, and it is taken to do as well as v5e.
REALISED = {"v4": 0.87, "v5e": 0.87, "v5p": 0.905, "v6e": 0.73}


class Roofline(NamedTuple):
    """Seconds of one optimizer step on every chip. MFU is exact training FLOPs over the peak."""

    compute_seconds: float
    hbm_seconds: float
    link_seconds: dict[str, float]  # by mesh axis
    bubble: float  # the share of the step in which a pipeline's stage waits
    bound_seconds: float
    step_seconds: float  # predicted
    tokens_per_second: float  # of all chips, predicted
    mfu: float  # predicted

    @property
    def limit(self) -> str:
        """What takes longest of all that a step does."""
        times = {"compute": self.compute_seconds, "HBM": self.hbm_seconds}
        times |= {f"links of {axis}": seconds for axis, seconds in self.link_seconds.items()}
        return max(times, key=times.get)


def roofline(
    config: Config,
    topology: Topology,
    sizes: dict[str, int],
    sequences: int,
    fused_attention: bool = True,
) -> Roofline | None:
    """The bound of a step of `sequences` rows; None where the mesh does not fit the torus.

    `sizes`: devices along each mesh axis (``lm.config.MESH_AXES``).
    """
    bandwidths = topology.bandwidths(sizes)
    if bandwidths is None:
        return None
    chip, model = topology.chip, config.model
    tokens = sequences * config.data.seq_len
    seq_len = config.data.seq_len
    exact = tokens * arithmetic.flops_per_token(model, seq_len, "exact")
    products, scores = _hardware_flops(config, fused_attention)
    fast = chip.int8_flops if model.quantization == "int8" else chip.peak_flops
    compute = tokens * (products / fast + scores / chip.peak_flops) / topology.n_chips
    hbm = _hbm_bytes(config, sizes, sequences, fused_attention) / chip.hbm_bandwidth
    sent = sent_bytes(config, sizes, sequences)
    links = {axis: sent[axis] / bandwidths[axis] for axis in sent if sizes[axis] > 1}

    exposed = sum(seconds for axis, seconds in links.items() if axis in ("model", "context"))
    hidden = sum(seconds for axis, seconds in links.items() if axis in ("data", "replica"))
    stages, micro_batches = sizes["stage"], config.train.accumulation
    bubble = (stages - 1) / (config.mesh.rounds * micro_batches + stages - 1)
    bound = (max(compute + hbm, hidden) + exposed + links.get("stage", 0.0)) / (1 - bubble)
    step = bound / REALISED[topology.chip_name]
    mfu = exact / (step * chip.peak_flops * topology.n_chips)
    return Roofline(compute, hbm, links, bubble, bound, step, tokens / step, mfu)


def _hardware_flops(config: Config, fused_attention: bool) -> tuple[float, float]:
    """FLOPs a token that are really computed: of matrices, and of attention's scores and values."""
    model, seq_len = config.model, config.data.seq_len
    count = arithmetic.parameters(model, seq_len)
    blocks = 2.0 * (count.matrices - count.head)
    convention = "exact_causal" if fused_attention else "exact"
    forward = arithmetic.flops_per_token(model, seq_len, convention) / 3
    scores = forward - 2.0 * count.matrices
    # A fused backward pass computes the scores again: five products to the forward pass's two.
    backward = 2.5 if fused_attention else 2.0
    again = {"none": (0, 0), "full": (1, 1), "dots": (0, fused_attention)}
    blocks_again, scores_again = again.get(model.remat, (0, 1))
    products = 3 * 2.0 * count.head + (3 + blocks_again) * blocks
    return products, (1 + backward + scores_again) * scores


def _hbm_bytes(
    config: Config, sizes: dict[str, int], sequences: int, fused_attention: bool
) -> float:
    model, train, seq_len = config.model, config.train, config.data.seq_len
    width = compute_width(model)
    whole, split = stored_parameters(config, sizes)
    passes = 3 if model.remat == "none" else 4  # a backward pass reads a weight and writes its own
    weights = passes * width * whole * train.accumulation
    # Weight, two moments, read and written; the gradient read.
    optimizer = 7 * FLOAT32 * (split if config.mesh.zero >= 1 else whole)
    tokens = sequences * seq_len / sizes["replica"] / sizes["data"] / sizes["context"]
    scores = 0 if fused_attention else seq_len
    mesh = config.mesh
    kept = kept_bytes(model, sizes, mesh.sequence_sharded, scores, mesh.experts)["none"]
    layers = model.n_layers / sizes["stage"]
    logits = 3 * FLOAT32 * model.vocab_size / sizes["model"]
    return weights + optimizer + tokens * (passes * layers * kept + logits)


def sent_bytes(config: Config, sizes: dict[str, int], sequences: int) -> dict[str, float]:
    """Bytes that a device sends in a step along each mesh axis, by optimal algorithms."""
    model, mesh, micro_batches = config.model, config.mesh, config.train.accumulation
    width = compute_width(model)
    shards = sizes["replica"] * sizes["data"] * sizes["context"]
    tokens = sequences * config.data.seq_len / shards
    layers = model.n_layers / sizes["stage"]
    share = {axis: (n - 1) / n for axis, n in sizes.items()}  # of a gathered array
    whole, _ = stored_parameters(config, sizes)
    by_data = experts_per_device(config, sizes) if mesh.experts == "data" else 0.0
    summed = whole - by_data  # parameters whose gradients all devices of the axis hold

    reductions = 1 if mesh.zero >= 2 else 2  # reduce-scatter; all-reduce
    data = width * summed * micro_batches * reductions
    if mesh.zero in (1, 2):
        data += FLOAT32 * summed
    if mesh.zero == 3:  # for the forward pass and again for the backward pass
        data += 2 * width * summed * micro_batches
    replica = 2 * width * whole * micro_batches / (sizes["data"] if mesh.zero >= 2 else 1)

    again = model.remat == "full"
    residual = width * tokens * model.d_model
    # Two all-reduces a layer each way, or as many gathers and scatters; embedding and head.
    tensor = 2 * residual * (layers * (4 + again) + 2)
    keys_values = width * tokens * 2 * model.n_kv_heads * model.head_width
    keys_values /= 1 if model.n_kv_heads % sizes["model"] else sizes["model"]
    if mesh.experts == "data" and model.moe.n_experts:  # to the experts and back, each way
        room = model.moe.top_k * model.moe.capacity_factor
        data += residual * room * 2 * (2 + again) * len(model.moe_layers) / sizes["stage"]
    return {
        "replica": replica * share["replica"],
        "stage": 2 * residual * mesh.rounds * (sizes["stage"] > 1),
        "data": data * share["data"],
        "context": keys_values * layers * (2 + again) * (sizes["context"] - 1),
        "model": tensor * share["model"],
    }
