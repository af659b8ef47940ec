"""Variants of one size and budget; the comparison against a paired t test and by its coverage."""

import numpy as np
import pytest
from scipy import stats

from experiments.modern_recipe import run
from lm import arithmetic
from lm.config import replace
from lm.config_file import load
from lm.train.recipe import resolve

STUDY = load(f"{run.CONFIG}:full")


def of_variant(variant, seed=1):
    return run.as_config(STUDY, run.Trial(variant, 0.01, seed))


@pytest.mark.parametrize("variant", run.VARIANTS)
def test_a_variant_differs_by_its_change_alone(variant):
    config, modern = of_variant(variant), of_variant("modern")
    change = run.VARIANTS[variant]
    back = {name: getattr(modern.model, name) for name in (*change, "d_ff")}
    assert replace(config, model=back, name=modern.name) == modern
    assert all(getattr(config.model, name) == value for name, value in change.items())
    size, wanted = (
        arithmetic.parameters(c.model, c.data.seq_len).blocks_and_head for c in (config, modern)
    )
    assert size == pytest.approx(wanted, rel=0.01) and wanted == 115_584
    assert resolve(config).flops == pytest.approx(run.FLOPS, rel=1e-3)


def test_feed_forward_without_a_gate_is_the_textbooks():
    for name in ("ReLU", "GELU", "2017"):
        assert of_variant(name).model.d_ff == 4 * 64


def measure(losses, best):
    """A run whose loss at seed 0 is lowest at the rate ``best``."""

    def run_one(trial):
        loss = abs(np.log(trial.rate / best)) if trial.seed == 0 else losses[trial.seed]
        return {"loss": loss, "params": 1, "tokens": 1, "batch_tokens": 1}

    return run_one


@pytest.mark.parametrize("best, more", [(0.01, []), (0.02, [0.04]), (0.00125, [2.5e-3, 1.25e-3])])
def test_the_best_rate_has_worse_ones_on_either_side(best, more):
    rows = run.of_variant("MQA", measure({1: 1.0, 2: 2.0, 3: 3.0}, best))
    tried = [row["rate_at_width_32"] for row in rows if row["use"] == "choice"]
    assert tried[:3] == list(run.RATES) and tried[3 : 3 + len(more)] == more
    assert min(tried) < best < max(tried)
    compared = [row for row in rows if row["use"] == "comparison"]
    assert [(row["rate_at_width_32"], row["seed"], row["loss"]) for row in compared] == [
        (best, seed, float(seed)) for seed in run.SEEDS
    ]


def test_a_rate_that_diverges_is_not_chosen():
    def run_one(trial):
        loss = None if trial.rate > 0.005 else 1.0 + (trial.rate < 0.005)
        return {"loss": loss, "params": 1, "tokens": 1, "batch_tokens": 1}

    assert run.of_variant("MQA", run_one)[-1]["rate_at_width_32"] == 0.005


def rows_of(loss_VS):
    names = list(run.VARIANTS)
    return [
        {"variant": names[v], "use": "comparison", "rate_at_width_32": 0.01, "seed": s, "loss": x}
        for v, losses in enumerate(loss_VS)
        for s, x in zip(run.SEEDS, losses, strict=True)
    ]


def test_of_two_variants_the_interval_is_the_paired_t_tests():
    loss_VS = np.array([[1.5, 1.6, 1.4], [1.53, 1.62, 1.48]])
    (base, other), scatter = run.compare(rows_of(loss_VS))
    expected = stats.ttest_rel(loss_VS[1], loss_VS[0]).confidence_interval(0.95)
    assert (other.low, other.high) == pytest.approx((expected.low, expected.high))
    assert other.difference == pytest.approx(0.13 / 3) and base.difference == 0
    assert scatter == pytest.approx(np.std(loss_VS[1] - loss_VS[0], ddof=1) / np.sqrt(2))


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, effects, held = np.random.default_rng(0), np.array([0, 0.05, -0.02, 0.1]), []
    for _ in range(600):
        seeds, noise = rng.normal(0, 0.1, 3), rng.normal(0, 0.02, (4, 3))
        found, _ = run.compare(rows_of(1.5 + effects[:, None] + seeds + noise))
        held += [d.low < e < d.high for d, e in zip(found[1:], effects[1:], strict=True)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_one_that_scatters_more_has_an_interval_of_its_own():
    rng = np.random.default_rng(0)
    loss_VS = 1.5 + rng.normal(0, 0.005, (12, 3))
    assert all(d.pooled for d in run.compare(rows_of(loss_VS))[0])
    unsteady = np.array([0.3, 0.4, 0.2])
    found, scatter = run.compare(rows_of([*loss_VS, loss_VS[0] + unsteady]))
    others, of_others = run.compare(rows_of(loss_VS))
    assert found[:-1] == others and scatter == of_others and not found[-1].pooled
    expected = stats.ttest_1samp(unsteady, 0).confidence_interval(0.95)
    assert (found[-1].low, found[-1].high) == pytest.approx((expected.low, expected.high))
    # Cochran's table: k = 10 variances of 2 degrees of freedom, 1 %.
    shares = np.array([1, *[(1 / 0.5358 - 1) / 9] * 9])
    for factor, alike in ((1.001, False), (0.999, True)):
        variances = shares * np.array([factor, *[1] * 9])
        differences = np.sqrt(variances)[:, None] * np.array([-1, 0, 1])
        assert run.scatter_alike(differences)[0] == alike


def test_from_table_to_figure(tmp_path):
    found, _ = run.compare(rows_of([[1.5, 1.6, 1.4], [1.6, 1.71, 1.52], [1.5, 1.61, 1.39]]))
    lines = run.table(found).splitlines()
    assert len(lines) == 5 and "| **+0.1100 (" in lines[3] and "**" not in lines[4]
    run.draw(found, tmp_path / "differences.png")
    assert (tmp_path / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_what_diverged_is_left_out():
    losses = [[1.5, 1.6, 1.4], [1.6, np.nan, 1.5], [1.5, 1.61, 1.39]]
    found, _ = run.compare(rows_of(losses))
    alone, _ = run.compare([row for row in rows_of(losses) if row["variant"] != "2017"])
    assert found == alone and [d.variant for d in found] == ["modern", "post-LayerNorm"]
    with pytest.raises(run.BadInput, match="runs of modern or of all others diverged"):
        run.compare(rows_of(losses[:2]))
