"""Switch Transformers (Fedus et al. 2022) as decoders: base, large, xxl or c.

    python -m lm.train --config=configs/switch.py:base --workdir=runs/switch_base

The paper's are T5: encoder and decoder, 12 layers each in base. Here both stacks are one decoder
of 24 layers without cross-attention, its positions are rotary, and AdamW trains it, not Adafactor.
Widths, experts and routing are the paper's (Table 9), so stored parameters agree: 7.41e9, 27.05e9,
393.06e9, 1571.12e9 against its 7, 26, 395 and 1571 billion; a token visits 0.220e9, 0.686e9,
9.54e9, 1.54e9. Exact training FLOPs 7.43e20, 2.43e21, 3.32e22, 5.31e21 for 550,000 steps of 2^20
tokens. (By ``lm.arithmetic``. The xxl of Table 9 with its 64 experts would have 200 billion; with
128, as in the released configuration, it has the stated number. Not trained here.)
"""

from configs import base
from lm.command import one_of

# d_model, layers of both stacks, heads, d_ff, experts, in every n-th layer, feed-forward
SIZES = {
    "base": (768, 24, 12, 2_048, 128, 2, "geglu"),
    "large": (1_024, 48, 16, 2_816, 128, 2, "geglu"),
    "xxl": (4_096, 48, 64, 10_240, 128, 2, "geglu"),
    "c": (2_080, 30, 32, 6_144, 2_048, 1, "relu"),
}


def get_config(size="base"):
    """Top-1, capacity factor 1.25, jitter and load-balancing coefficient of 1e-2."""
    one_of("configs/switch.py: the size", size, list(SIZES))
    d_model, n_layers, n_heads, d_ff, n_experts, every, feed_forward = SIZES[size]

    config = base.get_config()
    config.name = f"switch_{size}"
    config.model.vocab_size = 32_128
    config.model.d_model = d_model
    config.model.n_layers = n_layers
    config.model.n_heads = n_heads
    config.model.n_kv_heads = n_heads
    config.model.head_width = 64
    config.model.d_ff = d_ff
    config.model.feed_forward = feed_forward
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    config.model.moe.n_experts = n_experts
    config.model.moe.top_k = 1
    config.model.moe.every = every
    config.model.moe.dispatch = "capacity"
    config.model.moe.capacity_factor = 1.25
    config.model.moe.jitter = 0.01
    config.model.moe.balance_coefficient = 0.01

    config.data.corpus = "c4/en"
    config.data.tokenizer = "bpe:32128"
    config.data.seq_len = 512

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_rule = "fixed"
    config.optimizer.warmup = 10_000 * 2.0**20

    config.train.batch_tokens = 2.0**20
    config.train.tokens = 550_000 * 2.0**20
    config.train.steps_per_dispatch = 1
    config.train.evaluate_every = 1_000
    config.train.checkpoint_every = 1_000
    config.train.loss_chunk = 128
    config.mesh.zero = 1
    config.mesh.experts = "data"  # an all-to-all each way
    return config
