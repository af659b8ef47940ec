"""A study of eight runs of a second or two each, with checkpoints, on text that is made for it."""

from configs import base


def get_config():
    """Needs ``data.files`` and ``data.data_dir``."""
    config = base.get_config()
    config.data.corpus = "text"
    config.data.seq_len = 64
    config.data.validation_tokens = 2_048
    config.train.batch_tokens = 512.0
    config.train.steps_per_dispatch = 4
    config.train.checkpoint_every = 20
    config.train.tensorboard = False
    config.sweep.budgets = (2.5e8, 5e8, 1e9, 2e9)
    config.sweep.sizes = 2
    config.sweep.widths = (8, 16)  # two programs in all: starting again costs little else
    config.sweep.first_optimum = 10_000.0
    config.sweep.spread = 3.0
    return config
