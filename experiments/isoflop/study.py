"""The sweeps of the full study beside the main one: Kaplan's settings, another corpus, a tokenizer.

    python -m lm.sweep --config=experiments/isoflop/study.py:batch --workdir=runs/isoflop/batch

Each is configs/isoflop_cpu.py:full with what its kind changes, at its four lower budgets. run.py
trains them all; PROTOCOL.md says why each is what it is.
"""

from configs import isoflop_cpu
from lm.command import one_of

# How Kaplan et al. 2020 trained and counted, each in the measure of these budgets.
KAPLAN = {
    # Budgets of 6 x non-embedding parameters x tokens: neither head nor attention scores.
    "accounting": {"train.flops_convention": "kaplan"},
    # Their 3,000 steps of 2^19 tokens were 4 times D_opt at Porian et al.'s lowest budget.
    "warmup": {
        "optimizer.warmup_rule": "fixed",
        "optimizer.warmup": 2e6,
        "optimizer.warmup_max_fraction": 100.0,
    },
    # Their 250,000 steps were 1.3e11 tokens, whatever the run's own length.
    "cosine": {"optimizer.decay_tokens": 10**8},
    # One batch for all: 8 times the tuned one at the lowest budget, as theirs was.
    "batch": {"train.batch_rule": "fixed", "train.batch_tokens": 2_048.0},
    # Their rule of thumb, which knows N alone, for every parameter.
    "rate": {"optimizer.learning_rate_rule": "kaplan2020", "optimizer.learning_rate": 1.0},
}
# The head's FLOPs alone not counted.
HEAD = {"head": {"train.flops_convention": "exact_blocks"}}
# Porian et al.'s ladder, from Kaplan's side down: each rung undoes one more.
LADDER = {
    "kaplan": ("accounting", "warmup", "cosine", "batch", "rate"),
    "with_head": ("warmup", "cosine", "batch", "rate"),
    "short_warmup": ("cosine", "batch", "rate"),
    "matched_cosine": ("batch", "rate"),
}
ELSEWHERE = {
    # run.py writes it: what Python's own library is written in.
    "python_source": {
        "data.corpus": "text",
        "data.files": "runs/isoflop/python_source.jsonl",
    },
    "bpe512": {"data.tokenizer": "bpe:512", "model.vocab_size": 512},
}
# One optimal size and two smaller ones beyond its budget; run.py names the widths.
SMALLER_BASE, SMALLER_BUDGETS = 1e12, (1e12, 1.4e12, 2e12, 2.8e12, 4e12)
BUDGETS = (1e11, 3e11, 1e12, 3e12)
# What was added to a kind when it had ended: budgets, and the width of the only shape.
ADDED = {
    # The shapes nearest to what was wanted at 1e13 spanned a factor 14, not 16: the next one up.
    "wider": ("main", (1e13,), 112),
    # The smallest model had not come to the optimum's loss at 4e12.
    "longer": ("smaller", (5.6e12, 8e12), 24),
}
KINDS = ("main", *HEAD, *KAPLAN, *LADDER, *ELSEWHERE, "smaller", *ADDED)


def changes(kind: str) -> dict[str, object]:
    """The settings, by dotted name, in which a kind differs from the main study."""
    one_of("experiments/isoflop/study.py: the kind", kind, KINDS)
    if kind in LADDER:
        return {name: value for each in LADDER[kind] for name, value in KAPLAN[each].items()}
    return {**HEAD, **KAPLAN, **ELSEWHERE}.get(kind, {})


def get_config(kind="main"):
    """``main``, additions to a kind, or a kind at the four lower budgets, mostly of one seed."""
    changed = changes(kind)
    config = isoflop_cpu.get_config("full")
    if kind == "smaller":
        config.name = "isoflop_smaller"
        config.sweep.budgets = SMALLER_BUDGETS
        config.sweep.sizes = 3
        config.sweep.near = 0.0
    elif kind in ADDED:
        config.name = f"isoflop_{kind}"
        _, config.sweep.budgets, width = ADDED[kind]
        config.sweep.widths = (width,)
        config.sweep.sizes = 1
    elif kind != "main":
        config.name = f"isoflop_{kind}"
        config.sweep.budgets = BUDGETS
        config.sweep.sizes = 7
        config.sweep.spread = 6.0  # where the optimum will be is not known
        config.sweep.seeds = 1
        config.sweep.seeds_small = 2
    for name, value in changed.items():
        section, key = name.split(".")
        config[section][key] = value
    return config
