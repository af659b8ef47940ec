"""Positions beyond training: how the experiment reads a model there, and a whole tiny one."""

import csv
import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.rope_extrapolation import run
from lm.checkpoint import Checkpoints, claim
from lm.config_file import load
from lm.model import Decoder, rotary

SMALL = (
    "model.d_model=16", "model.n_layers=1", "model.d_ff=24", "data.seq_len=32",
    "data.corpus=text", "data.validation_tokens=256", "train.tokens=4096",
    "train.batch_tokens=256",
)  # fmt: skip


def test_bins_are_all_positions_once():
    positions = np.concatenate([np.arange(run.WANTED)[part] for part in run.bins()])
    assert positions.tolist() == list(range(run.WANTED))
    sizes = [part.stop - part.start for part in run.bins()]
    assert sizes[0] == 1 and max(sizes) < 0.06 * run.WANTED
    assert run.TRAINED in [part.stop for part in run.bins()]


def test_errors_are_between_windows():
    """Positions of a window that move together count once."""
    of_window = np.array([1.0, 2.0, 4.0, 5.0])
    loss_WT = np.repeat(of_window[:, None], 10, 1) + np.linspace(-0.5, 0.5, 10)
    mean, error = run.mean_and_error(loss_WT, slice(0, 10))
    assert mean == pytest.approx(3) and error == pytest.approx(np.sqrt(10 / 3) / 2)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3", "longrope"])
def test_scalings_slow_the_slowest_pair_by_the_factor(kind):
    factors = np.geomspace(1, run.FACTOR, 16).tolist() if kind == "longrope" else None
    ratio = rotary.frequencies(32, 1e4) / rotary.frequencies(32, 1e4, run.section(kind, factors))
    assert ratio[-1] == pytest.approx(run.FACTOR)
    assert ratio[0] == pytest.approx(run.FACTOR if kind == "linear" else 1)


def test_fine_tunes_are_of_the_same_decoder():
    study = f"{run.HERE / 'study.py'}:"
    plain = load(study + "rope")
    for name in run.FINE_TUNES:
        tuned = load(f"{study}tuned_{name}").model
        assert tuned.rope_scaling.kind == name
        assert dataclasses.replace(tuned, rope_scaling=plain.model.rope_scaling) == plain.model


@pytest.mark.slow
def test_learned_positions_repeat_their_last_row(tmp_path):
    settings = ["model.n_layers=1", "model.d_model=16", "model.d_ff=24", "data.seq_len=16"]
    config = load(f"{run.HERE / 'study.py'}:learned", settings)
    decoder = Decoder(config.model, 16)
    params = nn.meta.unbox(decoder.init(jax.random.key(0), np.zeros((1, 1), np.int32)))["params"]
    claim(tmp_path, config)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"params": params}, {"schema": 1})
    checkpoints.close()
    judge = run.scorer(tmp_path, run.VARIANTS["learned"], [])
    table_TD = np.asarray(judge.params["positions"])
    np.testing.assert_array_equal(table_TD[:16], params["positions"])
    assert table_TD.shape == (run.WANTED, 16) and (table_TD[16:] == table_TD[15]).all()
    tokens_WT = np.random.default_rng(0).integers(0, 256, (2, 17))
    logits_BTV = decoder.apply({"params": params}, tokens_WT[:, :-1])
    chosen = np.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_WT[:, 1:, None], -1)
    np.testing.assert_allclose(run.nats(judge, tokens_WT), -chosen[..., 0], rtol=1e-5)


@pytest.mark.slow
def test_a_tiny_one_from_training_to_figure(monkeypatch, tmp_path, text_data):
    for name, value in {
        "SEEDS": (0,), "POSITIONS": ("rope",), "FINE_TUNES": ("yarn",),
        "WANTED": 64, "TRAINED": 32, "RANGES": ((1, 32), (33, 64)),
        "GENERATIONS": 1, "CHILDREN": 2, "SEARCH_WINDOWS": 2,
        "VARIANTS": {k: run.VARIANTS[k] for k in ("rope", "longrope", "tuned_yarn")}
                    | {"window": run.Variant("rope", window=32)},
    }.items():  # fmt: skip
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "draw", lambda losses, path: path.write_text("drawn"))
    (tmp_path / "results").mkdir()
    arguments = [
        *("run.py", f"--workdir={tmp_path / 'runs'}", f"--results={tmp_path / 'results'}"),
        *("--windows=4", f"--data_dir={text_data.data_dir}"),
        *(f"--override={setting}" for setting in (*SMALL, f"data.files={text_data.files}")),
    ]
    assert run.command.run(run.main, run.FLAGS, None, arguments) == 0
    losses = {p.stem: np.load(p) for p in (tmp_path / "runs" / "losses").iterdir()}
    assert {x.shape for x in losses.values()} == {(4, 64)}

    # A window of all positions so far changes nothing.
    np.testing.assert_allclose(
        losses["window-s0"][:, :32], losses["rope-s0"][:, :32], rtol=1e-5, atol=1e-6
    )
    assert np.abs(losses["tuned_yarn-s0"] - losses["rope-s0"]).max() > 1e-3

    with (tmp_path / "results/by_position.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["variant"] for row in rows} == set(run.VARIANTS)
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run.command.run(run.main, run.FLAGS, None, [*arguments, "--norun"]) == 0
