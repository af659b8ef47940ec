import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.command import BadInput
from lm.scaling import RunTable, read_curves, read_runs

HEADER = "run_id,params,tokens,flops,loss"
ROWS = ["a,1e6,2e7,1.2e14,4.0", "b,2e6,2e7,2.4e14,3.8", "c,4e6,2e7,4.8e14,3.7"]


def write(folder, *lines, name="runs.csv"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_a_table_and_keeps_other_columns(tmp_path):
    path = write(tmp_path, HEADER + ",d_model,corpus", *(row + ",64,web" for row in ROWS))
    runs = read_runs(path)
    assert len(runs) == 3 and list(runs.run_id) == ["a", "b", "c"]
    assert runs.params.dtype == np.float64 and runs.loss[1] == 3.8
    assert runs.columns["d_model"].dtype == np.float64
    assert list(runs.columns["corpus"]) == ["web"] * 3
    assert read_runs(tmp_path).run_id.tolist() == ["a", "b", "c"]  # a folder holds runs.csv


@pytest.mark.parametrize("left_out", ["params", "tokens", "flops"])
def test_the_third_follows_from_any_two(left_out):
    arrays = {"params": [1e6, 2e6], "tokens": [2e7, 3e7], "flops": [1.2e14, 3.6e14]}
    want = arrays.pop(left_out)
    runs = RunTable.from_arrays(loss=[4.0, 3.8], **arrays)
    assert getattr(runs, left_out) == pytest.approx(want)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(1e3, 1e12), min_size=2, max_size=20, unique=True),
    st.floats(0.02, 1e4),
    st.integers(0, 2**32 - 1),
)
def test_6nd_closes_whatever_two_are_given(params, ratio, seed):
    params = np.array(params)
    tokens = ratio * params * np.random.default_rng(seed).uniform(1, 2, len(params))
    loss = np.linspace(2, 3, len(params))
    arrays = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    for left_out in arrays:
        two = {name: values for name, values in arrays.items() if name != left_out}
        runs = RunTable.from_arrays(loss=loss, **two)
        np.testing.assert_allclose(runs.flops, 6 * runs.params * runs.tokens, rtol=1e-12)
        np.testing.assert_allclose(runs.params, params, rtol=1e-12)


def test_renamed_columns_and_joined_files(tmp_path):
    one = write(tmp_path, "N,D,loss,x", "1e6,2e7,4.0,1", name="one.csv")
    two = write(tmp_path, "N,D,loss,y", "2e6,2e7,3.8,2", name="two.csv")
    runs = read_runs([one, two], columns={"params": "N", "tokens": "D"})
    assert runs.params.tolist() == [1e6, 2e6]
    assert np.isnan(runs.columns["x"][1]) and runs.columns["y"][1] == 2


def test_a_column_may_take_over_a_name_of_ours(tmp_path):
    path = write(tmp_path, "params,N,tokens,loss", "7,1e6,2e7,4.0", "7,2e6,2e7,3.8")
    assert read_runs(path, columns={"params": "N"}).params.tolist() == [1e6, 2e6]


def test_diverged_runs_are_left_out_by_name(tmp_path):
    path = write(
        tmp_path, HEADER + ",status", *(r + ",done" for r in ROWS), "d,8e6,2e7,9.6e14,nan,diverged"
    )
    runs = read_runs(path)
    assert len(runs) == 3 and runs.excluded == ("d: diverged",)
    assert runs.where(runs.params > 1e6).excluded == ("d: diverged",)


def test_runs_that_rolled_back_are_left_out_by_name(tmp_path):
    rows = [row + rollbacks for row, rollbacks in zip(ROWS, (",", ",1", ",0"), strict=True)]
    path = write(tmp_path, HEADER + ",rollbacks", *rows, "d,8e6,2e7,9.6e14,3.5,2.0")
    runs = read_runs(path)
    assert list(runs.run_id) == ["a", "c"]
    assert runs.excluded == tuple(
        f"{name}: rollbacks: {n}, so trained at a lower rate" for name, n in (("b", 1), ("d", 2))
    )


def test_a_wandb_export_is_read_by_its_own_names(tmp_path):
    path = write(
        tmp_path, "Name,State,params,tokens,loss", "a,finished,1e6,2e7,4.0", "b,crashed,2e6,2e7,3.9"
    )
    runs = read_runs(path)
    assert list(runs.run_id) == ["a"] and runs.excluded == ("b: crashed",)


def test_bits_are_converted_when_declared(tmp_path):
    path = write(tmp_path, "params,tokens,loss_bits", "1e6,2e7,5.0", "2e6,2e7,4.5")
    runs = read_runs(path, columns={"loss": "loss_bits"}, loss_unit="bits")
    assert runs.loss == pytest.approx(np.array([5.0, 4.5]) * np.log(2))


@pytest.mark.parametrize(
    "header, rows, says",
    [
        ("params,tokens,Loss", ["1,2,3"], ["'loss'", "did you mean 'Loss'"]),
        ("param,loss", ["1,2"], ["'params'", "did you mean 'param'", "any two"]),
        (HEADER, [ROWS[0], "b,0,2e7,1e14,3.8"], ["params", "above zero", "line 3"]),
        (HEADER, [ROWS[0], "b,1e6,-2e7,1e14,3.8"], ["tokens", "above zero", "line 3"]),
        (HEADER, [ROWS[0], "b,1e6,2e7,1e14,nan"], ["loss", "finite", "line 3"]),
        (HEADER, [ROWS[0], "b,1e6,2e7,1e14,"], ["loss", "number", "line 3"]),
        (HEADER, [ROWS[0], "b,1e6,2e7,1e14,inf"], ["loss", "finite", "line 3"]),
        (HEADER, [ROWS[0], "b,1.5B,2e7,1e14,3"], ["params", "number", "line 3"]),
        (HEADER, [ROWS[0], ROWS[0]], ["duplicated", "run_id", "line 2", "line 3"]),
        (HEADER, [ROWS[0], "z" + ROWS[0][1:]], ["duplicated", "loss", "line 2", "line 3"]),
        (HEADER, [ROWS[0], "b,1e6"], ["line 3", "2 fields"]),
        (HEADER, [], ["no rows"]),
        (HEADER + ",loss", [ROWS[0] + ",4"], ["'loss'", "twice"]),
        (HEADER + ",tokenizer", [ROWS[0] + ",bpe", ROWS[1] + ",bytes"], ["tokenizer", "'bpe'"]),
        (HEADER + ",status", [ROWS[0] + ",diverged"], ["status"]),
        (HEADER + ",bits_per_byte", [r + r[-4:] for r in ROWS], ["loss", "bits_per_byte"]),
        (HEADER + ",perplexity", [ROWS[0] + ",16"], ["loss", "bits"]),
        (HEADER + ",vocab_size", [ROWS[0] + ",32"], ["loss", "vocab_size"]),
        (HEADER + ",loss_unit", [ROWS[0] + ",nats", ROWS[1] + ",bits"], ["bits", "line 3"]),
        ("params,tokens,loss", ["2e9,1e6,4", "4e9,2e6,3"], ["params and tokens", "swapped"]),
        ("params,tokens,flops,loss", ["1e6,2e7,1.2e-6,4"], ["flops", "unit"]),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_by_column_and_row(tmp_path, header, rows, says):
    path = write(tmp_path, header, *rows)
    with pytest.raises(BadInput) as error:
        read_runs(path)
    assert "\n" not in str(error.value)
    for text in says:
        assert text in str(error.value)


def test_a_missing_file_and_a_wrong_rename(tmp_path):
    with pytest.raises(BadInput, match="nowhere.csv"):
        read_runs(tmp_path / "nowhere.csv")
    path = write(tmp_path, "Model Size,tokens,loss", "1e6,2e7,4")
    with pytest.raises(BadInput, match="'Model size'.*did you mean 'Model Size'"):
        read_runs(path, columns={"params": "Model size"})
    with pytest.raises(BadInput, match="sounds like bits"):
        read_runs(write(tmp_path, "params,tokens,bpb", "1e6,2e7,4"), columns={"loss": "bpb"})


def test_arrays_must_fit_together():
    with pytest.raises(BadInput, match="equal length"):
        RunTable.from_arrays(loss=[4.0, 3.0], params=[1e6], tokens=[2e7, 2e7])
    with pytest.raises(BadInput, match="row 1"):
        RunTable.from_arrays(loss=[4.0, np.nan], params=[1e6, 2e6], tokens=[2e7, 2e7])


def test_curves_take_their_sizes_from_the_runs(tmp_path):
    runs = read_runs(write(tmp_path, HEADER, *ROWS))
    write(
        tmp_path, "run_id,tokens,flops,train_loss,validation_loss",
        "a,1e7,6e13,5.0,", "a,2e7,1.2e14,4.1,4.0", "gone,1e7,6e13,5.0,5.1", name="curves.csv",
    )  # fmt: skip
    curves = read_curves(tmp_path, runs)
    assert curves.params.tolist() == [1e6, 1e6]
    assert np.isnan(curves.validation_loss[0]) and curves.validation_loss[1] == 4.0
    with pytest.raises(BadInput, match="no run_id of the curves"):
        read_curves(tmp_path, runs.where([1]))
    bad = write(tmp_path, "run_id,tokens,loss", "a,1e7,5.0", name="bad.csv")
    with pytest.raises(BadInput, match="'train_loss'"):
        read_curves(bad, runs)
