"""IsoFLOP tables drawn from laws over the field's range, for coverage and recovery tests."""

import numpy as np
import pytest

from lm.scaling import BESIROGLU2024, ParametricLaw, RunTable


@pytest.fixture(scope="session")
def draw_law():
    """draw_law(rng) -> a law over the field's range."""
    return _draw_law


@pytest.fixture(scope="session")
def isoflop_table():
    """isoflop_table(law, rng, ...) -> a table of it; no noise without rng."""
    return _isoflop_table


@pytest.fixture(scope="session")
def noisy_table():
    """noisy_table(seed, law, ...) -> 6 budgets x 7 sizes, 0.3 % noise, Besiroglu et al.'s law."""

    def table(seed=0, law=BESIROGLU2024, **kwargs):
        return _isoflop_table(law, np.random.default_rng(seed), **kwargs)

    return table


def _draw_law(rng) -> ParametricLaw:
    """A law about those of Hoffmann, Besiroglu and Muennighoff et al.: exponents .28 to .45, and .5
    to 500 tokens a parameter at both ends of the budgets."""
    while True:
        law = ParametricLaw(
            E=rng.uniform(1.5, 2.1),
            A=float(np.exp(rng.uniform(np.log(150), np.log(1500)))),
            B=float(np.exp(rng.uniform(np.log(300), np.log(6000)))),
            alpha=rng.uniform(0.28, 0.45),
            beta=rng.uniform(0.28, 0.45),
        )
        best = law.optimum(np.array([1e18, 1e21]))
        ratio = best.tokens / best.params
        if ratio.min() > 0.5 and ratio.max() < 500:
            return law


def _isoflop_table(
    law, rng=None, *, noise=0.003, budgets=6, sizes=7, spread=6.0, low=1e18, high=1e21
):
    """`sizes` runs within a factor `spread` of each budget's optimum, with relative noise."""
    flops = np.repeat(np.geomspace(low, high, budgets), sizes)
    params = law.optimum(flops).params * np.tile(np.geomspace(1 / spread, spread, sizes), budgets)
    tokens = flops / (6 * params)
    loss = law.loss(params, tokens)
    if rng is not None:
        loss = loss * np.exp(noise * rng.standard_normal(len(loss)))
    return RunTable.from_arrays(params=params, tokens=tokens, flops=flops, loss=loss)
