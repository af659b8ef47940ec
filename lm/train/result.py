"""``result.json``: what a run ended with."""

from typing import Any

from lm import arithmetic, data
from lm.checkpoint import SCHEMA
from lm.config import Config
from lm.score import Score
from lm.train.clock import goodput
from lm.train.device import description, memory_bytes
from lm.train.recipe import Recipe


def result(
    config: Config,
    recipe: Recipe,
    dataset: data.Dataset,
    status: str,
    step: int,
    rollbacks: int,
    scored: tuple[int, Score] | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Of a run that is ``done`` or ``diverged`` after ``step`` steps.

    ``scored``: its last good evaluation, and the step of that. A diverged run has no ``loss``, and
    tells this as ``last_good_loss``.
    """
    count = arithmetic.parameters(config.model, config.data.seq_len)
    tokens = step * recipe.batch_tokens
    at, last = scored or (None, None)
    found, last_good = (last, {}) if status == "done" else (None, _last_good(at, last))
    return {
        "schema": SCHEMA,
        "status": status,
        "loss": found.loss if found else None,
        "bits_per_byte": found.bits_per_byte if found else None,
        "perplexity": found.perplexity if found else None,
        "validation_tokens": found.tokens if found else None,
        "params": count.blocks_and_head,
        "non_embedding_params": count.non_embedding,
        "active_params": count.active_blocks_and_head,
        "total_params": count.total,
        "tokens": tokens,
        "flops": tokens * recipe.flops_per_token,
        "flops_convention": arithmetic.DEFAULT_CONVENTION,
        "n_steps": recipe.n_steps,
        "rollbacks": rollbacks,
        "batch_tokens": recipe.batch_tokens,
        "learning_rate": recipe.learning_rate,
        "warmup_tokens": recipe.warmup_tokens,
        "epochs": dataset.epochs(tokens),
        "data": dataset.fingerprint,
        "wall_seconds": sum(seconds.values()),
        **{f"{part}_seconds": value for part, value in seconds.items()},
        "goodput": goodput(seconds),
        "memory_bytes": memory_bytes(),
        "device": description(),
        **last_good,
    }


def _last_good(step: int | None, score: Score | None) -> dict[str, Any]:
    return {
        "last_good_step": step,
        "last_good_loss": score.loss if score else None,
        "last_good_bits_per_byte": score.bits_per_byte if score else None,
        "last_good_perplexity": score.perplexity if score else None,
    }
