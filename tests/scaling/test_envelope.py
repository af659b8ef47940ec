import numpy as np
import pytest

from lm.scaling import BESIROGLU2024, CannotFit, CurveTable, fit_envelope

LAW = BESIROGLU2024


def curves(
    budgets=8, sizes=13, points=40, spread=6.0, noise=0.0, lag=0.05, seed=0, validation=False
):
    """Runs about the optimum at each budget; a curve lies up to `lag` above the law until its end,
    as it does while the learning rate is high."""
    rng = np.random.default_rng(seed)
    columns = {name: [] for name in ("run_id", "params", "tokens", "flops", "loss")}
    for i, budget in enumerate(np.geomspace(1e18, 1e21, budgets)):
        for j, params in enumerate(
            LAW.optimum(budget).params * np.geomspace(1 / spread, spread, sizes)
        ):
            share = np.arange(1, points + 1) / points
            tokens = budget / (6 * params) * share
            loss = LAW.loss(params, tokens) * (1 + lag * np.sqrt(1 - share))
            loss = loss * np.exp(noise * rng.standard_normal(points))
            for name, values in (("run_id", f"{i}-{j:02}"), ("params", params), ("tokens", tokens),
                                 ("flops", 6 * params * tokens), ("loss", loss)):  # fmt: skip
                columns[name].append(np.broadcast_to(values, points))
    columns = {name: np.concatenate(values) for name, values in columns.items()}
    loss = columns.pop("loss")
    missing = np.full(len(loss), np.nan)
    losses = (missing, loss) if validation else (loss, missing)
    return CurveTable(**columns, train_loss=losses[0], validation_loss=losses[1])


@pytest.mark.parametrize("validation", [False, True])
def test_the_known_exponent_is_found(validation):
    fit = fit_envelope(curves(validation=validation), bootstrap=200)
    assert fit.a == pytest.approx(LAW.a, abs=0.02)
    assert fit.a + fit.b == pytest.approx(1, abs=1e-6)
    low, high = fit.a_interval95
    assert low < fit.a < high and low < LAW.a < high
    assert fit.optimal_params(1e20) == pytest.approx(LAW.optimum(1e20).params, rel=0.1)
    assert len(fit.optima) == fit.n_points == len(fit.run_of_optimum) == len(fit.progress)


def test_every_optimum_is_the_lowest_of_the_curves_there():
    table = curves(budgets=3, sizes=7, noise=0.002)
    fit = fit_envelope(table, n_flops=200, smoothing=0, bootstrap=0)
    for optimum, name in list(zip(fit.optima, fit.run_of_optimum, strict=True))[::7]:
        lowest = {}
        for run in np.unique(table.run_id):
            mine = table.run_id == run
            flops = table.flops[mine]
            if 0.85 * flops.max() <= optimum.flops <= flops.max():
                lowest[run] = np.interp(
                    np.log(optimum.flops), np.log(flops), table.train_loss[mine]
                )
        assert min(lowest, key=lowest.get) == name
        assert optimum.loss == pytest.approx(lowest[name], rel=1e-3)
        assert optimum.params == table.params[table.run_id == name][0]
        assert 6 * optimum.params * optimum.tokens == pytest.approx(optimum.flops, rel=1e-3)


def test_only_the_last_part_of_a_run_counts():
    assert fit_envelope(curves(), bootstrap=0).progress.min() >= 0.85 - 1e-9
    whole = fit_envelope(curves(lag=0), last_fraction=1.0, bootstrap=0)
    assert whole.progress.min() < 0.5 and whole.n_points > 1000
    # Curves that are still above the law pull the envelope to other runs: the reason for the cut.
    assert whole.checklist["last_fraction"] == 1.0


def test_smoothing_removes_the_envelopes_taste_for_lucky_noise():
    quiet = fit_envelope(curves(), bootstrap=0)
    rough = fit_envelope(curves(noise=0.01), smoothing=0, bootstrap=0)
    smooth = fit_envelope(curves(noise=0.01), smoothing=20, bootstrap=0)
    want = np.mean([LAW.optimum(o.flops).loss for o in quiet.optima])

    def bias(fit):
        return np.mean([o.loss / LAW.optimum(o.flops).loss for o in fit.optima]) - 1

    assert want > 1.8 and bias(rough) < bias(smooth) < bias(quiet) + 0.003
    assert np.std(smooth.residuals) < np.std(rough.residuals)


def test_sizes_at_the_edge_say_nothing():
    table = curves(budgets=4, sizes=9)
    fit = fit_envelope(table, bootstrap=0)
    assert table.params.min() < fit.optima[0].params and fit.optima[-1].params < table.params.max()
    # All sizes too large: the smallest on offer always wins, and no minimum is inside.
    shifted = curves(budgets=4, sizes=5, spread=1.0001)
    with pytest.raises(CannotFit, match="no_interior_minimum"):
        fit_envelope(
            CurveTable(shifted.run_id, shifted.params * 50, shifted.tokens, shifted.flops,
                       shifted.train_loss + 1e-9 * shifted.params, shifted.validation_loss),
            bootstrap=0,
        )  # fmt: skip


def test_no_curves_are_refused_by_name():
    one = curves(budgets=1, sizes=1)
    with pytest.raises(CannotFit) as error:
        fit_envelope(one)
    assert error.value.name == "no_curves"


def test_draws_are_the_envelope_of_the_resampled_runs():
    """A draw that lacks a run is the fit of a table without it."""
    from lm.scaling.envelope import _best

    size = np.array([1.0, 2.0, 3.0, 4.0])
    loss = np.array([[1.0, 4.0], [2.0, 3.0], [3.0, 1.0], [4.0, 2.0]])
    order = np.argsort(loss, axis=0)
    present = np.array([[True] * 4, [False, True, True, True], [True, True, False, True]])
    best, sound = _best(order, np.ones((4, 2), bool), size, present)
    assert best.tolist() == [[0, 2], [1, 2], [0, 3]]
    assert sound.tolist() == [[False, True], [False, True], [False, False]]
