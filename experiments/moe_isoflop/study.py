"""The runs of experiments/moe_isoflop: dense, top1, top2 and fine, and what collapses.

    python -m lm.sweep --config=experiments/moe_isoflop/study.py:top1 --workdir=runs/moe_top1

All four have configs/isoflop_cpu.py's widths, rates and batches, in two layers with a head of their
own and without weight decay; only the feed-forward layers differ. run.py has all commands.
"""

from configs import base, isoflop_cpu
from lm.command import one_of

KINDS = {  # settings of model.moe
    "dense": {},
    "top1": dict(n_experts=8, top_k=1),
    "top2": dict(n_experts=8, top_k=2),
    "fine": dict(n_experts=16, top_k=2, granularity=2),  # top1's experts, each cut in two
}
BALANCES = {
    "none": dict(balance_coefficient=0.0),
    "loss": dict(balance_coefficient=0.01),
    "bias": dict(balance_coefficient=0.0, bias_rate=0.001),
}


def get_config(kind="dense"):
    """An IsoFLOP study of a kind, or (``collapse_none``, ``_loss``, ``_bias``) one longer run."""
    collapses = {f"collapse_{name}": settings for name, settings in BALANCES.items()}
    one_of("experiments/moe_isoflop/study.py: the kind", kind, [*KINDS, *collapses])
    if kind in collapses:
        config = base.get_config()
        config.model.d_model = 32
        config.model.n_layers = 4
        config.model.d_ff = 88
        config.data.validation_tokens = 65_536
        config.train.tokens = 2e6
        config.train.log_every = 10
        config.train.checkpoint_every = -1
        config.train.tensorboard = False
        settings = dict(n_experts=8, top_k=1, **collapses[kind])
    else:
        config = isoflop_cpu.get_config("quick")
        config.data.validation_tokens = 102_400
        config.sweep.budgets = (3e10, 1e11, 3e11)
        config.model.tied = False
        config.model.rope_base = 10_000.0
        config.optimizer.weight_decay = 0.0
        config.sweep.aspect = 1e6
        config.sweep.sizes = 5
        config.sweep.spread = 4.0
        config.sweep.first_optimum = 13_000.0
        config.sweep.seeds = config.sweep.seeds_small = 2
        settings = KINDS[kind]
    config.name = f"moe_isoflop_{kind}"
    for name, value in settings.items():
        config.model.moe[name] = value
    config.model.moe.dispatch = "capacity"
    config.model.moe.capacity_factor = 1.25
    return config
