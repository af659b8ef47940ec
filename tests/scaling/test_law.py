import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lm.scaling.kaplan import KaplanLaw
from lm.scaling.law import PowerLawAllocation, TokensPerParameter, minimise_on_log_grid, positive


def test_twenty_tokens_a_parameter_is_exact():
    best = TokensPerParameter(20).optimum(1.2e24)
    assert (best.params, best.tokens) == (1e11, 2e12)


def test_ten_times_the_compute_grows_both_by_root_ten():
    small, large = (TokensPerParameter(20).optimum(c) for c in (1e21, 1e22))
    assert large.params / small.params == pytest.approx(10**0.5, rel=1e-14)
    assert large.tokens / small.tokens == pytest.approx(10**0.5, rel=1e-14)


def test_an_allocation_spends_its_budget_unless_it_has_its_own_tokens():
    budgets = np.array([1e18, 1e21])
    best = PowerLawAllocation(0.1, 0.5).optimum(budgets)
    np.testing.assert_allclose(6 * best.params * best.tokens, budgets)
    assert np.isnan(best.loss)
    own = PowerLawAllocation(0.1, 0.5, 2.0, 0.5).optimum(budgets)
    np.testing.assert_allclose(own.tokens, 2.0 * budgets**0.5)


def test_the_zooming_grid_agrees_with_scipy():
    centres = np.array([1e3, 2.5e7])
    found = minimise_on_log_grid(lambda x: np.log(x / centres) ** 2 + 1, np.array([1.0, 1e2]), 1e12)
    for x, centre in zip(found, centres, strict=True):
        scipy = minimize_scalar(
            lambda t, c=centre: (t - np.log(c)) ** 2 + 1, options={"xtol": 1e-9}
        )
        assert np.log(x) == pytest.approx(scipy.x, abs=1e-6)


def test_a_minimum_at_the_edge_of_the_grid_is_returned():
    assert minimise_on_log_grid(lambda x: x, 2.0, 1e9) == pytest.approx(2.0)


def test_fit_recovers_constants_that_are_far_from_the_first_guess():
    true = KaplanLaw(N_c=2e13, D_c=6e13, alpha_N=0.09, alpha_D=0.12)
    params, tokens = (x.ravel() for x in np.meshgrid(np.logspace(5, 9, 6), np.logspace(7, 11, 6)))
    fitted = KaplanLaw().fit(params, tokens, loss=true.loss(params, tokens))
    for name in ("N_c", "D_c", "alpha_N", "alpha_D"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-4)
    assert "36 runs" in fitted.source


def test_fit_shrugs_off_an_outlier_and_holds_what_is_not_free():
    true = KaplanLaw(N_c=9e13)
    params, tokens = (x.ravel() for x in np.meshgrid(np.logspace(5, 9, 6), np.logspace(7, 11, 6)))
    loss = true.loss(params, tokens)
    loss[7] *= 2
    fitted = KaplanLaw().fit(params, tokens, loss=loss, free=("N_c",))
    assert fitted.N_c == pytest.approx(9e13, rel=1e-2)
    assert fitted.alpha_D == KaplanLaw().alpha_D


def test_fit_refuses_too_few_runs_and_losses_that_are_not_positive():
    with pytest.raises(ValueError, match="3 runs cannot determine 4"):
        KaplanLaw().fit([1e6] * 3, [1e9] * 3, loss=[3.0] * 3)
    with pytest.raises(ValueError, match="loss must be positive"):
        KaplanLaw().fit([1e6] * 4, [1e9] * 4, loss=[3.0, 3.0, 3.0, -1.0])


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan])
def test_positive_names_what_is_not(bad):
    with pytest.raises(ValueError, match="flops must be positive"):
        positive([1.0, bad], "flops")
