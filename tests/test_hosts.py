"""Runs by several real processes over real sockets, beside the same run in this process."""

import itertools
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.fault_injection import poisoned
from lm import hosts
from lm.checkpoint import Checkpoints, abstract_like
from lm.command import BAD_INPUT, PREEMPTED, BadInput, InUse
from lm.config import Config, MeshConfig, ModelConfig, replace, to_dict
from lm.data import Dataset
from lm.sharding import make_mesh
from lm.train import loop
from lm.train.events import read_events
from lm.train.metrics import read_metrics
from lm.train.step import Program

ROOT = Path(__file__).parents[1]
HOST = socket.gethostname()
LM = {"LM_COORDINATOR": "node0:8476", "LM_PROCESSES": "4", "LM_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}


def test_a_process_alone_is_told_so_by_nothing():
    assert hosts.cluster({}) is None
    assert hosts.cluster({**LM, "LM_PROCESSES": "1", "LM_PROCESS": "0"}) is None
    assert hosts.cluster({**SLURM, "SLURM_NTASKS": "1"}) is None
    without_srun = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}
    assert hosts.cluster(without_srun) is None


def test_the_environment_is_read():
    assert hosts.cluster(LM) == hosts.Cluster(3, 4, "node0", 8476)
    assert hosts.cluster({**LM, "LM_COORDINATOR": "[::1]:80"}).host == "::1"


def test_srun_is_read(monkeypatch):
    for tasks, devices in (("4", None), ("32", [0])):  # a task a node; a task a device
        for name, value in {**SLURM, "SLURM_NTASKS": tasks}.items():
            monkeypatch.setenv(name, value)
        found = hosts.cluster(os.environ)
        assert found[:3] == (2, int(tasks), "gpu007") and found.local_devices == devices


@pytest.mark.parametrize(
    "change, told",
    [
        ({"LM_PROCESS": None}, "LM_COORDINATOR, LM_PROCESSES without LM_PROCESS: set all three"),
        ({"LM_COORDINATOR": None}, "without LM_COORDINATOR"),
        ({"LM_COORDINATOR": "node0"}, "'node0': must be HOST:PORT"),
        ({"LM_COORDINATOR": "node0:99999"}, "must be HOST:PORT"),
        ({"LM_PROCESSES": "two"}, "LM_PROCESSES = 'two': must be a whole number"),
        ({"LM_PROCESSES": "0"}, "1 or more"),
        ({"LM_PROCESS": "4"}, "LM_PROCESS = '4': must be one of 0 to 3"),
        ({"LM_PROCESS": "-1"}, "must be one of 0 to 3"),
    ],
)
def test_a_wrong_environment_is_refused(change, told):
    environment = {k: v for k, v in (LM | change).items() if v is not None}
    with pytest.raises(BadInput, match=told):
        hosts.cluster(environment)


def test_alone_everything_is_as_without():
    with hosts.joined(), hosts.ending_all():
        assert hosts.is_first() and hosts.agree(lambda: 3) == 3
    for within in (hosts.ending_all, hosts.failing_together):
        with pytest.raises(KeyError), hosts.joined(), within():
            raise KeyError


class Link:
    """The line of process ``index`` of two, to a test that is the other one."""

    n, name = 2, "process"

    def __init__(self, index, *heard):
        self.index, self.said, self.words = index, [], queue.SimpleQueue()
        for word in heard:
            self.words.put(json.loads(json.dumps(word)))

    def say(self, word):
        self.said.append(word)


@pytest.mark.parametrize("kind", [BadInput, InUse])
def test_what_process_0_refuses_is_refused_alike_everywhere(monkeypatch, kind):
    def refuse():
        raise kind("not this folder")

    first = Link(0, {"here": 1, "says": None})
    monkeypatch.setattr(hosts, "_link", first)
    with pytest.raises(BadInput, match="not this folder") as here:
        hosts.agree(refuse)
    monkeypatch.setattr(hosts, "_link", Link(1, *first.said))
    with pytest.raises(BadInput, match="not this folder") as there:
        hosts.agree(lambda: 1 / 0)
    assert here.type is there.type is kind


@pytest.mark.parametrize("other", [hosts._HAVE_FAILED, None, False])
def test_a_process_that_failed_alone_answers_no_question_of_another(monkeypatch, other):
    """Which would go on from it, and fail of that."""
    link = Link(0, {"here": 1, "says": other})
    monkeypatch.setattr(hosts, "_link", link)

    def end_all(error):
        link.say({"failed": str(error)})
        raise error

    monkeypatch.setattr(hosts, "_end_all", end_all)
    together = other == hosts._HAVE_FAILED
    with pytest.raises(MemoryError, match="no room"), hosts.failing_together():
        raise MemoryError("no room")
    assert link.said == [{"agreed": {"value": True}} if together else {"failed": "no room"}]


@pytest.fixture(scope="module")
def config(text_data):
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
    return replace(
        Config(model=ModelConfig(vocab_size=264, **shape), data=text_data, mesh=MeshConfig()),
        data={"validation_tokens": 2_048},
        train={
            **{"tokens": 64.0 * 16 * 20, "batch_tokens": 64.0 * 16, "log_every": 1},
            **{"checkpoint_every": 10, "steps_per_dispatch": 5, "tensorboard": False},
        },
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The folder of the run by one process with 8 devices."""
    folder = tmp_path_factory.mktemp("alone")
    loop.train(config, folder)
    return folder


class Processes:
    """The command on ``n`` processes of ``8 / n`` devices each."""

    def __init__(self, folder, config, n, compiled, script=None, **overrides):
        self.folder, self.n = folder, n
        file = folder / "config.py"
        file.write_text(
            "from lm.config import from_config_dict, to_config_dict\n"
            f"def get_config(): return to_config_dict(from_config_dict({to_dict(config)!r}))\n"
        )
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.started = []
        for i in range(n):
            environment = os.environ | {
                "LM_COORDINATOR": f"localhost:{port}", "LM_PROCESSES": str(n), "LM_PROCESS": str(i),
                "JAX_NUM_CPU_DEVICES": str(8 // n), "JAX_COMPILATION_CACHE_DIR": str(compiled),
                "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            script = script or (ROOT / "tests" / "host.py",)
            noted = () if "-m" in script else (self.noted(i),)
            command = [sys.executable, *map(str, script), *noted]
            command += [f"--config={file}", f"--workdir={folder / 'run'}"]
            command += [f"--config.{key}={value}" for key, value in overrides.items()]
            with open(self.log(i), "w") as log:
                self.started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                )

    def noted(self, i):
        return str(self.folder / f"read-{i}.json")

    def log(self, i):
        return self.folder / f"log-{i}.txt"

    def wait(self):
        """Exit codes and logs."""
        codes = [process.wait(timeout=240) for process in self.started]
        return codes, [self.log(i).read_text() for i in range(self.n)]

    def finish(self):
        codes, logs = self.wait()
        assert codes == [0] * self.n, "\n".join(logs)
        return [json.loads(Path(self.noted(i)).read_text()) for i in range(self.n)]

    def until(self, path):
        while not path.exists():
            assert all(process.poll() is None for process in self.started), self.wait()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def launch(config, compiled, tmp_path):
    launched = []

    def launch(n, **overrides):
        launched.append(Processes(tmp_path, config, n, compiled, **overrides))
        return launched[-1]

    yield launch
    for process in itertools.chain(*(each.started for each in launched)):
        process.kill()
        process.wait()


def losses(folder):
    return [line["train_loss"] for line in read_metrics(folder)]


def state(config, folder, **mesh):
    """The last checkpoint, restored in this process on any mesh."""
    config = replace(config, mesh=mesh)
    program = Program(config, make_mesh(config.mesh))
    checkpoints = Checkpoints(folder)
    found, _ = checkpoints.restore(abstract_like(program.abstract_state, program.state_sharding))
    checkpoints.close()
    return jax.device_get(found)


def assert_same_run(config, found, alone):
    np.testing.assert_allclose(losses(found), losses(alone), rtol=1e-5)
    results = [json.loads((folder / "result.json").read_text()) for folder in (found, alone)]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)
    assert results[0]["bits_per_byte"] == pytest.approx(results[1]["bits_per_byte"], rel=1e-5)
    assert results[0]["validation_tokens"] == results[1]["validation_tokens"]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6),
        state(config, found, data=8).params,
        state(config, alone, data=8).params,
    )


@pytest.mark.slow
def test_two_processes_are_the_same_run_and_read_disjoint_rows(launch, config, alone, tmp_path):
    first, second = launch(2).finish()
    assert_same_run(config, tmp_path / "run", alone)
    # Of each batch of 16 rows one half each, and nobody a row twice.
    assert {row // 8 % 2 for row in first["trained"]} == {0}
    assert {row // 8 % 2 for row in second["trained"]} == {1}
    assert sorted(first["trained"] + second["trained"]) == list(range(16 * 20))
    assert first["validated"] == second["validated"] == 2048 // 64 // 2
    # What two processes saved, one restores on whatever mesh.
    jax.tree.map(
        np.testing.assert_array_equal,
        state(config, tmp_path / "run", data=8),
        state(config, tmp_path / "run", data=2, model=2, replica=2, zero=3),
    )


@pytest.mark.slow
def test_four_processes_are_the_same_run_and_read_disjoint_rows(launch, config, alone, tmp_path):
    read = launch(4).finish()
    assert_same_run(config, tmp_path / "run", alone)
    assert [len(each["trained"]) for each in read] == [4 * 20] * 4
    assert sorted(sum((each["trained"] for each in read), [])) == list(range(16 * 20))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, shared",
    [
        ({"data": 4, "model": 2}, False),
        ({"data": 2, "replica": 2, "model": 2, "zero": 3}, False),
        ({"data": 1, "context": 4, "model": 2}, True),  # both hold parts of every row
    ],
)
def test_any_mesh_over_two_processes_is_the_same_run(launch, config, alone, tmp_path, mesh, shared):
    first, second = launch(2, **{f"mesh.{k}": v for k, v in mesh.items()}).finish()
    assert_same_run(config, tmp_path / "run", alone)
    common = set(first["trained"]) & set(second["trained"])
    assert common == (set(range(16 * 20)) if shared else set())


@pytest.mark.slow
def test_a_second_call_returns_and_another_config_is_refused_by_all(launch, tmp_path):
    launch(2).finish()
    result = (tmp_path / "run" / "result.json").read_text()
    again = launch(2)
    assert [read["trained"] for read in again.finish()] == [[], []]
    codes, logs = launch(2, **{"optimizer.learning_rate": 0.5}).wait()
    assert codes == [BAD_INPUT] * 2
    assert all("config.optimizer.learning_rate: 0.003 -> 0.5" in log for log in logs)
    assert (tmp_path / "run" / "result.json").read_text() == result


LONGER = {"train.tokens": 64.0 * 16 * 60, "train.steps_per_dispatch": 2}


@pytest.fixture(scope="module")
def longer_alone(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("longer")
    loop.train(replace(config, train={"tokens": 64.0 * 16 * 60, "steps_per_dispatch": 2}), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_is_named_and_the_next_pair_goes_on(
    launch, config, longer_alone, tmp_path, victim
):
    pair = launch(2, **LONGER)
    pair.until(tmp_path / "run" / "checkpoints" / "10")
    pair.started[victim].kill()
    killed = time.monotonic()
    codes, logs = pair.wait()
    assert time.monotonic() - killed < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, BAD_INPUT, PREEMPTED)
    assert f"error: process {victim} ({HOST}) died" in logs[1 - victim]
    assert not (tmp_path / "run" / "result.json").exists()
    read = launch(2, **LONGER).finish()
    assert min(read[0]["trained"]) >= 16 * 10  # nothing before the checkpoint is done again
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 61))
    assert_same_run(config, tmp_path / "run", longer_alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    launch, config, longer_alone, tmp_path, victim
):
    run = tmp_path / "run"
    pair = launch(2, **LONGER)
    pair.until(run / "checkpoints" / "10")
    pair.started[victim].terminate()
    codes, logs = pair.wait()
    assert codes == [PREEMPTED] * 2
    assert "interrupted; the same command goes on" in logs[0] and "error" not in logs[0] + logs[1]
    read = [json.loads(Path(pair.noted(i)).read_text())["trained"] for i in range(2)]
    assert [len(rows) for rows in read] == [len(read[0])] * 2
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert read_metrics(run)[-1]["step"] == saved < 60
    read = launch(2, **LONGER).finish()
    assert min(read[0]["trained"]) == 16 * saved  # nothing is done again
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 61))
    assert_same_run(config, run, longer_alone)


@pytest.mark.slow
def test_two_processes_go_back_together(launch, config, tmp_path, monkeypatch):
    script = "-m", "experiments.fault_injection.poisoned", "batch", "12", "14", "once"
    codes, logs = launch(2, script=script, **{"train.skips_before_rollback": 3}).wait()
    assert codes == [0, 0], logs
    for owner, name in ((Dataset, "batches"), (loop._Run, "_roll_back")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is put back
    poisoned.poison_batches(12, 14, once=True)
    loop.train(replace(config, train={"skips_before_rollback": 3}), tmp_path / "alone")
    told = [
        [(event["step"], event["event"], event.get("to")) for event in read_events(tmp_path / name)]
        for name in ("run", "alone")
    ]
    skipped = [(at, "skipped", None) for at in (12, 13, 14)]
    assert told == [[*skipped, (14, "rollback", 10)]] * 2
    assert_same_run(config, tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_two_processes_pass_a_damaged_checkpoint_over(launch, config, alone, tmp_path):
    launch(2).finish()
    run = tmp_path / "run"
    (run / "result.json").unlink()
    with open(run / "checkpoints" / "20" / "meta" / "metadata", "a") as file:
        file.write(" ")
    again = launch(2)
    assert min(again.finish()[0]["trained"]) == 16 * 10
    told = [again.log(i).read_text().count("checkpoints/20: damaged, meta/met") for i in range(2)]
    assert told == [1, 0]
    assert_same_run(config, run, alone)


AMID = """
import os, runpy, signal, sys, time
from lm.data import Dataset
validation = Dataset.validation
def signalled(dataset, *arguments):
    for batch in validation(dataset, *arguments):
        if os.environ["LM_PROCESS"] == "1":
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)  # a thread notes it
        yield batch
Dataset.validation = signalled
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_stop_amid_an_evaluation_and_the_next_pair_makes_it(
    launch, config, alone, tmp_path
):
    script = "-c", AMID, ROOT / "tests" / "host.py"
    codes, logs = launch(2, script=script, **{"train.evaluate_every": 10}).wait()
    assert codes == [PREEMPTED] * 2, logs
    run = tmp_path / "run"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"10"}
    assert read_metrics(run)[-1]["step"] == 9
    first, second = launch(2, **{"train.evaluate_every": 10}).finish()
    assert min(first["trained"]) == 16 * 10 and first["validated"] == second["validated"] == 32
    log = read_metrics(run)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert [line["step"] for line in log if "validation_loss" in line] == [10, 20]
    assert_same_run(config, run, alone)


FULL = """
import os, runpy, shutil, sys
from lm import hosts
usage, hosts.FAILING_SECONDS = shutil.disk_usage, 3.0
if os.environ["LM_PROCESS"] == "1":  # the other finds the last bytes of it
    shutil.disk_usage = lambda path: usage(path)._replace(free=0)
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_a_full_disk_ends_two_processes_and_the_next_pair_goes_on(launch, config, alone, tmp_path):
    script = "-c", FULL, ROOT / "tests" / "host.py"
    codes, logs = launch(2, script=script, **{"train.checkpoint_every": 8}).wait()
    assert codes == [1, 1]
    assert all("No space left on device" in log and "Traceback" not in log for log in logs), logs
    launch(2, **{"train.checkpoint_every": 8}).finish()
    assert_same_run(config, tmp_path / "run", alone)


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once(launch, tmp_path):
    pair = launch(2, **LONGER, **{"train.evaluate_every": 1})
    pair.until(tmp_path / "run" / "checkpoints" / "10")
    os.kill(pair.started[0].pid, signal.SIGSTOP)  # so that the other waits for it
    for _ in range(2):
        pair.started[1].terminate()
        time.sleep(0.5)
    os.kill(pair.started[0].pid, signal.SIGCONT)
    codes, logs = pair.wait()
    assert codes == [PREEMPTED] * 2
    assert f"error: process 1 ({HOST}): interrupted; the same command goes on" in logs[0]


def test_sigterm_interrupts_a_process_that_is_alone(monkeypatch):
    for name in hosts.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), hosts.joined():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
