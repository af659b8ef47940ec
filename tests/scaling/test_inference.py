import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from lm.scaling.inference import (
    SARDANA2024,
    flops_for_loss,
    lifetime_optimum,
    lifetime_optimum_at_budget,
    overtrain,
    tokens_for_loss,
)
from lm.scaling.parametric import HOFFMANN2022, ParametricLaw

LAWS = st.builds(
    ParametricLaw,
    E=st.floats(0.5, 2.5),
    A=st.floats(50, 2000),
    B=st.floats(50, 5000),
    alpha=st.floats(0.2, 0.6),
    beta=st.floats(0.2, 0.6),
)


def test_sardanas_case_to_four_digits():
    assert SARDANA2024.loss(70e9, 1e12) == pytest.approx(1.947, abs=5e-4)
    best = lifetime_optimum(SARDANA2024, 1.947, 2e12)
    assert best.params == pytest.approx(2.418e10, rel=2e-4)
    assert best.tokens == pytest.approx(2.657e12, rel=2e-4)
    usual = SARDANA2024.optimum(flops_for_loss(SARDANA2024, 1.947))
    assert 100 * best.params / usual.params == pytest.approx(70.96, abs=0.005)
    assert 100 * best.tokens / usual.tokens == pytest.approx(146.77, abs=0.005)
    usual_cost = usual.flops + 2 * usual.params * 2e12
    assert 100 * best.lifetime_flops / usual_cost == pytest.approx(95.22, abs=0.005)


def test_a_13b_model_with_2e12_tokens_served_becomes_7b():
    # Figure 1 of the paper: 7B, and 1.7e22 FLOPs (17 %) saved.
    budget = (13e9 / SARDANA2024.k_N) ** (1 / SARDANA2024.a)
    usual = SARDANA2024.optimum(budget)
    best = lifetime_optimum(SARDANA2024, usual.loss, 2e12)
    assert best.params == pytest.approx(6.97e9, rel=1e-3)
    assert best.tokens == pytest.approx(1.25e12, rel=5e-3)
    saved = usual.flops + 2 * usual.params * 2e12 - best.lifetime_flops
    assert saved == pytest.approx(1.69e22, rel=5e-3)


@settings(max_examples=40, deadline=None)
@given(law=LAWS, log_flops=st.floats(17, 26), served=st.sampled_from([0.0, 1e9, 1e12, 1e15]))
def test_lifetime_optimum_is_the_cheapest_of_its_loss(law, log_flops, served):
    loss = law.optimum(10**log_flops).loss
    best = lifetime_optimum(law, loss, served)
    assert law.loss(best.params, best.tokens) == pytest.approx(loss, rel=1e-12)
    assert best.lifetime_flops == pytest.approx(
        6 * best.params * best.tokens + 2 * best.params * served
    )
    for factor in (0.97, 1.03):
        params = factor * best.params
        cost = 6 * params * tokens_for_loss(law, loss, params) + 2 * params * served
        assert cost >= best.lifetime_flops


@settings(max_examples=40, deadline=None)
@given(law=LAWS, log_flops=st.floats(17, 26))
def test_without_inference_it_is_chinchillas_and_flops_for_loss_inverts_it(law, log_flops):
    usual = law.optimum(10**log_flops)
    best = lifetime_optimum(law, usual.loss, 0.0)
    assert best.params == pytest.approx(usual.params, rel=1e-6)
    assert flops_for_loss(law, usual.loss) == pytest.approx(usual.flops, rel=1e-6)


def test_more_inference_means_smaller_and_longer():
    best = lifetime_optimum(HOFFMANN2022, 2.2, np.array([0, 1e10, 1e12, 1e14]))
    assert np.all(np.diff(best.params) < 0)
    assert np.all(np.diff(best.tokens) > 0)


def test_the_budgeted_optimum_is_the_dual_and_the_minimum_by_scipy():
    best = lifetime_optimum_at_budget(SARDANA2024, 5e23, 2e12)
    assert best.lifetime_flops == pytest.approx(5e23, rel=1e-9)
    found = minimize_scalar(
        lambda t: SARDANA2024.loss(np.exp(t), (5e23 / np.exp(t) - 2 * 2e12) / 6),
        bounds=(np.log(1e9), np.log(1e11)),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert best.loss == pytest.approx(found.fun, rel=1e-9)
    assert np.log(best.params) == pytest.approx(found.x, abs=1e-5)


def test_overtraining_half_the_size_costs_a_fifth_more():
    best = overtrain(HOFFMANN2022, 1e21, [1.0, 0.5])
    assert best.flops[0] == pytest.approx(1e21, rel=1e-9)
    assert best.flops[1] / 1e21 == pytest.approx(1.210, abs=5e-4)
    assert best.tokens[1] / best.tokens[0] == pytest.approx(2.420, abs=5e-4)


def test_what_cannot_be_reached_is_infinite_or_refused():
    assert np.isinf(tokens_for_loss(HOFFMANN2022, 1.7, 1e6))
    assert np.isinf(flops_for_loss(HOFFMANN2022, 1.6))
    assert np.isinf(overtrain(HOFFMANN2022, 1e21, 1e-4).tokens)
    with pytest.raises(ValueError, match="not above the law's floor"):
        lifetime_optimum(HOFFMANN2022, 1.6, 1e12)
    with pytest.raises(ValueError, match="inference_tokens must be zero or more"):
        lifetime_optimum(HOFFMANN2022, 2.0, -1.0)
