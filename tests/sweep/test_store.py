"""The study's folder: tables made from results, and no study mixed with another."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from lm.command import BadInput
from lm.config import Config, SweepConfig, replace, to_dict
from lm.sweep.store import COLUMNS, Store

CONTRACT = (  # design.md's columns, which others script against
    "run_id params non_embedding_params active_params tokens flops flops_convention loss"
    " bits_per_byte budget d_model n_layers n_heads n_kv_heads n_experts vocab_size tied seq_len"
    " batch_tokens learning_rate schedule seed corpus tokenizer epochs wall_seconds device status"
).split()


def put(store, run_id, metrics=(), **result):
    config = replace(Config(), model={"d_model": 32}, train={"flops": 1e11, "seed": 3})
    folder = store.folder(run_id)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"schema": 1, "config": to_dict(config)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    given = {"status": "done", "loss": 2.0, "params": 10, "tokens": 20, "flops": 1.01e11}
    (folder / "result.json").write_text(json.dumps({"schema": 1, **given, **result}))


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_runs_csv(tmp_path):
    store = Store(tmp_path)
    put(store, "c2", loss=None, status="diverged")
    put(store, "c10", epochs={"a": 0.25, "b": 0.5}, rollbacks=0)
    put(store, "c30", rollbacks=1)
    store.scan()
    store.write_tables()
    rows = table(tmp_path / "runs.csv")
    assert list(rows[0])[: len(CONTRACT)] == CONTRACT and set(COLUMNS) >= set(CONTRACT)
    assert [row["run_id"] for row in rows] == ["c10", "c2", "c30"]
    done, diverged, rolled_back = rows
    assert (done["loss"], done["budget"], done["flops"]) == ("2.0", str(1e11), str(1.01e11))
    assert (done["d_model"], done["seed"], done["schedule"]) == ("32", "3", "cosine")
    assert (done["epochs"], done["corpus"], done["n_experts"]) == ("0.5", "pd_english", "0")
    assert (diverged["loss"], diverged["status"]) == ("", "diverged")
    assert [row["rollbacks"] for row in rows] == ["0", "", "1"]  # an older result says nothing
    assert (rolled_back["loss"], rolled_back["status"]) == ("2.0", "done")
    assert store.losses()["c10"] == 2.0
    assert math.isnan(store.losses()["c2"]) and math.isnan(store.losses()["c30"])


def test_experts_csv_has_the_loads_of_the_layers_with_experts(tmp_path):
    store = Store(tmp_path)
    put(store, "dense")
    store.scan()
    store.write_tables()
    assert not (tmp_path / "experts.csv").exists()
    told = {"dropped_share": [0.0, 0.25], "router_entropy": [1.0, 0.5]}
    told["expert_load"] = [[0.5, 0.5], [0.125, 0.875]]
    lines = [{"step": n, "tokens": 10 * n, "flops": n, "train_loss": 3.0} for n in range(1, 101)]
    put(store, "experts", metrics=[line | told for line in lines])
    path = store.folder("experts") / "config.json"
    config = replace(Config(), model={"moe": {"n_experts": 2, "every": 2}})
    path.write_text(json.dumps({"config": to_dict(config)}))
    store.scan()
    store.write_tables()
    rows = table(tmp_path / "experts.csv")
    assert {row["run_id"] for row in rows} == {"experts"} and len(rows) == 2 * 50
    assert rows[1] == {
        "run_id": "experts", "tokens": "10", "layer": "3",
        "dropped_share": "0.25", "router_entropy": "0.5", "load": "0.125 0.875",
    }  # fmt: skip
    assert rows[-1]["tokens"] == "1000"
    assert [row["n_experts"] for row in table(tmp_path / "runs.csv")] == ["0", "2"]


def test_the_tables_are_read_by_the_fits(tmp_path):
    from lm.scaling import read_curves, read_runs

    store = Store(tmp_path)
    metrics = [{"step": 1, "tokens": 10, "flops": 600.0, "train_loss": 3.0}]
    put(store, "a", metrics=metrics, params=10, tokens=20, flops=1200.0)
    put(store, "b", metrics=metrics, params=20, tokens=10, flops=1200.0, loss=2.5)
    put(store, "c", loss=None, status="diverged")
    store.scan()
    store.write_tables()
    runs = read_runs(tmp_path)
    assert list(runs.run_id) == ["a", "b"] and list(runs.loss) == [2.0, 2.5]
    curves = read_curves(tmp_path, runs)
    assert list(curves.run_id) == ["a", "b"] and list(curves.train_loss) == [3.0, 3.0]


def test_curves_are_thinned_by_means_and_validation_stays(tmp_path):
    store = Store(tmp_path)
    steps = np.arange(1, 5001)
    metrics = [
        {
            "step": int(s),
            "tokens": int(s) * 100,
            "flops": s * 1e4,
            "train_loss": 5 - math.log(s) / 3,
        }
        for s in steps
    ]
    metrics[-1]["validation_loss"] = 2.25
    put(store, "run", metrics=metrics)
    with (store.folder("run") / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5001, "tok')  # torn by a kill
    store.scan()
    store.write_tables()
    rows = table(tmp_path / "curves.csv")
    assert 60 < len(rows) < 170
    tokens = np.array([float(row["tokens"]) for row in rows])
    assert np.all(np.diff(tokens) > 0)
    for row in rows:
        expected = 5 - math.log(float(row["tokens"]) / 100) / 3
        assert float(row["train_loss"]) == pytest.approx(expected, abs=2e-3)
        assert float(row["flops"]) == pytest.approx(float(row["tokens"]) * 100)
    assert (rows[-1]["tokens"], rows[-1]["validation_loss"]) == ("500000.0", "2.25")
    assert all(row["validation_loss"] == "" for row in rows[:-1])


def test_another_study_is_refused_naming_the_keys(tmp_path):
    store, config = Store(tmp_path), Config(sweep=SweepConfig(budgets=(1e9, 1e10)))
    store.claim(config)
    store.claim(config)
    before = (tmp_path / "study.json").read_text()
    changed = replace(config, train={"batch_tokens": 4096.0}, optimizer={"beta2": 0.95})
    with pytest.raises(BadInput) as refused:
        store.claim(changed)
    assert "config.optimizer.beta2: 0.99 -> 0.95" in str(refused.value)
    assert "config.train.batch_tokens: 2048.0 -> 4096.0" in str(refused.value)
    assert "sweep" not in str(refused.value)
    assert (tmp_path / "study.json").read_text() == before


def test_budgets_may_be_added_above_only(tmp_path):
    store, config = Store(tmp_path), Config(sweep=SweepConfig(budgets=(1e9, 1e10)))
    store.claim(config)

    def with_budgets(*budgets):
        return dataclasses.replace(config, sweep=SweepConfig(budgets=budgets))

    for budgets in ((1e9, 2e9, 1e10), (1e8, 1e9, 1e10), (1e9,)):
        with pytest.raises(BadInput, match="config.sweep.budgets"):
            store.claim(with_budgets(*budgets))
    store.claim(with_budgets(1e9, 1e10, 1e11))
    assert store.config().sweep.budgets == (1e9, 1e10, 1e11)


def test_tables_hold_what_another_launcher_finished_meanwhile(tmp_path, monkeypatch):
    store = Store(tmp_path)
    put(store, "a")
    store.scan()
    write = Store._write_tables

    def slow_write(self):  # the other one writes before this one does, and is overwritten
        if not store.folder("b").exists():
            put(store, "b")
        write(self)

    monkeypatch.setattr(Store, "_write_tables", slow_write)
    store.write_tables()
    assert [row["run_id"] for row in table(tmp_path / "runs.csv")] == ["a", "b"]


def test_no_study_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="no study here"):
        Store(tmp_path).config()


@pytest.mark.parametrize("content", [b"", b'{"config"', b"\xff", b"[]"])
@pytest.mark.parametrize("name", ["study.json", "runs/a/config.json", "runs/a/result.json"])
def test_damaged_files_are_refused_by_name(name, content, tmp_path):
    store = Store(tmp_path)
    store.claim(Config(sweep=SweepConfig(budgets=(1e9,))))
    put(store, "a")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=name):
        store.config()
        store.scan()
