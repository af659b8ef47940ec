"""The grid: a pure function of what is done, on a smooth ladder, leaving no core idle."""

import dataclasses
import heapq
import itertools
import math
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config, OptimizerConfig, SweepConfig, TrainConfig
from lm.config_file import load
from lm.sweep import grid


def study(**sweep):
    defaults = dict(budgets=(1e11, 3e11, 1e12, 3e12), sizes=6, widths=tuple(range(8, 257, 8)))
    return Config(sweep=SweepConfig(**{**defaults, **sweep}))


def law(run, noise=0.0):
    tokens = run.flops / arithmetic.flops_per_token(run.config.model, run.config.data.seq_len)
    wobble = noise * math.sin(zlib.crc32(run.run_id.encode()))
    return 1.0 + 60 / run.params**0.45 + 40 / tokens**0.4 + wobble


def finished(config, noise=0.0):
    """All runs of a study in order, and their losses."""
    losses = {}
    for _ in config.sweep.budgets:
        budgets = grid.plan(config, losses)
        losses = {run.run_id: law(run, noise) for budget in budgets for run in budget.runs}
    return budgets, losses


STUDIES = {
    "plain": study(),
    "seeds": study(seeds=2, seeds_small=3),
    "five sizes": study(sizes=5),
    "few sizes": study(sizes=3, budgets=(1e11, 1e12)),
}


@pytest.mark.parametrize("name", STUDIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_order_of_completion_changes_the_grid(name, data):
    config = STUDIES[name]
    whole, losses = finished(config, noise=0.01)
    draw = data.draw(st.randoms(use_true_random=False))
    done = {}
    while True:
        budgets = grid.plan(config, done)
        assert budgets == whole[: len(budgets)]
        ready = [r.run_id for b in budgets for r in b.runs if r.run_id not in done]
        if not ready:
            break
        finishing = draw.choice(ready)
        done[finishing] = losses[finishing]
    assert len(done) == len(losses) and budgets == whole


def test_a_budget_starts_before_the_one_below_is_done():
    config = study()
    first = grid.plan(config, {})[0]
    informing = {run.run_id: law(run) for run in first.runs if run.informs}
    assert len(informing) == len(first.runs) - 2
    assert len(grid.plan(config, informing)) == 2
    informing.popitem()
    assert len(grid.plan(config, informing)) == 1


def test_budgets_added_above_leave_those_below_as_they_are():
    small, large = study(budgets=(1e11, 3e11)), study(budgets=(1e11, 3e11, 1e12))
    assert finished(small)[0] == finished(large)[0][:2]


def test_the_sizes_follow_the_minima():
    budgets, _ = finished(study(budgets=(1e11, 3e11, 1e12, 3e12, 1e13), first_optimum=40_000.0))
    for budget in budgets[1:]:
        rungs = grid.ladder(study(sizes=1, widths=tuple(range(8, 257, 8))))
        losses = [
            law(
                SimpleNamespace(
                    run_id="", flops=budget.flops, params=r.params, config=Config(model=r.model)
                )
            )
            for r in rungs
        ]
        best = rungs[int(np.argmin(losses))].params
        assert budget.expected == pytest.approx(best, rel=0.4)
        assert budget.runs[1].params < best < budget.runs[-2].params


def test_run_ids_are_distinct_and_readable():
    budgets, _ = finished(study(seeds=2, budgets=(1e11, 3.16227766e11)))
    ids = [run.run_id for budget in budgets for run in budget.runs]
    assert len(set(ids)) == len(ids)
    assert "c1e11-d24-l2-s0" in ids and any(i.startswith("c3.162e11-") for i in ids)


def test_a_run_is_its_budget_shape_and_seed_and_knows_nothing_of_the_study():
    config = dataclasses.replace(study(seeds=2, small=0.0), train=TrainConfig(seed=7))
    for run in grid.plan(config, {})[0].runs:
        assert run.config.train.flops == run.flops == 1e11
        assert run.config.train.seed == 7 + int(run.run_id[-1])
        assert run.config.sweep == SweepConfig()
        assert run.config.name == run.run_id
        count = arithmetic.parameters(run.config.model).blocks_and_head
        assert run.params == count


def test_seeds_by_size():
    budgets, _ = finished(study(seeds=1, seeds_small=3, small=30_000.0))
    for budget in budgets:
        sizes = [run.params for run in budget.runs]
        assert all(sizes.count(n) == (3 if n < 30_000 else 1) for n in sizes)


def test_seeds_near_the_expected_optimum():
    budgets, _ = finished(study(seeds=2, seeds_small=3, small=30_000.0, near=2.0))
    counted = set()
    for budget in budgets:
        sizes = [run.params for run in budget.runs]
        for n in sizes:
            near = budget.expected / 2 <= n <= budget.expected * 2
            assert sizes.count(n) == (3 if n < 30_000 else 2 if near else 1)
            counted.add(sizes.count(n))
    assert counted == {1, 2, 3}


def test_the_family():
    rungs = grid.ladder(
        study(aspect=16.0, min_layers=2, head_width=8, query_group=1, ff_multiple=4)
    )
    for rung in rungs:
        m = rung.model
        assert m.n_heads * m.head_width == m.d_model and m.head_width == 8
        assert m.n_layers == max(2, math.floor(m.d_model / 16 + 0.5))
        assert m.d_ff % 4 == 0 and abs(m.d_ff - 8 / 3 * m.d_model) <= 2
    assert [rung.params for rung in rungs] == sorted(rung.params for rung in rungs)
    deep = grid.ladder(study(aspect=1e6, min_layers=3))
    assert {rung.model.n_layers for rung in deep} == {3}


def test_listed_shapes_of_one_width_and_depth_get_names_of_their_own():
    shapes = ((512, 2048, 64, 8, 8), (512, 1024, 64, 8, 8))
    rungs = grid.ladder(Config(sweep=SweepConfig(shapes=shapes, sizes=2)))
    assert [rung.label for rung in rungs] == ["d512-l8-h8x64-f1024", "d512-l8-h8x64-f2048"]


@given(
    params=st.sets(st.integers(100, 10**7), min_size=6, max_size=9),
    centre=st.floats(1e2, 1e7),
    spread=st.floats(1.1, 20),
)
def test_sizes_are_the_nearest_distinct_rungs(params, centre, spread):
    rungs = tuple(SimpleNamespace(params=n) for n in sorted(params))
    wanted = np.log(centre) + np.linspace(-math.log(spread), math.log(spread), 5)

    def distance(chosen):
        return sum((math.log(r.params) - w) ** 2 for r, w in zip(chosen, wanted, strict=True))

    chosen = grid.choose_sizes(rungs, centre, spread, 5)
    assert distance(chosen) == pytest.approx(min(map(distance, itertools.combinations(rungs, 5))))
    assert [r.params for r in chosen] == sorted({r.params for r in chosen})


def test_minimum_of_a_parabola_and_of_what_is_none():
    n = np.geomspace(1e3, 1e5, 6)
    bowl = 2 + 0.1 * (np.log(n) - math.log(2e4)) ** 2
    found = grid.find_minimum(n, bowl)
    assert (found.params, found.loss, found.interior) == (
        pytest.approx(2e4),
        pytest.approx(2),
        True,
    )
    with_hole = np.where(np.arange(6) == 3, np.nan, bowl)
    assert grid.find_minimum(n, with_hole).params == pytest.approx(2e4)
    assert grid.find_minimum(n, -bowl) == grid.Minimum(pytest.approx(1e3), -bowl[0], False)
    falling = grid.find_minimum(n, -np.log(n))
    assert falling.params == pytest.approx(1e5) and not falling.interior
    assert grid.find_minimum(n, np.full(6, np.nan)) is None


def test_expected_optimum_goes_from_prior_to_data():
    sweep = SweepConfig(first_optimum=123.0, prior_exponent=0.5)
    assert grid.expected_optimum(sweep, 1e12, []) == 123.0
    assert grid.expected_optimum(sweep, 4e12, [(1e12, 1e4)]) == pytest.approx(2e4)
    minima = [(1e11, 9e3), (3e11, 2e4), (1e12, 4e4)]
    x, y = np.log(minima).T
    # The same by least squares with one row more: the prior as a measurement of the slope.
    weight = 0.2 / 0.15
    rows = np.vstack([np.stack([np.ones(3), x - x.mean()], 1), [0, weight]])
    level, slope = np.linalg.lstsq(rows, [*y, 0.5 * weight], rcond=None)[0]
    expected = math.exp(level + slope * (math.log(3e12) - x.mean()))
    assert grid.expected_optimum(sweep, 3e12, minima) == pytest.approx(expected)
    assert 0.5 < slope < np.polyfit(x, y, 1)[0]


def test_diverged_runs_do_not_move_the_sizes_of_the_next_budget():
    config = study()
    first = grid.plan(config, {})[0]
    losses = {run.run_id: law(run) for run in first.runs}
    whole = grid.plan(config, losses)[1].expected
    losses[first.runs[0].run_id] = math.nan
    assert grid.plan(config, losses)[1].expected == pytest.approx(whole, rel=0.25)


def branching():
    wsd = OptimizerConfig(schedule="wsd", learning_rate_rule="width")
    config = dataclasses.replace(study(), optimizer=wsd)
    return dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, branches=True))


def test_branches_continue_the_same_shape_and_seed_at_the_budget_below():
    budgets, losses = finished(branching())
    assert all(run.parent is None for run in budgets[0].runs)
    runs = {run.run_id: run for budget in budgets for run in budget.runs}
    children = [run for run in runs.values() if run.parent]
    assert len(children) > 5
    for run in children:
        parent = runs[run.parent]
        assert parent.config.model == run.config.model and parent.flops < run.flops
        assert not any(
            r.config.model == run.config.model and parent.flops < r.flops < run.flops
            for r in runs.values()
        )
    child = next(run for run in children if not runs[run.parent].informs)
    again = grid.plan(branching(), {**losses, child.parent: math.nan})
    orphan = next(r for b in again for r in b.runs if r.run_id == child.run_id)
    assert orphan.parent is None


@pytest.mark.parametrize(
    "sweep, train, optimizer, told",
    [
        (dict(budgets=()), {}, {}, "at least one budget"),
        (dict(widths=()), {}, {}, "neither is given"),
        (dict(shapes=((32, 88, 8, 4, 2),)), {}, {}, "both are given"),
        (dict(widths=(8, 16)), {}, {}, "the ladder has only 2 shapes"),
        (dict(budgets=(1e11, 1.00001e11)), {}, {}, "two budgets read 1e11"),
        (dict(branches=True), dict(batch_rule="step_law"), {}, "batch_rule = 'step_law'"),
        (dict(branches=True), {}, dict(learning_rate_rule="step_law"), "learning_rate_rule"),
        (dict(branches=True), dict(checkpoint_every=-1), {}, "checkpoint_every = -1"),
    ],
)  # fmt: skip
def test_impossible_sweeps_are_refused_by_name(sweep, train, optimizer, told):
    config = dataclasses.replace(
        study(),
        optimizer=OptimizerConfig(schedule="wsd", **optimizer),
        train=TrainConfig(**train),
    )
    config = dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, **sweep))
    with pytest.raises(BadInput, match=told):
        grid.plan(config, {})


def test_what_informs_starts_first_and_the_longest_of_what_does_not_after_it():
    budgets, _ = finished(study(seeds_small=2))
    ordered = grid.in_order(budgets)
    n = sum(run.informs for run in ordered)
    assert all(run.informs for run in ordered[:n]) and 0 < n < len(ordered)
    # Of equal FLOPs the smallest model takes longest.
    assert [(run.flops, run.params) for run in ordered[:n]] == sorted(
        (run.flops, run.params) for run in ordered[:n]
    )
    assert [(-run.flops, run.params) for run in ordered[n:]] == sorted(
        (-run.flops, run.params) for run in ordered[n:]
    )


def simulate(config, workers):
    """Idle share of ``workers`` cores, if a run takes as long as measured FLOP/s say."""

    def seconds(run):  # 12 to 45 GFLOP/s a core from 4k to 500k parameters
        return run.flops / (12e9 * (run.params / 4e3) ** 0.27) + 1.5

    done, clock, busy, running = {}, 0.0, 0.0, []
    while True:
        started = {run.run_id for *_, run in running}
        for run in grid.in_order(grid.plan(config, done)):
            if len(running) < workers and run.run_id not in started and run.run_id not in done:
                heapq.heappush(running, (clock + seconds(run), run.run_id, run))
                busy += seconds(run)
        if not running:
            return 1 - busy / (workers * clock), len(done)
        clock, _, run = heapq.heappop(running)
        done[run.run_id] = law(run)


@pytest.mark.parametrize("arguments", ["quick", "full"])
def test_two_workers_are_hardly_ever_idle(arguments):
    config = load(f"configs/isoflop_cpu.py:{arguments}")
    idle, n = simulate(config, workers=2)
    assert idle < 0.05
    assert n >= len(config.sweep.budgets) * config.sweep.sizes
