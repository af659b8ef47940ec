"""One run, from config to ``result.json``; the same call again resumes it or returns its result."""

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import arithmetic, data, hosts
from lm.checkpoint import SCHEMA, Checkpoints, abstract_like, check_shared, claim, load_config
from lm.command import BadInput, write_atomically
from lm.config import Config
from lm.score import Score, score
from lm.sharding import batch_shards, make_mesh
from lm.train.device import description, matmul_peak
from lm.train.experts import ExpertWatch
from lm.train.metrics import MetricsLog, check_trackers
from lm.train.recipe import Recipe, branch_step, check_vocabulary, resolve
from lm.train.step import Program, State

EVALUATION_SEQUENCES = 32  # rows of an evaluation batch; the score does not depend on it


@dataclass(frozen=True)
class Progress:
    """What ``train`` tells its caller after every dispatch."""

    step: int
    n_steps: int
    tokens: int
    flops: float  # done so far
    loss: float  # nats a token, of the last step
    step_seconds: float  # in optimizer steps so far


def train(
    config: Config,
    workdir: str | Path,
    *,
    programs: dict[tuple, Program] | None = None,
    dataset: data.Dataset | None = None,
    progress: Callable[[Progress], None] | None = None,
    start_from: str | Path | None = None,
    force: bool = False,
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

    Raises:
      BadInput: an impossible config, or a folder that holds another run.
    """
    workdir = Path(workdir)
    mesh = make_mesh(config.mesh)
    recipe = resolve(config, batch_shards(mesh))
    dataset = dataset or data.open_dataset(config.data)
    check_vocabulary(config, dataset.vocab_size)
    check_trackers(config.train)
    programs = {} if programs is None else programs
    key = Program.key(config)
    if key not in programs:
        programs[key] = Program(config, mesh)
    done = hosts.agree(lambda: claim(workdir, config, force))
    if done is not None:
        return done
    with hosts.ending_all():
        if config.train.checkpoint_every >= 0:
            check_shared(workdir)
        run = _Run(config, recipe, workdir, dataset, programs[key], progress)
        return run.to_the_end(start_from)


class _Run:
    """The state of one run in this process."""

    def __init__(self, config, recipe: Recipe, workdir, dataset, program: Program, progress):
        self.config, self.recipe, self.workdir = config, recipe, workdir
        self.dataset, self.program, self.progress = dataset, program, progress
        self.seconds = dict.fromkeys(("wall", "step", "compile", "evaluate", "data"), 0.0)
        self.rows = program.rows(recipe.sequences)
        self.log: MetricsLog | None = None  # process 0's
        self.unlogged: list[float] = []  # losses since the last line of the log
        self.last_score: Score | None = None
        self.experts = ExpertWatch(config.model) if config.model.moe.n_experts else None

    def to_the_end(self, start_from: str | Path | None) -> dict:
        with contextlib.ExitStack() as stack:  # an error, too, waits for the checkpoint under way
            self.checkpoints = None
            if self.config.train.checkpoint_every >= 0:
                self.checkpoints = Checkpoints(self.workdir, self.recipe.branch_step)
                stack.callback(self.checkpoints.close)
            # Before this process waits for the others, as closing does.
            stack.enter_context(hosts.ending_all())
            self._start_clock()
            state, step = self._first_state(start_from)
            if hosts.is_first():
                log = MetricsLog.of(self.config, self.workdir, step)
                self.log = stack.enter_context(log)
            status, step = self._steps(state, step)
        self._read_clock()
        result = self._result(status, step)
        if hosts.is_first():
            write_atomically(self.workdir / "result.json", json.dumps(result, indent=1))
        return result

    def _steps(self, state: State, step: int) -> tuple[str, int]:
        """Runs from ``step`` to the end. Returns the status and the last step."""
        train, recipe = self.config.train, self.recipe
        batches = self._batches(step)
        while step < recipe.n_steps:
            n = self._next_stop(step) - step
            compiling, reading = self.program.compile_seconds, self.seconds["data"]
            dispatched = time.perf_counter()
            state, metrics = self.program.train(state, batches, n, recipe.schedule)
            if step + n < recipe.n_steps:
                batches = self._batches(step + n)  # while the device works
            metrics = jax.device_get(metrics)
            losses = metrics.loss[:n]
            seconds = time.perf_counter() - dispatched - (self.program.compile_seconds - compiling)
            # On CPU reading takes the step's cores; elsewhere it hides behind the step.
            reading = self.seconds["data"] - reading if jax.default_backend() == "cpu" else 0.0
            self.seconds["step"] += seconds - reading
            end = step + n
            finite = bool(np.all(np.isfinite(losses)))
            validation = None
            if finite and self._due(end, train.evaluate_every):
                validation = self._evaluate(state)
                finite = math.isfinite(validation.loss)
            self._write_log(step, losses, metrics, seconds / n, validation)
            step = end
            if not finite:
                return "diverged", step
            if self.checkpoints and (
                self._due(step, train.checkpoint_every) or step == recipe.branch_step
            ):
                self._save(state, step)
            if self.progress:
                tokens = step * recipe.batch_tokens
                flops = tokens * recipe.flops_per_token
                self.progress(
                    Progress(
                        step, recipe.n_steps, tokens, flops, float(losses[-1]), self.seconds["step"]
                    )
                )
        return "done", step

    def _start_clock(self) -> None:
        self._started = time.perf_counter()
        self._compiled = self.program.compile_seconds

    def _read_clock(self) -> None:
        """Adds the time since the last reading, so that a resumed run's times sum its pieces."""
        now, compiled = time.perf_counter(), self.program.compile_seconds
        self.seconds["wall"] += now - self._started
        self.seconds["compile"] += compiled - self._compiled
        self._started, self._compiled = now, compiled

    def _first_state(self, start_from: str | Path | None) -> tuple[State, int]:
        """The newest checkpoint of this run, else of ``start_from``, else a fresh state."""
        abstract = abstract_like(self.program.abstract_state, self.program.state_sharding)
        found = self.checkpoints.restore(abstract) if self.checkpoints else None
        if found:
            state, meta = found
            self.seconds, self.unlogged = meta["seconds"], meta["unlogged"]
            if meta["validation"]:
                self.last_score = Score(**meta["validation"])
            return state, int(state.step)
        if start_from is not None:
            shorter = load_config(Path(start_from))
            at = branch_step(shorter, self.config, batch_shards(self.program.mesh))
            checkpoints = Checkpoints(Path(start_from))
            found = checkpoints.restore(abstract, at)
            checkpoints.close()
            if not found:
                raise BadInput(f"{start_from}: holds no checkpoint of step {at} to branch from")
            return found[0], at
        return self.program.init(self.config.train.seed), 0

    def _batches(self, step: int) -> data.Batch:
        started, train = time.perf_counter(), self.config.train
        n, sequences = train.steps_per_dispatch, self.recipe.sequences
        batches = self.program.put(self.dataset.batches(train.seed, step, n, sequences, self.rows))
        self.seconds["data"] += time.perf_counter() - started
        return batches

    def _next_stop(self, step: int) -> int:
        """The step at which the next dispatch ends: full, or where something is due."""
        train = self.config.train
        stops = [step + train.steps_per_dispatch, self.recipe.n_steps]
        for every in (train.evaluate_every, train.checkpoint_every):
            if every > 0:
                stops.append(step - step % every + every)
        if self.recipe.branch_step and self.recipe.branch_step > step:
            stops.append(self.recipe.branch_step)
        return min(stops)

    def _due(self, step: int, every: int) -> bool:
        return step == self.recipe.n_steps and every >= 0 or every > 0 and step % every == 0

    def _evaluate(self, state: State) -> Score:
        """The validation score of ``state``."""
        compiling, started = self.program.compile_seconds, time.perf_counter()
        micro = self.config.train.accumulation if self.program.mesh.shape["stage"] > 1 else 1
        sequences = math.lcm(EVALUATION_SEQUENCES, micro * batch_shards(self.program.mesh))
        self.last_score = score(
            lambda batch: self.program.nats(state.params, batch),
            map(self.program.put, self.dataset.validation(sequences, self.program.rows(sequences))),
            self.dataset.token_bytes,
        )
        seconds = time.perf_counter() - started
        self.seconds["evaluate"] += seconds - (self.program.compile_seconds - compiling)
        return self.last_score

    def _write_log(self, step: int, losses, metrics, seconds_per_step, validation) -> None:
        """The log's lines among the steps after ``step``; their losses are means since the last."""
        recipe, every = self.recipe, self.config.train.log_every
        last = step + len(losses)
        for i, loss in enumerate(losses):
            at = step + i + 1
            self.unlogged.append(float(loss))
            if self.experts:
                self.experts.see(metrics.routing, i)
            if at % every and at != recipe.n_steps and not (validation and at == last):
                continue
            tokens = at * recipe.batch_tokens
            flops_per_second = recipe.batch_tokens * recipe.flops_per_token / seconds_per_step
            line = {
                "step": at,
                "tokens": tokens,
                "flops": tokens * recipe.flops_per_token,
                "train_loss": math.fsum(self.unlogged) / len(self.unlogged),
                "gradient_norm": float(metrics.gradient_norm[i]),
                "learning_rate": float(metrics.learning_rate[i]),
                "tokens_per_second": recipe.batch_tokens / seconds_per_step,
                "flops_per_second": flops_per_second,
                "matmul_peak_share": flops_per_second / _peak(self.config.model.dtype),
            }
            if validation is not None and at == last:
                line["validation_loss"] = validation.loss
                line["validation_bits_per_byte"] = validation.bits_per_byte
                line["validation_perplexity"] = validation.perplexity
            if self.experts:
                line |= self.experts.entries(metrics.routing, i)
            self.unlogged = []
            if self.log:
                self.log.write(line)
        if self.log:
            self.log.flush()

    def _save(self, state: State, step: int) -> None:
        self._read_clock()
        if self.log:  # whatever happens to the machine, no older than the checkpoint
            self.log.flush(to_disk=True)
        meta = {
            "schema": SCHEMA,
            "seconds": dict(self.seconds),
            "unlogged": list(self.unlogged),
            "validation": vars(self.last_score) if self.last_score else None,
        }
        self.checkpoints.save(step, state, meta)

    def _result(self, status: str, step: int) -> dict[str, Any]:
        config, recipe = self.config, self.recipe
        count = arithmetic.parameters(config.model, config.data.seq_len)
        tokens = step * recipe.batch_tokens
        found = self.last_score if status == "done" else None
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
            "batch_tokens": recipe.batch_tokens,
            "learning_rate": recipe.learning_rate,
            "warmup_tokens": recipe.warmup_tokens,
            "epochs": self.dataset.epochs(tokens),
            "data": self.dataset.fingerprint,
            "wall_seconds": self.seconds["wall"],
            "step_seconds": self.seconds["step"],
            "compile_seconds": self.seconds["compile"],
            "evaluate_seconds": self.seconds["evaluate"],
            "data_seconds": self.seconds["data"],
            "device": description(),
        }


_peaks: dict[str, float] = {}


def _peak(dtype: str) -> float:
    if dtype not in _peaks:
        _peaks[dtype] = matmul_peak(dtype)
    return _peaks[dtype]
