import numpy as np
import pytest

from lm.scaling.moe_laws import (
    ABNAR2025,
    CLARK_HASH,
    CLARK_RL_R,
    CLARK_S_BASE,
    KRAJEWSKI2024,
    KRAJEWSKI2024_DENSE,
    LUDZIEJEWSKI2025,
    saturated_experts,
)

# Ludziejewski et al. 2025, Table 4: experts, m, mu, n, nu.
TABLE_4 = (
    (1, 30.3640, -0.1817, 53.9838, -0.1965),
    (2, 27.7982, -0.1780, 66.8401, -0.2065),
    (4, 24.8462, -0.1731, 87.7022, -0.2192),
    (8, 21.8330, -0.1676, 119.9126, -0.2338),
    (16, 19.0159, -0.1617, 167.5073, -0.2494),
    (32, 16.5424, -0.1557, 234.6726, -0.2652),
)


@pytest.mark.parametrize("experts, m, mu, n, nu", TABLE_4)
def test_ludziejewskis_table_4_follows_from_table_3(experts, m, mu, n, nu):
    law = LUDZIEJEWSKI2025.at_experts(experts)
    got = (law.A, -law.alpha, law.B, -law.beta)
    np.testing.assert_allclose(got, (m, mu, n, nu), rtol=5e-3)
    assert law.E == 1.3637


def test_ludziejewskis_loss_optimum_and_learning_rate():
    law = LUDZIEJEWSKI2025
    assert law.loss(1e9, 2e10, 8) == pytest.approx(law.at_experts(8).loss(1e9, 2e10))
    best = law.optimum(1e21, np.array([1, 8]))
    for factor in (0.9, 1.1):
        assert np.all(law.loss(best.params * factor, best.tokens / factor, [1, 8]) > best.loss)
    assert best.loss[1] < best.loss[0]
    assert law.learning_rate(1e9, 1) == pytest.approx(np.exp(8.39 - 0.81 * np.log(1e9)))
    assert law.learning_rate(1e9, 4) / law.learning_rate(1e9, 1) == pytest.approx(4**-0.25)


def test_saturation_starts_and_ends_where_it_says():
    assert saturated_experts(1, 2.0732, 290.4521) == pytest.approx(2.0732)
    assert saturated_experts(1e12, 2.0732, 290.4521) == pytest.approx(290.4521)
    with pytest.raises(ValueError, match="experts must be 1 or more"):
        saturated_experts(0.5, 2.0, 300.0)


@pytest.mark.parametrize(
    "law, cutoff", [(CLARK_S_BASE, 937e9), (CLARK_RL_R, 85e9), (CLARK_HASH, 83e9)]
)
def test_clarks_cutoff_lies_within_the_rounding_of_his_table(law, cutoff):
    half = 0.0005  # b and c are printed to three decimals
    low, high = ((-law.b - s * half) / (law.c + s * half) for s in (1, -1))
    assert 10**low < cutoff < 10**high


def test_clarks_effective_dense_model_has_the_same_loss():
    for law in (CLARK_S_BASE, CLARK_RL_R, CLARK_HASH):
        dense = law.effective_dense_params(1e9, np.array([1, 8, 128]))
        assert dense[0] == pytest.approx(1e9)
        assert np.all(np.diff(dense) > 0)
        np.testing.assert_allclose(law.loss(dense, 1), law.loss(1e9, np.array([1, 8, 128])))


def test_clark_wants_experts_below_the_cutoff_only():
    law = CLARK_S_BASE
    np.testing.assert_array_equal(law.optimum([1e9, 2 * law.cutoff_params], 512), [512, 1])
    assert law.loss(1e9, 512) < law.loss(1e9, 1)
    assert law.loss(2 * law.cutoff_params, 512) > law.loss(2 * law.cutoff_params, 1)


def test_clarks_dense_models_follow_a_power_law_near_kaplans():
    slope = np.diff(np.log(CLARK_S_BASE.loss([1e8, 1e9], 1))) / np.log(10)
    assert slope == pytest.approx(-0.078, abs=0.003)


def test_krajewskis_flops_and_optimum_are_his_table_2():
    # 64 x 100M: 4.37B tokens, G = 8, 2.95e18 FLOPs, loss 3.133.
    law = KRAJEWSKI2024
    d_model = (100e6 * 64 / 12) ** (1 / 3)
    assert law.flops_per_token(d_model, 8) * 4.37e9 == pytest.approx(2.95e18, rel=5e-3)
    for flops, tokens, granularity, loss in (
        (2.95e18, 4.37e9, 8, 3.133),
        (1.93e20, 28.94e9, 16, 2.491),
        (6.46e21, 137.6e9, 32, 2.076),
    ):
        best, best_granularity = law.optimum(flops)
        assert best_granularity == granularity
        assert best.tokens == pytest.approx(tokens, rel=0.03)
        assert best.loss == pytest.approx(loss, rel=0.01)


def test_krajewskis_granularity_pays_until_the_router_costs_more():
    fixed = np.array([KRAJEWSKI2024.optimum(1e21, g)[0].loss for g in (1, 16, 4096)])
    assert fixed[1] < fixed[0] and fixed[1] < fixed[2]
    best, _ = KRAJEWSKI2024.optimum(1e21)
    assert best.loss <= fixed.min()
    assert best.loss < KRAJEWSKI2024_DENSE.optimum(1e21).loss


def test_krajewskis_optimum_broadcasts_over_budgets():
    budgets = np.array([1e19, 1e22])
    best, granularity = KRAJEWSKI2024.optimum(budgets)
    alone, its = KRAJEWSKI2024.optimum(1e22)
    assert best.loss[1] == pytest.approx(alone.loss, rel=1e-9) and granularity[1] == its


def test_abnar_prefers_sparser_models_and_its_optimum_is_a_minimum():
    sparsity = np.array([0.0, 0.5, 0.9])
    best = ABNAR2025.optimum(1e21, sparsity)
    np.testing.assert_allclose(6 * (1 - sparsity) * best.params * best.tokens, 1e21)
    assert np.all(np.diff(best.loss) < 0) and np.all(np.diff(best.params) > 0)
    for factor in (0.95, 1.05):
        beside = ABNAR2025.loss(best.params * factor, best.tokens / factor, sparsity)
        assert np.all(beside > best.loss)
    with pytest.raises(ValueError, match="sparsity"):
        ABNAR2025.loss(1e9, 1e10, 1.0)


def test_moe_laws_can_be_fitted():
    rng = np.random.default_rng(0)
    params, experts = 10 ** rng.uniform(7, 9.5, 60), rng.choice([1, 4, 16, 64, 256], 60)
    loss = CLARK_HASH.loss(params, experts)
    fitted = CLARK_S_BASE.fit(params, experts, loss=loss)
    np.testing.assert_allclose(fitted.loss(params, experts), loss, rtol=1e-4)
    assert fitted.cutoff_params == pytest.approx(CLARK_HASH.cutoff_params, rel=0.05)
