"""What a checkpoint costs, measured in a small run."""

import importlib

import numpy as np
import pytest


def test_the_error_of_a_ratio_is_that_of_its_medians():
    run = importlib.import_module("experiments.checkpoint_cost.run")
    assert run.ratio([3.0] * 5, [2.0] * 5) == (1.5, 0.0)
    times = np.random.default_rng(1).normal(10.0, 1.0, 400)
    _, error = run.ratio(list(times), [10.0])
    assert error == pytest.approx(np.sqrt(np.pi / 2) * 0.1 / 20, rel=0.25)  # of a normal's median


@pytest.mark.slow
def test_intervals_with_and_without_a_checkpoint_are_those_after_the_first_two(
    monkeypatch, tmp_path
):
    run = importlib.import_module("experiments.checkpoint_cost.run")
    small = {"d_model": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 128}
    monkeypatch.setattr(run, "MODEL", run.MODEL | small)
    found = run.saving(tmp_path, 600)
    assert [len(found[key]) for key in ("seconds_with_a_checkpoint", "seconds_without")] == [2, 2]
    assert min(found["seconds_with_a_checkpoint"] + found["seconds_without"]) > 0
