import json
import math
import signal
import time

import jax
import numpy as np
import pytest

from lm import arithmetic, command
from lm.checkpoint import Checkpoints, abstract_like
from lm.command import BadInput, Preempted
from lm.config import Config, MeshConfig, ModelConfig, replace, to_dict
from lm.data import open_dataset
from lm.score import Score
from lm.sharding import make_mesh
from lm.train import __main__ as main
from lm.train import loop, pace
from lm.train.clock import PARTS, timeless
from lm.train.heartbeat import Heartbeat, read_heartbeat
from lm.train.metrics import MetricsLog, read_metrics
from lm.train.recipe import resolve
from lm.train.step import Program


@pytest.fixture(autouse=True)
def known_dispatches(monkeypatch):
    """After three of one step, dispatches double until full, however busy this machine is."""
    monkeypatch.setattr(pace, "LONGEST_DISPATCH_SECONDS", 1e9)


@pytest.fixture(scope="module")
def config(text_data):
    return Config(
        model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24),
        data=text_data,
        mesh=MeshConfig(data=8),
        train=replace(
            Config(), train={"tokens": 64.0 * 8 * 20, "batch_tokens": 64.0 * 8, "log_every": 3}
        ).train,
    )


@pytest.fixture(scope="module")
def programs():
    return {}


EXPERTS = {"moe": {"n_experts": 4, "top_k": 2, "bias_rate": 0.1, "jitter": 0.1, "dead_after": 3}}


def final_params(config, workdir):
    program = Program(config, make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir)
    state, _ = checkpoints.restore(abstract_like(program.abstract_state, program.state_sharding))
    checkpoints.close()
    return jax.device_get(state)


def test_a_run_ends_with_its_result_and_log(config, programs, tmp_path):
    seen = []
    result = loop.train(config, tmp_path, programs=programs, progress=seen.append)
    assert result == json.loads((tmp_path / "result.json").read_text())
    count = arithmetic.parameters(config.model, 64)
    assert result["status"] == "done" and result["params"] == count.blocks_and_head
    assert result["tokens"] == 64 * 8 * 20
    assert result["flops"] == arithmetic.training_flops(config.model, 64, result["tokens"])
    assert 0 < result["loss"] < math.log(257)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    # Every token but end-of-text is one byte: bits per byte are a little above loss / ln 2.
    assert 1.0 <= result["bits_per_byte"] * math.log(2) / result["loss"] < 1.01

    log = read_metrics(tmp_path)
    assert [line["step"] for line in log] == [3, 6, 9, 12, 15, 18, 20]
    assert log[-1]["validation_loss"] == result["loss"]
    assert log[-1]["flops"] == result["flops"]
    assert [p.step for p in seen] == [1, 2, 3, 5, 9, 17, 20] and seen[-1].flops == result["flops"]
    assert json.loads((tmp_path / "config.json").read_text())["config"] == to_dict(config)
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_the_result_is_the_score_of_the_final_state(config, programs, tmp_path):
    result = loop.train(config, tmp_path, programs=programs)
    state = final_params(config, tmp_path)
    dataset, total, count = open_dataset(config.data), 0.0, 0
    decoder = programs[Program.key(config)].decoder
    for batch in dataset.validation(1):
        logits = decoder.apply({"params": state.params}, batch.inputs_BT)
        nats = -jax.nn.log_softmax(logits)[0, np.arange(64), batch.targets_BT[0]]
        total, count = total + float(nats.sum()), count + 64
    assert count == result["validation_tokens"] == 1024
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("model", [{}, pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=str)
def test_resumed_is_bit_identical_to_undisturbed(config, programs, tmp_path, model):
    config = replace(config, model=model, train={"checkpoint_every": 7, "evaluate_every": 5})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step >= 15:
            raise Killed

    with pytest.raises(Killed):
        loop.train(config, parts, programs=programs, progress=kill)
    assert not (parts / "result.json").exists()
    assert (
        sorted(int(p.name) for p in (parts / "checkpoints").iterdir() if p.name.isdigit())[-1] == 14
    )
    assert (
        read_metrics(parts)[-1]["step"] >= 15
    )  # beyond the checkpoint of step 14: forgotten again
    found = loop.train(config, parts, programs=programs)
    assert timeless(found) == timeless(wanted)
    assert [timeless(x) for x in read_metrics(parts)] == [timeless(x) for x in read_metrics(whole)]
    jax.tree.map(
        np.testing.assert_array_equal, final_params(config, parts), final_params(config, whole)
    )


def test_a_checkpoint_restores_onto_another_mesh(config, programs, tmp_path):
    loop.train(config, tmp_path, programs=programs)
    other = replace(config, mesh={"data": 4, "model": 2})
    jax.tree.map(
        np.testing.assert_array_equal, final_params(other, tmp_path), final_params(config, tmp_path)
    )


@pytest.mark.slow
def test_resumed_on_another_mesh_it_ends_the_same_to_1e_5(config, programs, tmp_path):
    config = replace(config, train={"checkpoint_every": 7, "evaluate_every": 5})
    other = replace(config, mesh={"data": 4, "model": 2, "zero": 3})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs)

    def signalled(progress):
        if progress.step == 14:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)  # a thread notes it

    with pytest.raises(Preempted):
        loop.train(config, parts, programs=programs, progress=signalled)
    with pytest.raises(BadInput, match="config.mesh.data: 8 -> 4"):
        loop.train(other, parts)
    found = loop.train(other, parts, force=True)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    for one, two in zip(read_metrics(parts), read_metrics(whole), strict=True):
        assert one["step"] == two["step"]
        assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
        final_params(other, parts).params,
        final_params(config, whole).params,
    )


def test_a_finished_run_is_returned_and_another_config_refused(config, programs, tmp_path):
    result = loop.train(config, tmp_path, programs=programs)
    assert loop.train(config, tmp_path) == result
    other = replace(config, optimizer={"learning_rate": 0.5})
    with pytest.raises(BadInput, match=r"config.optimizer.learning_rate: 0.003 -> 0.5"):
        loop.train(other, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_diverged_run_says_so(config, tmp_path):
    explosive = replace(config, optimizer={"learning_rate": 1e30, "clip_norm": 0.0})
    result = loop.train(explosive, tmp_path)
    assert result["status"] == "diverged" and result["loss"] is None
    assert result["tokens"] == (1 + 5) * 64 * 8  # after five steps in a row that were skipped
    assert read_metrics(tmp_path)[-1]["train_loss"] is None


def test_a_score_that_is_no_number_is_divergence_too(config, programs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "score", lambda *_: Score(math.nan, math.nan, 1))
    result = loop.train(config, tmp_path, programs=programs)
    assert result["status"] == "diverged" and result["loss"] is None


def test_a_branch_is_the_longer_run_itself(config, tmp_path):
    """A wsd run continued from where a shorter one began to decay equals one from scratch."""
    short = replace(config, optimizer={"schedule": "wsd", "warmup": 0.01})
    long = replace(short, train={"tokens": 64.0 * 8 * 40})
    programs = {}
    loop.train(short, tmp_path / "short", programs=programs)
    wanted = loop.train(long, tmp_path / "scratch", programs=programs)
    found = loop.train(long, tmp_path / "branch", programs=programs, start_from=tmp_path / "short")
    assert found["loss"] == wanted["loss"] and found["tokens"] == wanted["tokens"]
    first = read_metrics(tmp_path / "branch")[0]["step"]
    assert first > resolve(short).branch_step  # it really began there


def test_a_small_vocabulary_and_an_indivisible_batch_are_refused(config, tmp_path):
    small = replace(config, model={"vocab_size": 100})
    with pytest.raises(
        BadInput, match="model.vocab_size = 100: must be at least the tokenizer's 257"
    ):
        loop.train(small, tmp_path / "run")
    ragged = replace(config, train={"batch_tokens": 64.0 * 3})
    with pytest.raises(BadInput, match="must be a multiple of the mesh's replica x data, 8"):
        loop.train(ragged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_axis_that_does_not_divide_its_dimension_is_refused(config, tmp_path):
    odd = replace(config, model={"vocab_size": 257}, mesh={"data": 4, "model": 2})
    with pytest.raises(
        BadInput, match=r"embedding's axis 'vocab' = 257 over mesh.model = 2: .* 258"
    ):
        loop.train(odd, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_torn_line_of_the_log_is_forgotten(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    log = MetricsLog(tmp_path, step=1)
    log.write({"step": 2, "loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": None}]


class Slow:
    """A dataset that takes half a second for every dispatch."""

    def __init__(self, config):
        self._dataset = open_dataset(config.data)

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def batches(self, *arguments):
        time.sleep(0.5)
        return self._dataset.batches(*arguments)


def test_slow_reading_is_no_step_time_on_cpu_and_no_speed_either(config, programs, tmp_path):
    result = loop.train(config, tmp_path, programs=programs, dataset=Slow(config))
    assert result["data_seconds"] >= 2.5 and result["step_seconds"] < 1
    # The fourth reading falls into the third dispatch, which is of one step.
    assert read_metrics(tmp_path)[0]["tokens_per_second"] < 2 * 64 * 8


@pytest.mark.parametrize("given", [[], ["--workdir="]])
def test_the_command_needs_a_workdir(given, capsys):
    argv = ["lm.train", "--config=configs/tiny.py", *given]
    assert command.run(main.main, main.FLAGS, main.__doc__, argv) == command.BAD_INPUT
    assert capsys.readouterr() == ("", "error: --workdir is missing; as --workdir=runs/tiny\n")


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    argv = ["lm.train", "--config=configs/tiny.py", f"--workdir={tmp_path}"]
    assert command.run(main.main, main.FLAGS, main.__doc__, argv) == command.PREEMPTED
    assert "the same command goes on" in capsys.readouterr().out


def test_a_checkpoint_is_no_newer_than_the_log_on_disk(config, programs, tmp_path, monkeypatch):
    told = []
    flush, save = MetricsLog.flush, Checkpoints.save
    monkeypatch.setattr(
        MetricsLog, "flush", lambda log, to_disk=False: (told.append(to_disk), flush(log, to_disk))
    )
    monkeypatch.setattr(Checkpoints, "save", lambda *a, **k: (told.append("saved"), save(*a, **k)))
    loop.train(config, tmp_path, programs=programs)
    assert told.count("saved") == told.count(True) == 1
    assert told[told.index("saved") - 1] is True


@pytest.mark.parametrize("every", [pytest.param(0, marks=pytest.mark.slow), 7])
def test_preempted_at_every_dispatch_it_ends_bit_identical(config, programs, tmp_path, every):
    settings = {"checkpoint_every": every, "evaluate_every": 5, "steps_per_dispatch": 3}
    config = replace(config, train=settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs)
    calls, stopped_at = [], []

    def signalled(progress):
        calls[-1].append(progress.step)
        if len(calls[-1]) == 2:
            signal.raise_signal(signal.SIGTERM if len(calls) % 2 else signal.SIGINT)
            time.sleep(0.05)  # a thread notes it

    while len(calls) < 20:
        calls.append([])
        try:
            found = loop.train(config, parts, programs=programs, progress=signalled)
            break
        except Preempted:
            assert len(calls[-1]) <= 3  # it stops at the next boundary
            stopped_at.append(calls[-1][-1])
    assert len(stopped_at) >= 4 and any(step % 7 for step in stopped_at)
    assert found == json.loads((parts / "result.json").read_text())
    assert timeless(found) == timeless(wanted)
    assert [timeless(x) for x in read_metrics(parts)] == [timeless(x) for x in read_metrics(whole)]
    jax.tree.map(
        np.testing.assert_array_equal, final_params(config, parts), final_params(config, whole)
    )


def test_no_dispatch_is_longer_than_a_signal_can_wait(config, programs, tmp_path, monkeypatch):
    config = replace(config, train={"steps_per_dispatch": 3})
    found = []
    # The speed is known when the first has ended, with the second under way and the third read.
    for most, steps in ((1e9, [1, 2, 3, 5, 8, 11, 14, 17, 20]), (1e-9, [*range(1, 21)])):
        monkeypatch.setattr(pace, "LONGEST_DISPATCH_SECONDS", most)
        seen, folder = [], tmp_path / str(most)
        found.append(loop.train(config, folder, programs=programs, progress=seen.append))
        assert [progress.step for progress in seen] == steps
    assert timeless(found[0]) == timeless(found[1])


def test_a_signal_amid_slow_steps_is_acted_on_in_time(config, programs, tmp_path, monkeypatch):
    """Of 16 steps, at 1.5 seconds each, a dispatch would take 24."""
    run, signalled = Program.train, []

    def slow(program, state, batches, n_steps, schedule):
        found = run(program, state, batches, n_steps, schedule)
        if not signalled:
            signal.raise_signal(signal.SIGTERM)
            signalled.append(time.monotonic())
        time.sleep(1.5 * n_steps)
        return found

    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: train(*a, **k, programs=programs))
    monkeypatch.setattr("lm.train.device.keep_compiled", lambda: None)
    monkeypatch.setattr(Program, "train", slow)
    file = tmp_path / "config.py"
    file.write_text(
        "from lm.config import from_config_dict, to_config_dict\n"
        f"def get_config(): return to_config_dict(from_config_dict({to_dict(config)!r}))\n"
    )
    argv = ["lm.train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    assert command.run(main.main, main.FLAGS, main.__doc__, argv) == command.PREEMPTED
    assert time.monotonic() - signalled[0] < 15
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


class SignalledAmidEvaluations:
    """A dataset in whose evaluations of these numbers a signal comes."""

    def __init__(self, config, *numbers):
        self._dataset, self._numbers, self._n = open_dataset(config.data), numbers, 0

    def __getattr__(self, name):
        return getattr(self._dataset, name)

    def validation(self, *arguments):
        self._n += 1
        for batch in self._dataset.validation(*arguments):
            if self._n in self._numbers:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.05)  # a thread notes it
            yield batch


@pytest.mark.parametrize(
    "every, model",
    [
        (5, {}),
        pytest.param(0, {}, marks=pytest.mark.slow),
        pytest.param(7, {}, marks=pytest.mark.slow),
        pytest.param(5, EXPERTS, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stopped_amid_its_evaluations_it_ends_bit_identical(
    config, programs, tmp_path, every, model
):
    settings = {"checkpoint_every": every, "evaluate_every": 5, "log_every": 1}
    config = replace(config, model=model, train=settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = loop.train(config, whole, programs=programs)
    dataset = SignalledAmidEvaluations(config, 1, 4, 6, 8)

    def kill(progress):  # after the second evaluation at step 5, which is then made a third time
        if progress.validation_loss is not None:
            told[progress.step] = progress.validation_loss
            assert 0 < progress.seconds_left or progress.step == 20
        if progress.step == 6 and not killed:
            raise KeyError(killed.append(True))

    killed, told = [], {}
    for step in (5, None, 10, 15, 20):
        with pytest.raises(Preempted if step else KeyError):
            loop.train(config, parts, programs=programs, dataset=dataset, progress=kill)
        if not step:
            continue
        assert max(int(path.name) for path in (parts / "checkpoints").iterdir()) == step
        assert read_metrics(parts)[-1]["step"] == step - 1
    found = loop.train(config, parts, programs=programs, dataset=dataset, progress=kill)
    assert timeless(found) == timeless(wanted)
    log = read_metrics(whole)
    assert [timeless(x) for x in read_metrics(parts)] == [timeless(x) for x in log]
    assert told == {x["step"]: x["validation_loss"] for x in log if "validation_loss" in x}
    jax.tree.map(
        np.testing.assert_array_equal, final_params(config, parts), final_params(config, whole)
    )


def test_without_checkpoints_a_signal_ends_at_once(config, programs, tmp_path):
    seen = []

    def signalled(progress):
        seen.append(progress.step)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        never = replace(config, train={"checkpoint_every": -1})
        loop.train(never, tmp_path, programs=programs, progress=signalled)
    assert caught.type is KeyboardInterrupt and len(seen) == 1
    assert not (tmp_path / "checkpoints").exists()


class Killed(BaseException):
    """As kill -9: nothing is written after it."""


def test_times_sum_to_the_wall_time_and_work_lost_to_a_kill_is_told(
    config, programs, tmp_path, monkeypatch
):
    config = replace(config, train={"checkpoint_every": 7})
    began, spent = time.perf_counter(), 0.0

    def kill(progress):
        if progress.step == 14:
            monkeypatch.setattr(Heartbeat, "__exit__", lambda heart, *_: heart._stop.set())
            Heartbeat._write(beating[0])
            raise Killed

    beating = []
    enter = Heartbeat.__enter__
    monkeypatch.setattr(Heartbeat, "__enter__", lambda heart: beating.append(heart) or enter(heart))
    with pytest.raises(Killed):
        loop.train(config, tmp_path, programs=programs, progress=kill, dataset=Slow(config))
    monkeypatch.undo()
    spent = time.perf_counter() - began
    heartbeat = read_heartbeat(tmp_path)
    assert heartbeat["step"] == 14 and heartbeat["n_steps"] == 20
    killed = heartbeat["seconds"]
    time.sleep(0.5)  # nobody trains

    began = time.perf_counter()
    result = loop.train(config, tmp_path, programs=programs)
    spent += time.perf_counter() - began
    parts = {part: result[f"{part}_seconds"] for part in PARTS}
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(result["wall_seconds"], rel=1e-9)
    assert 0.5 * spent < result["wall_seconds"] <= spent
    assert 3 <= parts["data"] < 3.5 <= killed["data"]
    assert parts["lost"] >= 0.5  # the steps after the seventh, with what was read for the fifteenth
    assert result["goodput"] == parts["step"] / result["wall_seconds"]
    assert parts["lost"] + parts["step"] > killed["step"]
    assert parts["checkpoint"] > 0 and parts["start"] > killed["start"] > 0
    for line in read_metrics(tmp_path):
        assert 0 < line["goodput"] < 1 and 0 < line["mfu"] and line["memory_bytes"] > 1e7


def test_a_profile_traces_its_steps_and_changes_nothing(config, programs, tmp_path, monkeypatch):
    traced = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda at: (traced.append("start"), start(at)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (traced.append("stop"), stop()))
    config = replace(config, train={"log_every": 1})
    wanted = loop.train(config, tmp_path / "plain", programs=programs)
    assert not (tmp_path / "plain" / "profile").exists()

    def told(progress):
        traced.append(progress.step)

    profiled = tmp_path / "profiled"
    found = loop.train(config, profiled, programs=programs, profile=(7, 13), progress=told)
    after = [x for x in traced if x not in ("start", 1, 2, 3, 5)]
    assert after in ([7, "stop", 13, 20], ["stop", 7, 13, 20])
    assert traced.index("start") < traced.index("stop")
    assert list((profiled / "profile").rglob("*.xplane.pb"))
    assert timeless(found) == timeless(wanted)
    lines = [[timeless(x) for x in read_metrics(tmp_path / w)] for w in ("plain", "profiled")]
    assert lines[0] == lines[1]
    with pytest.raises(BadInput, match="--profile=7:21: must lie within .* 0:20"):
        loop.train(config, tmp_path / "none", programs=programs, profile=(7, 21))
    assert not (tmp_path / "none").exists()
