"""``metrics.jsonl``, one object a line, and the same for TensorBoard and Weights & Biases."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from lm.command import BadInput, naming, write_atomically
from lm.config import Config, TrainConfig, to_dict

SECONDS_BETWEEN_FLUSHES = 30.0  # of TensorBoard's events, which then are shown


class Tracker(Protocol):
    """Where else a run's numbers go."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """The finite numbers of one line."""

    def close(self, done: bool) -> None:
        """``done``: the run has ended, and not been interrupted."""


class TensorBoard:
    """Event files beside the log, by tensorboardX: clu's writers import tensorflow.

    Not by its SummaryWriter: that one's thread dies of a full disk, and the run then waits for it.
    """

    def __init__(self, config: Config, workdir: Path, step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._path, self._event, self._summary = workdir / "events", Event, Summary
        self._writer, self._flushed = EventsWriter(str(self._path)), time.monotonic()
        # Later ones of an earlier file are not shown.
        session = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=step + 1, session_log=session))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        summary = self._summary(value=values)
        with naming(self._path):
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self, done: bool) -> None:
        with naming(self._path):
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
            # W&B's own steps never go back, as a run does at a rollback.
            self._run.define_metric("*", step_metric="step")
        except wandb.errors.Error as error:
            raise BadInput(f"train.track = 'wandb': {error}") from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({"step": step, **scalars})

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
        line = finite(line)
        with naming(self._path):
            self._file.write(json.dumps(line) + "\n")
        scalars = {k: v for k, v in _scalars(line) if k != "step" and v is not None}
        for tracker in self._trackers:
            tracker.write(line["step"], scalars)

    def flush(self, to_disk: bool = False) -> None:
        """Shows to others what was written; ``to_disk`` waits until the disk, or bucket, has it."""
        with naming(self._path):
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error, *_) -> None:
        self.close(done=error is None)

    def close(self, done: bool = True) -> None:
        """Flushes and closes; ``done``: the run has ended, and not been interrupted."""
        with contextlib.ExitStack() as stack, naming(self._path):
            for tracker in self._trackers:
                stack.callback(tracker.close, done)
            self._file.close()


def _scalars(line: dict) -> Iterator[tuple[str, float | None]]:
    """The line's entries; of one that is a list, ``key/0``, ``key/1`` and so on."""
    for key, value in line.items():
        if isinstance(value, list):
            yield from _scalars({f"{key}/{i}": item for i, item in enumerate(value)})
        else:
            yield key, value


def finite(value: Any) -> Any:
    """``value`` with null for each number in it that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(workdir: Path) -> list[dict]:
    """The whole lines of a run's log; a line torn by a kill is left out."""
    return read_lines(workdir / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    """Of a file with one object a line, those before the first that is torn."""
    # What storage made no UTF-8 of is no JSON either.
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole
