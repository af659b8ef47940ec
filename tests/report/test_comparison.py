import json

import numpy as np
import pytest

from lm.command import BadInput
from lm.report.comparison import compare, read_law_file


def law(a, spread, seed, k_N=0.1, **checklist):
    """A law.json's content with one approach, whose draws of `a` are normal."""
    draws = np.zeros((1000, 4))
    draws[:, 0] = a + spread * np.random.default_rng(seed).standard_normal(1000)
    draws[:, 1] = 1 - draws[:, 0]
    draws[:, 2] = np.log(k_N)
    entry = {
        "a": a,
        "b": 1 - a,
        "k_N": k_N,
        "k_D": 1 / (6 * k_N),
        "allocation_draws": draws.tolist(),
    }
    return {"approaches": {"isoflop": entry}, "flops_range": [1e10, 1e14], "checklist": checklist}


def test_difference_of_independent_normals():
    found = compare(law(0.55, 0.03, 1), law(0.50, 0.04, 2), "other")
    row = found["rows"][0]
    assert row["quantity"] == "a" and row["difference"] == pytest.approx(0.05)
    # sqrt(0.03^2 + 0.04^2) = 0.05, so that 95 % is 0.05 +- 0.098
    assert row["interval95"] == pytest.approx((0.05 - 0.098, 0.05 + 0.098), abs=0.012)
    assert row["interval80"] == pytest.approx((0.05 - 0.064, 0.05 + 0.064), abs=0.010)


def test_optimal_params_are_compared_as_a_ratio_at_the_middle_of_both_ranges():
    found = compare(law(0.5, 1e-9, 1, k_N=0.2), law(0.5, 1e-9, 2, k_N=0.1), "other")
    row = found["rows"][2]
    assert found["flops"] == pytest.approx(1e12)
    assert (row["this"], row["other"]) == pytest.approx((0.2e6, 0.1e6))
    assert row["difference"] == pytest.approx(2)
    assert row["interval95"] == pytest.approx((2, 2), rel=1e-6)


def test_without_draws_there_is_no_interval():
    other = law(0.5, 0.02, 2)
    del other["approaches"]["isoflop"]["allocation_draws"]
    assert np.isnan(compare(law(0.5, 0.02, 1), other, "other")["rows"][0]["interval95"]).all()


def with_parametric(content, scale, **checklist):
    """`content` with a parametric law whose reducible loss costs `scale` times the compute."""
    constants = {
        "E": 1.7,
        "A": 400 * scale**0.15,
        "B": 400 * scale**0.15,
        "alpha": 0.3,
        "beta": 0.3,
    }
    content["approaches"]["parametric"] = content["approaches"].pop("isoflop") | constants
    content["checklist"] = checklist
    return content


def test_compute_multiplier_of_two_recipes():
    # With alpha = beta = 0.3 the reducible loss at the optimum falls as C^-0.15.
    one = with_parametric(law(0.5, 0.01, 1), 2.0, corpus="c", tokenizer="bytes")
    other = with_parametric(law(0.5, 0.01, 2), 1.0, corpus="c", tokenizer="bytes")
    assert compare(one, other, "other")["multiplier"]["value"] == pytest.approx(2, rel=1e-6)


def test_no_compute_multiplier_across_tokenizers():
    one = with_parametric(law(0.5, 0.01, 1), 2.0, corpus="c", tokenizer="bytes")
    other = with_parametric(law(0.5, 0.01, 2), 1.0, corpus="c", tokenizer="bpe")
    assert "tokenizer" in compare(one, other, "other")["multiplier"]["reason"]


def test_laws_without_a_shared_approach_are_refused():
    with pytest.raises(BadInput, match="none in common"):
        compare(law(0.5, 0.01, 1), with_parametric(law(0.5, 0.01, 2), 1.0), "other")


def test_a_law_file_without_its_range_is_refused(tmp_path):
    path = tmp_path / "law.json"
    content = law(0.5, 0.01, 1)
    path.write_text(json.dumps(content))
    assert read_law_file(path)["approaches"]["isoflop"]["a"] == 0.5
    del content["flops_range"]
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="flops_range"):
        read_law_file(path)
