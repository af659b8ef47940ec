"""This repository's side: ``lm.train.step.Program``, from the weights of ``torch_side.py``."""

import jax
import numpy as np
from common import (
    BETA1,
    BETA2,
    CLIP_NORM,
    EPS,
    LEARNING_RATE,
    NORM_EPS,
    ROPE_BASE,
    WEIGHT_DECAY,
    Shape,
    batches,
    measure,
    side,
)

from lm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from lm.data import Batch
from lm.sharding import make_mesh
from lm.train.schedule import Schedule
from lm.train.step import Program, State

BLOCK_MATRICES = {
    ("attention", "query"): "self_attn.q_proj",
    ("attention", "key"): "self_attn.k_proj",
    ("attention", "value"): "self_attn.v_proj",
    ("attention", "out"): "self_attn.o_proj",
    ("feed_forward", "gate"): "mlp.gate_proj",
    ("feed_forward", "up"): "mlp.up_proj",
    ("feed_forward", "down"): "mlp.down_proj",
}


def params_from_llama(weights, n_layers: int) -> dict:
    """The decoder's parameters from a Llama state dict; PyTorch keeps matrices as (out, in)."""
    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": {"gain": weights["model.norm.weight"]},
        "head": {"kernel": weights["lm_head.weight"].T},
    }
    for i in range(n_layers):
        prefix = f"model.layers.{i}."
        layer = {
            "attention_norm": {"gain": weights[prefix + "input_layernorm.weight"]},
            "feed_forward_norm": {"gain": weights[prefix + "post_attention_layernorm.weight"]},
        }
        for (room, name), theirs in BLOCK_MATRICES.items():
            kernel = weights[f"{prefix}{theirs}.weight"].T
            layer.setdefault(room, {})[name] = {"kernel": kernel}
        params[f"layer_{i}"] = layer
    return params


def run(args, shape: Shape) -> dict:
    config = Config(
        model=ModelConfig(
            vocab_size=shape.vocab_size,
            d_model=shape.d_model,
            n_layers=shape.n_layers,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            d_ff=shape.d_ff,
            norm_eps=NORM_EPS,
            rope_base=ROPE_BASE,
        ),
        data=DataConfig(seq_len=shape.seq_len),
        optimizer=OptimizerConfig(
            schedule="constant",
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            clip_norm=CLIP_NORM,
        ),
        train=TrainConfig(steps_per_dispatch=shape.steps_per_call),
    )
    program = Program(config, make_mesh(config.mesh))
    state = program.init(0)
    with np.load(args.weights) as weights:
        params = params_from_llama(weights, shape.n_layers)
    state = State(state.step, jax.device_put(params, program.state_sharding.params), state.moments)
    schedule = Schedule(LEARNING_RATE, 1.0, 0.0, 0.0, 0.0, 1.0)
    data_NBT = batches(shape)
    done = 0

    def train(n: int) -> list[float]:
        nonlocal state, done
        rows = (done + np.arange(shape.steps_per_call)) % len(data_NBT)
        done += n
        batch = Batch(data_NBT[rows, :, :-1], data_NBT[rows, :, 1:])
        state, metrics = program.train(state, program.put(batch), n, schedule)
        return np.asarray(metrics.loss)[:n].tolist()

    return measure(train, shape.steps_per_call, args.loss_steps)


if __name__ == "__main__":
    side(run)
