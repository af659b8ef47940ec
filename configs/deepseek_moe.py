"""DeepSeekMoE 16B (Dai et al. 2024): fine-grained experts, and two that every token visits.

    python -m lm.train --config=configs/deepseek_moe.py --workdir=runs/deepseek_moe

Stored parameters 16.38e9, of which a token visits 2.83e9; exact training FLOPs 3.71e22 for 2e12
tokens at 4,096 a sequence. (By ``lm.arithmetic``; the paper prints 16.4 and 2.8 billion. Not
trained here.)
"""

from configs import base


def get_config():
    """Six of 64 experts and two shared, in all layers but the first (section 5.1.2)."""
    config = base.get_config()
    config.name = "deepseek_moe"
    config.model.vocab_size = 102_400
    config.model.d_model = 2_048
    config.model.n_layers = 28
    config.model.n_heads = 16
    config.model.n_kv_heads = 16
    config.model.d_ff = 10_944  # the first layer's
    config.model.norm_eps = 1e-6
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.dtype = "bfloat16"
    config.model.moe.n_experts = 64
    config.model.moe.top_k = 6
    config.model.moe.renormalise = False
    config.model.moe.n_shared = 2
    config.model.moe.expert_d_ff = 1_408
    config.model.moe.first_dense = 1
    config.model.moe.balance_coefficient = 0.001
    config.model.moe.dispatch = "capacity"  # so that the experts' rows divide over `model`

    config.data.corpus = "c4/en"  # DeepSeek's own corpus is not public
    config.data.tokenizer = "bpe:102400"
    config.data.seq_len = 4_096

    config.optimizer.learning_rate = 4.2e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.final_fraction = 0.1
    config.optimizer.warmup_rule = "fixed"
    config.optimizer.warmup = 2_000 * 4_608 * 4_096.0

    config.train.tokens = 2e12
    config.train.batch_tokens = 4_608 * 4_096.0  # of 4.5 thousand sequences
    config.train.steps_per_dispatch = 1
    config.train.evaluate_every = 1_000
    config.train.checkpoint_every = 1_000
    config.train.accumulation = 8
    config.mesh.model = 8
    config.mesh.sequence_sharded = True
    config.mesh.zero = 3
    return config
