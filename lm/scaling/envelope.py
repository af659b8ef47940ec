"""Approach 1 (Hoffmann et al. 2022, section 3.1): the lower envelope of all training curves."""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d

from lm.scaling.allocation import AllocationFit, CannotFit, Optimum
from lm.scaling.table import CurveTable

BOOTSTRAP_FLOPS = 150  # FLOP values a draw is fitted at: neighbouring ones lie on the same runs


@dataclass(frozen=True, kw_only=True)
class EnvelopeFit(AllocationFit):
    """The allocation of Approach 1; `optima` are the envelope's points, one a FLOP value.

    `run_of_optimum` names the run that each optimum lies on, `progress` how far through that run it
    is (1.0: at its end).
    """

    run_of_optimum: np.ndarray
    progress: np.ndarray


def fit_envelope(
    curves: CurveTable,
    *,
    n_flops: int = 1500,
    smoothing: float = 10.0,
    last_fraction: float = 0.15,
    bootstrap: int = 4000,
    seed: int = 0,
) -> EnvelopeFit:
    """Fits N = k_N C^a, D = k_D C^b to the best run at each of `n_flops` log-spaced FLOP values.

    smoothing: width in logged points of the Gaussian window over each curve (the paper's 10 are of
    its steps); validation losses are used where a run logged at least two, else training losses.
    last_fraction: only this last part of a run counts, in which its learning rate has decayed (the
    paper finds all its minima there: 0.15); 1.0 takes whole curves.
    FLOP values where the best run is of the smallest or largest size on offer there say nothing
    about the optimum and are left out, which the paper does not do.
    Intervals: runs are resampled with replacement, the envelope is taken anew. Raises CannotFit.
    """
    runs = [_Curve(curves, name, smoothing, last_fraction) for name in np.unique(curves.run_id)]
    runs = [run for run in runs if len(run.log_flops) > 1]
    if len(runs) < 2:
        raise CannotFit("no_curves", f"{len(runs)} runs have a curve of two points or more")
    size = np.array([run.params for run in runs])
    low = min(run.log_flops[0] for run in runs)
    high = max(run.log_flops[-1] for run in runs)
    grid = np.linspace(low, high, n_flops)
    loss = np.stack([np.interp(grid, r.log_flops, r.loss, np.inf, np.inf) for r in runs])
    log_tokens = np.stack([np.interp(grid, r.log_flops, r.log_tokens) for r in runs])

    order = np.argsort(loss, axis=0)
    best, sound = _best(order, np.isfinite(loss), size, np.ones((1, len(runs)), bool))
    best, points = best[0], np.flatnonzero(sound[0])
    winners = size[best[points]]
    if len(np.unique(winners)) < 2:
        raise CannotFit(
            "no_interior_minimum",
            f"the envelope lies on {len(np.unique(winners))} sizes, the smallest and the "
            "largest left out; more sizes a budget, or last_fraction=1.0, are needed",
        )
    x, y = grid[points], np.log(winners)
    tokens = log_tokens[best[points], points]
    (a, log_k_N), (b, log_k_D) = np.polyfit(x, y, 1), np.polyfit(x, tokens, 1)
    draws, refused = _bootstrap(order, loss, size, log_tokens, grid, bootstrap, seed)

    residuals = y - (a * x + log_k_N)
    progress = np.array([np.exp(c - runs[i].end) for c, i in zip(x, best[points], strict=True)])
    flags = () if len(np.unique(winners)) > 3 else ("few_sizes_on_the_envelope",)
    if len(points) < 0.05 * n_flops:
        flags += ("envelope_has_gaps",)
    if refused > 0.05 * bootstrap:
        flags += ("refused_draws",)
    optima = np.stack([np.exp(x), winners, np.exp(tokens), loss[best[points], points]], axis=1)
    return EnvelopeFit(
        approach="envelope",
        a=float(a),
        b=float(b),
        k_N=float(np.exp(log_k_N)),
        k_D=float(np.exp(log_k_D)),
        optima=tuple(Optimum(*map(float, row)) for row in optima),
        allocation_draws=draws,
        flops_range=(float(np.exp(low)), float(np.exp(high))),
        n_points=len(points),
        residuals=residuals,
        goodness={
            "r_squared_log_params": float(1 - np.var(residuals) / np.var(y)),
            "sizes_on_envelope": len(np.unique(winners)),
            "least_progress": float(progress.min()),
        },
        flags=flags,
        checklist={
            "law": "N_opt = k_N C^a, D_opt = k_D C^b",
            "objective": "least squares of log N and log D of the best run on log C",
            "n_flops": n_flops,
            "smoothing": smoothing,
            "last_fraction": last_fraction,
            "interval": "pairs over runs",
            "bootstrap": bootstrap,
        },
        run_of_optimum=np.array([runs[i].name for i in best[points]]),
        progress=progress,
    )


class _Curve:
    """One run's smoothed curve over log FLOPs, cut to its last part."""

    def __init__(self, curves, name, smoothing, last_fraction):
        mine = np.flatnonzero(curves.run_id == name)
        mine = mine[np.argsort(curves.flops[mine], kind="stable")]
        logged = np.isfinite(curves.validation_loss[mine])
        if logged.sum() >= 2:
            mine, loss = mine[logged], curves.validation_loss[mine[logged]]
        else:
            mine = mine[np.isfinite(curves.train_loss[mine])]
            loss = curves.train_loss[mine]
        # Reflected about its end points, so that the end of a falling curve is not pulled up.
        smooth = _smooth(loss, smoothing) if smoothing and len(loss) > 2 else loss
        flops = curves.flops[mine]
        late = (flops > 0) & (flops >= (1 - last_fraction) * flops.max(initial=0) * (1 - 1e-9))
        if late.sum() == 1 and len(mine) > 1:
            late[-2:] = flops[-2:] > 0  # a thinned curve: its last stretch
        self.name, self.params = name, curves.params[mine[0]] if mine.size else np.nan
        self.log_flops = np.log(flops[late])
        self.log_tokens = np.log(curves.tokens[mine[late]])
        self.loss = smooth[late]
        self.end = self.log_flops[-1] if late.any() else np.nan


def _smooth(loss, width):
    """A Gaussian window of `width` points (4 standard deviations), odd reflection at both ends."""
    pad = min(len(loss) - 1, int(width))
    padded = np.pad(loss, pad, mode="reflect", reflect_type="odd")
    return gaussian_filter1d(padded, width / 4)[pad : pad + len(loss)]


def _best(order, available, size, present):
    """(index of the best run (draws, grid), whether it is an interior minimum there).

    order: runs by loss at each grid value. present: (draws, runs), which runs a draw has.
    """
    candidates = present[:, order] & np.take_along_axis(available, order, axis=0)
    place = candidates.argmax(1)
    best = np.take_along_axis(order, place.reshape(-1, order.shape[1]), axis=0).reshape(place.shape)
    on_offer = present[:, :, None] & available
    smallest = np.where(on_offer, size[:, None], np.inf).min(1)
    largest = np.where(on_offer, size[:, None], -np.inf).max(1)
    return best, (size[best] > smallest) & (size[best] < largest)


def _bootstrap(order, loss, size, log_tokens, grid, draws, seed):
    """((n, 4): a, b, log k_N, log k_D; how many draws were refused)."""
    rng = np.random.default_rng(seed)
    thin = np.unique(np.linspace(0, len(grid) - 1, BOOTSTRAP_FLOPS).astype(int))
    order, available, x = order[:, thin], np.isfinite(loss[:, thin]), grid[thin]
    n, found = len(size), []
    for start in range(0, draws, 50):
        counts = rng.multinomial(n, np.full(n, 1 / n), min(50, draws - start))
        best, sound = _best(order, available, size, counts > 0)
        weights = sound.astype(float)
        values = np.stack([np.log(size)[best], log_tokens[:, thin][best, np.arange(len(thin))]])
        total = np.maximum(weights.sum(1), 1)
        centre = (weights * x).sum(1) / total
        spread = (weights * (x - centre[:, None]) ** 2).sum(1)
        mean = (weights * values).sum(2) / total
        slope = (weights * (x - centre[:, None]) * values).sum(2) / np.maximum(spread, 1e-300)
        varied = np.where(sound, values[0], np.nan)
        with np.errstate(invalid="ignore"):
            enough = np.nanmax(varied, 1, initial=-np.inf) > np.nanmin(varied, 1, initial=np.inf)
        rows = np.stack([slope[0], slope[1], *(mean - slope * centre)], axis=1)
        found.append(rows[enough])
    found = np.concatenate(found) if found else np.empty((0, 4))
    return found, draws - len(found)
