import json

import numpy as np
import pytest

from lm.command import BadInput
from lm.scaling.law import PowerLawAllocation
from lm.scaling.parametric import ParametricLaw
from lm.scaling.published import (
    APPROACHES,
    HOFFMANN_TABLES,
    MODELS,
    hoffmann_tables,
    models_table,
    named_law,
)

LAW_JSON = {
    "schema": 1,
    "approaches": {
        "isoflop": {"a": 0.5, "b": 0.5, "k_N": 0.1, "k_D": 1.7},
        "parametric": {
            "E": 1.7, "A": 400.0, "B": 2000.0, "alpha": 0.34, "beta": 0.37,
            "draws": [[1.7, 400.0, 2000.0, 0.34, 0.37], [1.6, 300.0, 1800.0, 0.33, 0.36]],
        },
    },
    "flops_range": [1e15, 1e18],
    "accounting": {"params": "non_embedding", "flops": "6nd"},
}  # fmt: skip


@pytest.fixture
def law_json(tmp_path):
    def write(content):
        path = tmp_path / "law.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def changed(path, value):
    """LAW_JSON with one key (None: removed) replaced."""
    content = json.loads(json.dumps(LAW_JSON))
    *parents, key = path.split(".")
    entry = content
    for parent in parents:
        entry = entry[parent]
    if value is None:
        del entry[key]
    else:
        entry[key] = value
    return content


@pytest.mark.parametrize("approach", APPROACHES)
def test_printed_rows_and_their_misprints(approach):
    marked = {row.params: row.flops_over_6nd for row in HOFFMANN_TABLES[approach] if row.misprinted}
    expected = {
        "envelope": {6.7e10: 0.955},
        "isoflop": {},
        "parametric": {6.7e10: 1.037, 1.75e11: 0.100, 2.8e11: 1.042},
    }[approach]
    assert marked.keys() == expected.keys()
    for params, ratio in expected.items():
        assert marked[params] == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize("approach", ["envelope", "isoflop"])
def test_the_line_regenerates_every_row_but_the_67b(approach):
    law = named_law(f"hoffmann2022:{approach}").law
    assert law.a == pytest.approx({"envelope": 0.498, "isoflop": 0.490}[approach], abs=5e-4)
    for row in HOFFMANN_TABLES[approach]:
        miss = abs(law.optimum(row.flops).params / row.params - 1)
        assert (miss < 0.002) == (row.params != 6.7e10)


def test_equation_10_asks_for_more_tokens_than_its_own_table():
    law = named_law("hoffmann2022:parametric").law
    rows = HOFFMANN_TABLES["parametric"]
    over = [(r.params / law.k_N) ** (1 / law.a) / (6 * r.params) / r.tokens for r in rows]
    assert over[0] == pytest.approx(1.06, abs=0.005) and over[-1] == pytest.approx(1.18, abs=0.005)
    assert hoffmann_tables().count("MISPRINT") == 4


def test_tokens_per_parameter_at_chinchillas_compute():
    assert named_law("hoffmann2022").name == "hoffmann2022:parametric"
    for name, ratio in (("hoffmann2022:parametric", 59.0), ("besiroglu2024", 18.3)):
        best = named_law(name).law.optimum(5.88e23)
        assert best.tokens / best.params == pytest.approx(ratio, abs=0.05)


def test_models_tokens_per_parameter_are_the_lectures():
    expected = {
        "GPT-3": 1.7, "Gopher": 1.1, "Chinchilla": 20, "LLaMA 65B": 21.5, "Llama 2 70B": 29,
        "Llama 3 70B": 214, "Llama 3 8B": 1875,
    }  # fmt: skip
    for name, (params, tokens) in MODELS.items():
        assert tokens / params == pytest.approx(expected[name], rel=0.03)
    printed = models_table().splitlines()
    assert len(printed) == 1 + len(expected)
    assert printed[-1].split()[4:6] == ["1875", "93.8"]  # 94 times the optimum


def test_the_rounded_constants_would_say_93():
    rounded = ParametricLaw(1.69, 406.4, 410.7, 0.34, 0.28).optimum(5.88e23)
    assert rounded.tokens / rounded.params == pytest.approx(92.8, abs=0.1)


def test_llama3_is_its_printed_formula_not_its_quoted_optimum():
    best = named_law("llama3").law.optimum(3.8e25)
    assert best.tokens == pytest.approx(0.299 * 3.8e25**0.537)
    assert (best.params, best.tokens) == (
        pytest.approx(389e9, rel=2e-3),
        pytest.approx(16.29e12, rel=1e-3),
    )


def test_kaplan_counts_without_embeddings():
    assert named_law("kaplan2020").params_counted == "non_embedding"


def test_every_law_has_a_source_and_spends_its_budget():
    for name in ("besiroglu2024", "kaplan2020", "llama3", "muennighoff2023", "sardana2024",
                 "hoffmann2022:envelope", "tokens_per_parameter:20"):  # fmt: skip
        named = named_law(name)
        best = named.law.optimum(np.array([1e20, 1e23]))
        np.testing.assert_allclose(6 * best.params * best.tokens, [1e20, 1e23])
        assert named.source
        assert bool(named.no_loss) == bool(np.isnan(best.loss).any())


def test_a_fitted_law_is_read_with_its_draws_range_and_accounting(law_json):
    path = law_json(LAW_JSON)
    named = named_law(path)
    assert named.name == "law.json:parametric"
    assert (named.law.E, named.law.beta) == (1.7, 0.37)
    assert named.draws.shape == (2, 5) and not named.no_interval
    assert named.flops_range == (1e15, 1e18)
    assert (named.params_counted, named.flops_counted) == ("non_embedding", "6nd")
    elsewhere = changed("accounting", {"params": "as in the table", "flops": "as in the table"})
    assert named_law(law_json(elsewhere)).params_counted == "total"
    isoflop = named_law(path + ":isoflop")
    assert isinstance(isoflop.law, PowerLawAllocation)
    assert isoflop.law.optimum(1e18).tokens == pytest.approx(1.7e9)
    assert "not a loss" in isoflop.no_loss
    flagged = changed("approaches.isoflop.flags", ["profiles_excluded"])
    assert named_law(law_json(flagged) + ":isoflop").flags == ("profiles_excluded",)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must hold an object"),
        (changed("approaches", None), "'approaches' is missing"),
        (changed("approaches.parametric.alpha", None), r"approaches\.parametric\.alpha"),
        (changed("approaches.parametric.E", "1.7"), r"parametric\.E must be a number, not '1.7'"),
        (changed("approaches.parametric.A", float("nan")), r"parametric\.A must be a number"),
        (changed("approaches.parametric.A", 0), r"parametric\.A = 0: must be above 0"),
        (changed("approaches.parametric.draws", [[1, 2]]), "rows of"),
        (changed("approaches.parametric.draws", [[1, 2, 3, 4, 5], [1]]), "rows of"),
        (changed("approaches.parametric", [1]), "parametric must be an object"),
        (changed("flops_range", [1e20]), "flops_range"),
        (changed("flops_range", ["a", "b"]), "flops_range"),
    ],
)
def test_a_broken_law_json_is_refused_by_key(law_json, content, message):
    with pytest.raises(BadInput, match=message):
        named_law(law_json(content))


def test_unknown_laws_ratios_files_and_approaches_are_refused(law_json):
    for text, message in (
        ("besirglu2024", "did you mean 'besiroglu2024'"),
        ("hoffmann2022:isoflops", "did you mean 'hoffmann2022:isoflop'"),
        ("tokens_per_parameter:-1", "above 0"),
        ("tokens_per_parameter:x", "above 0"),
        ("nowhere/law.json", "cannot be read"),
        (law_json(LAW_JSON) + ":envelope", "no approach 'envelope', only isoflop, parametric"),
    ):
        with pytest.raises(BadInput, match=message):
            named_law(text)
