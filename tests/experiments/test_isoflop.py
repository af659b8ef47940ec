"""The full study: its kinds and trials can be run, and its analysis finds what was put in."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.isoflop import analysis, calibrate, figures, page, run, study
from experiments.results import as_csv
from lm import arithmetic, fit
from lm.config import check_vocabulary
from lm.config_file import load
from lm.report.study import plain
from lm.scaling import ParametricLaw, RunTable, fit_isoflop, fit_parametric, overtrain, read_runs
from lm.scaling.parametric import HOFFMANN_STARTS
from lm.sweep import grid

ROOT = run.ROOT
LAW = ParametricLaw(E=0.8, A=60.0, B=900.0, alpha=0.42, beta=0.45)
STARTS = HOFFMANN_STARTS[::50]


@pytest.mark.parametrize("part", calibrate.PARTS)
def test_trials_of_a_calibration_can_be_run(part):
    config = load(f"{calibrate.CONFIG}:full")
    trials = calibrate.trials(config, part)
    assert len(set(trials)) == len(trials)
    for trial in trials:
        made = calibrate.as_config(config, trial)
        assert (made.model.d_model, made.model.n_layers) == (trial.d_model, trial.n_layers)
        assert made.optimizer.learning_rate == trial.rate
        assert (made.train.flops, made.train.seed) == (trial.flops, trial.seed)
    chosen = calibrate.as_config(config, calibrate.Trial(3e11, 32, 2))
    same = chosen.model.tied, chosen.model.rope_base, chosen.optimizer
    assert same == (config.model.tied, config.model.rope_base, config.optimizer)


def test_the_main_study_spans_budgets_sizes_and_seeds():
    config = load("experiments/isoflop/study.py:main")
    sweep = config.sweep
    assert config == load("configs/isoflop_cpu.py:full")
    assert sweep.budgets[0] == 1e11 and sweep.budgets[-1] == 3e13 and len(sweep.budgets) >= 6
    assert sweep.sizes >= 7 and sweep.spread**2 >= 16
    first = grid.plan(config, {})[0]
    seeds = {}
    for each in first.runs:
        seeds.setdefault(each.params, set()).add(each.config.train.seed)
    assert all(len(found) >= 3 for params, found in seeds.items() if params < 50_000)


@pytest.mark.parametrize("kind", study.KINDS)
def test_kinds_change_what_they_name_and_nothing_else(kind):
    files = ["data.files=sources.jsonl"] if kind == "python_source" else []
    widths = ["sweep.widths=(16,24,40)"] if kind == "smaller" else []
    config = load(f"experiments/isoflop/study.py:{kind}", files + widths)
    main = load("experiments/isoflop/study.py:main")
    runs = [each for budget in grid.plan(config, {}) for each in budget.runs]
    assert runs
    check_vocabulary(config, 512 if kind == "bpe512" else 257)
    changed = {name.partition(".")[0] for name in study.changes(kind)}
    for section in ("model", "data", "optimizer", "train"):
        assert (getattr(config, section) == getattr(main, section)) == (section not in changed)


@pytest.mark.parametrize("kind", study.ADDED)
def test_what_is_added_to_a_kind_is_as_its_own_runs(kind):
    main, added = (load(f"experiments/isoflop/study.py:{each}") for each in ("main", kind))
    runs = [each for budget in grid.plan(added, {}) for each in budget.runs]
    shapes = [rung.model for rung in grid.ladder(main)]
    for each in runs:
        assert each.config.model in shapes and each.config.train.flops == each.flops
    # Of longer's two budgets the sizes of one are known at once.
    assert len(runs) == {"wider": 1, "longer": 3}[kind]


def test_kept_runs_span_what_the_protocol_says():
    runs = read_runs(run.HERE / "results" / "full")
    budgets = runs.columns["budget"]
    assert np.unique(budgets).tolist() == list(load("configs/isoflop_cpu.py:full").sweep.budgets)
    assert not runs.excluded
    for budget in np.unique(budgets):
        sizes, seeds = np.unique(runs.params[budgets == budget], return_counts=True)
        assert len(sizes) >= 7 and sizes[-1] / sizes[0] >= 16
        assert (seeds[sizes < 50_000] >= 3).all()
        losses = [runs.loss[(budgets == budget) & (runs.params == n)].mean() for n in sizes]
        assert seeds[np.argmin(losses)] >= 2


def test_every_rung_undoes_one_of_kaplans():
    rungs = [set(names) for names in study.LADDER.values()]
    for above, below in zip(rungs, [*rungs[1:], set()], strict=True):
        assert below < above
    assert rungs[0] == set(study.KAPLAN)
    assert {kind for _, kind, _ in analysis.ONE_AT_A_TIME} == {"main", *study.HEAD, *study.KAPLAN}
    assert [kind for _, kind, _, _ in analysis.TOGETHER] == [*study.LADDER, "main"]


def table(law=LAW, budgets=(1e11, 3e11, 1e12, 3e12, 1e13), sizes=8, noise=0.0, spread=4.0):
    """Runs of the family's own shapes whose losses are a law's."""
    config = load("configs/isoflop_cpu.py:full")
    rungs, rows, rng = grid.ladder(config), [], np.random.default_rng(0)
    for budget in budgets:
        best = 20_000 * (budget / 1e11) ** 0.5
        for rung in grid.choose_sizes(rungs, best, spread, sizes):
            for seed in (0, 1):
                tokens = budget / arithmetic.flops_per_token(rung.model, 128)
                loss = law.loss(rung.params, tokens) * np.exp(noise * rng.standard_normal())
                model = rung.model
                rows.append(
                    dict(
                        loss=float(loss), params=float(rung.params), tokens=tokens, flops=budget,
                        budget=budget, seed=float(seed), epochs=tokens / 21e6,
                        d_model=model.d_model, n_layers=model.n_layers, n_heads=model.n_heads,
                        head_width=model.head_width, d_ff=model.d_ff, tied=1.0,
                        n_kv_heads=model.n_kv_heads, vocab_size=257.0, seq_len=128.0,
                    )
                )  # fmt: skip
    return RunTable.from_arrays(
        **{name: np.array([float(r[name]) for r in rows]) for name in rows[0]}
    )


def test_the_ladder_finds_a_known_exponent_and_says_where_there_is_none():
    runs = table(noise=1e-4)
    tables = dict.fromkeys(study.KINDS, runs)
    tables["batch"] = runs.where(runs.columns["budget"] == 1e12)  # one budget: no line
    del tables["rate"]
    rows = analysis.ladder(tables, study.BUDGETS, bootstrap=20)
    assert len(rows) == len(analysis.ONE_AT_A_TIME) + len(analysis.TOGETHER)
    by = {row["rung"]: row for row in rows}
    tuned, alone = by["none: tuned, all counted"], by["N: non-embedding"]
    assert tuned["a"] == pytest.approx(by["+ tuned batch and rate: the main study"]["a"])
    assert tuned["a"] == pytest.approx(tuned["akima"], abs=0.05)
    assert alone["a"] > tuned["a"] + 0.03  # the head is the smaller, the larger the model
    assert by["batch: fixed"]["a"] is None and by["batch: fixed"]["reason"]
    assert by["rate: Kaplan's rule"]["reason"] == "not run" != by["batch: fixed"]["reason"]
    assert all(flops < 3.1e12 for flops, *_ in tuned["optima"])
    upper = runs.where(np.isin(runs.columns["budget"], study.BUDGETS[1:]))
    without = fit_isoflop(upper, window=analysis.WINDOW, bootstrap=0).a
    assert tuned["a_upper"] == pytest.approx(without, abs=1e-9) != tuned["a"]


@pytest.fixture(scope="module")
def main():
    """The fits of runs that follow a law but for 0.2 % of noise."""
    runs = table(noise=0.002)
    fits = {
        "isoflop": fit_isoflop(runs, bootstrap=50),
        "parametric": fit_parametric(runs, bootstrap=50, starts=STARTS),
    }
    return fit.Study(runs=runs, curves=None, fits=fits, refused={}, accounting={})


def test_the_held_out_budget_is_foreseen_where_the_law_holds(main):
    found = analysis.held_out(main, bootstrap=50)
    assert found["flops"] == 1e13
    assert abs(found["parametric"]["loss_error"]) < 0.005
    low, high = found["parametric"]["loss_interval80"]
    assert low < found["parametric"]["loss"] < high
    assert found["isoflop"]["ratio"] == pytest.approx(1, abs=0.15)

    top = main.runs.columns["budget"] == 1e13
    higher = dataclasses.replace(main.runs, loss=main.runs.loss * np.where(top, 1.05, 1.0))
    fits = {"isoflop": fit_isoflop(higher, bootstrap=0)}
    found = analysis.held_out(dataclasses.replace(main, runs=higher, fits=fits), bootstrap=50)
    assert found["parametric"]["loss_error"] == pytest.approx(-0.05, abs=0.008)


def test_smaller_models_cost_what_the_law_says():
    """Under FLOPs of 6 N D it is `overtrain`'s closed form."""
    base, rows = 1e12, []
    optimum = LAW.optimum(base)
    for factor in (1.0, 0.75, 0.5):
        for times in (1, 1.4, 2, 2.8, 4):
            params, flops = float(optimum.params) * factor, base * times
            tokens = flops / (6 * params)
            rows.append((params, tokens, flops, float(LAW.loss(params, tokens))))
    params, tokens, flops, loss = np.array(rows).T
    runs = RunTable.from_arrays(loss=loss, params=params, tokens=tokens, flops=flops)

    class Fit:
        law = LAW

    found = analysis.over_training(runs, Fit, base, bootstrap=10)
    assert [row["times_smaller"] for row in found] == pytest.approx([4 / 3, 2])
    for row, factor in zip(found, (0.75, 0.5), strict=True):
        expected = float(overtrain(LAW, base, factor).flops) / base
        assert row["cost_by_the_law"] == pytest.approx(expected, rel=1e-6)
        assert row["cost"] == pytest.approx(expected, rel=0.02)

    noisy = loss * np.exp(0.002 * np.random.default_rng(0).standard_normal(len(loss)))
    noisy = RunTable.from_arrays(loss=noisy, params=params, tokens=tokens, flops=flops)
    for row, exact in zip(analysis.over_training(noisy, Fit, base, 200), found, strict=True):
        low, high = row["interval95"]
        assert low < exact["cost"] < high and 0.01 < high / low - 1 < 0.3

    beyond = analysis.over_training(noisy, Fit, 3.5e12, 20)[-1]  # the runs end at 4e12
    assert np.isnan(beyond["cost"]) and beyond["interval95"] is None


def test_seeds_scatter_as_they_were_made_to():
    runs = table(noise=0.01)
    found = analysis.seed_scatter(runs)
    assert found["all"] == pytest.approx(0.01, rel=0.3)
    assert set(found) == {"all", "below 50,000", "above"}
    assert analysis.seed_scatter(table(noise=1e-6))["all"] < 2e-6
    exact = table(noise=1e-6)
    whole, without = fit_isoflop(exact, bootstrap=0).a, analysis.without_each_budget(exact)
    assert list(without) == ["1e+11", "3e+11", "1e+12", "3e+12", "1e+13"]
    assert np.ptp(list(without.values())) > 0  # each is another fit, of one law
    assert list(without.values()) == pytest.approx([whole] * 5, abs=0.02)
    repeats = analysis.repeated(runs)
    assert len(repeats) + len(analysis.without_repeats(runs)) == len(runs) and repeats


def test_a_bent_law_is_told_from_noise(main):
    """Where the five constants hold, a sixth changes nothing; where they do not, it shows."""
    straight = {row["form"]: row for row in analysis.forms(main)}
    five, near, six = straight.values()
    assert five["rms_log_residual"] == pytest.approx(0.002, rel=0.2)
    assert six["rms_log_residual"] == pytest.approx(five["rms_log_residual"], rel=0.05)
    assert 20 < near["runs"] < five["runs"] and abs(five["top_budget"]) < 0.004
    assert five["a"] == pytest.approx(LAW.a, abs=0.02)

    runs, constants = main.runs, [np.log(0.6), 6.0, 0.6, 7.2, 0.53, np.log(0.4)]
    noise = np.exp(0.002 * np.random.default_rng(1).standard_normal(len(runs)))
    loss = analysis.bent_loss(constants, runs.params, runs.tokens) * noise
    bent = dataclasses.replace(main, runs=dataclasses.replace(runs, loss=loss))
    five, near, six = analysis.forms(bent)
    assert six["rms_log_residual"] == pytest.approx(0.002, rel=0.2)
    assert five["rms_log_residual"] > 2 * six["rms_log_residual"]
    assert six["gamma"] == pytest.approx(0.4, rel=0.3)
    assert six["a"] == pytest.approx(0.53 / 1.13, abs=0.02)
    assert abs(six["top_budget"]) < 0.004 < abs(five["top_budget"])


def test_figures_and_page_show_every_number(main):
    runs = main.runs
    tables = dict.fromkeys(study.KINDS, runs)
    del tables["rate"]
    elsewhere = [{"name": "English"} | analysis.exponent(runs, analysis.AS_COUNTED, 20)]
    rows = analysis.ladder(tables, study.BUDGETS, bootstrap=20)
    foreseen = analysis.held_out(main, 20)
    smaller = [
        dict(params=2e4, times_smaller=2.0, base_flops=1e12, cost=1.2, interval95=(1.1, 1.3),
             draws_beyond_the_runs=0.0, cost_by_the_law=1.21)
    ]  # fmt: skip
    summary = plain(
        dict(
            held_out=foreseen, ladder=rows, elsewhere=elsewhere, over_training=smaller,
            seed_scatter=analysis.seed_scatter(runs), rms_log_residual=0.002, repeated=["x"],
            forms=analysis.forms(main), estimators=analysis.estimators(runs, 20),
            without_each_budget=analysis.without_each_budget(runs),
            without_repeats={"isoflop": {"a": 0.5}}, without_wider={"isoflop": 0.4321},
            cost={"main": {"runs": 80, "flops": 5e14, "hours": 1.5, "goodput": 0.93}},
        )
    )  # fmt: skip
    json.dumps(summary, allow_nan=False)
    drawn = {
        "exponents": figures.exponents(main, elsewhere),
        "ladder": figures.ladder(rows),
        "held_out": figures.held_out(main, foreseen, summary["forms"][-1]["constants_below_top"]),
        "over_training": figures.over_training(smaller, runs, 1e12),
    }
    text = "".join(page.sections(summary, drawn))
    assert text.count("<svg") == 4
    for shown in (
        "0.835",
        "not run",
        "1.20",
        "(1.10, 1.30)",
        "93 %",
        "0.432",
        f"{rows[0]['a']:.3f}",
    ):
        assert shown in text


@pytest.mark.slow  # half a minute of fits
def test_tables_of_all_kinds_become_results_and_a_page(tmp_path):
    """As ``--norun`` would, of synthetic tables; what is written agrees with what was put in."""
    runs = table(noise=0.002, budgets=(*study.BUDGETS, 1e13, 3e13))
    rows = [
        {name: values[i] for name, values in runs.columns.items()}
        | {"run_id": f"r{i}", "loss": runs.loss[i], "params": runs.params[i]}
        | {"tokens": runs.tokens[i], "flops": runs.flops[i], "status": "done"}
        | {"wall_seconds": 10.0, "step_seconds": 9.5}
        for i in range(len(runs))
    ]  # fmt: skip
    often = [int(x) for x in np.argsort(-np.bincount(runs.columns["d_model"].astype(int)))[:3]]
    largest, steps = runs.params.max(), np.linspace(0.1, 1, 10)
    of_kind = {
        "main": lambda row: row["params"] < largest,
        "wider": lambda row: row["params"] == largest,
        "smaller": lambda row: row["d_model"] in often and row["budget"] < 1e13,
        "longer": lambda row: row["d_model"] in often and row["budget"] >= 1e13,
    }
    curves = [
        {"run_id": row["run_id"], "tokens": row["tokens"] * x, "flops": row["flops"] * x,
         "train_loss": float(LAW.loss(row["params"], row["tokens"] * x)), "validation_loss": ""}
        for row in rows for x in steps
    ]  # fmt: skip
    blank = dict.fromkeys(run.KEPT, "")
    workdir, results, report = tmp_path / "runs", tmp_path / "results", tmp_path / "report.html"
    for kind in study.KINDS:
        kept = [row for row in rows if of_kind.get(kind, lambda row: True)(row)]
        (workdir / kind).mkdir(parents=True)
        (workdir / kind / "runs.csv").write_text(as_csv([blank | row for row in kept]))
        ids = {row["run_id"] for row in kept}
        of_kept = [point for point in curves if point["run_id"] in ids]
        (workdir / kind / "curves.csv").write_text(as_csv(of_kept))
        (workdir / kind / "calls.jsonl").touch()

    run.FLAGS(["run", "--bootstrap=20"])
    run.write(run.read_kinds(workdir), workdir, results, report)
    summary, law = (json.loads((results / f"{x}.json").read_text()) for x in ("summary", "law"))
    optimum = np.log([LAW.optimum(c).params for c in (1e11, 3e13)])
    assert law["approaches"]["isoflop"]["a"] == pytest.approx(
        np.diff(optimum)[0] / np.log(300), abs=0.05
    )
    assert summary["held_out"]["flops"] == 3e13
    assert abs(summary["held_out"]["parametric"]["loss_error"]) < 0.005
    assert summary["without_repeats"]["envelope"]["a"] != law["approaches"]["envelope"]["a"]
    assert summary["cost"]["main"]["goodput"] == pytest.approx(0.95)
    assert summary["cost"]["main"]["runs"] == len(rows) and "wider" not in summary["cost"]
    assert len(read_runs(results)) == len(rows)
    assert summary["rms_log_residual"] == pytest.approx(0.002, rel=0.3)
    assert len((results / "other_runs.csv").read_text().splitlines()) > len(rows)
    text = report.read_text()
    assert text.count("<svg") >= 8 and not (results / "report.html").exists()
    figures_of = {path.stem for path in (results / "figures").iterdir()}
    assert {"isoflop", "exponents", "ladder", "held_out", "over_training"} <= figures_of
