"""The same study in a folder and in an object store, which two machines see."""

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from lm.command import BadInput
from lm.config import Config, SweepConfig, TrainConfig
from lm.sweep import __main__ as command_line
from lm.sweep import files
from lm.sweep.backends import Inline
from lm.sweep.launch import Study
from lm.sweep.store import Store

CONFIG = Config(
    sweep=SweepConfig(budgets=(1e9, 3e9), sizes=5, spread=4.0, widths=tuple(range(8, 129, 8))),
    train=TrainConfig(batch_tokens=1024.0),
)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A URL; whatever else is stored there is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "SECONDS_TO_SETTLE", 0.0)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield "memory://bucket/study"
    memory.store.clear()


@pytest.fixture(params=["folder", "bucket"])
def place(request, bucket, tmp_path):
    return files.Bucket(bucket) if request.param == "bucket" else files.Folder(tmp_path / "study")


def test_what_is_written_is_read_and_listed(place):
    assert place.read("a/x") is None and place.names("a") == place.finished() == []
    place.write("a/x", "one")
    place.write("a/x", "two")
    place.write("runs/r1/result.json", "{}")
    place.write("runs/r2/config.json", "{}")
    assert place.read("a/x") == "two" and place.names("a") == ["a/x"]
    assert place.finished() == ["r1"]


def test_of_many_who_create_a_file_one_is_told_so(place):
    barrier, won = threading.Barrier(8), []

    def create(i):
        barrier.wait()
        if place.create("leases/r.1.json", f"mine {i}"):
            won.append(f"mine {i}")

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [place.read("leases/r.1.json")]


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    full = tmp_path / "study" / "leases"
    full.mkdir(parents=True)
    place = files.Folder(tmp_path / "study")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # to the writer the same
    try:
        with pytest.raises(OSError):
            place.create("leases/r.1.json", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list(full.iterdir())


def test_a_store_that_overwrites_what_it_should_create_is_seen_through(bucket, monkeypatch):
    """As old ones do: both are told that they wrote, and the last one's text is there."""
    monkeypatch.setattr(files, "SECONDS_TO_SETTLE", 0.2)
    filesystem = fsspec.filesystem("memory")
    pipe = filesystem.pipe_file
    monkeypatch.setattr(
        filesystem, "pipe_file", lambda path, value, mode="overwrite": pipe(path, value)
    )
    one, other, told = files.Bucket(bucket), files.Bucket(bucket), []
    first = threading.Thread(target=lambda: told.append(one.create("x", "one")))
    first.start()
    assert other.create("x", "other") != (first.join() or told[0])


def sweep(workdir):
    store = Store(workdir)
    store.claim(CONFIG)
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    backend = Inline("fake_trainer:train")
    code = command_line.run(Study(CONFIG, store), backend, console)
    return code, store, console.export_text()


def test_a_study_in_a_bucket_is_the_same_and_seen_from_another_machine(
    bucket, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    _, folder, _ = sweep(tmp_path / "study")
    code, here, _ = sweep(bucket)
    assert code == 0 and here.place == bucket
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    code, there, printed = sweep(bucket)
    assert code == 0 and "nothing was trained" in printed
    assert there.workdir != here.workdir
    for name in ("runs.csv", "curves.csv"):
        tables = {(store.workdir / name).read_text() for store in (folder, here, there)}
        assert tables == {here.files.read(name)}
    assert len(list(csv.reader(tables.pop().splitlines()))) > 10


LAUNCHER = """
import sys
from rich.console import Console
from lm.sweep import __main__ as command_line
from lm.sweep.backends import Processes
from lm.sweep.launch import Study
from lm.sweep.store import Store
store = Store(sys.argv[1])
backend = Processes(1, store.workdir / "workers.log", "fake_trainer:train")
sys.exit(command_line.run(Study(store.config(), store), backend, Console()))
"""


@pytest.mark.slow
def test_two_machines_share_a_study_in_s3(tmp_path, monkeypatch):
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    s3 = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PYTHONPATH": os.pathsep.join(paths),
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    url = "s3://bucket/study"
    Store(url).claim(CONFIG)
    command = [sys.executable, "-c", LAUNCHER, url]
    caches = [{**os.environ, "XDG_CACHE_HOME": str(tmp_path / str(i))} for i in range(2)]
    launchers = [subprocess.Popen(command, env=cache) for cache in caches]
    assert [launcher.wait() for launcher in launchers] == [0, 0]
    seen = Store(url)
    attempts = [json.loads(seen.files.read(name)) for name in seen.files.names("leases")]
    rows = list(csv.DictReader(seen.files.read("runs.csv").splitlines()))
    s3.stop()
    assert [attempt["end"] for attempt in attempts] == ["done"] * len(rows) and len(rows) == 10
    assert len({attempt["owner"] for attempt in attempts}) == 2


def test_a_place_that_is_none_is_refused():
    with pytest.raises(BadInput, match="--workdir=nowhere://x/y: "):
        Store("nowhere://x/y")
