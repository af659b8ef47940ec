"""Approach 2 (Hoffmann et al. 2022, section 3.2): loss profiles, and a line through their minima.

Every profile's minimum has its own uncertainty, and the minima scatter about the line by more than
that (tau). The line is weighted by both, and its intervals carry both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from lm.command import BadInput, one_of
from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.intervals import corrected_residuals
from lm.scaling.parametric import fit_parametric
from lm.scaling.table import RunTable

DEGREE = {"parabola": 2, "cubic": 3}
FEWEST_RUNS = {"parabola": 4, "cubic": 5, "akima": 4}
INTERVALS = ("residual", "pairs")
UNEVEN = 1.1  # highest over lowest FLOPs of a budget above which its runs are brought to one value
NEAREST_BUDGET = 10**0.12  # a run belongs to the nearest of the given budgets within this factor


@dataclass(frozen=True)
class Profile:
    """One budget's runs, sorted by params, and the curve through them over x = log params.

    `used` masks the runs inside the window. `coefficients` are the polynomial's in (x - center),
    highest power first; empty for Akima. `minimum` is the estimator's own optimum, `log_params_sd`
    its standard error in log params, `akima` the Akima interpolant's optimum in params (nan where
    it lies at an edge) as a cross-check. `reason` says why the profile is not in the fit; "" for
    those that are.
    """

    flops: float
    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    run_id: np.ndarray
    used: np.ndarray
    center: float
    coefficients: np.ndarray
    minimum: Optimum | None
    log_params_sd: float
    akima: float
    reason: str

    def curve(self, params: np.ndarray) -> np.ndarray:
        """The fitted loss at `params` inside the window, in nats per token; nan outside."""
        x, inside = np.log(params), np.log(self.params[self.used])
        if self.coefficients.size:
            y = np.polyval(self.coefficients, x - self.center)
        elif inside.size >= FEWEST_RUNS["akima"]:
            y = Akima1DInterpolator(*_averaged(inside, self.loss[self.used]))(x)
        else:
            y = np.full(np.shape(x), np.nan)
        return np.where((x >= inside[0] - 1e-9) & (x <= inside[-1] + 1e-9), y, np.nan)


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(AllocationFit):
    """The allocation of Approach 2 with its profiles, used and excluded.

    `residuals` are the used profiles' (observed / fitted - 1), one after the other. `goodness`:
    r_squared of log N_opt, rms_relative_residual of the loss, tau (scatter of log N_opt between
    budgets beyond what the profiles' noise explains), chi_squared of the line over its freedom.
    """

    estimator: str
    profiles: tuple[Profile, ...]
    refused_draws: int


def fit_isoflop(
    runs: RunTable,
    *,
    budgets: str | float | Sequence[float] | None = None,
    estimator: str = "parabola",
    window: float | None = None,
    drop_highest_loss: int = 0,
    bootstrap: int = 4000,
    interval: str = "residual",
    seed: int = 0,
) -> IsoflopFit:
    """Fits N = k_N C^a and D = k_D C^b through the minima of the isoFLOP profiles.

    budgets: a column that names each run's budget; or a relative tolerance by which FLOPs are
    grouped (0.1: within 10 % of the group's lowest); or the budgets themselves, to which runs
    within 0.12 dex belong. None takes the column `budget` where there is one, and 0.1 otherwise.
    estimator: "parabola", "cubic" (least squares of the loss in log N) or "akima" (interpolation).
    window: keeps runs within this factor of the lowest-loss run's params (6.0: N / 6 to 6 N).
    interval: "residual" resamples relative residuals, leverage-corrected and pooled over budgets,
    and adds the scatter between budgets; "pairs" resamples the runs of each budget.
    Runs of one budget whose FLOPs differ by more than 10 % are first brought to its median FLOPs,
    their losses along a parametric law of the table (flag `levelled_budgets`).
    A profile is left out, by name, if it has too few runs, is concave, or has its minimum outside
    the sampled sizes. Raises CannotFit (see there for the names) and BadInput for unknown settings.
    """
    one_of("estimator", estimator, tuple(FEWEST_RUNS))
    one_of("interval", interval, INTERVALS)
    if estimator == "akima" and interval == "pairs":
        raise BadInput("interval = 'pairs': an interpolation has no meaning on resampled runs")
    if not np.all(np.isfinite(runs.loss)):
        bad = ", ".join(map(str, runs.run_id[~np.isfinite(runs.loss)][:5]))
        raise CannotFit("non_finite_loss", f"the loss of run {bad} is not a number")
    if drop_highest_loss:
        runs = runs.where(np.sort(np.argsort(-runs.loss, kind="stable")[drop_highest_loss:]))
    groups = _group(runs, budgets)
    if len(groups) < 2:
        raise CannotFit("one_budget", f"{len(groups)} budget; an exponent needs two, better five")
    runs, levelled = _level(runs, groups)
    fits = [_ProfileFit(runs.where(rows), estimator, window) for rows in groups]
    good = [fit for fit in fits if not fit.reason]
    if len(good) < 2:
        name = "too_few_points" if any(fit.few for fit in fits) else "no_interior_minimum"
        reasons = "; ".join(f"{fit.flops:.3g}: {fit.reason}" for fit in fits if fit.reason)
        raise CannotFit(name, f"{len(good)} of {len(fits)} profiles have a minimum ({reasons})")

    noise = np.sqrt(
        sum((fit.residuals**2).sum() for fit in good) / max(1, sum(fit.freedom for fit in good))
    )
    x = np.log([fit.flops for fit in good])
    minima = np.array([fit.minima(fit.loss[:, None])[0] for fit in good])  # log N_opt
    log_tokens = np.array([fit.log_tokens(v) for fit, v in zip(good, minima, strict=True)])
    variance = np.array([(fit.sensitivity() ** 2).sum() for fit in good]) * noise**2
    if estimator == "akima":  # an interpolant's sensitivity jumps from run to run: equal weights
        variance = np.full(len(good), variance.mean())
    line = _Line(x, minima, np.maximum(variance, 1e-12))
    (a, log_k_N), (b, log_k_D) = line.fit(minima), line.fit(log_tokens)

    draws, refused = _bootstrap(good, line, bootstrap, interval, seed)
    optima = []
    for fit, v, d in zip(good, minima, log_tokens, strict=True):
        optima.append(Optimum(fit.flops, float(np.exp(v)), float(np.exp(d)), fit.value(v)))
    sd = dict(zip(map(id, good), np.sqrt(variance), strict=True))
    best = dict(zip(map(id, good), optima, strict=True))
    profiles = tuple(fit.profile(best.get(id(fit)), float(sd.get(id(fit), np.nan))) for fit in fits)
    scatter = minima - (a * x + log_k_N)
    return IsoflopFit(
        approach="isoflop",
        a=float(a),
        b=float(b),
        k_N=float(np.exp(log_k_N)),
        k_D=float(np.exp(log_k_D)),
        optima=tuple(optima),
        allocation_draws=draws,
        flops_range=(float(runs.flops.min()), float(runs.flops.max())),
        n_points=int(sum(fit.used.sum() for fit in good)),
        residuals=np.concatenate([fit.residuals for fit in good]),
        goodness={
            "r_squared_log_params": float(1 - (scatter**2).sum() / (np.var(minima) * len(minima))),
            "rms_relative_residual": float(noise),
            "tau": float(line.tau),
            "chi_squared_per_freedom": float(line.chi_squared / max(1, len(x) - 2)),
        },
        flags=levelled + _flags(profiles, line, refused, bootstrap),
        checklist={
            "law": "N_opt = k_N C^a, D_opt = k_D C^b",
            "objective": f"{estimator} of loss in log N by budget; line weighted by noise and tau",
            "budgets": [profile.flops for profile in profiles],
            "window": window,
            "interval": interval,
            "bootstrap": bootstrap,
            "excluded_profiles": {f"{p.flops:.4g}": p.reason for p in profiles if p.reason},
            "excluded": list(runs.excluded),
        },
        estimator=estimator,
        profiles=profiles,
        refused_draws=refused,
    )


def _group(runs: RunTable, budgets) -> list[np.ndarray]:
    """Row indices of each budget, budgets ascending."""
    if budgets is None:
        budgets = "budget" if "budget" in runs.columns else 0.1
    log_flops = np.log(runs.flops)
    if isinstance(budgets, str):
        one_of("budgets", budgets, tuple(runs.columns))
        _, label = np.unique(runs.columns[budgets], return_inverse=True)
    elif np.ndim(budgets) == 0:
        order = np.argsort(log_flops)
        label, first, current = np.empty(len(runs), int), -np.inf, -1
        for i in order:
            if log_flops[i] > first + np.log1p(budgets):
                first, current = log_flops[i], current + 1
            label[i] = current
    else:
        distance = np.abs(log_flops[:, None] - np.log(np.asarray(budgets, float)))
        near = distance.min(1) <= np.log(NEAREST_BUDGET)
        label = np.where(near, distance.argmin(1), -1)
    groups = [np.flatnonzero(label == k) for k in range(label.max() + 1)]
    groups = [rows for rows in groups if rows.size]
    return sorted(groups, key=lambda rows: np.median(log_flops[rows]))


def _level(runs: RunTable, groups) -> tuple[RunTable, tuple[str, ...]]:
    """Moves runs to their budget's own FLOPs where a budget's runs differ by more than UNEVEN.

    So they do once runs are counted under another convention than the one they were planned under.
    Tokens are scaled; the loss moves by what a parametric law of the table says of that step.
    """
    target = runs.flops.copy()
    for rows in groups:
        target[rows] = np.exp(np.median(np.log(runs.flops[rows])))
    if max(np.ptp(np.log(runs.flops[rows])) for rows in groups) <= np.log(UNEVEN):
        return runs, ()
    try:
        law = fit_parametric(runs, method="variable_projection", bootstrap=0).law
    except CannotFit:
        return runs, ("uneven_budgets",)
    tokens = runs.tokens * target / runs.flops
    step = law.loss(runs.params, tokens) - law.loss(runs.params, runs.tokens)
    return replace(runs, tokens=tokens, flops=target, loss=runs.loss + step), ("levelled_budgets",)


class _ProfileFit:
    """One budget's runs and the estimator on them, vectorised over loss columns."""

    def __init__(self, runs: RunTable, estimator: str, window: float | None):
        order = np.argsort(runs.params, kind="stable")
        self.runs, self.estimator = runs.where(order), estimator
        self.flops = float(np.exp(np.median(np.log(runs.flops))))
        params, lowest = self.runs.params, self.runs.params[np.argmin(self.runs.loss)]
        self.used = np.ones(len(params), bool)
        if window is not None:
            # The tolerance keeps a grid whose outermost sizes are exactly at the factor.
            self.used = np.abs(np.log(params / lowest)) <= np.log(window) * (1 + 1e-9)
        self.x, self.loss = np.log(params[self.used]), self.runs.loss[self.used]
        self.center = float(self.x.mean())
        self.coefficients = np.array([])
        self.residuals, self.errors, self.freedom = np.array([]), np.array([]), 0
        sizes = len(np.unique(self.x))
        self.few = sizes < FEWEST_RUNS[estimator]
        self.reason = ""
        if self.few:
            needed = FEWEST_RUNS[estimator]
            self.reason = f"too few points ({sizes} sizes, a {estimator} needs {needed})"
            return
        if estimator == "akima" and sizes < len(self.x):
            self._average_repeats()
        self._measure_noise()
        if estimator in DEGREE:
            self.coefficients = np.polyfit(self.x - self.center, self.loss, DEGREE[estimator])
            if estimator == "parabola" and self.coefficients[0] <= 0:
                self.reason = "concave parabola"
                return
        if np.isnan(self.minima(self.loss[:, None])[0]):
            self.reason = "no interior minimum (it lies at or outside the sampled sizes)"

    def _average_repeats(self) -> None:
        self.x, self.loss = _averaged(self.x, self.loss)

    def _measure_noise(self) -> None:
        """Relative residuals of the polynomial. Akima has none: there those of a cubic through the
        seven runs nearest the lowest stand in, which no wide profile can bend away from."""
        degree = DEGREE.get(self.estimator, 3)
        near = np.arange(len(self.x))
        if self.estimator == "akima":
            near = np.argsort(np.abs(self.x - self.x[np.argmin(self.loss)]))[:7]
            degree = min(degree, len(near) - 2)
        basis = np.vander(self.x[near] - self.center, degree + 1)
        fitted = basis @ np.linalg.lstsq(basis, self.loss[near], rcond=None)[0]
        self.residuals = self.loss[near] / fitted - 1
        self.errors = corrected_residuals(self.residuals, basis / fitted[:, None])
        self.freedom = len(near) - degree - 1

    def fitted(self) -> np.ndarray:
        if self.coefficients.size:
            return np.polyval(self.coefficients, self.x - self.center)
        return self.loss

    def minima(self, losses: np.ndarray) -> np.ndarray:
        """log N at the minimum for each column of losses (n, m); nan where none is inside."""
        if self.estimator == "akima":
            return _akima_minima(self.x, losses)[0]
        basis = np.vander(self.x - self.center, DEGREE[self.estimator] + 1)
        return self._inside(np.linalg.pinv(basis) @ losses)

    def minima_of_resamples(self, counts: np.ndarray) -> np.ndarray:
        """log N at the minimum when run j is there counts[:, j] times, counts (m, n)."""
        basis = np.vander(self.x - self.center, DEGREE[self.estimator] + 1)
        normal = np.einsum("mn,ni,nj->mij", counts, basis, basis)
        right = (counts * self.loss) @ basis
        enough = (counts > 0).sum(1) > basis.shape[1]
        normal = np.where(enough[:, None, None], normal, np.eye(basis.shape[1]))
        coefficients = np.linalg.solve(normal, right[..., None])[..., 0].T
        return np.where(enough, self._inside(coefficients), np.nan)

    def _inside(self, coefficients):
        found = _cubic_minimum(*([np.zeros_like(coefficients[0]), *coefficients][-4:-1]))
        found = found + self.center
        return np.where((found > self.x[0]) & (found < self.x[-1]), found, np.nan)

    def sensitivity(self) -> np.ndarray:
        """d log N_opt / d log loss_j (n,), by central differences small against every profile."""
        step = 1e-5 * np.ptp(self.loss) / self.loss.mean()
        change = np.eye(len(self.x)) * self.fitted()[:, None] * step
        base = self.fitted()[:, None]
        return np.nan_to_num((self.minima(base + change) - self.minima(base - change)) / (2 * step))

    def log_tokens(self, log_params):
        """log D at log N of this budget: linear between runs, which is exact under C = 6 N D."""
        return np.interp(log_params, np.log(self.runs.params), np.log(self.runs.tokens))

    def value(self, log_params: float) -> float:
        if self.coefficients.size:
            return float(np.polyval(self.coefficients, log_params - self.center))
        return float(_akima_minima(self.x, self.loss[:, None])[1][0])

    def profile(self, minimum: Optimum | None, sd: float) -> Profile:
        sizes, losses = _averaged(self.x, self.loss)
        akima = np.nan
        if len(sizes) >= FEWEST_RUNS["akima"]:
            akima = float(np.exp(_akima_minima(sizes, losses[:, None])[0][0]))
        return Profile(
            self.flops, self.runs.params, self.runs.tokens, self.runs.loss, self.runs.run_id,
            self.used, self.center, self.coefficients, minimum, sd, akima, self.reason,
        )  # fmt: skip


def _averaged(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interpolation wants one loss a size: seeds of the same size are averaged."""
    sizes, where = np.unique(x, return_inverse=True)
    return sizes, np.bincount(where, loss) / np.bincount(where)


def _cubic_minimum(c3, c2, c1):
    """The local minimum of c3 x^3 + c2 x^2 + c1 x, in a form that holds for c3 = 0; else nan."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = -c1 / (c2 + np.sqrt(c2**2 - 3 * c3 * c1))
    return np.where(np.isfinite(found), found, np.nan)


def _akima_minima(x, losses):
    """(argmin, min) of the Akima interpolant of each column of losses (n, m); nan at an edge."""
    pieces = Akima1DInterpolator(x, losses).c  # (4, n - 1, m), powers of (x - x_k), highest first
    within = _cubic_minimum(*pieces[:3])
    width = np.diff(x)[:, None]
    valid = (within > 0) & (within < width)
    within = np.where(valid, within, 0)
    c3, c2, c1, c0 = pieces
    bottom = np.where(valid, ((c3 * within + c2) * within + c1) * within + c0, np.inf)
    places = np.concatenate([x[:, None] + np.zeros_like(losses), x[:-1, None] + within])
    heights = np.concatenate([losses, bottom])
    best = heights.argmin(0)
    columns = np.arange(losses.shape[1])
    at_edge = (best == 0) | (best == len(x) - 1)
    return np.where(at_edge, np.nan, places[best, columns]), heights[best, columns]


class _Line:
    """Weighted least squares of values at k budgets on log C, weights 1 / (variance + tau^2).

    tau^2 is DerSimonian & Laird's (1986) moment estimate of the scatter between budgets.
    """

    def __init__(self, x, values, variance):
        self.basis = np.stack([x, np.ones_like(x)], axis=1)
        self.weights, self.tau = 1 / variance, 0.0
        residual = values - self.basis @ self.fit(values)
        self.chi_squared = (residual**2 * self.weights).sum()
        weighted = self.basis * self.weights[:, None]
        overlap = np.linalg.solve(self.basis.T @ weighted, weighted.T @ weighted)
        excess = self.chi_squared - (len(x) - 2)
        if len(x) > 2 and excess > 0:
            self.tau = np.sqrt(excess / (self.weights.sum() - np.trace(overlap)))
        self.weights = 1 / (variance + self.tau**2)

    def fit(self, values):
        """(slope, intercept) of values (k,), or of each row of values (m, k), nan = left out."""
        known = np.isfinite(values)
        weights = self.weights * known
        normal = np.einsum("...k,ki,kj->...ij", weights, self.basis, self.basis)
        right = (weights * np.where(known, values, 0)) @ self.basis
        enough = known.sum(-1) >= min(3, len(self.weights))
        normal = np.where(enough[..., None, None], normal, np.eye(2))
        found = np.linalg.solve(normal, right[..., None])[..., 0]
        return np.where(enough[..., None], found, np.nan)


def _bootstrap(fits, line, draws, interval, seed):
    """((n, 4): a, b, log k_N, log k_D; how many draws were refused)."""
    if draws == 0:
        return np.empty((0, 4)), 0
    rng = np.random.default_rng(seed)
    if interval == "pairs":
        minima = []
        for fit in fits:
            n = len(fit.x)
            minima.append(fit.minima_of_resamples(rng.multinomial(n, np.full(n, 1 / n), draws)))
        minima = np.stack(minima, axis=1)
    else:
        errors = np.concatenate([fit.errors for fit in fits])
        losses = [fit.fitted()[:, None] for fit in fits]
        noise = [rng.choice(errors, (len(fit.x), draws)) for fit in fits]
        minima = [f.minima(y * (1 + e)) for f, y, e in zip(fits, losses, noise, strict=True)]
        minima = np.stack(minima, axis=1) + line.tau * rng.standard_normal((draws, len(fits)))
    log_tokens = np.stack([f.log_tokens(v) for f, v in zip(fits, minima.T, strict=True)], axis=1)
    log_tokens = np.where(np.isfinite(minima), log_tokens, np.nan)
    slopes = np.concatenate([line.fit(minima), line.fit(log_tokens)], axis=1)[:, [0, 2, 1, 3]]
    sound = np.isfinite(slopes).all(1)
    return slopes[sound], int((~sound).sum())


def _flags(profiles, line, refused, bootstrap) -> tuple[str, ...]:
    used = [profile for profile in profiles if not profile.reason]
    flags = []
    if len(used) < len(profiles):
        flags.append("profiles_excluded")
    if len(used) == 2:
        flags.append("two_budgets")
    if np.ptp(np.log10([profile.flops for profile in used])) < 1:
        flags.append("less_than_a_decade_of_flops")
    if line.chi_squared > 3 * max(1, len(used) - 2):
        flags.append("minima_scatter_beyond_noise")
    apart = [np.log(profile.akima / profile.minimum.params) for profile in used]
    if np.nanmedian(np.abs(apart)) > np.log(1.5) if np.isfinite(apart).any() else True:
        flags.append("akima_disagrees")
    if refused > 0.05 * bootstrap:
        flags.append("refused_draws")
    return tuple(flags)
