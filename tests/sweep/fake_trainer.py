"""Stands in for ``lm.train.loop.train``: a known law's loss at once, in the same files."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

from lm.command import Preempted, write_atomically
from lm.config import Config, to_dict
from lm.train.recipe import resolve


def law(params: float, tokens: float) -> float:
    """N_opt is about 15k at 1e11 FLOPs, and grows as C^0.47."""
    return 1.0 + 60 / params**0.45 + 40 / tokens**0.4


def train(config: Config, workdir, *, programs, dataset, progress, start_from) -> dict:
    """Fails or kills its process once, diverges or rolls back, where a file by ``runs`` says so.

    ``pause`` there holds the seconds that every run takes, ``devices`` gets what each may use.
    """
    workdir = Path(workdir)
    orders = workdir.parents[1]
    with (orders / "devices").open("a") as log:
        log.write(f"{config.name} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    if (orders / "pause").exists():
        time.sleep(float((orders / "pause").read_text()))
    for order, obey in (
        ("fail", _fail),
        ("kill", _kill),
        ("end", _end),
        ("preempt", _preempt),
        ("interrupt", _interrupt),
    ):
        for path in orders.glob(f"{order}-{config.name}*"):
            path.unlink()
            print(f"about to {order}", flush=True)
            obey()
    programs.setdefault("runs", []).append(config.name)
    recipe = resolve(config)
    write_atomically(workdir / "config.json", json.dumps({"schema": 1, "config": to_dict(config)}))
    diverges = (orders / f"diverge-{config.name}").exists()
    loss = None if diverges else law(recipe.params, recipe.tokens)
    with (workdir / "metrics.jsonl").open("w") as log:
        for step in range(1, recipe.n_steps + 1):
            tokens = step * recipe.batch_tokens
            line = {
                "step": step,
                "tokens": tokens,
                "flops": tokens * recipe.flops_per_token,
                "train_loss": law(recipe.params, tokens),
            }
            if step == recipe.n_steps:
                line["validation_loss"] = loss
            log.write(json.dumps(line) + "\n")
    progress(
        SimpleNamespace(
            step=1, n_steps=recipe.n_steps, flops=recipe.flops_per_token, loss=2.0, seconds_left=1.0
        )
    )
    result = {
        "schema": 1,
        "status": "diverged" if diverges else "done",
        "loss": loss,
        "bits_per_byte": 1.0,
        "params": recipe.params,
        "tokens": recipe.tokens,
        "flops": recipe.flops,
        "flops_convention": "exact",
        "n_steps": recipe.n_steps,
        "epochs": {"pd_english": 0.5, "other": 0.25},
        "wall_seconds": 2.0,
        "step_seconds": 1.0,
        "compile_seconds": 0.5,
        "data_seconds": 0.1,
        "evaluate_seconds": 0.25,
        "device": "fake",
        "start_from": start_from,
        "rollbacks": 2 * (orders / f"roll_back-{config.name}").exists(),
    }
    write_atomically(workdir / "result.json", json.dumps(result))
    return result


def _fail() -> None:
    raise RuntimeError("the disk is on fire\nand more")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _preempt() -> None:
    raise Preempted


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)
