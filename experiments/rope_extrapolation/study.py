"""The runs of experiments/rope_extrapolation: a kind of positions, or a fine-tune of RoPE.

    python -m lm.train --config=experiments/rope_extrapolation/study.py:rope --workdir=runs/rope

run.py has all commands.
"""

from configs import base
from lm.command import one_of

TRAINED, WANTED, TUNED = 128, 2_048, 512  # positions: in training, in the test, in fine-tunes
FACTOR = WANTED / TRAINED
POSITIONS = ("rope", "sinusoidal", "learned")
FINE_TUNES = ("none", "linear", "ntk", "yarn")  # scalings of RoPE


def get_config(kind="rope"):
    """``rope``, ``sinusoidal``, ``learned``: from scratch. ``tuned_none``, ``tuned_yarn``, ...:
    the continuation of a ``rope`` run at 512 positions."""
    tunes = [f"tuned_{scaling}" for scaling in FINE_TUNES]
    one_of("experiments/rope_extrapolation/study.py: the kind", kind, [*POSITIONS, *tunes])
    config = base.get_config()
    config.name = f"rope_extrapolation_{kind}"
    config.model.n_layers = 4
    config.model.n_heads = config.model.n_kv_heads = 2  # 32 wide: 16 pairs of columns
    config.data.validation_tokens = 65_536
    config.optimizer.learning_rate_rule = "width"
    config.train.tensorboard = False
    if kind in POSITIONS:
        config.model.position = kind
        config.data.seq_len = TRAINED
        config.optimizer.learning_rate = 0.01
        config.train.tokens = 4e6
    else:
        config.model.rope_scaling = scaling(kind.removeprefix("tuned_"))
        config.data.seq_len = TUNED
        config.optimizer.learning_rate = 0.001
        config.train.tokens = 4e5
    return config


def scaling(kind):
    """The section ``model.rope_scaling`` of a kind."""
    section = base.get_config().model.rope_scaling
    section.kind = kind
    if kind != "none":
        section.factor = FACTOR
    if kind in ("yarn", "llama3", "longrope"):
        section.original_positions = TRAINED
    return section
