import math
from pathlib import Path

import pytest

from lm import arithmetic
from lm.command import BadInput
from lm.config import MESH_AXES, replace
from lm.config_file import load
from lm.estimate.memory import device_memory
from lm.estimate.roofline import roofline
from lm.estimate.study import largest_run, planned, training
from lm.hardware import PEAK_FLOPS, topology
from lm.sharding import axis_sizes
from lm.sweep import grid
from lm.train.recipe import resolve


@pytest.fixture
def study(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    return load("configs/isoflop_tpu.py:1e20", ["sweep.budgets=(1e18,1e19,1e20)"])


def test_the_plan_is_the_sweeps_when_every_minimum_comes_where_the_prior_expects_it(study):
    losses, budgets = {}, ()
    while len(budgets) < 3:
        budgets = grid.plan(study, losses)
        newest = budgets[-1]
        losses |= {
            run.run_id: 2 + math.log(run.params / newest.expected) ** 2 for run in newest.runs
        }
    for budget in budgets:
        assert planned(study, budget.flops) == [run.config for run in budget.runs]
    assert largest_run(study) == budgets[-1].runs[-1].config


def test_flops_are_those_of_the_budgets_in_whole_batches(study):
    found = training(study)
    assert found["runs"] == 27 and "days" not in found
    assert found["flops"] == pytest.approx(9 * (1e18 + 1e19 + 1e20), rel=1e-3)
    assert found["flops"] == pytest.approx(sum(b["flops"] for b in found["budgets"]))
    for budget in found["budgets"]:
        spent = [
            6 * n * d for n, d in zip(budget["params"], reversed(budget["tokens"]), strict=True)
        ]
        assert all(c < budget["budget"] for c in spent)  # exact FLOPs count attention's too


def test_time_and_money_at_a_given_share_of_the_peak(study):
    found = training(study, "h100", 8, mfu=0.5, price=2.0)
    seconds = found["flops"] / (0.5 * 989e12 * 8)
    assert found["days"] == pytest.approx(seconds / 86_400)
    assert found["dollars"] == pytest.approx(2 * 8 * seconds / 3600)
    assert (found["mfu"], found["mfu_from"]) == (pytest.approx(0.5), "given")
    assumed = training(study, "h100", 8)
    assert (assumed["mfu"], assumed["mfu_from"]) == (pytest.approx(0.4), "assumed")
    assert assumed["dollars"] is None


def test_time_by_the_roofline_and_bytes_are_those_of_every_run(study):
    on = topology("v5e:2x4")
    found = training(study, "v5e", 8, on)
    sizes = dict(zip(MESH_AXES, axis_sizes(study.mesh, 8), strict=True))
    total = 0.0
    for budget in found["budgets"]:
        runs = planned(study, budget["budget"])
        rows = [resolve(run, 8).sequences for run in runs]
        assert budget["sequences"] == [min(rows), max(rows)]
        assert budget["bytes_per_chip"] == int(
            max(device_memory(run, sizes, n).total for run, n in zip(runs, rows, strict=True))
        )
        total += sum(
            resolve(run, 8).n_steps * roofline(run, on, sizes, n).step_seconds
            for run, n in zip(runs, rows, strict=True)
        )
    assert found["days"] == pytest.approx(total / 86_400)
    assert found["mfu"] == pytest.approx(found["flops"] / (total * 8 * PEAK_FLOPS["v5e"]))
    assert all(b["fits"] for b in found["budgets"]) and found["mfu_from"] == "roofline"
    whole = replace(study, mesh={"zero": 0})
    assert not training(whole, "v5e", 8, on)["budgets"][-1]["fits"]


def test_a_mesh_off_the_torus_has_no_time_but_at_a_given_share(study):
    off = replace(study, mesh={"data": 1, "context": 8})
    twice = topology("2*v5e:2x2")
    assert training(off, "v5e", 8, twice)["days"] is None
    assert training(off, "v5e", 8, twice)["dollars"] is None
    assert training(off, "v5e", 8, twice, mfu=0.4)["days"] > 0


def test_one_run_is_its_own_study(study):
    run = largest_run(study)
    found = training(run, "v5p", 8)
    flops = arithmetic.training_flops(run.model, 2_048, resolve(run, 8).tokens)
    assert (found["runs"], found["flops"]) == (1, pytest.approx(flops))
    assert largest_run(run) is run


def test_a_mesh_that_the_chips_do_not_fill_is_refused(study):
    with pytest.raises(BadInput, match="must multiply to the 8 devices"):
        training(replace(study, mesh={"data": 3}), "h100", 8)
