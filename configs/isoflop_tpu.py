"""An IsoFLOP study at the scale of Hoffmann et al. 2022: C4, 1e18 to 1e20 FLOPs, Table A9's shapes.

    python -m lm.sweep --config=configs/isoflop_tpu.py --workdir=runs/isoflop_tpu
    python -m lm.fit --runs=runs/isoflop_tpu --out=runs/isoflop_tpu

Seven budgets of nine sizes, 63 runs; 1.89e21 exact FLOPs, which is 35 days on the 8 TPU v5e chips
of one host at 40 % of their bfloat16 peak, 1.97e14 a second. (Arithmetic; not run here.) TFDS must
have prepared `c4/en`, which takes Apache Beam; a folder that it prepared works as `data.corpus`.
From an empty cloud project to this study on 8 and on 256 chips: tpu_setup/README.md.
"""

from configs import base, chinchilla


def get_config():
    """One recipe for all: rates and batches by Step Law, so that no size is favoured by tuning."""
    config = base.get_config()
    config.name = "isoflop_tpu"
    config.model.vocab_size = 32_000
    config.model.feed_forward = "gelu"
    config.model.tied = True
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.dtype = "bfloat16"

    config.data.corpus = "c4/en"
    config.data.tokenizer = "bpe:32000"
    config.data.seq_len = 2_048
    config.data.validation_tokens = 2**22

    config.optimizer.learning_rate_rule = "step_law"
    config.optimizer.learning_rate = 1.0
    config.optimizer.warmup_rule = "params"
    config.optimizer.warmup = 1.0
    config.optimizer.weight_decay = 0.1
    config.optimizer.beta2 = 0.95

    config.train.batch_rule = "step_law"
    config.train.batch_tokens = 1.0
    config.train.steps_per_dispatch = 10
    config.train.checkpoint_every = 1_000
    config.train.loss_chunk = 256
    config.mesh.zero = 3  # the largest model does not fit a chip otherwise

    config.sweep.budgets = (1e18, 3e18, 6e18, 1e19, 3e19, 6e19, 1e20)
    config.sweep.shapes = tuple(tuple(shape) for _, *shape in chinchilla.TABLE_A9)
    config.sweep.sizes = 9
    config.sweep.first_optimum = 9e7  # sqrt(C / 120), 20 tokens a parameter
    config.sweep.spread = 4.0
    return config
