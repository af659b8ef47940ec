import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from lm.scaling.data_limited import MUENNIGHOFF2023

DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", Path(__file__).parents[3] / "shared" / "data"))
FIT_SET = DATA / "muennighoff2023_datablations" / "fit_set_182.csv"
needs_fit_set = pytest.mark.skipif(
    not FIT_SET.is_file(), reason="Muennighoff's 182 runs: set LM_PUBLISHED_RUNS"
)
LAW = MUENNIGHOFF2023


@pytest.fixture(scope="module")
def runs():
    with FIT_SET.open() as file:
        rows = list(csv.DictReader(file))
    return [np.array([float(row[key]) for row in rows]) for key in ("N", "D", "U_D", "loss")]


@needs_fit_set
def test_objective_at_the_published_point(runs):
    assert f"{LAW.objective(*runs):.7f}" == "0.0158259"


@needs_fit_set
def test_the_published_point_is_not_the_optimum(runs):
    fit = LAW.fit(*runs)
    assert fit.objective < 0.015810
    assert fit.objective == pytest.approx(fit.law.objective(*runs))
    # The profile is flat: any R_D* from 15 to 150 is within 0.5 % of the best.
    near = (fit.profile_r_tokens > 15) & (fit.profile_r_tokens < 150)
    assert np.all(fit.profile_objective[near] < 1.005 * fit.objective)


def test_base_law_has_twenty_tokens_a_parameter():
    best = LAW.base.optimum(np.array([1e18, 1e24]))
    np.testing.assert_allclose(best.tokens / best.params, 19.6, atol=0.05)


def test_one_epoch_is_the_base_law_and_epochs_saturate():
    assert LAW.effective_tokens(1e9, 1e10) == 1e9
    assert LAW.loss(2e7, 1e9, 1e9) == pytest.approx(LAW.base.loss(2e7, 1e9))
    # More parameters than the unique tokens call for decay in value even in one epoch.
    assert LAW.loss(1e9, 1e9, 1e9) > LAW.base.loss(1e9, 1e9)
    many = LAW.effective_tokens(1e30, 1e9)
    assert many == pytest.approx(1e9 * (1 + LAW.r_tokens))
    epochs = np.array([1, 2, 4, 8, 16, 100])
    assert np.all(np.diff(LAW.loss(1e8, epochs * 1e9, 1e9)) < 0)


def test_the_first_repeats_are_almost_as_good_as_new():
    # The derivative of D' at one epoch is 1; four epochs keep 90 % of their worth.
    assert LAW.effective_tokens(4e9, 1e9) / 4e9 == pytest.approx(0.932, abs=0.001)
    small = LAW.effective_tokens(1.001e9, 1e9) - 1e9
    assert small == pytest.approx(1e6, rel=1e-4)


def test_enough_unique_tokens_give_the_base_optimum():
    best, base = LAW.optimum(1e21, 1e13), LAW.base.optimum(1e21)
    assert best.params == pytest.approx(base.params, rel=1e-6)
    assert best.loss == pytest.approx(base.loss, rel=1e-12)


def test_optimum_is_the_minimum_and_prefers_epochs_to_parameters():
    best, base = LAW.optimum(1e21, 1e9), LAW.base.optimum(1e21)
    found = minimize_scalar(
        lambda t: LAW.loss(np.exp(t), 1e21 / (6 * np.exp(t)), 1e9),
        bounds=(np.log(1e8), np.log(1e11)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert best.loss == pytest.approx(found.fun, rel=1e-10)
    assert np.log(best.params) == pytest.approx(found.x, abs=1e-4)
    assert best.params < base.params and best.tokens > base.tokens


def test_optimum_broadcasts():
    best = LAW.optimum(np.array([[1e20], [1e21]]), np.array([1e9, 1e10, 1e14]))
    assert best.params.shape == (2, 3)
    np.testing.assert_allclose(6 * best.params * best.tokens, best.flops)
    assert np.all(np.diff(best.loss, axis=1) < 0)


def test_fit_recovers_the_decay_constants_of_synthetic_runs():
    true = replace(LAW, r_tokens=8.0, r_params=3.0)
    rng = np.random.default_rng(0)
    params, unique = 10 ** rng.uniform(7, 10, 150), 10 ** rng.uniform(8, 10, 150)
    tokens = unique * rng.choice([1, 2, 4, 10, 30, 100], 150)
    loss = true.loss(params, tokens, unique) * np.exp(rng.normal(0, 1e-3, 150))
    fit = LAW.fit(params, tokens, unique, loss)
    assert fit.law.r_tokens == pytest.approx(8.0, rel=0.02)
    assert fit.law.r_params == pytest.approx(3.0, rel=0.02)


def test_fit_without_repetition_is_refused():
    with pytest.raises(ValueError, match="0 runs repeat data"):
        LAW.fit([1e8] * 5, [1e9] * 5, [1e9] * 5, [3.0] * 5)
