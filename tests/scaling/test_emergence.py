import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.scaling.emergence import (
    TokenLossLaw,
    brier_score,
    emergence_score,
    exact_match,
    expected_edit_distance,
    log_exact_match,
    measured,
    multiple_choice_accuracy,
    sharpness,
    token_accuracy,
)

LAW = TokenLossLaw(c=1e6, alpha=-0.2)
PARAMS = np.logspace(6, 11, 41)
LENGTHS = np.array([1, 5, 10, 30])


def test_the_lectures_example():
    np.testing.assert_allclose(exact_match([0.5, 0.9], 3), [0.125, 0.729], rtol=1e-12)


def test_log_accuracy_is_exactly_linear_in_length():
    log_accuracy = log_exact_match(LAW.loss(PARAMS)[:, None], LENGTHS)
    np.testing.assert_array_equal(log_accuracy, -LENGTHS * LAW.loss(PARAMS)[:, None])
    np.testing.assert_array_max_ulp(log_accuracy[:, 3] / 30, log_accuracy[:, 0], maxulp=1)
    accuracy = exact_match(token_accuracy(LAW.loss(PARAMS))[:, None], LENGTHS)
    np.testing.assert_allclose(np.log(accuracy), log_accuracy, rtol=1e-12)


def test_exact_match_sharpens_in_proportion_to_length_and_edit_distance_does_not():
    accuracy = token_accuracy(LAW.loss(PARAMS))
    matches = sharpness(exact_match(accuracy, LENGTHS[:, None]), PARAMS)
    np.testing.assert_allclose(matches / matches[0], LENGTHS, rtol=1e-9)
    # At the smallest model, where the loss is 1: steps |alpha| (one-sided difference at the edge).
    assert matches[0] == pytest.approx(0.2, rel=0.04)
    distances = sharpness(expected_edit_distance(accuracy, LENGTHS[:, None]), PARAMS)
    np.testing.assert_allclose(distances, distances[0])
    assert distances[0] < 0.2


def test_exact_match_over_one_range_scores_as_ever_more_emergent():
    accuracy = token_accuracy(LAW.loss(np.logspace(6, 9, 41)))
    scores = emergence_score(exact_match(accuracy, LENGTHS[:, None]))
    assert np.all(np.diff(scores) > 0) and scores[0] < 45 and scores[-1] > 1e3
    distances = emergence_score(expected_edit_distance(accuracy, LENGTHS[:, None]))
    np.testing.assert_allclose(distances, distances[0])


def test_more_steps_move_the_curve_right_and_keep_its_shape():
    shift = 30 ** (1 / 0.2)
    one, thirty = (
        exact_match(token_accuracy(LAW.loss(n)), steps)
        for n, steps in ((PARAMS, 1), (PARAMS * shift, 30))
    )
    np.testing.assert_allclose(one, thirty, rtol=1e-12)


def test_emergence_score_of_a_line_and_of_a_jump():
    assert emergence_score(np.linspace(0, 1, 11)) == pytest.approx(10)
    assert emergence_score(-np.linspace(0, 1, 11)) == pytest.approx(-10)
    assert emergence_score([0, 0, 0, 0, 1.0]) == np.inf
    assert emergence_score([0.3, 0.3, 0.3]) == 0


def test_a_finite_test_reads_zero_below_its_resolution():
    visible = LAW.smallest_visible_params(30, 1000)
    at = exact_match(token_accuracy(LAW.loss(visible)), 30)
    assert at == pytest.approx(1e-3)
    small = exact_match(token_accuracy(LAW.loss(visible / 30)), 30)
    assert small > 0 and measured(small, 1000) == 0
    assert measured(0.5, 1000) == pytest.approx(0.5, abs=0.05)
    assert (measured(np.linspace(0, 1, 7), 250) * 250 % 1 == 0).all()


def test_multiple_choice_is_chance_at_chance_and_sharper_with_less_scatter():
    for k in (2, 4, 5):
        assert multiple_choice_accuracy(1 / k, k) == pytest.approx(1 / k, abs=1e-9)
    sharp, soft = (multiple_choice_accuracy([0.2, 0.3], 4, spread) for spread in (0.05, 2.0))
    assert sharp[0] < soft[0] < 0.25 < soft[1] < sharp[1]


def test_two_choices_are_a_normal_difference():
    # With k = 2, P = Phi(lead / (spread sqrt 2)): an independent closed form.
    from scipy.stats import norm

    p = np.array([0.1, 0.5, 0.8])
    closed = norm.cdf(np.log(p / (1 - p)) / (0.7 * np.sqrt(2)))
    np.testing.assert_allclose(multiple_choice_accuracy(p, 2, 0.7), closed, atol=1e-9)


def test_multiple_choice_agrees_with_simulation():
    rng = np.random.default_rng(0)
    lead = np.log(0.4 * 3 / 0.6)
    scores = rng.normal(size=(200_000, 4)) * 1.5
    scores[:, 0] += lead
    simulated = np.mean(np.argmax(scores, axis=1) == 0)
    assert multiple_choice_accuracy(0.4, 4, 1.5) == pytest.approx(simulated, abs=0.005)


@given(p=st.floats(0.01, 0.99), k=st.integers(2, 10))
def test_brier_score_is_smooth_and_falls_to_zero(p, k):
    assert brier_score(1.0, k) == 0
    wrong = np.full(k, (1 - p) / (k - 1))
    wrong[0] = p - 1
    assert brier_score(p, k) == pytest.approx(np.sum(wrong**2))


def test_bad_probabilities_and_choices_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        exact_match(1.2, 3)
    with pytest.raises(ValueError, match="2 or more"):
        brier_score(0.5, 1)
