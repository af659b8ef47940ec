"""The models of Hoffmann et al. 2022, by size, on 20 tokens a parameter: 70b, or 44m ... 16183m.

    python -m lm.train --config=configs/chinchilla.py:44m --workdir=runs/chinchilla_44m

70b: the paper's 70.06e9 parameters are 64.69e9 here, as RoPE needs no relative-position matrices;
1.4e12 tokens cost 5.66e23 exact FLOPs. 44m: 41.6e6 parameters, 8.8e8 tokens, 3.08e17 FLOPs.
(By ``lm.arithmetic``; not trained here.)
"""

import math

from configs import base
from lm.command import one_of

# Table A9: millions of parameters, d_model, d_ff, head width, heads, layers.
TABLE_A9 = (
    (44, 512, 2048, 64, 8, 8),
    (57, 576, 2304, 64, 9, 9),
    (74, 640, 2560, 64, 10, 10),
    (90, 640, 2560, 64, 10, 13),
    (106, 640, 2560, 64, 10, 16),
    (117, 768, 3072, 64, 12, 12),
    (140, 768, 3072, 64, 12, 15),
    (163, 768, 3072, 64, 12, 18),
    (175, 896, 3584, 64, 14, 14),
    (196, 896, 3584, 64, 14, 16),
    (217, 896, 3584, 64, 14, 18),
    (251, 1024, 4096, 64, 16, 16),
    (278, 1024, 4096, 64, 16, 18),
    (306, 1024, 4096, 64, 16, 20),
    (425, 1280, 5120, 128, 10, 18),
    (489, 1280, 5120, 128, 10, 21),
    (509, 1408, 5632, 128, 11, 18),
    (552, 1280, 5120, 128, 10, 24),
    (587, 1408, 5632, 128, 11, 21),
    (632, 1536, 6144, 128, 12, 19),
    (664, 1408, 5632, 128, 11, 24),
    (724, 1536, 6144, 128, 12, 22),
    (816, 1536, 6144, 128, 12, 25),
    (893, 1792, 7168, 128, 14, 20),
    (1018, 1792, 7168, 128, 14, 23),
    (1143, 1792, 7168, 128, 14, 26),
    (1266, 2048, 8192, 128, 16, 22),
    (1424, 2176, 8704, 128, 17, 22),
    (1429, 2048, 8192, 128, 16, 25),
    (1593, 2048, 8192, 128, 16, 28),
    (1609, 2176, 8704, 128, 17, 25),
    (1731, 2304, 9216, 128, 18, 24),
    (1794, 2176, 8704, 128, 17, 28),
    (2007, 2304, 9216, 128, 18, 28),
    (2283, 2304, 9216, 128, 18, 32),
    (2298, 2560, 10240, 128, 20, 26),
    (2639, 2560, 10240, 128, 20, 30),
    (2980, 2560, 10240, 128, 20, 34),
    (3530, 2688, 10752, 128, 22, 36),
    (3802, 2816, 11264, 128, 22, 36),
    (4084, 2944, 11776, 128, 22, 36),
    (4516, 3072, 12288, 128, 24, 36),
    (6796, 3584, 14336, 128, 28, 40),
    (9293, 4096, 16384, 128, 32, 42),
    (11452, 4352, 17408, 128, 32, 47),
    (12295, 4608, 18432, 128, 36, 44),
    (12569, 4608, 18432, 128, 32, 47),
    (13735, 4864, 19456, 128, 32, 47),
    (14940, 4992, 19968, 128, 32, 49),
    (16183, 5120, 20480, 128, 40, 47),
)
SHAPES = {f"{millions}m": shape for millions, *shape in TABLE_A9}
SHAPES["70b"] = [8192, 32768, 128, 64, 80]  # Table 4


def get_config(size="70b"):
    """The decoder of 2022: no gates, a head for every key, tied embedding; cosine to a tenth."""
    one_of("configs/chinchilla.py: the size", size, list(SHAPES))
    d_model, d_ff, head_width, n_heads, n_layers = SHAPES[size]
    params = 70e9 if size == "70b" else 1e6 * int(size[:-1])

    config = base.get_config()
    config.name = f"chinchilla_{size}"
    config.model.vocab_size = 32_000
    config.model.d_model = d_model
    config.model.d_ff = d_ff
    config.model.head_width = head_width
    config.model.n_heads = config.model.n_kv_heads = n_heads
    config.model.n_layers = n_layers
    config.model.feed_forward = "gelu"
    config.model.tied = True
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.dtype = "bfloat16"

    config.data.corpus = "c4/en"  # the paper's second corpus; MassiveText is not public
    config.data.tokenizer = "bpe:32000"
    config.data.seq_len = 2_048

    config.optimizer.learning_rate = 1e-4 if size == "70b" else _learning_rate(params)
    config.optimizer.final_fraction = 0.1
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_rule = "fixed"

    config.train.tokens = 20 * params
    config.train.batch_tokens = 3.0 * 2**20 if size == "70b" else 2.0**19
    config.optimizer.warmup = 1_500 * config.train.batch_tokens  # Gopher's 1,500 steps
    config.train.steps_per_dispatch = 1
    config.train.evaluate_every = 1_000
    config.train.checkpoint_every = 1_000
    config.mesh.zero = 3
    return config


def _learning_rate(params):
    """The paper has 2e-4 for the smallest to 1.25e-4 for the largest; even in log N between."""
    smallest, largest = TABLE_A9[0][0] * 1e6, TABLE_A9[-1][0] * 1e6
    position = math.log(params / smallest) / math.log(largest / smallest)
    return 2e-4 * (1.25e-4 / 2e-4) ** position
