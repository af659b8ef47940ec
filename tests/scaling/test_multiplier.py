from dataclasses import replace

import numpy as np
import pytest

from lm.scaling.multiplier import compute_multiplier
from lm.scaling.parametric import HOFFMANN2022, ParametricLaw


def test_a_law_against_itself_is_one():
    assert compute_multiplier(HOFFMANN2022, HOFFMANN2022, flops=1e21).value == pytest.approx(1)


def test_a_recipe_worth_three_times_the_tokens_is_known_in_closed_form():
    # B's tokens count threefold: L_B(N, D) = L_A(N, 3 D), so A needs 3 C at any loss.
    better = replace(HOFFMANN2022, B=HOFFMANN2022.B / 3**HOFFMANN2022.beta)
    assert compute_multiplier(HOFFMANN2022, better, loss=2.3).value == pytest.approx(3)
    assert compute_multiplier(better, HOFFMANN2022, loss=2.3).value == pytest.approx(1 / 3)


def test_interval_of_a_known_spread():
    # Draws of B's recipe whose token worth is log-normal: the ratio is that worth itself.
    rng = np.random.default_rng(1)
    worth = np.exp(rng.normal(np.log(2), 0.1, 3000))
    law = HOFFMANN2022
    steady = np.tile([law.E, law.A, law.B, law.alpha, law.beta], (3000, 1))
    draws = steady.copy()
    draws[:, 2] = law.B / worth**law.beta
    central = ParametricLaw(law.E, law.A, law.B / 2**law.beta, law.alpha, law.beta)
    got = compute_multiplier(law, central, loss=2.4, draws_a=steady, draws_b=draws, pairs=20_000)
    assert got.value == pytest.approx(2)
    np.testing.assert_allclose(got.interval80, 2 * np.exp(np.array([-1, 1]) * 0.1282), rtol=0.02)
    np.testing.assert_allclose(got.interval95, 2 * np.exp(np.array([-1, 1]) * 0.196), rtol=0.03)
    assert got.unreachable == 0


def test_draws_that_never_reach_the_loss_count_as_infinite():
    law = HOFFMANN2022
    row = [law.E, law.A, law.B, law.alpha, law.beta]
    draws_a = np.array([row] * 3 + [[1.99, *row[1:]]])
    got = compute_multiplier(law, law, loss=1.98, draws_a=draws_a, draws_b=np.array([row, row]))
    assert got.unreachable == pytest.approx(0.25, abs=0.03)
    assert got.interval80[1] == np.inf and got.interval80[0] == pytest.approx(1)


def test_without_draws_there_is_no_interval_and_one_target_is_needed():
    got = compute_multiplier(HOFFMANN2022, HOFFMANN2022, flops=1e21)
    assert np.isnan(got.interval95).all()
    for both in ({}, {"flops": 1e20, "loss": 2.0}):
        with pytest.raises(ValueError, match="one of the two"):
            compute_multiplier(HOFFMANN2022, HOFFMANN2022, **both)
