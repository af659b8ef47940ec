import json

import numpy as np
import pytest

from lm.train.spikes import LEAST, Spikes


def found(losses, deviations=6.0):
    spikes = Spikes(deviations)
    return [i for i, loss in enumerate(losses) if spikes.see(float(loss)) is not None]


def training(n=3000, seed=0, noise=0.05):
    """A power law with the noise of batches."""
    steps = np.arange(1, n + 1)
    return 2 + 5 * steps**-0.3 + noise * np.random.default_rng(seed).standard_normal(n)


def test_a_calm_run_has_none_and_a_spike_is_told_at_its_first_step():
    losses = training()
    assert found(losses) == []
    losses[1500] += 1.0
    losses[2000:2010] += np.linspace(2, 0.6, 10)  # goes down slowly: one spike
    losses[2100] += 0.5  # smaller, soon after the larger one
    assert found(losses) == [1500, 2000, 2100]
    assert found(losses, deviations=0.0) == []


@pytest.mark.parametrize("deviations", [4.0, 8.0])
def test_the_threshold_is_in_standard_deviations(deviations):
    calm = 3 + 0.1 * np.random.default_rng(1).standard_normal(1000)
    window = calm[900:].std()
    for times, wanted in ((0.75, []), (1.4, [1000])):
        assert found([*calm, 3 + times * deviations * window], deviations) == wanted


def test_the_expectation_is_of_all_losses_at_first():
    losses = np.random.default_rng(2).random(50)
    spikes = Spikes(1e9)
    for loss in losses:
        spikes.see(float(loss))
    assert spikes.mean == pytest.approx(losses.mean())
    assert spikes.variance == pytest.approx(np.mean(np.diff(losses) ** 2) / 2)


def test_a_steep_fall_hides_no_spike():
    losses = np.linspace(8, 3, 200) + 0.05 * np.random.default_rng(3).standard_normal(200)
    assert found(losses) == []
    losses[150] += 2.5  # the mean of the last hundred is above the curve
    assert found(losses) == [150]


def test_the_first_steps_are_none():
    assert found([1.0] * (LEAST - 1) + [100.0]) == []
    assert found([1.0] * LEAST + [100.0]) == [LEAST]
    assert found([1.0] * LEAST + [1.02]) == []  # 2 % above a constant


def test_a_new_plateau_is_one_spike_and_then_what_is_expected():
    losses = training()
    losses[1000:] += 1.0
    losses[2500] += 1.0
    assert found(losses) == [1000, 2500]


def test_resumed_anywhere_it_tells_the_same():
    losses = training()
    losses[[700, 701, 900]] += 1.0
    for at in (10, 500, 701, 899):
        first = Spikes(6.0)
        told = [i for i in range(at) if first.see(float(losses[i])) is not None]
        second = Spikes(6.0, json.loads(json.dumps(first.carried())))
        told += [i for i in range(at, 3000) if second.see(float(losses[i])) is not None]
        assert told == [700, 900]
