import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import Akima1DInterpolator
from scipy.optimize import minimize_scalar

from lm.command import BadInput
from lm.scaling import BESIROGLU2024, CannotFit, RunTable, fit_isoflop
from lm.scaling.isoflop import _Line, _ProfileFit

BUDGETS = np.array([1e18, 1e19, 1e20])


def center(flops, a=0.5):
    return 1e9 * (flops / 1e20) ** a


def table(loss_of_x, sizes=7, spread=6.0, a=0.5, budgets=BUDGETS, **columns):
    """Runs about center(C) whose loss at budget i is loss_of_x(x, i) of x = log(N / center)."""
    x = np.linspace(-np.log(spread), np.log(spread), sizes)
    flops = np.repeat(budgets, sizes)
    params = center(flops, a) * np.exp(np.tile(x, len(budgets)))
    loss = np.concatenate([loss_of_x(x, i) for i in range(len(budgets))])
    return RunTable.from_arrays(params=params, flops=flops, loss=loss, **columns)


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0.3, 0.8),
    st.floats(-0.8, 0.8),
    st.floats(0.01, 0.2),
    st.sampled_from(["parabola", "cubic"]),
)
def test_exact_parabolas_give_their_vertices(a, vertex, curvature, estimator):
    runs = table(lambda x, i: 3 - 0.3 * i + curvature * (x - vertex) ** 2, a=a)
    fit = fit_isoflop(runs, estimator=estimator, bootstrap=0)
    assert fit.a == pytest.approx(a, abs=1e-7) and fit.b == pytest.approx(1 - a, abs=1e-7)
    assert fit.k_N * 1e20**fit.a == pytest.approx(1e9 * np.exp(vertex), rel=1e-5)
    for optimum, flops in zip(fit.optima, BUDGETS, strict=True):
        assert optimum.flops == pytest.approx(flops)
        assert 6 * optimum.params * optimum.tokens == pytest.approx(flops, rel=1e-6)
    assert fit.optima[2].loss == pytest.approx(2.4)
    assert fit.optimal_params(1e21) == pytest.approx(center(1e21, a) * np.exp(vertex), rel=1e-5)


def test_a_cubic_is_followed_by_the_cubic():
    def skewed(x, i):
        return 3 - 0.3 * i + 0.1 * x**2 + 0.02 * x**3

    fit = fit_isoflop(table(skewed), estimator="cubic", bootstrap=0)
    assert [o.params for o in fit.optima] == pytest.approx(center(BUDGETS), rel=1e-6)
    parabola = fit_isoflop(table(skewed), bootstrap=0)
    assert abs(np.log(parabola.optima[0].params / center(BUDGETS[0]))) > 0.1
    assert np.ptp(parabola.residuals) > 1e-4 > np.ptp(fit.residuals)


def test_akima_is_scipys_interpolant_minimised():
    rng = np.random.default_rng(0)
    runs = table(
        lambda x, i: 3 - 0.3 * i + 0.08 * (x - 0.3) ** 2 + 0.005 * rng.standard_normal(len(x))
    )
    fit = fit_isoflop(runs, estimator="akima", bootstrap=0)
    for profile in fit.profiles:
        x = np.log(profile.params)
        curve = Akima1DInterpolator(x, profile.loss)
        k = np.argmin(profile.loss)
        found = minimize_scalar(curve, bounds=(x[k - 1], x[k + 1]), method="bounded",
                                options={"xatol": 1e-10})  # fmt: skip
        assert np.log(profile.minimum.params) == pytest.approx(found.x, abs=1e-6)
        assert profile.minimum.loss == pytest.approx(found.fun)
        assert profile.curve(profile.params) == pytest.approx(profile.loss)


def test_seeds_of_one_size_are_averaged_where_an_interpolation_passes(noisy_table):
    once = noisy_table()
    twice = RunTable.from_arrays(
        params=np.tile(once.params, 2),
        flops=np.tile(once.flops, 2),
        loss=np.concatenate([once.loss + 0.01, once.loss - 0.01]),
        seed=np.repeat([0, 1], len(once)),
    )
    for estimator in ("parabola", "akima"):
        one = fit_isoflop(once, budgets=0.1, estimator=estimator, bootstrap=0)
        two = fit_isoflop(twice, budgets=0.1, estimator=estimator, bootstrap=0)
        for alone, repeated in zip(one.profiles, two.profiles, strict=True):
            assert repeated.akima == pytest.approx(alone.akima, rel=1e-6)
            assert repeated.minimum.params == pytest.approx(alone.minimum.params, rel=1e-6)
            assert repeated.curve(alone.params) == pytest.approx(alone.curve(alone.params))


def test_profiles_without_a_minimum_are_left_out_by_name():
    def loss(x, i):
        if i == 1:
            return 3 - 0.1 * x**2  # concave
        if i == 2:
            return 3 + 0.05 * (x - 3) ** 2  # minimum beyond the largest size
        return 4 - 0.2 * i + 0.05 * x**2

    budgets = np.array([1e18, 1e19, 1e20, 1e21, 1e22])
    fit = fit_isoflop(table(loss, budgets=budgets), bootstrap=0)
    assert [p.reason.split(" (")[0] for p in fit.profiles] == [
        "", "concave parabola", "no interior minimum", "", "",
    ]  # fmt: skip
    assert "profiles_excluded" in fit.flags and len(fit.optima) == 3
    assert fit.profiles[1].minimum is None
    assert list(fit.checklist["excluded_profiles"]) == ["1e+19", "1e+20"]
    assert fit.a == pytest.approx(0.5)


def falling(x, i):
    return 3 - 0.1 * x


def bowl(x, i):
    return 3 - 0.3 * i + 0.05 * x**2


@pytest.mark.parametrize("name, runs", [
    ("no_interior_minimum", table(falling)),
    ("one_budget", table(bowl, budgets=BUDGETS[:1])),
    ("too_few_points", table(bowl, sizes=3)),
])  # fmt: skip
@pytest.mark.parametrize("estimator", ["parabola", "akima"])
def test_what_cannot_be_fitted_is_refused_by_name(name, runs, estimator):
    with pytest.raises(CannotFit) as error:
        fit_isoflop(runs, estimator=estimator, bootstrap=0)
    assert error.value.name == name


def test_a_loss_that_is_no_number_is_refused_by_name():
    runs = table(bowl)
    runs.loss[4] = np.inf
    with pytest.raises(CannotFit, match="non_finite_loss.*row 4"):
        fit_isoflop(runs)


def test_budgets_by_column_by_tolerance_and_by_value():
    rng = np.random.default_rng(0)
    runs = table(bowl)
    jittered = runs.flops * np.exp(0.02 * rng.standard_normal(len(runs)))
    loose = RunTable.from_arrays(
        params=runs.params, flops=jittered, loss=runs.loss, which=np.repeat([3.0, 1.0, 2.0], 7)
    )
    by_value = fit_isoflop(loose, budgets=BUDGETS, bootstrap=0)
    by_column = fit_isoflop(loose, budgets="which", bootstrap=0)
    by_tolerance = fit_isoflop(loose, budgets=0.2, bootstrap=0)
    assert len(by_value.profiles) == len(by_column.profiles) == len(by_tolerance.profiles) == 3
    assert by_value.a == by_column.a == by_tolerance.a
    assert np.all(np.diff([p.flops for p in by_column.profiles]) > 0)
    near_one = fit_isoflop(loose, budgets=[1e18, 1e19], bootstrap=0)
    assert near_one.n_points == 14 and len(near_one.profiles) == 2
    with pytest.raises(BadInput, match="budgets"):
        fit_isoflop(loose, budgets="budgets")


def test_the_window_keeps_runs_near_the_lowest():
    fit = fit_isoflop(table(bowl, sizes=13, spread=64.0), window=4.0, bootstrap=0)
    for profile in fit.profiles:
        lowest = profile.params[np.argmin(profile.loss)]
        assert (
            profile.used.tolist()
            == (np.abs(np.log(profile.params / lowest)) < np.log(4.01)).tolist()
        )
        assert profile.used.sum() == 5
        assert np.isnan(profile.curve(profile.params[:1]))


def test_uneven_budgets_are_brought_to_their_median():
    law = BESIROGLU2024
    flops = np.repeat(np.geomspace(1e18, 1e21, 6), 9)
    best = law.optimum(flops).params
    params = best * np.tile(np.geomspace(1 / 6, 6, 9), 6)
    even = RunTable.from_arrays(
        params=params, flops=flops, loss=law.loss(params, flops / (6 * params))
    )
    # A count under which small models cost more, as attention makes them.
    tokens = flops * (params / best) ** -0.3 / (6 * params)
    uneven = RunTable.from_arrays(
        params=params, tokens=tokens, loss=law.loss(params, tokens), budget=flops
    )
    fit, want = fit_isoflop(uneven, bootstrap=0), fit_isoflop(even, bootstrap=0)
    assert "levelled_budgets" in fit.flags and want.flags == ()
    for got, wanted in zip(fit.optima, want.optima, strict=True):
        assert got == pytest.approx(wanted, rel=2e-3)
        assert 6 * got.params * got.tokens == pytest.approx(got.flops)


def test_the_line_weighs_by_noise_and_scatter():
    x, rng = np.linspace(40, 48, 6), np.random.default_rng(0)
    variance = np.array([0.3, 0.01, 0.02, 0.01, 0.04, 0.01]) ** 2
    on_line = 0.5 * x - 3 + 1e-3 * rng.standard_normal(6)
    line = _Line(x, on_line, variance)
    assert line.tau == 0
    np.testing.assert_allclose(line.fit(on_line), np.polyfit(x, on_line, 1, w=variance**-0.5))
    off_line = on_line + 0.2 * rng.standard_normal(6)
    line = _Line(x, off_line, variance)
    # DerSimonian & Laird's tau^2 is the one at which Cochran's Q expects what it is.
    basis, w = np.stack([x, np.ones(6)], axis=1), np.diag(1 / variance)
    projector = w - w @ basis @ np.linalg.inv(basis.T @ w @ basis) @ basis.T @ w
    q = off_line @ projector @ off_line
    expected = np.trace(projector @ (np.diag(variance) + line.tau**2 * np.eye(6)))
    assert q == pytest.approx(expected)
    weights = (variance + line.tau**2) ** -0.5
    np.testing.assert_allclose(line.fit(off_line), np.polyfit(x, off_line, 1, w=weights))
    missing = np.where(np.arange(6) == 2, np.nan, off_line)
    kept = np.arange(6) != 2
    want = np.polyfit(x[kept], off_line[kept], 1, w=weights[kept])
    np.testing.assert_allclose(line.fit(np.stack([missing, off_line]))[0], want)


def test_noisy_profiles_weigh_less(noisy_table):
    runs = noisy_table(sizes=9)
    tilt = runs.loss.copy()
    flat = (
        runs.flops < 2e18
    )  # the lowest budget: its curve is flattened tenfold, so its minimum is vague
    level = tilt[flat].min()
    tilt[flat] = (
        level
        + 0.1 * (tilt[flat] - level)
        + 0.004 * np.random.default_rng(5).standard_normal(flat.sum())
    )
    vague = RunTable.from_arrays(params=runs.params, flops=runs.flops, loss=tilt)
    fit = fit_isoflop(vague, bootstrap=0)
    used = [p for p in fit.profiles if not p.reason]
    if len(used) == 6:
        assert used[0].log_params_sd > 3 * used[1].log_params_sd
    assert fit.a == pytest.approx(BESIROGLU2024.a, abs=0.03)


def test_standard_errors_are_those_of_repeated_sweeps(noisy_table):
    fits = [fit_isoflop(noisy_table(seed, spread=3.0), bootstrap=0) for seed in range(100)]
    minima = np.array(
        [[np.log(o.params) for o in fit.optima] for fit in fits if len(fit.optima) == 6]
    )
    told = np.mean(
        [[p.log_params_sd for p in fit.profiles] for fit in fits if len(fit.optima) == 6], axis=0
    )
    assert len(minima) > 90
    assert told == pytest.approx(minima.std(0), rel=0.3)


@pytest.mark.parametrize("interval", ["residual", "pairs"])
def test_intervals_hold_the_estimate(noisy_table, interval):
    fit = fit_isoflop(noisy_table(), bootstrap=1000, interval=interval)
    assert fit.allocation_draws.shape == (1000 - fit.refused_draws, 4)
    assert (
        fit.a_interval95[0]
        < fit.a_interval80[0]
        < fit.a
        < fit.a_interval80[1]
        < fit.a_interval95[1]
    )
    np.testing.assert_allclose(fit.allocation_draws[:, :2].sum(1), 1, atol=1e-6)
    low, high = fit.params_interval(1e20)
    assert low < fit.optimal_params(1e20) < high
    low, high = fit.tokens_interval(1e20)
    assert low < fit.optimal_tokens(1e20) < high


def test_pairs_are_refits_of_the_resampled_runs(noisy_table):
    runs = noisy_table().where(slice(14, 21))
    rows = np.array([[0, 0, 1, 2, 4, 5, 6], [1, 2, 3, 3, 4, 5, 5], [0, 0, 0, 0, 6, 6, 6]])
    counts = np.stack([np.bincount(r, minlength=7) for r in rows])
    found = _ProfileFit(runs, "parabola", None).minima_of_resamples(counts)
    for i in (0, 1):
        x, y = np.log(runs.params[rows[i]]), runs.loss[rows[i]]
        c2, c1, _ = np.polyfit(x - 20, y, 2)
        assert found[i] == pytest.approx(20 - c1 / (2 * c2), abs=1e-6)
    assert np.isnan(found[2])  # two sizes only


def test_scatter_between_budgets_widens_the_interval():
    rng = np.random.default_rng(1)
    shifts = [0.4, -0.5, 0.3, -0.2, 0.5, -0.4]
    budgets = np.geomspace(1e18, 1e21, 6)

    def noise(x):
        return 1e-4 * rng.standard_normal(len(x))

    straight = table(lambda x, i: 3 - 0.2 * i + 0.05 * x**2 + noise(x), budgets=budgets)
    jagged = table(
        lambda x, i: 3 - 0.2 * i + 0.05 * (x - shifts[i]) ** 2 + noise(x), budgets=budgets
    )
    narrow, wide = fit_isoflop(straight, bootstrap=500), fit_isoflop(jagged, bootstrap=500)
    assert narrow.goodness["tau"] < 0.02 and 0.3 < wide.goodness["tau"] < 0.7
    assert "minima_scatter_beyond_noise" in wide.flags and not narrow.flags
    # the slope's standard error under scatter tau alone
    sd = wide.goodness["tau"] / np.sqrt(((np.log(budgets) - np.log(budgets).mean()) ** 2).sum())
    assert np.ptp(wide.a_interval95) == pytest.approx(2 * 1.96 * sd, rel=0.15)


def test_doubts_are_flagged():
    assert "two_budgets" in fit_isoflop(table(bowl, budgets=BUDGETS[:2]), bootstrap=0).flags
    close = table(bowl, budgets=np.array([1e18, 2e18, 4e18]))
    assert "less_than_a_decade_of_flops" in fit_isoflop(close, bootstrap=0).flags


def test_an_interpolation_has_no_pairs(noisy_table):
    with pytest.raises(BadInput, match="pairs"):
        fit_isoflop(noisy_table(), estimator="akima", interval="pairs")
    with pytest.raises(BadInput, match="estimator.*parabola"):
        fit_isoflop(noisy_table(), estimator="parabel")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["parabola", "cubic"])
def test_the_interval_of_a_covers_the_truth(draw_law, isoflop_table, estimator):
    """200 laws over the field's range: the 95 % interval holds the true a in 91 to 99 % of them."""
    rng = np.random.default_rng(0)
    covered, refused = 0, 0
    for _ in range(200):
        law = draw_law(rng)
        try:
            fit = fit_isoflop(isoflop_table(law, rng), estimator=estimator, bootstrap=1000)
        except CannotFit:
            refused += 1
            continue
        low, high = fit.a_interval95
        covered += low < law.a < high
    assert refused <= 10
    assert 0.91 <= covered / (200 - refused) <= 0.99
