import numpy as np
import pytest

from lm.scaling.parametric import BESIROGLU2024
from lm.scaling.sweep_design import plan_sweep, simulate

LAW = BESIROGLU2024


def test_without_noise_or_misplacement_only_the_curves_asymmetry_is_left():
    design = simulate(LAW, np.geomspace(1e17, 1e19, 4), 7, noise=0.0, misplaced=0.0, draws=3)
    assert design.half_width == pytest.approx(abs(design.bias))
    assert design.half_width < 0.01 and design.refused == 0


def test_half_width_grows_with_noise_and_counts_the_runs():
    budgets = np.geomspace(1e17, 1e19, 5)
    quiet, loud = (simulate(LAW, budgets, 7, noise=s, draws=40) for s in (0.001, 0.01))
    assert 3 < loud.half_width / quiet.half_width < 30
    assert quiet.runs == 35
    assert quiet.total_flops == pytest.approx(7 * budgets.sum())


def test_half_width_agrees_with_a_plain_numpy_simulation():
    budgets, x = np.geomspace(1e17, 1e19, 4), np.linspace(-np.log(6), np.log(6), 7)
    design = simulate(LAW, budgets, 7, noise=0.003, misplaced=0.0, draws=150)
    rng, errors = np.random.default_rng(1), []
    for _ in range(2000):
        minima = []
        for flops in budgets:
            centre = np.log(LAW.optimum(flops).params)
            params = np.exp(centre + x)
            loss = LAW.loss(params, flops / (6 * params)) * (1 + 0.003 * rng.normal(size=7))
            c2, c1, _ = np.polyfit(x, loss, 2)
            minima.append(centre - c1 / (2 * c2))
        errors.append(np.polyfit(np.log(budgets), minima, 1)[0] - LAW.a)
    assert design.half_width == pytest.approx(np.quantile(np.abs(errors), 0.95), rel=0.25)
    assert abs(design.bias) < design.half_width / 2


def test_the_chosen_sweep_is_the_cheapest_that_suffices():
    best, tried = plan_sweep(LAW, 1e17, 1e19, 0.03, draws=20)
    assert best is tried[-1] and best.half_width <= 0.03
    assert all(a.total_flops <= b.total_flops for a, b in zip(tried, tried[1:], strict=False))
    assert all(design.half_width > 0.03 or design.refused > 0.05 for design in tried[:-1])


def test_what_cannot_be_reached_is_none_and_a_narrow_range_is_refused():
    best, tried = plan_sweep(LAW, 1e17, 1e18, 1e-5, draws=4)
    assert best is None and len(tried) == 9
    with pytest.raises(ValueError, match="factor of ten"):
        plan_sweep(LAW, 1e17, 5e17, 0.02)
