"""PyTorch's side: ``transformers.LlamaForCausalLM``, float32, sdpa, fused AdamW, clipping.

Run by ``run.py``. ``--mode=weights`` writes the weights that both sides start from;
``--mode=eager`` and ``--mode=compile`` train on them and print the measurement.
"""

import numpy as np
import torch
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
from transformers import LlamaConfig, LlamaForCausalLM


def llama(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        intermediate_size=shape.d_ff,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=NORM_EPS,
        rope_theta=ROPE_BASE,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).float()


def adamw(model: LlamaForCausalLM) -> torch.optim.Optimizer:
    """Decay on the matrices of the blocks and the head alone, as `lm` has it."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and "embed_tokens" not in name else others).append(p)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPS, fused=True)


def run(args, shape: Shape) -> dict | None:
    torch.set_num_threads(args.threads)
    model = llama(shape)
    if args.mode == "weights":
        np.savez(args.weights, **{name: x.numpy() for name, x in model.state_dict().items()})
        return None
    with np.load(args.weights) as stored:
        model.load_state_dict({name: torch.from_numpy(stored[name]) for name in stored.files})
    optimizer = adamw(model)
    forward = torch.compile(model) if args.mode == "compile" else model
    data_NBT = torch.from_numpy(batches(shape).astype(np.int64))
    done = 0

    def step() -> torch.Tensor:
        nonlocal done
        tokens_BT = data_NBT[done % len(data_NBT)]
        done += 1
        logits_BTV = forward(input_ids=tokens_BT[:, :-1]).logits
        targets = tokens_BT[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(n: int) -> list[float]:
        return [x.item() for x in [step() for _ in range(n)]]

    return measure(train, shape.steps_per_call, args.loss_steps)


if __name__ == "__main__":
    side(run)
