"""What a run tells of its steps while it trains: the lines of its log, and its events."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm import hosts
from lm.config import Config
from lm.score import Score
from lm.train.clock import Clock, goodput
from lm.train.device import memory_bytes, peak_flops
from lm.train.events import EventLog
from lm.train.experts import ExpertWatch
from lm.train.metrics import MetricsLog
from lm.train.recipe import Recipe
from lm.train.spikes import Spikes
from lm.train.step import Metrics


class Journal:
    """Takes in the metrics of every step, in order. Process 0 writes; all others only follow.

    Args:
      blame: the documents that made a step (from 0) go bad.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        workdir: Path,
        clock: Clock,
        blame: Callable[[int], list[dict[str, Any]]],
    ):
        self.config, self.recipe, self.workdir = config, recipe, workdir
        self.clock, self.blame = clock, blame
        self.unlogged: list[float] = []  # losses since the last line of the log
        self.spikes = Spikes(config.train.spike_deviations)
        self.experts = ExpertWatch(config.model) if config.model.moe.n_experts else None
        self.n_events = 0
        self.unscored: dict[str, Any] = {}  # the log's line that waits for its validation score
        self._log: MetricsLog | None = None
        self._events: EventLog | None = None

    def open(self, step: int, carried: dict[str, Any]) -> None:
        """Goes on from ``step``, with what ``carried`` gave there; what was told beyond is gone."""
        self.n_events = carried.get("events", 0)
        self._take_up(step, carried)
        if hosts.is_first():
            self._events = EventLog(self.workdir, self.n_events)

    def roll_back(self, step: int, carried: dict[str, Any]) -> None:
        """As ``open``, but that events stay."""
        self.close(done=False)
        self._take_up(step, carried)

    def carried(self) -> dict[str, Any]:
        """What a checkpoint has to keep, so that a resumed run tells the same."""
        return {
            "unlogged": list(self.unlogged),
            "spikes": self.spikes.carried(),
            "experts": self.experts.carried() if self.experts else None,
            "events": self.n_events,
            "unscored": self.unscored,
        }

    def _take_up(self, step: int, carried: dict[str, Any]) -> None:
        self.unlogged = list(carried.get("unlogged", ()))
        self.unscored = carried.get("unscored", {})
        self.spikes = Spikes(self.config.train.spike_deviations, carried.get("spikes", ()))
        if self.experts:
            self.experts = ExpertWatch(self.config.model, carried.get("experts"))
        if hosts.is_first():
            self._log = MetricsLog.of(self.config, self.workdir, step - bool(self.unscored))

    def event(self, step: int, event: str, told: bool = False, **values: Any) -> None:
        """Writes one event and, unless it is ``told`` already, tells it.

        Its kinds are those of ``lm.train.events``.
        """
        self.n_events += 1
        if not self._events:
            return
        self._events.write({"step": step, "event": event, **values})
        if not told:
            said = (
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in values.items()
                if not isinstance(value, list)
            )
            print(f"step {step}: {event} ({', '.join(said)})", file=sys.stderr)

    def take(self, step: int, metrics: Metrics, n: int, seconds: float, evaluates: bool) -> None:
        """The ``n`` steps after ``step``, which took ``seconds``.

        Losses in the log are means since its last line, of the steps that were not skipped. If it
        ``evaluates``, the last step's line waits for ``score``.
        """
        recipe, every = self.recipe, self.config.train.log_every
        rate = n * recipe.batch_tokens / seconds
        for i in range(n):
            at, loss = step + i + 1, float(metrics.loss[i])
            if metrics.skipped[i]:
                norm = float(metrics.gradient_norm[i])
                documents = self.blame(at - 1)
                self.event(at, "skipped", loss=loss, gradient_norm=norm, documents=documents)
            else:
                self._see(at, loss)
                if self.experts:
                    self.experts.see(metrics.routing, i)
            waits = evaluates and i == n - 1
            if at % every and at != recipe.n_steps and not waits:
                continue
            tokens, flops_per_second = at * recipe.batch_tokens, rate * recipe.flops_per_token
            line = {
                "step": at,
                "tokens": tokens,
                "flops": tokens * recipe.flops_per_token,
                "train_loss": _mean(self.unlogged),
                "gradient_norm": float(metrics.gradient_norm[i]),
                "learning_rate": float(metrics.learning_rate[i]),
                "tokens_per_second": rate,
                "flops_per_second": flops_per_second,
                "mfu": flops_per_second / peak_flops(self.config.model.dtype),
                "goodput": goodput(self.clock.seconds()),  # until now
                "memory_bytes": memory_bytes(),
            }
            if self.experts:
                line |= self.experts.entries(metrics.routing, i)
            self.unlogged = []
            if waits:
                self.unscored = line
            elif self._log:
                self._log.write(line)
        self.flush()

    def score(self, validation: Score) -> None:
        """Of the last step that was taken in, whose line has waited for it."""
        scores = {
            "validation_loss": validation.loss,
            "validation_bits_per_byte": validation.bits_per_byte,
            "validation_perplexity": validation.perplexity,
        }
        if self._log:
            self._log.write(self.unscored | scores)
        self.unscored = {}
        self.flush()

    def _see(self, step: int, loss: float) -> None:
        self.unlogged.append(loss)
        if (expected := self.spikes.see(loss)) is not None:
            documents = self.blame(step - 1)
            self.event(step, "spike", loss=loss, expected=expected, documents=documents)

    def flush(self, to_disk: bool = False) -> None:
        """Shows to others what was told; ``to_disk`` waits until the disk has it."""
        if self._log:
            self._log.flush(to_disk)

    def close(self, done: bool) -> None:
        """``done``: the run has ended, and not been interrupted."""
        if self._log:
            self._log.close(done)


def _mean(losses: list[float]) -> float:
    return math.fsum(losses) / len(losses) if losses else math.nan
