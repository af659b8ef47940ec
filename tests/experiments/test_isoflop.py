"""The studies' calibration: trials that the sweeps' own ladder has."""

import importlib.util
from pathlib import Path

import pytest

from lm.config_file import load

ROOT = Path(__file__).resolve().parents[2]


def _module(name):
    path = ROOT / "experiments" / "isoflop" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"isoflop_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["quick", "full"])
def test_trials_of_a_calibration_can_be_run(monkeypatch, study):
    monkeypatch.chdir(ROOT)
    calibrate = _module("calibrate")
    config = load(f"configs/isoflop_cpu.py:{study}")
    trials = calibrate.trials(config, study)
    assert len(set(trials)) == len(trials)
    for trial in trials:
        made = calibrate.as_config(config, trial)
        assert (made.model.d_model, made.model.n_layers) == (trial.d_model, trial.n_layers)
        assert made.optimizer.learning_rate == trial.rate
        assert (made.train.flops, made.train.seed) == (trial.flops, trial.seed)
    rates = {trial.rate for trial in trials}
    assert len(rates) >= (5 if study == "full" else 3)
