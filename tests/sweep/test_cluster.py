"""Real clusters on this machine: Ray of two nodes, SLURM of one; what is lost in the middle."""

import csv
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from lm.config import Config, SweepConfig, TrainConfig
from lm.sweep import __main__ as command_line
from lm.sweep.backends import Inline
from lm.sweep.cluster import Ray, Slurm
from lm.sweep.launch import Study
from lm.sweep.store import Store

FAKE = "fake_trainer:train"


@pytest.fixture(autouse=True)
def fake_trainer(monkeypatch):
    folder = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([folder, str(Path(folder).parents[1])]))


def run(workdir, backend, pause):
    """(exit code, runs.csv, what was printed) of a small study, each run taking ``pause`` s."""
    sweep = SweepConfig(budgets=(1e9, 3e9), sizes=5, spread=4.0, widths=tuple(range(8, 129, 8)))
    store = Store(workdir)
    config = Config(sweep=sweep, train=TrainConfig(batch_tokens=1024.0))
    store.claim(config)
    (workdir / "pause").write_text(str(pause))
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    code = command_line.run(Study(config, store), backend(store), console)
    with (workdir / "runs.csv").open() as file:
        return code, list(csv.DictReader(file)), console.export_text()


def disturbed(workdir, start, disturb):
    """``run`` with runs of two seconds, and meanwhile ``disturb()``."""
    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        return run(workdir, start, 2.0)
    finally:
        disturbing.join()


def wait_for_results(workdir, n):
    while len(list(workdir.glob("runs/*/result.json"))) < n:
        time.sleep(0.1)


@pytest.fixture
def undisturbed(tmp_path):
    workdir = tmp_path / "undisturbed"
    return run(workdir, lambda _: Inline(FAKE), 0.0)[1]


def attempts(workdir):
    return [json.loads(p.read_text()) for p in workdir.glob("leases/*.json")]


@pytest.mark.slow
def test_ray_finishes_every_run_once_though_a_node_is_killed(tmp_path, undisturbed):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    workdir = tmp_path / "study"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2, num_gpus=4) for _ in range(2)]

    def start(store):
        ray.init(address=cluster.address, log_to_driver=False)
        return Ray(store, 4, cpus=1, gpus=2, options={}, trainer=FAKE).start()

    def kill_a_node():
        wait_for_results(workdir, 2)
        cluster.remove_node(nodes[0], allow_graceful=False)

    try:
        code, rows, printed = disturbed(workdir, start, kill_a_node)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert (code, rows) == (0, undisturbed), printed
    ends = [attempt["end"] for attempt in attempts(workdir)]
    assert ends.count("done") == len(rows) and set(ends) > {"done"}
    devices = [line.split()[1] for line in (workdir / "devices").read_text().splitlines()]
    assert {len(set(ids.split(","))) for ids in devices} == {2} and len(set(devices)) > 1


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM of one node with two CPUs, its daemons started here and ended after the test."""
    pytest.importorskip("submitit")
    daemons = ("munged", "slurmctld", "slurmd")
    path = os.environ["PATH"] + ":/usr/sbin"
    if missing := [name for name in daemons if not shutil.which(name, path=path)]:
        pytest.skip(f"{', '.join(missing)}: not installed (Debian: slurm-wlm, munge)")
    if os.geteuid():
        pytest.skip("SLURM's daemons need root")
    folder = Path(tempfile.mkdtemp(prefix="lm-slurm-"))  # as a socket's path must be short
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(SLURM_CONF.format(folder=folder, host=host, ports=ports))
    munge = {"socket": "munge.sock", "key-file": "key", "pid-file": "munged.pid"}
    munge |= {"log-file": "munged.log", "seed-file": "seed"}
    options = [f"--{name}={folder / value}" for name, value in munge.items()]
    commands = (
        ["munged", "--force", "--foreground", *options],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("PATH", path)
    running = []
    try:
        for command in commands:
            log = (folder / f"{command[0]}.out").open("w")
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(1.0)
        deadline = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1.0)
        for daemon in reversed(running):
            daemon.terminate()
            daemon.wait()
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [["scontrol", "requeue"], ["scancel", "--signal=USR2"]],
    ids=["queued again", "told that its time is over"],
)
def test_slurm_finishes_every_run_once_though_a_job_is(order, slurm, tmp_path, undisturbed):
    workdir, backends = tmp_path / "study", []

    def start(store):
        backends.append(Slurm(store, 2, cpus=1, gpus=0, options={}, trainer=FAKE).start())
        return backends[0]

    def queue_again():
        wait_for_results(workdir, 2)
        job = f"{backends[0]._array}_0"
        subprocess.run([*order, job], check=True)
        while state(job) != "PENDING":
            time.sleep(0.2)
        # It would wait for two minutes, lest a broken machine takes it again at once.
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)

    def state(job):
        squeue = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        return subprocess.run(squeue, capture_output=True, text=True).stdout.strip()

    code, rows, printed = disturbed(workdir, start, queue_again)
    assert (code, rows) == (0, undisturbed), printed
    ends = [attempt["end"] for attempt in attempts(workdir)]
    assert ends.count("done") == len(rows) and set(ends) == {"done", "interrupted"}
    log = next(workdir.glob("slurm/*_0_0_log.out")).read_text()
    assert log.count("Starting with JobEnvironment") == 2
