"""The command: what it refuses, what it shows, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lm import command
from lm.config import Config, SweepConfig, TrainConfig, to_dict
from lm.sweep import __main__ as sweep
from lm.sweep import display, launch
from lm.sweep.store import Store

ROOT = Path(__file__).parents[2]
FILE = """
from lm.config import Config, to_config_dict

def get_config():
    config = to_config_dict(Config())
    config.data.corpus = "text"
    config.data.files = "{files}"
    config.data.data_dir = "{data}"
    config.data.seq_len = 64
    config.data.validation_tokens = 1024
    config.train.batch_tokens = 512.0
    config.train.checkpoint_every = -1
    config.train.tensorboard = False
    config.sweep.budgets = (2e8, 4e8)
    config.sweep.sizes = 2
    config.sweep.widths = (8, 16, 24)
    config.sweep.first_optimum = 10_000.0
    config.sweep.spread = 2.0
    return config
"""


@pytest.fixture
def config_file(tmp_path, text_data):
    path = tmp_path / "study.py"
    path.write_text(FILE.format(files=text_data.files, data=text_data.data_dir))
    return path


def call(capsys, *arguments):
    code = command.run(sweep.main, sweep.FLAGS, sweep.__doc__, ["lm.sweep", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--workdir is missing"),
        (["--workdir="], "--workdir is missing"),
        (["--workdir={c}", "--config={c}"], "is a file; a folder is needed"),
        (["--workdir={w}"], "--config is missing"),
        (["--workdir={w}", "--status"], "no study here"),
        (["--workdir={w}", "--config={c}", "--backend=rey"], "--backend"),
        (["--workdir={w}", "--config={c}", "--workers=1000"], "--workers=1000: must be at most"),
        (["--workdir={w}", "--config={c}", "--backend=slurm"], "say how many jobs"),
        (["--workdir={w}", "--config={c}", "--backend=ray", "--cpus=0"], "--cpus=0"),
        (
            ["--workdir={w}", "--config={c}", "--backend=slurm", "--engine_option=partition"],
            "must be written NAME=VALUE",
        ),
        (["--workdir={w}", "--config={c}", "--config.sweep.sizes=9"], "only 3 shapes"),
        (["--workdir={w}", "--config={c}", "--config.sweep.budgets=()"], "at least one budget"),
        (["--workdir={w}", "--config={c}", "--config.data.files=nowhere/*.txt"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, told, config_file, tmp_path, capsys):
    workdir = tmp_path / "out"
    given = [a.format(w=workdir, c=config_file) for a in arguments]
    code, out, err = call(capsys, *given)
    assert code == 2 and told in err and err.count("\n") == 1 and out == ""
    assert not workdir.exists()


def test_a_changed_study_is_refused(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "run", lambda *_: 0)
    workdir = tmp_path / "out"
    assert call(capsys, f"--workdir={workdir}", f"--config={config_file}")[0] == 0
    changed = "--config.optimizer.learning_rate=0.1"
    code, _, err = call(capsys, f"--workdir={workdir}", f"--config={config_file}", changed)
    assert code == 2 and "config.optimizer.learning_rate: 0.003 -> 0.1" in err


def begun_study(workdir):
    """A study of which one run is done, one failed, one set aside and one is under way."""
    sweep_config = SweepConfig(budgets=(1e9, 1e10), sizes=4, widths=(8, 16, 24, 32))
    config = Config(sweep=sweep_config, train=TrainConfig(batch_tokens=1024.0))
    store = Store(workdir)
    store.claim(config)
    study = launch.Study(config, store)
    study.refresh()
    done, failed, set_aside, under_way = study.runs.values()
    store.folder(done.run_id).mkdir(parents=True)
    written = json.dumps({"schema": 1, "config": to_dict(done.config)})
    (store.folder(done.run_id) / "config.json").write_text(written)
    result = {"status": "done", "loss": 2.345, "flops": 1e9, "tokens": 10, "params": done.params}
    result |= {"wall_seconds": 60.0, "step_seconds": 45.0}
    (store.folder(done.run_id) / "result.json").write_text(json.dumps(result))
    for run, end, reason in [
        (failed, "failed", "MemoryError: no room"),
        *[(set_aside, "died", "its worker ended by SIGKILL: step 5")] * 3,
    ]:
        store.leases.claim(run.run_id)
        store.leases.end(run.run_id, end, reason, ("compiling", "step 5"))
    elsewhere = Store(workdir, "another-host:17")
    elsewhere.leases.claim(under_way.run_id)
    study.refresh()
    return study, failed.run_id, set_aside.run_id, under_way.run_id


def test_status(tmp_path, capsys):
    _, failed, set_aside, under_way = begun_study(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, out, _ = call(capsys, f"--workdir={tmp_path}", "--status")
    assert code == 0
    assert f"failed: {failed}: MemoryError: no room" in out
    assert f"set aside: {set_aside}: its worker ended by SIGKILL: step 5" in out
    assert "    compiling\n    step 5\n" in out
    assert f"running: {under_way} (another-host:17)" in out
    # One worker, of which 1e9 FLOPs took a minute, has 43e9 before it.
    assert "2 % of 4.4e+10 FLOPs done, 0:43:00 left, goodput 75 %" in out
    line = next(line for line in out.splitlines() if "1e+09" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][1:5] == ["1/4", "1", "1", "1"]
    assert "2.3450" in line
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_status_counts_what_runs_elsewhere_have_done(tmp_path, capsys):
    study, _, _, under_way = begun_study(tmp_path)
    elsewhere = Store(tmp_path, "another-host:18")
    elsewhere.leases.look()
    elsewhere.leases.forgive(study.where("failed")[0])
    second = study.where("failed")[0]
    elsewhere.leases.claim(second)
    # Half of 1e9 in 20 s, and the same of the other: 5e7 a second, with 42e9 before them.
    for run_id in (under_way, second):
        progress = {"step": 5, "n_steps": 10, "flops": 5e8, "loss": 3.21, "seconds_left": 20.0}
        name = f"leases/{run_id}.{1 if run_id == under_way else 3}.json"
        attempt = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(attempt | {"progress": progress}))
    _, out, _ = call(capsys, f"--workdir={tmp_path}", "--status")
    assert "5 % of 4.4e+10 FLOPs done, 0:14:00 left" in out
    assert f"{under_way} (another-host:17)  step 5/10  loss 3.210  0:00:20 left" in out


def test_the_live_picture(tmp_path):
    study, _, _, under_way = begun_study(tmp_path)
    progress = {"step": 5, "n_steps": 10, "flops": 5e8, "loss": 3.21, "seconds_left": 7.0}
    study.running = {under_way: progress}
    study.started -= 60
    console = Console(force_terminal=True, width=120, file=open(os.devnull, "w"), record=True)
    with display.Display(console) as show:
        show(study, "a run ended")
    seen = console.export_text()
    assert "a run ended" in seen
    assert "1/8 runs, 3 % of 4.40e+10 FLOPs, 0:01:00, 0:28:" in seen
    line = next(line for line in seen.splitlines() if line.startswith(f" {under_way} ━"))
    assert line.rstrip().endswith("━ step 5/10  loss 3.210  0:00:07 left")


def test_seconds_left_are_by_the_flops_of_this_call(tmp_path, monkeypatch):
    study, _, _, under_way = begun_study(tmp_path)
    study.done_at_start = set(study.store.losses())
    assert study.seconds_left() is None
    study.running = {under_way: {"flops": 1e9}}
    monkeypatch.setattr(launch.time, "monotonic", lambda: study.started + 10)
    assert study.seconds_left() == pytest.approx(10 * 42, rel=0.01)


def test_the_account_adds_up(tmp_path):
    study, *_ = begun_study(tmp_path)
    row = study.store.rows()[0]
    study.trained = {row["run_id"]}
    row.update(
        step_seconds=40.0,
        compile_seconds=5.0,
        evaluate_seconds=2.0,
        lost_seconds=1.0,
        wall_seconds=50.0,
    )
    account = launch.account(study, workers=2, wall_seconds=30.0)
    assert account["overhead"] == pytest.approx(60 / 40)
    assert sum(account["seconds"].values()) == pytest.approx(60)
    assert account["seconds"]["other"] == pytest.approx(2)
    assert account["seconds"]["between runs"] == pytest.approx(10)
    assert display.accounting_line(account) == (
        "goodput 66.7 % of 2 workers x 30.0 s"
        " (compile 8.3 %, evaluate 3.3 %, lost 1.7 %, other 3.3 %, between runs 16.7 %)"
    )
    assert json.loads((tmp_path / "calls.jsonl").read_text())["overhead"] == account["overhead"]


def test_the_launcher_of_processes_does_not_import_jax(tmp_path):
    script = "import sys, lm.sweep.__main__, lm.data; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


LAUNCHER = """
import sys
from pathlib import Path
from rich.console import Console
from lm.sweep import __main__ as sweep
from lm.sweep.backends import Processes
from lm.sweep.launch import Study
from lm.sweep.store import Store
store = Store(sys.argv[1])
study = Study(store.config(), store)
backend = Processes(1, store.workdir / "workers.log", "sleeping_trainer:train")
sys.exit(sweep.run(study, backend, Console()))
"""
SLEEPER = """
import os, time
from pathlib import Path
def train(config, workdir, **_):
    (Path(workdir) / "pid").write_text(str(os.getpid()))
    time.sleep(100)
"""


@pytest.mark.parametrize(
    "how, code", [(signal.SIGINT, 75), (signal.SIGTERM, 75), (signal.SIGKILL, -9)]
)
def test_no_worker_outlives_its_launcher(how, code, tmp_path):
    sweep_config = SweepConfig(budgets=(1e9,), sizes=3, widths=(8, 16, 24, 32))
    Store(tmp_path).claim(Config(sweep=sweep_config))
    (tmp_path / "sleeping_trainer.py").write_text(SLEEPER)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    # A shell script's background jobs ignore SIGINT, and so do their children.
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"] if how == signal.SIGTERM else []
    launcher = subprocess.Popen(
        [*ignoring, sys.executable, "-c", LAUNCHER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    worker = int(_wait_for(lambda: [p.read_text() for p in tmp_path.glob("runs/*/pid")][0]))
    # Ctrl-C goes to every process of the terminal's group; kill to one.
    (os.killpg if how == signal.SIGINT else os.kill)(launcher.pid, how)
    printed, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == code
    assert ("the same command goes on" in printed) == (code == 75)
    _wait_for(lambda: not Path(f"/proc/{worker}").exists())


def _wait_for(condition):
    for _ in range(300):
        try:
            if found := condition():
                return found
        except (IndexError, ValueError):
            pass
        time.sleep(0.1)
    raise AssertionError("waited 30 s in vain")


@pytest.mark.slow
def test_a_real_sweep_in_processes_equals_one_inline(config_file, tmp_path, capsys):
    tables = []
    for backend in ("inline", "processes"):
        workdir = tmp_path / backend
        arguments = f"--config={config_file}", f"--workdir={workdir}", f"--backend={backend}"
        process = subprocess.run(
            [sys.executable, "-m", "lm.sweep", *arguments],
            cwd=ROOT,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        store = Store(workdir)
        store.scan()
        tables.append({r["run_id"]: (r["params"], r["tokens"]) for r in store.rows()})
        assert all(1 < r["loss"] < 6 and r["status"] == "done" for r in store.rows())
    assert tables[0] == tables[1] and len(tables[0]) == 4


@pytest.mark.parametrize(
    "override, says",
    [
        ("--config.train.accumulation=7", "times train.accumulation = 7"),
        ("--config.model.vocab_size=100", "model.vocab_size = 100: must be at least"),
    ],
)
def test_what_no_run_could_train_is_refused_before_anything_is_written(
    override, says, text_data, tmp_path, capsys
):
    argv = [
        "lm.sweep",
        "--config=configs/isoflop_cpu.py:smoke",
        f"--workdir={tmp_path / 'study'}",
        "--config.train.batch_rule=fixed",
        "--config.train.batch_tokens=256",
        "--config.data.corpus=text",
        f"--config.data.files={text_data.files}",
        f"--config.data.data_dir={text_data.data_dir}",
        "--config.data.seq_len=64",
        "--config.data.validation_tokens=1024",
        override,
    ]
    assert command.run(sweep.main, sweep.FLAGS, sweep.__doc__, argv) == command.BAD_INPUT
    assert says in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
