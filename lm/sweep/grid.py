"""The runs of a study, as pure functions of its config and of the losses that finished so far.

The sizes of a budget follow from the runs that inform it, which are named beforehand. So the grid
is the same whatever the order in which runs finish, the number of workers or of restarts. The runs
that inform nothing (second seeds, and two sizes of each budget) fill the cores that would stand
idle while the last informing runs of a budget finish.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config, ModelConfig, SweepConfig
from lm.train.recipe import resolve

# The exponent of N_opt(C) is drawn to its prior as by one standard deviation of 0.15, against
# minima that are known to 20 %: two budgets half a decade apart say little about a slope.
EXPONENT_DEVIATION, MINIMUM_DEVIATION = 0.15, 0.2


@dataclass(frozen=True)
class Rung:
    """One shape of the ladder."""

    label: str  # as "d48-l3"
    model: ModelConfig
    params: int  # blocks + head, of experts the active ones


@dataclass(frozen=True)
class Run:
    """One row of the tables to be."""

    run_id: str  # as "c1e12-d48-l3-s0"
    config: Config
    params: int
    flops: float  # its budget
    informs: bool  # the sizes of the budgets above depend on its loss
    parent: str | None  # the run whose stable part this one continues


@dataclass(frozen=True)
class Budget:
    """The runs of one budget, and where its minimum was expected when they were chosen."""

    flops: float
    expected: float  # N_opt, parameters
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Minimum:
    """Where the losses of one budget are lowest. ``interior``: between the sizes at the edges."""

    params: float
    loss: float
    interior: bool


@functools.cache
def ladder(config: Config) -> tuple[Rung, ...]:
    """The shapes of ``config.sweep``, ascending in parameters.

    Raises ``BadInput`` where there are none, fewer than ``sizes``, or two of the same size.
    """
    sweep = config.sweep
    if bool(sweep.widths) == bool(sweep.shapes):
        given = "both are given" if sweep.widths else "neither is given"
        raise BadInput(f"sweep.widths and sweep.shapes: {given}, and one is needed")
    shapes = sweep.shapes or tuple(_family(sweep, width) for width in sweep.widths)
    rungs = sorted((_rung(config, shape) for shape in shapes), key=lambda rung: rung.params)
    if len(rungs) < sweep.sizes:
        raise BadInput(f"sweep.sizes = {sweep.sizes}: the ladder has only {len(rungs)} shapes")
    for below, above in zip(rungs, rungs[1:], strict=False):
        if below.params == above.params:
            raise BadInput(
                f"sweep: shapes {below.label} and {above.label} have {above.params} parameters both"
            )
    labels = [rung.label for rung in rungs]
    if len(set(labels)) < len(labels):  # of equal width and depth: told apart by all that differs
        rungs = [dataclasses.replace(rung, label=_long_label(rung.model)) for rung in rungs]
    return tuple(rungs)


def _family(sweep: SweepConfig, width: int) -> tuple[int, int, int, int, int]:
    multiple = sweep.ff_multiple
    d_ff = max(multiple, multiple * math.floor(sweep.ff_ratio * width / multiple + 0.5))
    n_layers = max(sweep.min_layers, math.floor(width / sweep.aspect + 0.5))
    return width, d_ff, sweep.head_width, width // sweep.head_width, n_layers


def _rung(config: Config, shape: tuple[int, int, int, int, int]) -> Rung:
    d_model, d_ff, head_width, n_heads, n_layers = shape
    model = dataclasses.replace(
        config.model,
        d_model=d_model,
        d_ff=d_ff,
        head_width=head_width,
        n_heads=n_heads,
        n_kv_heads=max(1, n_heads // config.sweep.query_group),
        n_layers=n_layers,
    )
    params = arithmetic.parameters(model, config.data.seq_len).active_blocks_and_head
    return Rung(f"d{d_model}-l{n_layers}", model, params)


def _long_label(model: ModelConfig) -> str:
    return f"d{model.d_model}-l{model.n_layers}-h{model.n_heads}x{model.head_width}-f{model.d_ff}"


def choose_sizes(rungs: tuple[Rung, ...], centre: float, spread: float, n: int) -> tuple[Rung, ...]:
    """The ``n`` rungs nearest, in log N, to sizes log-spaced from centre / spread to x spread."""
    wanted = math.log(centre) + np.linspace(-math.log(spread), math.log(spread), n)
    have = np.log([rung.params for rung in rungs])
    # cheapest[i]: least sum of squared distances of the sizes so far from rungs before the i-th.
    cheapest, taken = np.zeros(len(rungs) + 1), []
    for size in wanted:
        with_rung = cheapest[:-1] + (have - size) ** 2
        cheapest = np.concatenate([[np.inf], np.minimum.accumulate(with_rung)])
        taken.append(with_rung)
    chosen, end = [], len(rungs)
    for with_rung in reversed(taken):
        end = int(np.argmin(with_rung[:end]))
        chosen.append(rungs[end])
    return tuple(reversed(chosen))


def find_minimum(params: np.ndarray, losses: np.ndarray) -> Minimum | None:
    """Vertex of the parabola through loss against log N; the lowest run where none is in range.

    Losses that are not finite (of no use) are left out; None where none is left. It centres the
    next budget and shows how things stand: the laws are ``lm.fit``'s.
    """
    finite = np.isfinite(losses)
    x, y = np.log(params[finite]), losses[finite]
    if not len(x):
        return None
    lowest = int(np.argmin(y))
    if len(np.unique(x)) >= 3:
        middle = x.mean()
        a, b, c = np.polyfit(x - middle, y, 2)
        vertex = middle - b / (2 * a) if a > 0 else math.inf
        if x.min() < vertex < x.max():
            return Minimum(math.exp(vertex), float(c - b * b / (4 * a)), True)
    return Minimum(math.exp(x[lowest]), float(y[lowest]), False)


def expected_optimum(sweep: SweepConfig, flops: float, minima: list[tuple[float, float]]) -> float:
    """N_opt at ``flops``: a line in logs through the (budget, N_opt) below, drawn to the prior."""
    if not minima:
        return sweep.first_optimum
    x, y = np.log(np.asarray(minima)).T
    weight = (MINIMUM_DEVIATION / EXPONENT_DEVIATION) ** 2
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy + weight * sweep.prior_exponent) / (dx @ dx + weight)
    return float(np.exp(y.mean() + slope * (math.log(flops) - x.mean())))


def plan(config: Config, losses: Mapping[str, float]) -> tuple[Budget, ...]:
    """The budgets whose sizes are known, from the ``losses`` of finished runs (nan: left out).

    A pure function: any more losses leave the budgets it returns as they are and may add others.
    Raises ``BadInput`` where the sweep's settings cannot be.
    """
    check(config)
    rungs, budgets, minima = ladder(config), [], []
    for flops in config.sweep.budgets:
        if budgets:
            informing = [run for run in budgets[-1].runs if run.informs]
            if any(run.run_id not in losses for run in informing):
                break
            found = find_minimum(
                np.array([run.params for run in informing], float),
                np.array([losses[run.run_id] for run in informing], float),
            )
            minima += [(budgets[-1].flops, found.params)] if found else []
        expected = expected_optimum(config.sweep, flops, minima)
        chosen = choose_sizes(rungs, expected, config.sweep.spread, config.sweep.sizes)
        runs = _runs(config, flops, chosen, expected, budgets, losses)
        budgets.append(Budget(flops, expected, runs))
    return tuple(budgets)


def check(config: Config) -> None:
    """Raises ``BadInput`` where the sweep's settings cannot be."""
    if not config.sweep.budgets:
        raise BadInput("sweep.budgets = (): a study needs at least one budget, as (1e11, 3e11)")
    labels = [_flops_label(flops) for flops in config.sweep.budgets]
    for label in labels:
        if labels.count(label) > 1:
            raise BadInput(
                f"sweep.budgets: two budgets read {label} to three decimals; keep them apart"
            )
    for flops in config.sweep.budgets:
        for rung in ladder(config):  # raises where no rule gives a batch or a rate
            train = dataclasses.replace(config.train, flops=flops)
            resolve(dataclasses.replace(config, model=rung.model, train=train))
    if config.sweep.branches:
        if config.train.checkpoint_every == -1:
            raise BadInput(
                "train.checkpoint_every = -1 with sweep.branches = True: branches start from"
                " checkpoints, so it must be 0 or more"
            )
        rules = {
            "train.batch_rule": config.train.batch_rule,
            "optimizer.learning_rate_rule": config.optimizer.learning_rate_rule,
        }
        for name, rule in rules.items():
            if rule == "step_law":
                raise BadInput(
                    f"{name} = 'step_law' with sweep.branches = True: branches of one run share"
                    " batch and rate, so neither may follow the tokens of a branch"
                )


def _runs(config, flops, chosen, expected, below, losses) -> tuple[Run, ...]:
    sweep, runs = config.sweep, []
    # An edge or a centre lost would move the parabola's vertex; a neighbour of an edge does not.
    idle_fillers = {1, len(chosen) - 2} if len(chosen) >= 5 else set()
    for i, rung in enumerate(chosen):
        for seed in range(_seeds(sweep, rung.params, expected)):
            run_id = f"c{_flops_label(flops)}-{rung.label}-s{seed}"
            run_config = dataclasses.replace(
                config,
                name=run_id,
                model=rung.model,
                train=dataclasses.replace(config.train, flops=flops, seed=config.train.seed + seed),
                sweep=SweepConfig(),  # so that a study that grows leaves its runs as they are
            )
            parent = _parent(run_config, below, losses) if sweep.branches else None
            informs = seed == 0 and i not in idle_fillers
            runs.append(Run(run_id, run_config, rung.params, flops, informs, parent))
    return tuple(runs)


def _seeds(sweep: SweepConfig, params: int, expected: float) -> int:
    if params < sweep.small:
        return sweep.seeds_small
    far = sweep.near and abs(math.log(params / expected)) > math.log(sweep.near)
    return 1 if far else sweep.seeds


def _parent(config: Config, below: list[Budget], losses: Mapping[str, float]) -> str | None:
    """The run of the same shape and seed at the nearest budget below, unless its loss is nan."""
    for budget in reversed(below):
        for run in budget.runs:
            same = run.config.model == config.model and run.config.train.seed == config.train.seed
            if same and not math.isnan(losses.get(run.run_id, 0.0)):
                return run.run_id
    return None


def _flops_label(flops: float) -> str:
    """As "1e12" or "3.162e11"."""
    mantissa, exponent = f"{flops:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def in_order(budgets: tuple[Budget, ...]) -> list[Run]:
    """All runs as they should start: what informs first, by budget, and longest first within it.

    Of equal FLOPs the smallest model takes longest, since small products use a machine worst.
    """
    runs = [run for budget in budgets for run in budget.runs]
    return sorted(
        runs,
        key=lambda run: (
            not run.informs,
            run.flops if run.informs else -run.flops,
            run.params,
            run.run_id,
        ),
    )


def total_flops(config: Config, budgets: tuple[Budget, ...]) -> float:
    """Training FLOPs of the whole study: planned runs, and one seed of what isn't planned yet."""
    planned = sum(run.flops for budget in budgets for run in budget.runs)
    return planned + config.sweep.sizes * sum(config.sweep.budgets[len(budgets) :])
