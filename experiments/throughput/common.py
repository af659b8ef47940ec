"""What both sides of the comparison share: shapes, data, optimizer settings and the clock."""

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NORM_EPS = 1e-5
ROPE_BASE = 10_000.0
CLIP_NORM = 1.0
LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1  # decay: matrices
N_BATCHES = 16  # different batches, used in turn


class Shape(NamedTuple):
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab_size: int
    batch: int
    seq_len: int

    @property
    def steps_per_call(self) -> int:
        """Optimizer steps between two looks at the clock; for `lm`, those of one dispatch."""
        return 16 if self.d_model <= 64 else 4


def batches(shape: Shape) -> np.ndarray:
    """Token ids (n, batch, seq_len + 1) with something to learn: walks of uneven stride."""
    rng = np.random.default_rng(0)
    size = (N_BATCHES, shape.batch, shape.seq_len + 1)
    steps = rng.choice([1, 2, 3, 7], size=size, p=[0.6, 0.2, 0.1, 0.1])
    return (np.cumsum(steps, -1) % shape.vocab_size).astype(np.int32)


def measure(train: Callable[[int], list[float]], steps_per_call: int, loss_steps: int) -> dict:
    """Drives one side. ``train(n)`` takes n more optimizer steps and returns their losses.

    Returns the first ``loss_steps`` losses, the seconds of the first call (compilation), and the
    median over calls of the wall and CPU seconds a step.
    """
    start = time.perf_counter()
    losses = train(min(loss_steps, steps_per_call) or steps_per_call)
    first_call_seconds = time.perf_counter() - start
    while len(losses) < loss_steps:
        losses += train(min(steps_per_call, loss_steps - len(losses)))
    train(steps_per_call)
    wall, cpu, begin = [], [], time.perf_counter()
    while len(wall) < 5 or time.perf_counter() - begin < 3:
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        train(steps_per_call)
        cpu.append((time.process_time() - cpu_start) / steps_per_call)
        wall.append((time.perf_counter() - wall_start) / steps_per_call)
    return {
        "losses": losses[:loss_steps],
        "first_call_seconds": first_call_seconds,
        "wall_step_seconds": float(np.median(wall)),
        "cpu_step_seconds": float(np.median(cpu)),
    }


def side(run: Callable[[argparse.Namespace, Shape], dict | None]) -> None:
    """A side's command line: prints what ``run`` returns as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--mode", default="")
    parser.add_argument("--loss_steps", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes its number of threads from it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    print(json.dumps(run(args, Shape(*map(int, args.shape.split(","))))))
