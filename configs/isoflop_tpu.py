"""An IsoFLOP study at the scale of Hoffmann et al. 2022: C4, 1e18 to 1e21 FLOPs, Table A9's shapes.

    python -m lm.sweep --config=configs/isoflop_tpu.py --workdir=runs/isoflop_tpu
    python -m lm.fit --runs=runs/isoflop_tpu --out=runs/isoflop_tpu
    python -m lm.estimate --config=configs/isoflop_tpu.py --topology=v5p:4x8x8 --nocompile

Ten budgets of nine sizes, 90 runs of 4.16e7 to 1.14e10 parameters; 1.90e22 exact FLOPs, which is
4.7 days on 256 TPU v5p chips at 40 % of their bfloat16 peak, 4.59e14 a second; 28,700 chip-hours.
By the roofline, the last command, 5.3 days: at 1e18 it has 19 % of the peak, at 1e21 37 %.

:1e20 leaves out the three top budgets: 63 runs of 4.16e7 to 3.52e9 parameters, 1.89e21 FLOPs, 35
days on the 8 TPU v5e chips of one host at 40 % of 1.97e14 a second; 6,660 chip-hours. By the
roofline 27 days.

(Arithmetic; not run here. Both slices hold their largest run: compiled by libtpu without a chip,
experiments/tpu_fit.) TFDS must have prepared `c4/en`, which takes Apache Beam; a folder that it
prepared works as `data.corpus`. The longest run sees 2.1e11 tokens (with :1e20 5.5e10), and C4 has
some 1.6e11. From an empty cloud project to this study on 8 and on 256 chips: tpu_setup/README.md.
"""

from configs import base, chinchilla
from lm.command import one_of

BUDGETS = (1e18, 3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21)


def get_config(top="1e21"):
    """One recipe for all: rates and batches by Step Law, so that no size is favoured by tuning."""
    one_of("configs/isoflop_tpu.py: the top budget", top, ["1e21", "1e20"])
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
    if top == "1e21":
        # Eight chips share a sequence, so that 256 take batches in steps of 32 rows and not 256:
        # Step Law wants 24 to 768.
        config.mesh.context = 8

    config.sweep.budgets = tuple(budget for budget in BUDGETS if budget <= float(top))
    config.sweep.shapes = tuple(tuple(shape) for _, *shape in chinchilla.TABLE_A9)
    config.sweep.sizes = 9
    config.sweep.first_optimum = 9e7  # sqrt(C / 120), 20 tokens a parameter
    config.sweep.spread = 4.0
    return config
