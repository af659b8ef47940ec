"""``metrics.jsonl``, one object a line, and the same for TensorBoard and Weights & Biases."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lm.command import BadInput, write_atomically
from lm.config import Config, TrainConfig, to_dict


class Tracker(Protocol):
    """Where else a run's numbers go."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """The finite numbers of one line."""

    def close(self, done: bool) -> None:
        """``done``: the run has ended, and not been interrupted."""


class TensorBoard:
    """Event files beside the log, by tensorboardX: clu's writers import tensorflow."""

    def __init__(self, config: Config, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir), purge_step=step + 1 if step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, done: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in W&B, gone on with when this one is; WANDB_PROJECT and all its variables count."""

    def __init__(self, config: Config, workdir: Path, step: int):
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "lm"),
                name=config.name,
                config=to_dict(config),
                dir=str(workdir),
                resume="auto",  # by a file that it leaves there when the run is not done
                settings=wandb.Settings(console="off"),  # the progress bar is no log
            )
        except wandb.errors.Error as error:
            raise BadInput(f"train.track = 'wandb': {error}") from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


def check_trackers(train: TrainConfig) -> None:
    """Raises ``BadInput`` where the tracker that is asked for is not installed."""
    if train.track and not find_spec(train.track):
        raise BadInput(
            f"train.track = {train.track!r}: needs `pip install 'lm-scaling[{train.track}]'`"
        )


class MetricsLog:
    """Appends to a run's log. Opened at a step, it forgets what was logged beyond that step."""

    def __init__(self, workdir: Path, step: int, trackers: Sequence[Tracker] = ()):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a")
        self._trackers = trackers

    @classmethod
    def of(cls, config: Config, workdir: Path, step: int) -> "MetricsLog":
        """With the trackers that ``config.train`` asks for."""
        kinds = [TensorBoard] * config.train.tensorboard
        kinds += [WeightsAndBiases] * (config.train.track == "wandb")
        return cls(workdir, step, [kind(config, workdir, step) for kind in kinds])

    def write(self, line: dict) -> None:
        """Writes one line; numbers that are not finite become null, which JSON can hold."""
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        self._file.write(json.dumps(line) + "\n")
        scalars = {k: v for k, v in _scalars(line) if k != "step" and v is not None}
        for tracker in self._trackers:
            tracker.write(line["step"], scalars)

    def flush(self, to_disk: bool = False) -> None:
        """Shows to others what was written; ``to_disk`` waits until the disk, or bucket, has it."""
        self._file.flush()
        if to_disk:
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error, *_) -> None:
        self.close(done=error is None)

    def close(self, done: bool = True) -> None:
        """Flushes and closes; ``done``: the run has ended, and not been interrupted."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close(done)


def _scalars(line: dict) -> Iterator[tuple[str, float | None]]:
    """The line's entries; of one that is a list, ``key/0``, ``key/1`` and so on."""
    for key, value in line.items():
        if isinstance(value, list):
            yield from _scalars({f"{key}/{i}": item for i, item in enumerate(value)})
        else:
            yield key, value


def read_metrics(workdir: Path) -> list[dict]:
    """The whole lines of a run's log; a line torn by a kill is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole
