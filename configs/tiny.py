"""A decoder small enough to train while you watch.

    python -m lm.train --config=configs/tiny.py --workdir=runs/tiny

About a quarter of a minute on a two-core CPU machine, to a loss of 1.87 nats a byte.
"""

from configs import base


def get_config():
    """Two layers of width 32 on two million bytes."""
    config = base.get_config()
    config.name = "tiny"
    config.model.d_model = 32
    config.model.n_layers = 2
    config.model.n_heads = 4
    config.model.n_kv_heads = 2
    config.model.d_ff = 88
    config.train.tokens = 2e6
    config.data.validation_tokens = 65_536
    config.train.evaluate_every = 500
    config.train.checkpoint_every = 250
    return config
