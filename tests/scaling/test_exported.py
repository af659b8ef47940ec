import numpy as np
import pytest

from lm.command import BadInput
from lm.scaling import RunTable, read_runs
from lm.scaling.exported import exported_columns, read_any_curves


@pytest.fixture
def runs():
    return RunTable.from_arrays(
        run_id=["small", "big"], params=[1e4, 1e5], tokens=[1e6, 2e6], loss=[2.0, 1.8],
        batch_tokens=[1000.0, 2000.0],
    )  # fmt: skip


def test_wandb_run_table(tmp_path):
    file = tmp_path / "wandb.csv"
    file.write_text(
        'Name,State,config:params,config.tokens,"summary:loss"\n'
        "small,finished,1e4,1e6,2.0\nbig,finished,1e5,2e6,1.8\nbad,crashed,1e5,3e6,\n"
    )
    runs = read_runs([file], exported_columns([file], {}))
    assert runs.run_id.tolist() == ["small", "big"]
    assert runs.params.tolist() == [1e4, 1e5] and runs.loss.tolist() == [2.0, 1.8]
    assert "bad: crashed" in runs.excluded


def test_the_users_renames_go_first(tmp_path):
    file = tmp_path / "wandb.csv"
    file.write_text("config:params,config:tokens,summary:loss,summary:val\n1e4,1e6,9,2.0\n")
    columns = exported_columns([file], {"loss": "summary:val"})
    assert columns["loss"] == "summary:val"
    assert read_runs([file], columns).loss.tolist() == [2.0]


def test_wandb_line_plot(tmp_path, runs):
    file = tmp_path / "plot.csv"
    file.write_text(
        "Step,small - val/loss,small - val/loss__MIN,big - val/loss,other - val/loss\n"
        "100,3.0,2.9,2.8,9\n500,2.5,2.4,,9\n"
    )
    curves = read_any_curves([file], runs)
    assert curves.run_id.tolist() == ["small", "small", "big"]
    assert curves.tokens.tolist() == [1e5, 5e5, 2e5]
    assert np.allclose(curves.flops, 6 * curves.params * curves.tokens)
    assert curves.validation_loss.tolist() == [3.0, 2.5, 2.8]
    assert np.isnan(curves.train_loss).all()


def test_tensorboard_scalars_merge_by_step(tmp_path, runs):
    (tmp_path / "run-big-tag-train_loss.csv").write_text(
        "Wall time,Step,Value\n1,10,3.1\n2,20,2.9\n"
    )
    (tmp_path / "run-big-tag-validation_loss.csv").write_text("Wall time,Step,Value\n2,20,3.0\n")
    (tmp_path / "run-big-tag-learning_rate.csv").write_text("Wall time,Step,Value\n2,20,0.1\n")
    curves = read_any_curves([tmp_path], runs)
    assert curves.tokens.tolist() == [2e4, 4e4]
    assert curves.train_loss.tolist() == [3.1, 2.9]
    assert np.isnan(curves.validation_loss[0]) and curves.validation_loss[1] == 3.0


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("scalars.csv", "Wall time,Step,Value\n1,10,3.1\n", "run-RUN-tag-TAG"),
        ("plot.csv", "when,small - loss\n1,3.1\n", "none of Step"),
        ("plot.csv", "Step,small - loss\n1,high\n", "small - loss"),
        ("plot.csv", "Step,nobody - loss\n1,3.1\n", "no loss of a run"),
        ("plot.csv", "Step,small - loss\n1\n", "row 2: 1 fields"),
    ],
)
def test_unusable_exports_are_refused_by_name(tmp_path, runs, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=says) as refusal:
        read_any_curves([tmp_path / name], runs)
    assert name in str(refusal.value)


def test_steps_need_batch_tokens(tmp_path):
    runs = RunTable.from_arrays(run_id=["small"], params=[1e4], tokens=[1e6], loss=[2.0])
    (tmp_path / "plot.csv").write_text("Step,small - loss\n1,3.1\n")
    with pytest.raises(BadInput, match="batch_tokens"):
        read_any_curves([tmp_path / "plot.csv"], runs)
