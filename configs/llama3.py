"""Llama 3 (Grattafiori et al. 2024) by size: 8b, 70b or 405b.

    python -m lm.train --config=configs/llama3.py:8b --workdir=runs/llama3_8b \
        --config.data.tokenizer=PATH/tokenizer.json

Stored parameters 8.03e9, 70.55e9, 405.85e9; N (blocks and head) 7.50e9, 69.50e9, 403.75e9; exact
training FLOPs 8.69e23, 7.22e24, 4.10e25 for 15e12, 15e12 and 15.6e12 tokens at 8,192 a sequence.
(By ``lm.arithmetic``; the paper prints 3.8e25 for the largest, which is 6ND. Not trained here.)
The meshes are for v5p:4x4x4, v5p:8x8x8 and v5p:8x16x16, by arithmetic; experiments/tpu_fit has what
compiles on these and smaller slices, with fewer micro-batches.
"""

from configs import base
from lm.command import one_of

# Table 3: d_model, layers, heads, d_ff, peak learning rate; and tokens. Then our own:
# micro-batches, and what a layer keeps for its backward pass.
SIZES = {
    "8b": (4_096, 32, 32, 14_336, 3e-4, 15e12, 16, "dots_with_no_batch_dims"),
    "70b": (8_192, 80, 64, 28_672, 1.5e-4, 15e12, 2, "full"),
    "405b": (16_384, 126, 128, 53_248, 8e-5, 15.6e12, 1, "full"),
}


def get_config(size="8b"):
    """The 405B's recipe for all sizes, at its final batch of 16M tokens."""
    one_of("configs/llama3.py: the size", size, list(SIZES))
    d_model, n_layers, n_heads, d_ff, learning_rate, tokens, micro_batches, kept = SIZES[size]

    config = base.get_config()
    config.name = f"llama3_{size}"
    config.model.vocab_size = 128_256
    config.model.d_model = d_model
    config.model.n_layers = n_layers
    config.model.n_heads = n_heads
    config.model.n_kv_heads = 8
    config.model.d_ff = d_ff
    config.model.rope_base = 500_000.0
    config.model.scan_layers = True
    config.model.remat = kept
    config.model.dtype = "bfloat16"

    config.data.corpus = "c4/en"  # Meta's own corpus is not public
    config.data.tokenizer = "bpe:128256"
    config.data.seq_len = 8_192
    config.data.respect_documents = True

    config.optimizer.learning_rate = learning_rate
    config.optimizer.final_fraction = 0.01
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_rule = "fixed"
    config.optimizer.warmup = 8_000 * 2.0**22  # 8,000 steps of its initial 4M tokens

    config.train.tokens = tokens
    config.train.batch_tokens = 2.0**24
    config.train.steps_per_dispatch = 1
    config.train.evaluate_every = 1_000
    config.train.checkpoint_every = 1_000
    config.train.accumulation = micro_batches
    config.train.loss_chunk = 1_024
    config.mesh.zero = 3
    return config
