import numpy as np
import pytest

from lm.scaling.parametric import BESIROGLU2024, HOFFMANN2022
from lm.scaling.reconciliation import KAPLAN_SIZES, NonEmbeddingView

EPOCH, CHINCHILLA = NonEmbeddingView(BESIROGLU2024), NonEmbeddingView(HOFFMANN2022)


@pytest.mark.parametrize("view, local, total", [(EPOCH, 0.78, 0.51), (CHINCHILLA, 0.74, 0.46)])
def test_fitted_exponents_are_pearce_and_songs(view, local, total):
    assert round(view.fitted_exponent(), 2) == local
    assert round(view.fitted_exponent(total=True), 2) == total


def test_loss_exponents_and_limits():
    assert EPOCH.fitted_loss_exponent() == pytest.approx(-0.069, abs=5e-4)
    assert CHINCHILLA.fitted_loss_exponent() == pytest.approx(-0.066, abs=5e-4)
    assert EPOCH.exponent_limits() == pytest.approx((0.759, 0.513), abs=5e-4)
    assert CHINCHILLA.exponent_limits() == pytest.approx((0.716, 0.457), abs=5e-4)


def test_local_slope_rises_then_falls_to_chinchillas():
    slopes = EPOCH.local_exponent([768, 1e6, 1.5e9, 1e20])
    assert slopes[:3] == pytest.approx([0.76, 0.96, 0.53], abs=0.005)
    assert slopes[3] == pytest.approx(BESIROGLU2024.a, abs=1e-4)


def test_closed_form_is_theirs():
    # As their script has it.
    law, g, n = BESIROGLU2024, 47491, np.array([1e4, 1e6, 1e9])
    printed = (
        6
        * n
        * (n + g / 3 * n ** (1 / 3)) ** (-1 / law.beta)
        * (n + g * n ** (1 / 3)) ** ((1 + law.alpha) / law.beta)
        * (law.beta * law.B / (law.alpha * law.A)) ** (1 / law.beta)
    )
    np.testing.assert_allclose(EPOCH.flops(n), printed, rtol=1e-12)


def test_without_embeddings_it_is_the_law_itself():
    plain = NonEmbeddingView(BESIROGLU2024, gamma=0.0)
    best, law = plain.optimum(1e20), BESIROGLU2024.optimum(1e20)
    assert best.params == pytest.approx(law.params)
    assert best.loss == pytest.approx(law.loss)


def test_optimum_is_the_least_loss_along_its_budget():
    best = EPOCH.optimum(np.array([1e14, 1e20]))
    for factor in (0.95, 1.05):
        beside = EPOCH.loss(best.params * factor, best.tokens / factor)
        assert np.all(beside > best.loss)


def test_frontier_picks_among_the_given_sizes():
    frontier = EPOCH.frontier(np.array([1e15, 1e19]), KAPLAN_SIZES)
    assert set(frontier.params) <= set(KAPLAN_SIZES)
    assert np.all(frontier.loss >= EPOCH.optimum(frontier.flops).loss)
