import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from lm import command, fit
from lm.command import BadInput

DATA = Path(os.environ.get("LM_PUBLISHED_RUNS", Path(__file__).parents[2] / "shared" / "data"))
EPOCH = DATA / "epoch_chinchilla" / "svg_extracted_data.csv"


def run(*flags):
    return command.run(fit.main, fit.FLAGS, fit.__doc__, ["lm.fit", *map(str, flags)])


@pytest.fixture(scope="module")
def fitted(known_law_tables, tmp_path_factory):
    """The folder that the command wrote for the tables of a known law, and that law."""
    folder, law = known_law_tables
    out = tmp_path_factory.mktemp("out")
    assert run(f"--runs={folder}", f"--out={out}", "--bootstrap=300") == 0
    return out, law


@pytest.fixture(scope="module")
def law_file(fitted):
    return json.loads((fitted[0] / "law.json").read_text())


def test_every_approach_finds_the_known_exponent(fitted, law_file):
    _, law = fitted
    assert set(law_file["approaches"]) == {"envelope", "isoflop", "parametric"}
    # The envelope's winners are a handful of the ladder's sizes, a factor 1.5 apart.
    for name, within in (("envelope", 0.1), ("isoflop", 0.03), ("parametric", 0.02)):
        entry = law_file["approaches"][name]
        assert abs(entry["a"] - law.a) < within, name
        assert entry["a"] + entry["b"] == pytest.approx(1, abs=1e-3)
        low, high = entry["a_interval95"]
        assert low < law.a < high, name


def test_the_law_file_keeps_its_contract(law_file):
    assert law_file["schema"] == 1
    for entry in law_file["approaches"].values():
        assert {"a", "b", "k_N", "k_D", "optima"} <= set(entry)
        for interval in ("a_interval80", "a_interval95", "b_interval80", "b_interval95"):
            assert len(entry[interval]) == 2
    for optimum in law_file["approaches"]["isoflop"]["optima"]:
        assert set(optimum) == {"flops", "params", "tokens", "loss"}
    parametric = law_file["approaches"]["parametric"]
    assert {"E", "A", "B", "alpha", "beta", "objective", "n_points"} <= set(parametric)
    assert len(parametric["draws"]) == 300 and len(parametric["draws"][0]) == 5
    assert law_file["flops_range"] == pytest.approx([1e11, 1e13])
    assert law_file["accounting"]["params"] == "blocks_and_head"
    assert law_file["accounting"]["flops"] == "6nd"


def test_the_checklist_says_what_decides_whether_the_fit_can_be_trusted(law_file):
    checklist = law_file["checklist"]
    for key in (
        "law_form", "params_convention", "flops_convention", "params_range", "tokens_range",
        "flops_range", "corpus", "tokenizer", "epochs", "schedule", "optimizer", "exclusions",
        "objective", "delta", "initial_points", "tolerance", "interval_method", "held_out_error",
    ):  # fmt: skip
        assert checklist[key] not in (None, {}), key
    assert checklist["tokenizer"] == "bytes" and checklist["optimizer"] == "not in the table"
    assert checklist["delta"] == {"parametric": 1e-3}
    assert checklist["exclusions"] == ["c1e13-d999: diverged"]
    held_out = checklist["held_out_error"]["parametric"]
    assert held_out["top_budget_flops"] == pytest.approx(1e13)
    assert 0 < held_out["rms_log_loss_error"] < 0.01  # the noise is 0.002


def test_json_never_holds_what_json_does_not_know(fitted):
    text = (fitted[0] / "law.json").read_text()
    assert not re.search(r"NaN|Infinity", text)


def test_plan_reads_the_law(fitted):
    from lm.scaling.published import named_law

    out, law = fitted
    for approach in ("envelope", "isoflop", "parametric"):
        best = named_law(f"{out / 'law.json'}:{approach}").law.optimum(1e12)
        assert best.params == pytest.approx(law.optimum(1e12).params, rel=0.35)


def test_exponents_are_printed_beside_the_published(known_law_tables, tmp_path, capsys):
    assert run(f"--runs={known_law_tables[0]}", f"--out={tmp_path}", "--bootstrap=0",
               "--approaches=isoflop") == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "2  IsoFLOP" in printed and "0.490" in printed and "0.730" in printed
    assert "c1e13-d999: diverged" in printed


def test_without_curves_the_envelope_is_refused_and_the_others_go_on(known_law_tables, tmp_path):
    shutil.copy(known_law_tables[0] / "runs.csv", tmp_path / "alone.csv")
    assert run(f"--runs={tmp_path / 'alone.csv'}", f"--out={tmp_path}", "--bootstrap=0") == 0
    law = json.loads((tmp_path / "law.json").read_text())
    assert set(law["approaches"]) == {"isoflop", "parametric"}
    assert law["refused"]["envelope"].startswith("no_curves")
    assert law["approaches"]["isoflop"]["a_interval95"] == [
        None,
        None,
    ]  # no bootstrap was asked for


def test_highest_losses_are_left_out_by_name(known_law_tables):
    runs, curves = fit.read([known_law_tables[0]])
    study = fit.fit(runs, curves, approaches=["isoflop"], bootstrap=0, drop_highest_loss=2)
    highest = runs.run_id[np.argsort(-runs.loss)[:2]]
    assert len(study.runs) == len(runs) - 2
    assert not set(highest) & (set(study.runs.run_id) | set(study.curves.run_id))
    assert all(any(name in text for text in study.runs.excluded) for name in highest)


def test_another_accounting_recounts_runs_and_curves(known_law_tables):
    runs, curves = fit.read([known_law_tables[0]])
    study = fit.fit(
        runs, curves, approaches=["isoflop"], bootstrap=0, accounting=["non_embedding", "kaplan"]
    )
    head = 256 * runs.columns["d_model"]
    assert study.runs.params == pytest.approx(runs.params - head)
    assert study.accounting == {"params": "non_embedding", "flops": "kaplan"}
    for name in runs.run_id[:3]:
        (i,) = np.flatnonzero(runs.run_id == name)
        end = study.curves.flops[study.curves.run_id == name].max()
        assert end == pytest.approx(study.runs.flops[i])


def test_two_tables_side_by_side(known_law_tables, fitted, tmp_path, capsys):
    folder, _ = known_law_tables
    assert run(f"--runs={folder}", f"--out={tmp_path}", f"--compare={fitted[0] / 'law.json'}",
               "--bootstrap=300", "--approaches=parametric") == 0  # fmt: skip
    comparison = json.loads((tmp_path / "law.json").read_text())["comparison"]
    (row,) = (row for row in comparison["rows"] if row["quantity"] == "a")
    assert row["difference"] == pytest.approx(0)
    assert row["interval95"][0] < 0 < row["interval95"][1]
    assert comparison["multiplier"]["value"] == pytest.approx(1)
    assert "difference" in capsys.readouterr().out
    assert "Beside" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--approaches=isoflops"], "isoflop"),
        (["--approaches=envelope", "--curves=nowhere.csv"], "nowhere.csv"),
        (["--accounting=total,effective"], "one convention of N"),
        (["--accounting=embedding"], "non_embedding"),
        (["--columns=params"], "ours=theirs"),
        (["--drop_highest_loss=1000"], "drop_highest_loss"),
        (["--compare=missing.json"], "missing.json"),
        (["--window=-1"], "window"),
        (["--out="], "--out is missing"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    known_law_tables, tmp_path, capsys, flags, says
):
    out = tmp_path / "out"
    given = [
        f"--runs={known_law_tables[0]}",
        f"--out={out}",
        "--bootstrap=0",
        "--approaches=isoflop",
    ]
    assert run(*given, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error and error.startswith("error: ")
    assert not out.exists()


def test_runs_and_out_are_needed(capsys):
    assert run("--out=somewhere") == 2
    assert "--runs" in capsys.readouterr().err


def test_a_table_that_no_approach_can_use_is_refused(known_law_tables):
    runs, _ = fit.read([known_law_tables[0]])
    with pytest.raises(BadInput, match="envelope .*isoflop .*parametric"):
        fit.fit(runs.where(np.arange(3)), bootstrap=0)


@pytest.mark.slow
@pytest.mark.skipif(not EPOCH.is_file(), reason="Epoch's 245 runs: set LM_PUBLISHED_RUNS")
def test_epochs_table_by_one_command(tmp_path):
    columns = "--columns=params=Model Size,flops=Training FLOP"
    flags = ["--drop_highest_loss=5", "--bootstrap=0", "--approaches=parametric", columns]
    assert run(f"--runs={EPOCH}", f"--out={tmp_path}", *flags) == 0
    law = json.loads((tmp_path / "law.json").read_text())
    entry = law["approaches"]["parametric"]
    found = [entry[name] for name in ("A", "B", "E", "alpha", "beta", "a")]
    published = [477.826, 2143.417, 1.817218, 0.3473105, 0.3671724, 0.513900]
    assert found == pytest.approx(published, rel=1e-4)
    assert law["accounting"]["exponents"] == []  # the table has no shapes to recount
    assert len(law["checklist"]["exclusions"]) == 5
