import numpy as np
import pytest

from lm.scaling.intervals import (
    corrected_residuals,
    multinomial_counts,
    percentile_interval,
    uneven_noise,
)


def test_percentiles_hold_the_central_share():
    draws = np.arange(1001.0)
    assert percentile_interval(draws, 0.8) == pytest.approx((100, 900))
    assert percentile_interval(np.append(draws, np.nan), 0.95) == pytest.approx((25, 975))
    assert np.isnan(percentile_interval(np.array([1.0]), 0.8)).all()


def test_leverage_correction_restores_the_noise():
    rng = np.random.default_rng(0)
    basis = np.vander(np.linspace(-1, 1, 12), 5)
    noise = rng.normal(0, 0.1, (400, 12))
    residuals = noise - noise @ basis @ np.linalg.pinv(basis)
    raw = np.sqrt((residuals**2).mean())
    corrected = np.sqrt(np.mean([corrected_residuals(r, basis) ** 2 for r in residuals]))
    assert raw == pytest.approx(0.1 * np.sqrt(7 / 12), rel=0.03)
    # Centring costs a twelfth of the variance.
    assert corrected == pytest.approx(0.1 * np.sqrt(11 / 12), rel=0.05)


def test_least_squares_correction_is_the_textbook_one():
    basis = np.vander(np.linspace(-1, 1, 9), 3)
    residuals = np.random.default_rng(1).normal(size=9)
    hat = basis @ np.linalg.inv(basis.T @ basis) @ basis.T
    want = residuals / np.sqrt(1 - np.diag(hat))
    np.testing.assert_allclose(corrected_residuals(residuals, basis), want - want.mean())


def test_runs_that_a_huber_fit_passes_through_are_spread_out():
    basis = np.vander(np.linspace(-1, 1, 20), 3)
    residuals = np.random.default_rng(2).normal(0, 1, 20)
    residuals[[3, 9, 15]] = [1e-4, -2e-4, 1.5e-4]
    corrected = corrected_residuals(residuals, basis, delta=1e-3)
    stretch = (corrected + np.mean(residuals)) / residuals  # up to the centring
    far = np.abs(residuals) > 0.5
    assert np.abs(stretch[far] - 1).max() < 0.5
    near = corrected[[3, 9, 15]] - corrected[[3, 9, 15]].mean()
    assert np.ptp(near) > 1.2 * 3.5e-4


def test_counts_are_resamples_of_all_rows():
    counts = multinomial_counts(np.random.default_rng(0), 500, 12)
    assert counts.shape == (500, 12) and (counts.sum(1) == 12).all()
    assert counts.mean() == 1


def test_noise_that_grows_with_leverage_is_seen():
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 60)
    basis = np.vander(x, 3)
    even = [uneven_noise(rng.normal(size=60), basis) for _ in range(200)]
    assert np.mean(even) < 0.03
    assert uneven_noise(rng.normal(size=60) * (0.2 + x**2), basis)
    assert not uneven_noise(rng.normal(size=60) * (1.2 - x**2), basis)
