"""NaN in batches and gradients of real runs, put there from outside."""

import json
import math
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint import Checkpoints, abstract_like
from lm.command import Preempted
from lm.config import Config, MeshConfig, ModelConfig, replace
from lm.data import Batch, open_dataset
from lm.data.excerpts import excerpts
from lm.model import Decoder
from lm.score import Score
from lm.sharding import make_mesh
from lm.sweep.store import Store
from lm.train import loop, pace, spikes
from lm.train.clock import timeless
from lm.train.events import EventLog, read_events
from lm.train.metrics import read_metrics
from lm.train.recipe import resolve
from lm.train.schedule import Schedule
from lm.train.step import Program

N_STEPS, SEQUENCES = 20, 8
POISONED = (11, 12, 13)  # steps from 0, whose gradient is NaN while the rate is the config's
PEAK = 0.003


class Poisoned(Program):
    def _step(self, state, batch, schedule):
        self._peak = schedule.peak
        return super()._step(state, batch, schedule)

    def _mean_gradient(self, state, batch):
        loss, routing, gradient = super()._mean_gradient(state, batch)
        bad = jnp.isin(state.step, jnp.array(POISONED)) & (self._peak > 0.9 * PEAK)
        return loss, routing, jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), gradient)


class BadRows:
    """A dataset in which some rows, as (step, row), have NaN for weights."""

    def __init__(self, dataset, *rows):
        self._dataset, self._rows = dataset, rows

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def batches(self, seed, first_step, n_steps, batch_size, rows=slice(None)):
        batches = self._dataset.batches(seed, first_step, n_steps, batch_size, rows)
        weights = np.ones(batches.targets_BT.shape, np.float32)
        for step, row in self._rows:
            if first_step <= step < first_step + n_steps:
                weights[step - first_step, row] = np.nan
        return batches._replace(weights_BT=weights)


@pytest.fixture(autouse=True)
def known_dispatches(monkeypatch):
    """After three of one step, dispatches are of two, however busy this machine is."""
    monkeypatch.setattr(pace, "LONGEST_DISPATCH_SECONDS", 1e9)


@pytest.fixture(scope="module")
def config(text_data):
    return Config(
        model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24),
        data=text_data,
        mesh=MeshConfig(data=8),
        optimizer=replace(Config(), optimizer={"learning_rate": PEAK}).optimizer,
        train=replace(
            Config(),
            train={
                **{"tokens": 64.0 * SEQUENCES * N_STEPS, "batch_tokens": 64.0 * SEQUENCES},
                **{"steps_per_dispatch": 2, "log_every": 1, "tensorboard": False},
            },
        ).train,
    )


@pytest.fixture(scope="module")
def dataset(config):
    return open_dataset(config.data)


@pytest.fixture(scope="module")
def programs(config):
    return {Program.key(config): Poisoned(config, make_mesh(config.mesh))}


@pytest.fixture(scope="module")
def program(programs):
    (found,) = programs.values()
    return found


def steps(config, program, dataset, state, first, last, factor=1.0):
    """Steps ``first`` to before ``last`` one by one, written out."""
    schedule = resolve(config, 8).schedule
    schedule = schedule._replace(peak=factor * schedule.peak)
    for step in range(first, last):
        batches = program.put(dataset.batches(0, step, 2, SEQUENCES))
        state, metrics = program.train(state, batches, 1, schedule)
        assert not metrics.skipped[0]
    return state


def skipping(state, n):
    return state._replace(step=jax.device_put(state.step + n, state.step.sharding))


def final_state(program, workdir):
    checkpoints = Checkpoints(workdir)
    state, _ = checkpoints.restore(abstract_like(program.abstract_state, program.state_sharding))
    checkpoints.close()
    return state


def assert_equal(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(wanted))


def kinds(workdir):
    return [(event["step"], event["event"]) for event in read_events(workdir)]


def test_a_step_with_a_bad_gradient_is_as_if_it_had_not_been(
    config, programs, program, dataset, tmp_path
):
    result = loop.train(config, tmp_path, programs=programs, dataset=dataset)
    state = steps(config, program, dataset, program.init(0), 0, 11)
    assert_equal(
        final_state(program, tmp_path),
        steps(config, program, dataset, skipping(state, 3), 14, N_STEPS),
    )
    assert kinds(tmp_path) == [(step + 1, "skipped") for step in POISONED]
    event = read_events(tmp_path)[0]
    assert event["gradient_norm"] is None and event["loss"] > 0
    assert result["status"] == "done" and result["tokens"] == 64 * SEQUENCES * N_STEPS
    log = read_metrics(tmp_path)
    assert [line["step"] for line in log] == list(range(1, N_STEPS + 1))
    assert [line["train_loss"] is None for line in log].count(True) == 3


def test_a_bad_batch_is_skipped_and_its_document_told(config, programs, program, dataset, tmp_path):
    bad = BadRows(dataset, (2, 5), (6, 1))
    config = replace(config, train={"tokens": 64.0 * SEQUENCES * 10})
    loop.train(config, tmp_path, programs=programs, dataset=bad)
    state = steps(config, program, bad, program.init(0), 0, 2)
    state = steps(config, program, bad, skipping(state, 1), 3, 6)
    wanted = steps(config, program, bad, skipping(state, 1), 7, 10)
    assert_equal(final_state(program, tmp_path), wanted)
    assert kinds(tmp_path) == [(3, "skipped"), (7, "skipped")]
    for event, row in zip(read_events(tmp_path), (5, 1), strict=True):
        (document,) = event["documents"]
        of_row = excerpts(dataset, 0, event["step"] - 1, SEQUENCES, row)
        assert document["row"] == row and document["nats_per_token"] is None
        told = (document["source"], document["document"], document["text"])
        assert told == (of_row[0].source, of_row[0].document, of_row[0].text)


class StrangeRow(BadRows):
    """A dataset in which some rows have tokens at random."""

    def batches(self, seed, first_step, n_steps, batch_size, rows=slice(None)):
        batches = self._dataset.batches(seed, first_step, n_steps, batch_size, rows)
        batches = jax.tree.map(np.array, batches)
        for step, row in self._rows:
            if first_step <= step < first_step + n_steps:
                draw = np.random.default_rng(step)
                batches.targets_BT[step - first_step, row] = draw.integers(0, 257, 64)
        return batches


def test_a_loss_spike_is_told_with_its_documents(config, programs, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 10)  # or the fall of a short run's loss hides all
    monkeypatch.setattr(spikes, "LEAST", 10)
    strange = StrangeRow(dataset, (42, 2), (42, 5), (42, 7))
    config = replace(config, train={"tokens": 64.0 * SEQUENCES * 50, "spike_deviations": 3.0})
    loop.train(config, tmp_path, programs=programs, dataset=strange)
    losses = [(line["step"], line["train_loss"]) for line in read_metrics(tmp_path)]
    events = [event for event in read_events(tmp_path) if event["event"] != "skipped"]
    assert len(events) == 1, str(losses[30:])
    (event,) = events
    assert (event["step"], event["event"]) == (43, "spike")
    assert event["loss"] == dict(losses)[43] > event["expected"]
    documents = event["documents"]
    assert {document["row"] for document in documents} == {2, 5, 7}
    for document in documents:
        of_row = excerpts(dataset, 0, 42, SEQUENCES, document["row"])
        told = (document["source"], document["document"], document["text"])
        assert told in [(each.source, each.document, each.text) for each in of_row]
        assert document["nats_per_token"] > event["loss"]


ROLLS_BACK = {"checkpoint_every": 5, "evaluate_every": 5, "skips_before_rollback": 3}


def test_after_skips_in_a_row_it_goes_back_and_on_at_a_lower_rate(
    config, programs, program, dataset, tmp_path
):
    config = replace(config, train=ROLLS_BACK)
    result = loop.train(config, tmp_path, programs=programs, dataset=dataset)
    state = steps(config, program, dataset, program.init(0), 0, 10)
    wanted = steps(config, program, dataset, state, 10, N_STEPS, factor=0.5)
    assert_equal(final_state(program, tmp_path), wanted)
    assert result["status"] == "done" and "last_good_loss" not in result
    assert result["rollbacks"] == 1
    assert kinds(tmp_path) == [*((i + 1, "skipped") for i in POISONED), (14, "rollback")]
    rollback = read_events(tmp_path)[-1]
    assert rollback["to"] == 10 and rollback["rate_factor"] == 0.5
    log = read_metrics(tmp_path)
    assert [line["step"] for line in log] == list(range(1, N_STEPS + 1))
    assert all(line["train_loss"] for line in log)


@pytest.mark.parametrize("every", [-1, 0, pytest.param(15, marks=pytest.mark.slow)], ids=str)
def test_before_the_first_checkpoint_it_goes_back_to_its_first_state(
    config, programs, program, dataset, tmp_path, every
):
    config = replace(config, train={**ROLLS_BACK, "checkpoint_every": every})
    result = loop.train(config, tmp_path, programs=programs, dataset=dataset)
    wanted = steps(config, program, dataset, program.init(0), 0, N_STEPS, factor=0.5)
    score = loop.score(
        lambda batch: program.nats(wanted.params, batch),
        *(map(program.put, dataset.validation(32)), dataset.token_bytes),
    )
    assert (result["status"], result["rollbacks"], result["loss"]) == ("done", 1, score.loss)
    if every >= 0:
        assert_equal(final_state(program, tmp_path), wanted)
    assert kinds(tmp_path) == [*((i + 1, "skipped") for i in POISONED), (14, "rollback")]
    assert read_events(tmp_path)[-1]["to"] == 0
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, N_STEPS + 1))


@pytest.mark.slow
def test_a_branch_of_a_run_that_rolled_back_is_the_longer_run_itself(config, dataset, tmp_path):
    short = replace(config, optimizer={"schedule": "wsd", "warmup": 0.01}, train=ROLLS_BACK)
    long = replace(short, train={"tokens": 2 * short.train.tokens})
    programs = {Program.key(short): Poisoned(short, make_mesh(short.mesh))}
    shared = {"programs": programs, "dataset": dataset}
    loop.train(short, tmp_path / "short", **shared)
    wanted = loop.train(long, tmp_path / "scratch", **shared)
    found = loop.train(long, tmp_path / "branch", **shared, start_from=tmp_path / "short")
    assert read_metrics(tmp_path / "branch")[0]["step"] > max(POISONED)
    assert found["rollbacks"] == wanted["rollbacks"] == 1
    assert found["loss"] == wanted["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["init_from", "start_from"])
def test_the_first_state_may_be_another_runs(config, dataset, tmp_path, kind):
    other, run = tmp_path / "other", tmp_path / "run"
    wsd = replace(config, optimizer={"schedule": "wsd", "warmup": 0.01})
    shorter = replace(wsd, train={"tokens": 64.0 * SEQUENCES * 5})
    programs = {Program.key(wsd): Poisoned(wsd, make_mesh(wsd.mesh))}
    (program,) = programs.values()
    loop.train(shorter, other, programs=programs, dataset=dataset)
    start_from, first = other, 4
    config = replace(wsd, train=ROLLS_BACK | {"checkpoint_every": 0})
    if kind == "init_from":
        config, start_from, first = replace(config, train={"init_from": str(other)}), None, 0
    loop.train(config, run, programs=programs, dataset=dataset, start_from=start_from)
    assert read_events(run)[-1]["to"] == first
    if kind == "init_from":
        state = program.init(0)._replace(params=final_state(program, other).params)
    else:
        state = steps(shorter, program, dataset, program.init(0), 0, 4)
    assert_equal(
        final_state(program, run),
        steps(config, program, dataset, state, first, N_STEPS, factor=0.5),
    )


@pytest.mark.parametrize(
    "fault, every, least",
    [
        ("kill", 7, 4),
        ("signal", 7, 4),
        ("signal amid skips", 6, 1),
        pytest.param("signal", 0, 4, marks=pytest.mark.slow),
    ],
)
def test_interrupted_around_a_rollback_it_does_the_same(
    config, programs, program, dataset, tmp_path, fault, every, least
):
    config = replace(config, train={**ROLLS_BACK, "checkpoint_every": every})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs, dataset=dataset)
    assert (14, "rollback") in kinds(whole)

    class Killed(Exception):
        pass

    calls = []

    def interrupt(progress):
        calls[-1] += 1
        if fault == "kill" and calls[-1] == len(calls) + 1:
            raise Killed
        # Later in later calls, or they might go back to the first state again and again.
        if fault == "signal" and calls[-1] == 1 + len(calls) % 4 + len(calls) // 8:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)  # a thread notes it
        if fault == "signal amid skips" and progress.step == 12 and len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)  # where a checkpoint is due, and not to be saved
            time.sleep(0.05)

    found = None
    while not found and len(calls) < 25:
        calls.append(0)
        try:
            found = loop.train(
                config, parts, programs=programs, dataset=dataset, progress=interrupt
            )
        except (Killed, Preempted):
            pass
    assert len(calls) > least
    assert timeless(found) == timeless(wanted)
    assert [timeless(x) for x in read_metrics(parts)] == [timeless(x) for x in read_metrics(whole)]
    assert kinds(parts) == kinds(whole)
    assert_equal(final_state(program, parts), final_state(program, whole))


@pytest.mark.slow
@pytest.mark.parametrize("branch", [10, 12])
def test_where_a_decay_begins_is_gone_back_to_and_stopped_at(config, dataset, tmp_path, branch):
    """With no other checkpoint due; at 12 amid skips, as another run may branch from there."""
    config = replace(
        config,
        optimizer={"schedule": "wsd", "warmup": 0.01, "decay_fraction": 1 - branch / N_STEPS},
        train={**ROLLS_BACK, "checkpoint_every": 0},
    )
    assert resolve(config).branch_step == branch
    program = Poisoned(config, make_mesh(config.mesh))
    programs, whole, parts = {Program.key(config): program}, tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs, dataset=dataset)
    assert read_events(whole)[-1]["to"] == branch
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {str(branch), "20"}
    stops = []

    def signalled(progress):
        if progress.step == branch and len(stops) < 2:
            signal.raise_signal(stops.append(progress.step) or signal.SIGTERM)
            time.sleep(0.05)  # a thread notes it

    with pytest.raises(Preempted):
        loop.train(config, parts, programs=programs, dataset=dataset, progress=signalled)
    assert (parts / "checkpoints" / str(branch)).exists()
    found = loop.train(config, parts, programs=programs, dataset=dataset)
    assert timeless(found) == timeless(wanted) and kinds(parts) == kinds(whole)
    assert_equal(final_state(program, parts), final_state(program, whole))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_on_the_way_back_and_told(
    config, programs, dataset, tmp_path
):
    def damage(progress):
        path = tmp_path / "checkpoints" / "10" / "meta" / "metadata"
        if progress.step == 12:
            while not path.exists():
                time.sleep(0.01)  # it is being written
            path.write_bytes(path.read_bytes()[:-1])

    config = replace(config, train=ROLLS_BACK)
    loop.train(config, tmp_path, programs=programs, dataset=dataset, progress=damage)
    rollback, told = read_events(tmp_path)[3:5]
    assert (rollback["event"], rollback["to"]) == ("rollback", 5)
    assert (told["event"], told["step"], told["checkpoint"]) == ("damaged_checkpoint", 5, 10)


def test_with_force_too_many_rollbacks_are_too_many_at_once(
    config, programs, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "score", lambda *_: Score(math.nan, math.nan, 1))
    config = replace(config, train={**ROLLS_BACK, "rollbacks": 4})
    told, signals = [], [signal.SIGTERM]

    def signalled(progress):
        told.append(progress.step)
        assert len(told) < 30  # or it goes back for ever
        if kinds(tmp_path).count((5, "rollback")) == 2 and signals:
            signal.raise_signal(signals.pop())
            time.sleep(0.05)  # a thread notes it

    with pytest.raises(Preempted):
        loop.train(config, tmp_path, programs=programs, dataset=dataset, progress=signalled)
    fewer = replace(config, train={"rollbacks": 1})
    given = {"programs": programs, "dataset": dataset, "progress": signalled}
    result = loop.train(fewer, tmp_path, **given, force=True)
    assert result["status"] == "diverged" and result["rollbacks"] == 2


def test_what_is_saved_amid_an_evaluation_is_not_gone_back_to_if_that_is_no_number(
    config, programs, program, dataset, tmp_path, monkeypatch
):
    """Nor does it take the place of what is."""
    settings = {"keep_checkpoints": 1, "evaluate_every": 5, "checkpoint_every": 5}
    config = replace(config, train=settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    evaluate, score, at, signals = loop._Run._evaluate, loop.score, [], []

    def evaluated(run):
        at[:] = run.step, run.rollbacks
        if signals and at == [10, 0]:
            signal.raise_signal(signals.pop())
            time.sleep(0.05)
        return evaluate(run)

    def bad(*arguments):
        found = score(*arguments)
        return replace_loss(found) if at == [10, 0] else found

    def replace_loss(found):
        return type(found)(float("nan"), found.bits_per_byte, found.tokens)

    monkeypatch.setattr(loop._Run, "_evaluate", evaluated)
    monkeypatch.setattr(loop, "score", bad)
    wanted = loop.train(config, whole, programs=programs, dataset=dataset)
    assert [event["to"] for event in read_events(whole)] == [5]
    signals.append(signal.SIGTERM)
    with pytest.raises(Preempted):
        loop.train(config, parts, programs=programs, dataset=dataset)
    assert {path.name for path in (parts / "checkpoints").iterdir()} == {"5", "10"}
    found = loop.train(config, parts, programs=programs, dataset=dataset)
    assert timeless(found) == timeless(wanted) and kinds(parts) == kinds(whole)
    assert_equal(final_state(program, parts), final_state(program, whole))


def test_after_rollbacks_that_do_not_help_it_has_diverged(config, programs, dataset, tmp_path):
    config = replace(config, train={**ROLLS_BACK, "rollbacks": 2, "rollback_rate": 1.0})
    store = Store(str(tmp_path))
    workdir = store.folder("a")
    workdir.mkdir(parents=True)
    result = loop.train(config, workdir, programs=programs, dataset=dataset)
    skipped = [(step + 1, "skipped") for step in POISONED]
    back = [*skipped, (14, "rollback")]
    assert kinds(workdir) == [*back, *back, *skipped, (14, "diverged")]
    assert result["status"] == "diverged" and result["loss"] is None
    assert result["tokens"] == 14 * 64 * SEQUENCES
    (scored,) = (x for x in read_metrics(workdir) if x["step"] == 10)
    assert result["last_good_step"] == 10
    assert result["last_good_loss"] == scored["validation_loss"]
    assert json.loads((workdir / "result.json").read_text()) == result
    assert loop.train(config, workdir) == result  # the same call again tries nothing

    store.scan()
    store.write_tables()
    (row,) = store.rows()
    assert row["status"] == "diverged" and row["loss"] is None


def small(seed=0, n=2):
    """Batches (n, 8, 8) of which some targets do not count."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 32, (n, 8, 9)).astype(np.int32)
    weights = (draw.random((n, 8, 8)) < 0.6).astype(np.float32)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights)


SMALL = replace(
    Config(
        model=ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24),
        mesh=MeshConfig(data=8),
    ),
    data={"seq_len": 8},
    train={"steps_per_dispatch": 2, "batch_tokens": 64.0},
)
EXPERTS = {"n_experts": 4, "top_k": 2, "bias_rate": 0.1}
PIPELINE = {
    "mesh": {"stage": 2, "data": 4, "zero": 1},
    "model": {"scan_layers": True},
    "train": {"accumulation": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"clip_norm": 0.0, "weight_decay": 0.1}},
        {"train": {"accumulation": 4}, "mesh": {"data": 2, "model": 4}},
        {"mesh": {"data": 4, "model": 2, "zero": 3}},
        {"model": {"moe": EXPERTS}},
        {"model": {"lora": {"rank": 2}}, "mesh": {"data": 4, "model": 2, "zero": 1}},
        PIPELINE,
    ],
    ids=str,
)
def test_anywhere_a_skipped_step_leaves_all_but_its_count(change):
    config = replace(SMALL, **change)
    program = Program(config, make_mesh(config.mesh))
    good, bad = small(), small()
    bad.weights_BT[0, 5, 3] = np.nan
    schedule = Schedule(0.01, 1.0, 2.0, 2.0, 10.0, 0.0)

    def begun():
        """After two good steps: moments that are zero could be decayed unseen."""
        return program.train(program.init(1), program.put(small(2)), 2, schedule)[0]

    start = jax.device_get(begun())
    still_zero = {
        path[-1].key for path, x in jax.tree.leaves_with_path(start.moments) if not np.any(x)
    }
    assert still_zero <= {"balance_bias"}  # which has no gradient
    state, metrics = program.train(begun(), program.put(bad), 1, schedule)
    assert metrics.skipped.tolist() == [True, False] and state.step == 3
    assert_equal(state[1:], start[1:])
    state, metrics = program.train(begun(), program.put(bad), 2, schedule)
    again = jax.tree.map(lambda x: np.roll(x, 1, axis=0), good)
    wanted, _ = program.train(skipping(begun(), 1), program.put(again), 1, schedule)
    assert metrics.skipped.tolist() == [True, False] and state.step == 4
    assert_equal(state, wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"loss_chunk": 4}},
        pytest.param({"mesh": {"data": 2, "model": 2, "context": 2}}, marks=pytest.mark.slow),
        pytest.param(PIPELINE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nats_of_each_target_are_those_of_the_logits(change):
    config = replace(SMALL, **change)
    program = Program(config, make_mesh(config.mesh))
    batch, params = jax.tree.map(lambda x: x[0], small()), program.init(1).params
    for weights in (batch.weights_BT, None):
        given = batch._replace(weights_BT=weights)
        found = program.token_nats(params, program.put(given))
        decoder = Decoder(config.model, 8)
        log_p = jax.nn.log_softmax(
            decoder.apply({"params": jax.device_get(params)}, batch.inputs_BT)
        )
        wanted = -np.take_along_axis(np.asarray(log_p), batch.targets_BT[..., None], -1)[..., 0]
        wanted = wanted if weights is None else wanted * weights
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_events_after_a_checkpoint_are_forgotten(tmp_path):
    log = EventLog(tmp_path, 0)
    for step in (7, 3, 5):  # 3 after a rollback
        log.write({"step": step, "event": "spike", "loss": float("nan"), "documents": [{"a": 1}]})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 6, "ev')
    EventLog(tmp_path, 2).write({"step": 4, "event": "skipped"})
    found = read_events(tmp_path)
    assert [event["step"] for event in found] == [7, 3, 4] and found[0]["loss"] is None
