"""Mixtral (Jiang et al. 2024), eight experts of which a token visits two: tiny, 8x7b or 8x22b.

    python -m lm.train --config=configs/mixtral.py:tiny --workdir=runs/mixtral_tiny

`tiny` is configs/tiny.py with eight experts of half its feed-forward width: as many FLOPs a token.

Of 8x7b and 8x22b, stored parameters 46.70e9, 140.63e9, of which a token visits 12.88e9, 39.16e9;
exact training FLOPs 8.94e22, 2.51e23 for 1e12 tokens at 8,192 and 4,096 a sequence. (By
``lm.arithmetic``. How many tokens they were trained on, and with what batch and rate, is not
published: Llama 2's batch and rate stand here. Not trained here.)
"""

from configs import base, tiny
from lm.command import one_of

# d_model, layers, heads, d_ff, RoPE's base, vocabulary, tokens a sequence
SIZES = {
    "8x7b": (4_096, 32, 32, 14_336, 1e6, 32_000, 8_192),
    "8x22b": (6_144, 56, 48, 16_384, 1e6, 32_768, 4_096),
}


def get_config(size="8x7b"):
    """Top-2 with renormalised gates and a capacity of 1.25; experts lie on ``model``."""
    one_of("configs/mixtral.py: the size", size, ["tiny", *SIZES])
    config = tiny.get_config() if size == "tiny" else base.get_config()
    config.name = f"mixtral_{size}"
    config.model.moe.n_experts = 8
    config.model.moe.top_k = 2
    config.model.moe.balance_coefficient = 0.02
    config.model.moe.dispatch = "capacity"  # so that the experts' rows divide over `model`
    if size == "tiny":
        config.model.moe.granularity = 2
        return config
    d_model, n_layers, n_heads, d_ff, rope_base, vocab_size, seq_len = SIZES[size]
    config.model.vocab_size = vocab_size
    config.model.d_model = d_model
    config.model.n_layers = n_layers
    config.model.n_heads = n_heads
    config.model.n_kv_heads = 8
    config.model.d_ff = d_ff
    config.model.rope_base = rope_base
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.dtype = "bfloat16"

    config.data.corpus = "c4/en"  # Mistral's own corpus is not public
    config.data.tokenizer = f"bpe:{vocab_size}"
    config.data.seq_len = seq_len
    config.data.respect_documents = True

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_fraction = 0.1
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_rule = "fixed"
    config.optimizer.warmup = 2_000 * 2.0**22

    config.train.tokens = 1e12
    config.train.batch_tokens = 2.0**22
    config.train.steps_per_dispatch = 1
    config.train.evaluate_every = 1_000
    config.train.checkpoint_every = 1_000
    config.mesh.model = 8  # an expert a device
    config.mesh.sequence_sharded = True
    config.mesh.zero = 3
    return config
