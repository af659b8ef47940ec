"""One run, from config to ``result.json``; the same call again resumes it or returns its result.

The host is one dispatch ahead of what it knows: while the devices compute the steps of one, it
reads the metrics of the one before, unless something needs the state between the two (an
evaluation, a checkpoint, the end).

A step whose loss or gradient is not finite leaves the state as it was. After several in a row the
run goes back to the last checkpoint that was due, or to its first state, and on at a lower rate.
All of that follows from the state and the batches, so that an interrupted run does the same.
"""

import collections
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import data, hosts
from lm.checkpoint import CHECKPOINT_SCHEMA, Checkpoints, abstract_like, check_shared, claim
from lm.command import Preempted, write_atomically
from lm.config import Config, check_vocabulary
from lm.score import Score, score
from lm.sharding import batch_shards, make_mesh
from lm.train import clock, start
from lm.train.blame import worst_documents
from lm.train.device import peak_flops
from lm.train.heartbeat import Heartbeat, read_heartbeat
from lm.train.journal import Journal
from lm.train.metrics import check_trackers
from lm.train.pace import Pace
from lm.train.profile import Profile
from lm.train.recipe import resolve
from lm.train.result import result
from lm.train.step import Metrics, Program, State

EVALUATION_SEQUENCES = 32  # rows of an evaluation batch; the score does not depend on it


@dataclass(frozen=True)
class Progress:
    """What ``train`` tells its caller after every dispatch."""

    step: int
    n_steps: int
    tokens: int
    flops: float  # done so far
    loss: float  # nats a token, of the last step; of one that is evaluated on resume, as in the log
    validation_loss: float | None  # where this step was evaluated
    tokens_per_second: float  # of the last dispatch
    mfu: float  # of the last dispatch: its model FLOP/s over the devices' peak
    goodput: float  # the share of the run's wall time that useful steps had
    seconds_left: float  # at the rate of this call


def train(
    config: Config,
    workdir: str | Path,
    *,
    programs: dict[tuple, Program] | None = None,
    dataset: data.Dataset | None = None,
    progress: Callable[[Progress], None] | None = None,
    start_from: str | Path | None = None,
    force: bool = False,
    profile: tuple[int, int] | None = None,
) -> dict:
    """Trains one run in ``workdir`` and returns its result (also in ``result.json``).

    Under ``hosts.joined`` all processes call this alike; process 0 writes, but for the checkpoints,
    whose parts each process writes itself.

    Args:
      config: the run.
      workdir: its folder; made where missing, resumed where it holds a part of this run.
      programs: compiled programs, shared between calls of one process.
      dataset: the opened data of ``config.data``, where the caller has it open.
      progress: called after every dispatch.
      start_from: the folder of a shorter ``wsd`` run of the same model, batch, rate and seed. This
        run then continues it from where its decay began; the result counts the whole path.
      force: continue although the folder was begun under another config.
      profile: trace what happens between these two steps into ``workdir``/profile.

    Raises:
      BadInput: an impossible config, or a folder that holds another run.
      Preempted: SIGTERM or SIGINT came to any process; what was trained is in a checkpoint.
      KeyboardInterrupt: the same of a run without checkpoints.
    """
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh)
    recipe = resolve(config, batch_shards(mesh))
    dataset = dataset or data.open_dataset(config.data)
    check_vocabulary(config, dataset.vocab_size)
    check_trackers(config.train)
    if config.train.init_from and not (workdir / "checkpoints").exists():
        start.check(config, dataset.tokenizer)
    profile = Profile(workdir, profile)
    profile.check(recipe.n_steps)
    programs = {} if programs is None else programs
    key = Program.key(config)
    if key not in programs:
        programs[key] = Program(config, mesh)
    with contextlib.ExitStack() as stack:
        done = hosts.agree(lambda: claim(workdir, config, force, stack))
        if done is not None:
            return done
        stack.enter_context(hosts.failing_together())
        stopping = lambda: False  # noqa: E731
        if config.train.checkpoint_every >= 0:
            check_shared(workdir)
            stopping = stack.enter_context(hosts.preemptible())
        run = _Run(
            config, recipe, workdir, dataset, programs[key], start_from, progress, stopping, profile
        )
        found = run.to_the_end()
        stopped = stopping()
    if stopped:
        raise Preempted
    return found


class _Flight(NamedTuple):
    """A dispatch whose metrics are not read yet."""

    start: int  # steps done before it
    end: int
    metrics: Metrics  # on the devices


class _Run:
    """The state of one run in this process."""

    def __init__(
        self, config, recipe, workdir, dataset, program, start_from, progress, stopping, profile
    ):
        self.config, self.recipe, self.workdir = config, recipe, workdir
        self.dataset, self.program, self.start_from = dataset, program, start_from
        self.progress, self.stopping, self.profile = progress, stopping, profile
        self.rows = program.rows(recipe.sequences)
        self.clock = program.clock = clock.Clock(read_heartbeat(workdir).get("seconds", {}))
        self.journal = Journal(config, recipe, workdir, self.clock, self._blame)
        self.told: Progress | None = None
        self.status = ""
        self.scored: tuple[int, Score] | None = None  # the last good evaluation, and its step
        self.skips = 0  # in a row, up to the newest step that was read
        self.pace = Pace(config.train.steps_per_dispatch, self.clock)
        self.rollbacks = 0
        self.checkpoints: Checkpoints | None = None
        # After the newest dispatch: the state, the steps done, and the next one's batches and end.
        self.state: State | None = None
        self.step = self.end = 0
        self.batches: data.Batch | None = None
        self.flights: collections.deque[_Flight] = collections.deque()

    def to_the_end(self) -> dict | None:
        """Trains. Returns the result, or None where it was to stop before."""
        with contextlib.ExitStack() as stack:  # an error, too, waits for the checkpoint under way
            if hosts.is_first():
                stack.enter_context(Heartbeat(self.workdir, self._sign_of_life))
            with self.clock.on(clock.START):
                if self.config.train.checkpoint_every >= 0:
                    self.checkpoints = Checkpoints(
                        self.workdir,
                        kept_step=self.recipe.branch_step,
                        newest=self.config.train.keep_checkpoints,
                        every=self.config.train.keep_every,
                        period=self.config.train.checkpoint_every,
                    )
                    stack.callback(self._close_checkpoints)
                # Before this process waits for the others, as closing does.
                stack.enter_context(hosts.failing_together())
                stack.callback(lambda: self.journal.close(done=self.status in ("done", "diverged")))
                stack.callback(self.profile.close)
                self._begin()
            with self.clock.on(clock.STEP):
                try:
                    self.status = self._steps()
                except Preempted:
                    if not self._read(0) and self.step > self.began:
                        self._save()
                    return None
        found = result(
            self.config,
            self.recipe,
            self.dataset,
            status=self.status,
            step=self.step,
            rollbacks=self.rollbacks,
            scored=self.scored,
            seconds=self.clock.seconds(),
        )
        if hosts.is_first():
            write_atomically(self.workdir / "result.json", json.dumps(found, indent=1))
        return found

    def _steps(self) -> str:
        """Runs until it is ``done`` or ``diverged``.

        Raises ``Preempted`` where it is to stop before; steps may be in flight then.
        """
        while self.journal.unscored or self.step < self.recipe.n_steps:
            if saved := bool(self.journal.unscored):  # it was stopped amid the evaluation
                trouble = self._evaluate_again()
            else:
                self._heed_signals()
                if self.checkpoints:
                    self.checkpoints.check()
                self._dispatch()
                trouble = self._read(unread=0 if self._is_stop(self.step) else 1)
            if trouble:
                if not self._roll_back(trouble):
                    return "diverged"
            elif not saved and self._saves_at(self.step):
                # To be gone back to, a state must be one that took its last step.
                if not self.skips or self.step in (self.recipe.n_steps, self.recipe.branch_step):
                    self._save()
        return "done"

    def _heed_signals(self) -> None:
        """Raises ``Preempted`` if one came. What is saved at a step that is due may be gone back
        to: so never amid skips."""
        if self.stopping() and not (self.skips and self._saves_at(self.step)):
            raise Preempted

    def _dispatch(self) -> None:
        """Starts the steps up to the next stop; reads the batches after them meanwhile."""
        if not self.flights:
            self.pace.start()
        schedule = self.recipe.schedule
        schedule = schedule._replace(peak=schedule.peak * self._rate_factor())
        self.profile.before(self.step, self.state)
        n = self.end - self.step
        self.state, metrics = self.program.train(self.state, self.batches, n, schedule)
        self.flights.append(_Flight(self.step, self.end, metrics))
        self.step = self.end
        self.profile.after(self.step, self.state)
        self._read_batches()

    def _rate_factor(self) -> float:
        return self.config.train.rollback_rate**self.rollbacks

    def _read(self, unread: int) -> str:
        """Takes in what the dispatches in flight did, but for the last ``unread`` of them.

        Returns why the run cannot go on from the last step that it took in, or "".
        """
        while len(self.flights) > unread:
            flight = self.flights.popleft()
            metrics = jax.device_get(flight.metrics)
            n = flight.end - flight.start
            trouble, rate = "", n / self.pace.lap(n)
            if taken := self._too_many_skips(metrics.skipped[:n]):
                trouble, n = f"{self.skips} steps in a row were skipped", taken
                self.step = flight.start + n
            with self.clock.on(clock.STEP if self.flights else clock.OTHER):
                evaluates = not trouble and self._due(flight.end, self.config.train.evaluate_every)
                self.journal.take(flight.start, metrics, n, n / rate, evaluates)
                if evaluates:
                    trouble = self._evaluate()
                if trouble:
                    return trouble
                self._tell(flight.end, float(metrics.loss[n - 1]), rate)
        return ""

    def _too_many_skips(self, skipped: np.ndarray) -> int:
        """After how many of these steps the skips in a row are too many; 0: they are not."""
        for i, skip in enumerate(skipped):
            self.skips = self.skips + 1 if skip else 0
            if self.skips == self.config.train.skips_before_rollback:
                return i + 1
        return 0

    def _blame(self, step: int) -> list[dict[str, Any]]:
        """The worst documents of a batch; the state may be of some steps further on."""
        seed, sequences = self.config.train.seed, self.recipe.sequences
        return worst_documents(self.program, self.state.params, self.dataset, seed, step, sequences)

    def _roll_back(self, trouble: str) -> bool:
        """Goes back to the last checkpoint that was due, else to the first state, and on at a lower
        rate. False where it was done too often: the run has diverged."""
        self.flights.clear()
        self.state, found = None, None  # no two states at a time
        if self.rollbacks >= self.config.train.rollbacks:
            self.journal.event(self.step, "diverged", reason=trouble)
            return False
        with self.clock.on(clock.START):
            if self.checkpoints:
                found = self.checkpoints.roll_back(self._abstract_state(), before=self.step)
            state, meta = found or self._first_state()
        self.rollbacks += 1
        self.skips = 0
        to, factor = int(state.step), self._rate_factor()
        self.journal.event(self.step, "rollback", reason=trouble, to=to, rate_factor=factor)
        self.clock.roll_back(meta.get("seconds", {}))
        self.journal.roll_back(to, meta)
        self._take_up(state, meta)
        return True

    def _tell(self, step: int, loss: float, steps_per_second: float) -> None:
        recipe, (at, validation) = self.recipe, self.scored or (None, None)
        rate, left = steps_per_second * recipe.batch_tokens, recipe.n_steps - step
        done, seconds = step - self.began, self.clock.work()
        self.told = Progress(
            step=step,
            n_steps=recipe.n_steps,
            tokens=step * recipe.batch_tokens,
            flops=step * recipe.batch_tokens * recipe.flops_per_token,
            loss=loss,
            validation_loss=validation.loss if at == step else None,
            tokens_per_second=rate,
            mfu=rate * recipe.flops_per_token / peak_flops(self.config.model.dtype),
            goodput=clock.goodput(self.clock.seconds()),
            seconds_left=left * seconds / done if done else left / steps_per_second,
        )
        if self.progress:
            self.progress(self.told)

    def _sign_of_life(self) -> dict[str, Any]:
        told = vars(self.told) if self.told else {"step": self.step, "n_steps": self.recipe.n_steps}
        return {**told, "doing": self.clock.part, "seconds": self.clock.seconds()}

    def _begin(self) -> None:
        """From the newest checkpoint of this run, else from its first state."""
        found = self.checkpoints.restore(self._abstract_state()) if self.checkpoints else None
        self._go_on(*(found or self._first_state()))

    def _first_state(self) -> tuple[State, dict]:
        of_run = self.config, self.program, self._abstract_state(), self.start_from, self.workdir
        return start.state(*of_run)

    def _abstract_state(self) -> State:
        return abstract_like(self.program.abstract_state, self.program.state_sharding)

    def _go_on(self, state: State, meta: dict) -> None:
        """Begins with ``state``, and the ``meta`` that was saved beside it."""
        self.began = int(state.step)
        self.profile.go_on(self.began)
        self.clock.go_on(meta.get("seconds", {}))
        self.skips, self.rollbacks = meta.get("skips", 0), meta.get("rollbacks", 0)
        self.journal.open(self.began, meta)
        self._take_up(state, meta)

    def _tell_damage(self) -> None:
        """Events of the checkpoints that were passed over; stderr was told when they were."""
        if not self.checkpoints:
            return
        for at, reason in sorted(self.checkpoints.damaged.items()):
            self.journal.event(
                self.step, "damaged_checkpoint", told=True, checkpoint=at, reason=reason
            )
        self.checkpoints.damaged.clear()

    def _take_up(self, state: State, meta: dict) -> None:
        self.state, self.step = state, int(state.step)
        self.began = min(self.began, self.step)
        self._tell_damage()
        if validation := meta.get("validation"):
            self.scored = meta.get("validation_step"), Score(**validation)
        self._read_batches()

    def _read_batches(self) -> None:
        """Those of the next dispatch."""
        if self.step == self.recipe.n_steps:
            return
        self.end, most = self._next_stop(self.step), self.config.train.steps_per_dispatch
        started = time.perf_counter()
        with self.clock.on(clock.DATA):
            seed, n = self.config.train.seed, self.end - self.step
            found = self.dataset.batches(seed, self.step, n, self.recipe.sequences, self.rows)
            # Of one shape, so that a shorter dispatch is the same program.
            filled = jax.tree.map(lambda x: np.resize(x, (most, *x.shape[1:])), found)
            self.batches = self.program.put(filled)
        # On CPU reading takes the step's cores; elsewhere the devices wait once they have finished.
        busy = self.flights and not self.flights[-1].metrics.loss.is_ready()
        if busy and jax.default_backend() != "cpu":
            self.clock.count_as(clock.STEP, clock.DATA, time.perf_counter() - started)

    def _next_stop(self, step: int) -> int:
        """The step at which the next dispatch ends: full, or where something is due."""
        full = step + hosts.agree(lambda: self.pace.steps)
        return next(
            at
            for at in range(step + 1, full + 1)
            if at == full or self._is_stop(at) or at in self.profile.steps
        )

    def _is_stop(self, step: int) -> bool:
        """Whether something needs the state of ``step``."""
        evaluates = self._due(step, self.config.train.evaluate_every)
        return evaluates or self._saves_at(step) or step == self.recipe.n_steps

    def _saves_at(self, step: int) -> bool:
        due = self._due(step, self.config.train.checkpoint_every)
        return self.checkpoints is not None and (due or step == self.recipe.branch_step)

    def _due(self, step: int, every: int) -> bool:
        return (step == self.recipe.n_steps and every >= 0) or (every > 0 and step % every == 0)

    def _evaluate(self) -> str:
        """Gives the line of the log that waits for it the state's score.

        Returns why the run cannot go on from the state, or "". Raises ``Preempted`` where a signal
        comes before; the line waits on.
        """
        micro = self.config.train.accumulation if self.program.mesh.shape["stage"] > 1 else 1
        sequences = math.lcm(EVALUATION_SEQUENCES, micro * batch_shards(self.program.mesh))

        def batches() -> Iterator[data.Batch]:
            for batch in self.dataset.validation(sequences, self.program.rows(sequences)):
                self._heed_signals()
                yield self.program.put(batch)

        def nats(batch: data.Batch) -> jax.Array:
            return self.program.nats(self.state.params, batch)

        with self.clock.on(clock.EVALUATE):
            found = score(nats, batches(), self.dataset.token_bytes)
            self.journal.score(found)
        if not math.isfinite(found.loss):
            return "the validation loss is not finite"
        self.scored = self.step, found
        return ""

    def _evaluate_again(self) -> str:
        """``_evaluate`` on resume, of a step that was taken in before."""
        line = self.journal.unscored
        trouble = self._evaluate()
        if not trouble:
            rate = line["tokens_per_second"] / self.recipe.batch_tokens
            self._tell(self.step, line["train_loss"], rate)
        return trouble

    def _save(self) -> None:
        """Starts a checkpoint of the state."""
        with self.clock.on(clock.CHECKPOINT):
            self.journal.flush(to_disk=True)  # whatever happens to the machine, no older than it
            meta = {
                "schema": CHECKPOINT_SCHEMA,
                "seconds": self.clock.seconds(),
                "validation": vars(self.scored[1]) if self.scored else None,
                "validation_step": self.scored[0] if self.scored else None,
                "skips": self.skips,
                "rollbacks": self.rollbacks,
                **self.journal.carried(),
            }
            # What has yet to be evaluated may prove to be none to go back to.
            self.checkpoints.save(self.step, self.state, meta, good=not self.journal.unscored)

    def _close_checkpoints(self) -> None:
        with self.clock.on(clock.CHECKPOINT):
            self.checkpoints.close()
