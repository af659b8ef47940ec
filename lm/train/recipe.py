"""What a run will do, from its config alone: batch, steps, rates, lengths. No jax."""

import math
from dataclasses import dataclass

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config
from lm.train.schedule import Schedule


@dataclass(frozen=True)
class Recipe:
    """Every number of a run that its rules decide."""

    params: int  # blocks + head, of experts the active ones
    flops_per_token: float  # exact training FLOPs
    sequences: int  # rows of the global batch
    n_steps: int  # optimizer steps
    learning_rate: float  # peak, of the matrices
    warmup_tokens: float
    schedule: Schedule
    batch_tokens: int
    tokens: int  # D, in whole batches

    branch_step: int | None  # wsd: the step where decay begins, from which longer runs can branch

    @property
    def flops(self) -> float:
        """C, exact training FLOPs of the run."""
        return self.flops_per_token * self.tokens


def resolve(config: Config, batch_shards: int = 1) -> Recipe:
    """Applies the config's rules for length, batch, rate and warmup.

    ``batch_shards`` is the mesh's replica x data: a rule's batch becomes a multiple of it (times
    accumulation).
    Raises ``BadInput`` where a given batch is none.
    """
    model, train, optimizer = config.model, config.train, config.optimizer
    seq_len = config.data.seq_len
    params = arithmetic.parameters(model, seq_len).active_blocks_and_head
    flops_per_token = arithmetic.flops_per_token(model, seq_len)
    tokens = train.tokens
    if train.flops:
        counted = arithmetic.flops_per_token(model, seq_len, train.flops_convention)
        tokens = train.flops / counted

    wanted = arithmetic.batch_tokens(train.batch_rule, train.batch_tokens, params, tokens) / seq_len
    multiple = batch_shards * train.accumulation
    if train.batch_rule == "fixed":
        sequences = max(1, round(wanted))
    else:  # a rule's batch is rounded onto a ladder, so that compiled programs recur
        sequences = math.ceil(arithmetic.round_batch(wanted) / multiple) * multiple
    if sequences % multiple:
        raise BadInput(
            f"a batch of {sequences} sequences: must be a multiple of the mesh's replica x data,"
            f" {batch_shards}, times train.accumulation = {train.accumulation}"
        )
    batch_tokens = sequences * seq_len
    n_steps = max(1, round(tokens / batch_tokens))
    tokens = n_steps * batch_tokens

    rate = arithmetic.learning_rate(
        optimizer.learning_rate_rule,
        optimizer.learning_rate,
        params,
        tokens,
        model.d_model,
        optimizer.base_width,
    )
    # Under `width` it is the matrices alone whose rate follows the width.
    peak = optimizer.learning_rate if optimizer.learning_rate_rule == "width" else rate
    warmup_tokens = arithmetic.warmup_tokens(
        optimizer.warmup_rule, optimizer.warmup, params, tokens, optimizer.warmup_max_fraction
    )
    warmup = warmup_tokens / batch_tokens
    branch_step = None
    if optimizer.schedule == "wsd":
        branch_step = decay_start = round((1 - optimizer.decay_fraction) * n_steps)
        decay_steps = n_steps - decay_start
    else:
        decay_start = warmup
        decay_steps = (optimizer.decay_tokens / batch_tokens or n_steps) - warmup
    return Recipe(
        params=params,
        flops_per_token=flops_per_token,
        sequences=sequences,
        n_steps=n_steps,
        learning_rate=rate,
        warmup_tokens=warmup_tokens,
        schedule=Schedule(
            peak=peak,
            matrix_scale=rate / peak,
            warmup=warmup,
            decay_start=decay_start,
            decay_steps=decay_steps,
            final_fraction=optimizer.final_fraction,
        ),
        batch_tokens=batch_tokens,
        tokens=tokens,
        branch_step=branch_step,
    )


def branch_step(shorter: Config, longer: Config, batch_shards: int = 1) -> int:
    """The step from which the ``wsd`` run ``longer`` can continue ``shorter``: where that decays.

    Raises ``BadInput`` where the two differ before that step, naming in what.
    """
    a, b = resolve(shorter, batch_shards), resolve(longer, batch_shards)
    before_decay = {
        "schedule": [c.optimizer.schedule for c in (shorter, longer)],
        "model": [shorter.model, longer.model],
        "seed": [shorter.train.seed, longer.train.seed],
        "batch_tokens": [a.batch_tokens, b.batch_tokens],
        "rate": [a.schedule.peak, b.schedule.peak],
        "matrices' rate": [a.schedule.matrix_scale, b.schedule.matrix_scale],
        "warmup": [a.schedule.warmup, b.schedule.warmup],
    }
    for name, (old, new) in before_decay.items():
        if old != new:
            raise BadInput(f"to branch, both runs must have one {name}: {old} is not {new}")
    if a.branch_step is None or a.branch_step > b.branch_step:
        raise BadInput("to branch, both runs must be 'wsd' and the new one the longer")
    return a.branch_step
