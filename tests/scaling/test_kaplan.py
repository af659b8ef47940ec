import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lm.scaling.kaplan import (
    L_OF_C,
    L_OF_C_MIN,
    L_OF_D,
    L_OF_N,
    PF_DAY,
    CriticalBatch,
    KaplanAllocation,
    KaplanLaw,
    LearningCurve,
    PowerLaw,
)


def test_single_resource_laws_invert():
    for law in (L_OF_N, L_OF_D, L_OF_C, L_OF_C_MIN):
        assert law.x_for_loss(law.loss(1e10)) == pytest.approx(1e10)
        assert law.loss(law.x_c) == 1


def test_a_power_law_is_a_line_in_logs_with_its_exponent():
    n = np.logspace(3, 9, 7)
    slope = np.polyfit(np.log(n), np.log(L_OF_N.loss(n)), 1)[0]
    assert slope == pytest.approx(-0.076)
    fitted = PowerLaw(1e13, 0.1).fit(n, loss=L_OF_N.loss(n))
    assert (fitted.x_c, fitted.exponent) == pytest.approx((8.8e13, 0.076), rel=1e-3)


def test_joint_law_tends_to_each_single_one():
    law = KaplanLaw()
    assert law.loss(1e9, 1e30) == pytest.approx((law.N_c / 1e9) ** law.alpha_N, rel=1e-6)
    assert law.loss(1e40, 1e9) == pytest.approx((law.D_c / 1e9) ** law.alpha_D, rel=1e-4)


def test_joint_law_optimum_is_the_minimum_along_the_budget():
    law, flops = KaplanLaw(), 1e21
    best = law.optimum(flops)
    found = minimize_scalar(
        lambda t: law.loss(np.exp(t), flops / (6 * np.exp(t))),
        bounds=(10, 40),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert np.log(best.params) == pytest.approx(found.x, abs=1e-5)
    assert 6 * best.params * best.tokens == pytest.approx(flops)


def test_tokens_against_overfitting_follow_the_printed_rule():
    n = np.array([1e6, 1e9])
    needed = KaplanLaw().tokens_against_overfitting(n)
    np.testing.assert_allclose(needed, 5e3 * n**0.74, rtol=0.15)
    # The definition: the loss is 2 % above that of unlimited data.
    law = KaplanLaw()
    np.testing.assert_allclose(law.loss(n, needed) / law.loss(n, 1e40), 1.02, rtol=1e-9)


def test_critical_batch_and_its_two_adjustments():
    batch = CriticalBatch()
    critical = batch.tokens(3.0)
    assert critical == pytest.approx(2.1e8 / 3.0 ** (1 / 0.21))
    assert batch.min_steps(1000, critical, 3.0) == pytest.approx(500)
    assert batch.min_flops(1e18, critical, 3.0) == pytest.approx(5e17)
    assert batch.min_steps(1000, 1e6 * critical, 3.0) == pytest.approx(1000, rel=1e-5)
    assert batch.min_flops(1e18, 1e-6 * critical, 3.0) == pytest.approx(1e18, rel=1e-5)


def test_learning_curve_optimum_is_the_minimum_at_fixed_minimal_compute():
    law, batch, flops = LearningCurve(), CriticalBatch(), 1e20

    def loss_at(log_params):
        # S_min = C_min / (6 N B_crit(L)) holds L itself: iterate the fixed point from above.
        loss, params = 5.0, np.exp(log_params)
        for _ in range(500):
            steps = flops / (6 * params * batch.tokens(loss))
            loss = law.loss(params, steps)
        return loss

    found = minimize_scalar(loss_at, bounds=(np.log(1e8), np.log(4e9)), method="bounded")
    best = law.optimum(flops, batch)
    assert best.loss == pytest.approx(found.fun, rel=1e-6)
    assert np.log(best.params) == pytest.approx(found.x, abs=0.02)


def test_compute_exponent_is_the_papers():
    assert 0.052 < LearningCurve().compute_exponent() < 0.054
    budgets = np.array([1e19, 1e22])
    best = LearningCurve().optimum(budgets)
    slope = np.diff(np.log(best.loss)) / np.diff(np.log(budgets))
    assert slope == pytest.approx(-LearningCurve().compute_exponent())
    # alpha_C / alpha_N: the theory's version of the fitted 0.73.
    growth = np.diff(np.log(best.params)) / np.diff(np.log(budgets))
    assert growth == pytest.approx(LearningCurve().compute_exponent() / 0.077)


def test_allocation_is_the_printed_one_and_spends_the_budget():
    best = KaplanAllocation().optimum(np.array([PF_DAY, 10 * PF_DAY]))
    assert best.params[0] == pytest.approx(1.3e9)
    assert best.params[1] / best.params[0] == pytest.approx(10**0.73)
    np.testing.assert_allclose(6 * best.params * best.tokens, best.flops)
    # Their own token rule, rounded apart, would spend 1.81 times the budget.
    assert 6 * 1.3e9 * 2e10 / PF_DAY == pytest.approx(1.81, abs=0.005)


def test_batch_and_steps_at_one_petaflop_day_are_the_printed_coefficients():
    assert KaplanAllocation().batch_tokens(PF_DAY) == 2.0e6
    assert KaplanAllocation().min_steps(PF_DAY) == 5.4e3
    assert KaplanAllocation().batch_tokens(1e3 * PF_DAY) == pytest.approx(2.0e6 * 10**0.72)
