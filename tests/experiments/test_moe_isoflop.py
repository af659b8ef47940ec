"""The study of experts: what it compares costs the same, and how it reads a multiplier."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from lm import arithmetic
from lm.config_file import load
from lm.scaling import RunTable
from lm.sweep import grid

ROOT = Path(__file__).resolve().parents[2]
STUDY = "experiments/moe_isoflop/study.py"


@pytest.fixture(scope="module")
def run():
    path = ROOT / "experiments" / "moe_isoflop" / "run.py"
    spec = importlib.util.spec_from_file_location("moe_isoflop_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kinds_differ_in_their_experts_alone(monkeypatch, run):
    monkeypatch.chdir(ROOT)
    configs = {kind: load(f"{STUDY}:{kind}") for kind in run.KINDS}
    rungs = {kind: grid.ladder(config)[3] for kind, config in configs.items()}
    cost = {kind: arithmetic.flops_per_token(rung.model, 128) for kind, rung in rungs.items()}
    d, layers = rungs["dense"].model.d_model, rungs["dense"].model.n_layers
    assert cost["top1"] - cost["dense"] == 6 * layers * 8 * d  # the routers
    assert cost["fine"] - cost["dense"] == 6 * layers * 16 * d
    fine, top1 = (arithmetic.parameters(rungs[kind].model) for kind in ("fine", "top1"))
    assert fine.feed_forward == top1.feed_forward
    assert len({(c.optimizer, c.train, c.data, c.sweep) for c in configs.values()}) == 1
    for name in run.BALANCES:
        assert load(f"{STUDY}:collapse_{name}").model.moe.top_k == 1


def test_a_multiplier_is_the_compute_that_dense_minima_need(run):
    """Losses on parabolas whose minima follow C^-0.1; experts as good as dense at 3 x C."""

    def table(gain):
        budget = np.repeat([1e10, 1e11, 1e12], 10)
        best = 1e3 * (budget / 1e10) ** 0.5
        params = best * np.tile(np.repeat([0.25, 0.5, 1.0, 2.0, 4.0], 2), 3)
        loss = 20 * (gain * budget) ** -0.1 + 0.05 * np.log(params / best) ** 2
        loss += np.tile([1e-5, -1e-5], 15)  # two seeds
        return RunTable.from_arrays(
            loss=loss, params=params, tokens=budget / (6 * params), budget=budget, seed=budget * 0
        )

    dense, experts = run.minima(table(1.0)), run.minima(table(3.0))
    for budget in (1e10, 1e11):
        found = run.dense_flops_at(experts[budget][1], dense) / budget
        assert found == pytest.approx(3, rel=1e-3)
        assert experts[budget][0] == pytest.approx(1e3 * (budget / 1e10) ** 0.5, rel=1e-3)
    drawn = run.resampled(table(1.0), np.random.default_rng(0))
    assert np.abs(drawn - table(1.0).loss).max() < 3e-5
