"""The campaign: goes on after the last trial, tells what was wrong; and its faults, once each."""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm import command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def campaign(monkeypatch, tmp_path, capsys):
    """(the module, a call of it into tmp_path / "out" -> (exit code, printed))"""
    monkeypatch.syspath_prepend(str(ROOT))
    run = importlib.import_module("experiments.fault_injection.run")

    def call(*arguments):
        given = (f"--workdir={tmp_path / 'broken'}", f"--out={tmp_path / 'out'}", *arguments)
        code = command.run(run.main, run.FLAGS, run.__doc__, ["run.py", *given])
        return code, capsys.readouterr().out

    return run, call


def fault(trial, why=""):
    return SimpleNamespace(
        FAULT="made up", TIMES=5, REQUIRED="nothing", COLUMNS=("faults", "measure", "wrong"),
        cannot_run=lambda: why, trial=trial, told=lambda rows: f"{rows[-1]['faults']} at last",
    )  # fmt: skip


def test_it_goes_on_after_the_last_trial_and_tells_what_was_wrong(campaign, monkeypatch, tmp_path):
    run, call = campaign
    seen = []

    def trial(number, folder):
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "left").touch()
        seen.append(number)
        if number == 1 and seen.count(1) == 1:
            raise KeyboardInterrupt
        if number == 2:
            raise RuntimeError("broken\nfor good")
        return {"faults": 2, "measure": number, "wrong": ""}

    monkeypatch.setattr(run, "commit_of_code", lambda: "abc")
    monkeypatch.setattr(run, "FAULTS", ("one", "none"))
    monkeypatch.setattr(
        run, "load", lambda name: fault(trial) if name == "one" else fault(None, "no root")
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text(f"before\n{run.BEGIN}old\n{run.END}after\n")
    with pytest.raises(KeyboardInterrupt):
        call()
    code, printed = call()
    assert seen == [0, 1, 1, 2] and code == 1
    assert "none: skipped, no root" in printed
    row = "| made up | 5 of 5 | nothing | 2 of 3 trials; 1 at last |\n"
    assert row in printed and row in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/README.md").read_text().endswith("after\n")
    with (tmp_path / "out/results/one.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["wrong"] for r in rows] == ["", "", "RuntimeError: broken"]
    assert {r["code"] for r in rows} == {"abc"} and "as of commit abc." in printed
    assert [p.name for p in (tmp_path / "broken/one").iterdir()] == ["2"]  # kept to be looked at
    assert call()[0] == 1 and seen == [0, 1, 1, 2]


SHORT = {  # what is made smaller of a fault for one trial of it
    "sweep_kills": {"KILLS": 2},
    "ray_node": {},
    "training_kills": {"MOMENTS": ("writing",)},
    "preemption": {"SIGNALS": 1},
    "damaged_checkpoints": {},
    "not_finite": {},
    "full_disk": {},
    "host_kills": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_each_fault_once(campaign, name, monkeypatch):
    run, call = campaign
    fault = run.load(name)
    if why := fault.cannot_run():
        pytest.skip(f"{name}: {why}")
    for setting, value in SHORT[name].items():
        monkeypatch.setattr(fault, setting, value)
    code, printed = call(f"--only={name}", "--times=1")
    print(printed, file=sys.stderr)
    assert code is None or code == 0, printed
    assert "1 of 1 trials" in printed


@pytest.mark.parametrize(
    "kind",
    ["config", "corpus", "csv", "law", pytest.param("folder", marks=pytest.mark.slow)],
)
def test_malformed_input_of_every_kind(campaign, kind, monkeypatch, tmp_path):
    malformed = campaign[0].load("malformed")
    monkeypatch.setattr(malformed, "OWN_PROCESS", 10**6)
    numbers = [n for n in range(1, malformed.TIMES) if malformed.chosen(n)[0] == kind]
    for number in numbers:
        (folder := tmp_path / str(number)).mkdir()
        row = malformed.trial(number, folder)
        assert row["kind"] == kind and not row["wrong"], row


def test_the_table_tells_what_checkpoints_cost(campaign, tmp_path):
    run, _ = campaign
    assert run.costs(tmp_path / "none.json") == []
    found = {
        "saving": {"cost": 0.0234, "cost_error": 0.01, "alone_cpu_cost": 0.02},
        "restoring": {"cold_seconds": 3.21, "warm_seconds": 1.0},
    }
    (tmp_path / "found.json").write_text(json.dumps(found))
    saving, restoring = run.costs(tmp_path / "found.json")
    assert saving.endswith("| 2.3 ± 1.0 %; 2.0 % of CPU time, measured alone |")
    assert restoring.endswith("<= 5 s | 3.2 s |")


def test_every_fault_is_in_the_table_and_no_file_is_forgotten(campaign):
    run, _ = campaign
    files = {path.stem for path in (ROOT / "experiments/fault_injection").glob("*.py")}
    faults = {name for name in files if hasattr(run.load(name), "FAULT")}
    assert faults == set(run.FAULTS)
