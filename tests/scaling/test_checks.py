import numpy as np
import pytest

from lm.scaling import (
    BESIROGLU2024,
    CannotFit,
    RunTable,
    fit_isoflop,
    fit_parametric,
    leave_highest_out,
    leave_top_budget_out,
)
from lm.scaling.objective import HOFFMANN_STARTS


def parametric(table):
    return fit_parametric(table, starts=HOFFMANN_STARTS[7::90], bootstrap=0)


def isoflop(table):
    return fit_isoflop(table, bootstrap=0)


def test_leaving_the_highest_out(noisy_table):
    runs = noisy_table()
    fits = dict(leave_highest_out(runs, parametric, (0, 4)))
    assert fits[0].n_points == 42 and fits[4].n_points == 38
    kept = runs.where(runs.loss < np.sort(runs.loss)[-4])
    assert fits[4].a == pytest.approx(parametric(kept).a)
    assert fits[0].a == pytest.approx(parametric(runs).a)


def test_the_top_budget_is_foreseen(noisy_table):
    runs = noisy_table()
    held = leave_top_budget_out(runs, parametric)
    assert held.flops == pytest.approx(1e21) and len(held.flops) == 7
    assert held.fit.n_points == 35
    above = runs.where(runs.flops > 9e20)
    want = np.log(held.fit.law.loss(above.params, above.tokens) / above.loss)
    np.testing.assert_allclose(held.log_loss_errors, want)
    assert np.abs(want).max() < 0.02  # noise 0.3 %
    law_optimum = BESIROGLU2024.optimum(1e21).params
    assert abs(held.log_params_error) < 0.5
    assert held.fit.optimal_params(1e21) == pytest.approx(law_optimum, rel=0.4)


def test_an_isoflop_fit_is_judged_on_its_optimum(noisy_table):
    runs = noisy_table()
    held = leave_top_budget_out(runs, isoflop)
    assert held.log_loss_errors.size == 0
    below, everything = held.fit, isoflop(runs)
    assert held.log_params_error == pytest.approx(
        np.log(below.optimal_params(1e21) / everything.optimal_params(1e21))
    )


def test_the_top_budget_by_its_column():
    flops = np.repeat([1e18, 1e19, 1e20], 4)
    uneven = flops * np.tile([0.7, 0.9, 1.0, 1.3], 3)
    params = 1e9 * np.sqrt(flops / 1e20) * np.tile([0.3, 0.8, 1.5, 4.0], 3)
    loss = BESIROGLU2024.loss(params, uneven / (6 * params))
    runs = RunTable.from_arrays(params=params, flops=uneven, loss=loss, budget=flops)
    held = leave_top_budget_out(runs, parametric)
    assert len(held.flops) == 4 and held.fit.n_points == 8
    # Without the column, the runs within 10 % of the highest.
    held = leave_top_budget_out(
        RunTable.from_arrays(
            params=params, flops=flops * np.tile([1.0, 0.95, 0.98, 1.0], 3), loss=loss
        ),
        parametric,
    )
    assert len(held.flops) == 4


def test_one_budget_cannot_be_held_out(noisy_table):
    with pytest.raises(CannotFit, match="one_budget"):
        leave_top_budget_out(noisy_table(budgets=1), isoflop)
