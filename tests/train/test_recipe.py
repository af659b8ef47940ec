import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import arithmetic
from lm.command import BadInput
from lm.config import Config, replace
from lm.train.recipe import branch_step, resolve
from lm.train.schedule import learning_rate


def test_a_budget_becomes_tokens_through_exact_flops():
    config = replace(Config(), train={"flops": 1e12, "batch_tokens": 1024})
    recipe = resolve(config)
    per_token = arithmetic.flops_per_token(config.model, config.data.seq_len)
    assert recipe.tokens == recipe.n_steps * 1024
    assert abs(recipe.flops - 1e12) <= 0.5 * 1024 * per_token


def test_a_budget_counts_by_its_convention():
    config = replace(
        Config(), train={"flops": 1e12, "flops_convention": "kaplan", "batch_tokens": 1024}
    )
    recipe = resolve(config)
    blocks = arithmetic.parameters(config.model).non_embedding
    assert abs(6 * blocks * recipe.tokens - 1e12) <= 0.5 * 1024 * 6 * blocks
    assert recipe.flops > 1.2e12  # what it costs, head and scores with it


@given(tokens=st.floats(1e5, 1e9), scale=st.floats(0.3, 3))
def test_a_ruled_batch_follows_its_rule_onto_the_ladder(tokens, scale):
    config = replace(
        Config(), train={"tokens": tokens, "batch_rule": "step_law", "batch_tokens": scale}
    )
    recipe = resolve(config)
    wanted = scale * 0.58 * tokens**0.571 / config.data.seq_len
    assert recipe.sequences == arithmetic.round_batch(wanted)
    assert wanted < 1 or 1 / 1.42 < recipe.sequences / wanted < 1.42


def test_under_width_the_matrices_alone_follow_the_width():
    rule = {"learning_rate": 0.016, "learning_rate_rule": "width", "base_width": 32}
    recipe = resolve(replace(Config(), model={"d_model": 128, "head_width": 32}, optimizer=rule))
    assert recipe.learning_rate == pytest.approx(0.004)
    assert recipe.schedule.peak == pytest.approx(0.016)
    assert recipe.schedule.peak * recipe.schedule.matrix_scale == pytest.approx(0.004)


def test_warmup_is_n_tokens_and_never_more_than_its_share():
    config = replace(Config(), optimizer={"warmup": 1.0}, train={"tokens": 1e8})
    recipe = resolve(config)
    assert recipe.warmup_tokens == recipe.params
    short = resolve(replace(config, train={"tokens": 1e6}))
    assert short.warmup_tokens == pytest.approx(0.1 * short.tokens)
    assert short.schedule.warmup == pytest.approx(0.1 * short.n_steps)


def test_a_warmup_may_outlast_the_run():
    optimizer = {"warmup": 2e6, "warmup_rule": "fixed", "warmup_max_fraction": 100.0}
    recipe = resolve(replace(Config(), optimizer=optimizer, train={"tokens": 1e6}))
    assert recipe.warmup_tokens == 2e6
    last = learning_rate(recipe.schedule, recipe.n_steps - 1, "cosine")
    assert last == pytest.approx(recipe.learning_rate * recipe.tokens / 2e6)


def test_cosine_ends_with_the_run_unless_told_otherwise():
    recipe = resolve(Config())
    schedule = recipe.schedule
    assert schedule.decay_start + schedule.decay_steps == pytest.approx(recipe.n_steps)
    longer = resolve(replace(Config(), optimizer={"decay_tokens": 10 * recipe.tokens})).schedule
    assert longer.decay_start + longer.decay_steps == pytest.approx(10 * recipe.n_steps)


def test_wsd_decays_its_share_at_the_end():
    recipe = resolve(replace(Config(), optimizer={"schedule": "wsd", "decay_fraction": 0.25}))
    assert recipe.branch_step == recipe.schedule.decay_start == round(0.75 * recipe.n_steps)
    assert recipe.schedule.decay_start + recipe.schedule.decay_steps == recipe.n_steps


def test_accumulation_must_divide_the_batch():
    with pytest.raises(BadInput, match="batch of 16 sequences: .* train.accumulation = 3"):
        resolve(replace(Config(), train={"accumulation": 3}))


def test_a_ruled_batch_fits_the_mesh_and_a_given_one_must():
    ruled = replace(Config(), train={"tokens": 1e6, "batch_rule": "step_law", "batch_tokens": 1.0})
    assert resolve(ruled).sequences % 16 and resolve(ruled, 16).sequences % 16 == 0
    with pytest.raises(BadInput, match="multiple of the mesh's replica x data, 5"):
        resolve(Config(), 5)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"optimizer": {"learning_rate": 0.1}}, "rate"),
        ({"optimizer": {"warmup": 9.0}}, "warmup"),
        ({"train": {"tokens": 4e6, "seed": 2}}, "seed"),
        ({"train": {"tokens": 4e6, "batch_tokens": 1024.0}}, "batch_tokens"),
        ({"model": {"d_ff": 88}}, "model"),
        ({"optimizer": {"schedule": "cosine"}}, "schedule"),
        ({"train": {"tokens": 1e6}}, "longer"),
    ],
)
def test_branches_share_all_that_comes_before_the_decay(changed, named):
    short = replace(Config(), optimizer={"schedule": "wsd", "warmup": 0.01})
    long = replace(short, train={"tokens": 4e6})
    assert branch_step(short, long) == resolve(short).branch_step < resolve(long).branch_step
    with pytest.raises(BadInput, match=named):
        branch_step(short, replace(long, **changed))


def test_planning_needs_no_jax():
    import subprocess
    import sys

    code = (
        "import sys; from lm.config import Config; from lm.train.recipe import resolve;"
        "resolve(Config()); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
