"""What a token costs: at 128, at 2,048, to transformers. Opt-in, when idle: LM_TIMINGS=1."""

import os

import jax
import pytest

from experiments.decode_speed import run
from lm.sharding import make_mesh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("LM_TIMINGS"), reason="times tokens; set LM_TIMINGS=1 on idle cores"
    ),
]


@pytest.fixture(scope="module")
def mesh():
    run.FLAGS(["run", "--rounds=3"])
    return make_mesh(run.CONFIG.mesh, jax.devices()[:1])


def test_a_token_costs_what_its_position_does(mesh):
    found = run.by_position(max(run.DEPTHS), mesh)
    assert found["cache_positions"] == {"128": 128, "2048": 2048}
    assert found["over_arithmetic"] <= 1.2
    times = found["microseconds_per_token"]
    assert times["near"] <= 1.2 * times["near_with_little_room"]


def test_without_a_cache_it_grows_with_the_text(mesh):
    times = run.uncached(run.Program(run.CONFIG, mesh).init(0).params)
    assert times[512] > 3 * times[128]


def test_it_writes_half_as_fast_again_as_transformers(mesh):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not here; pip install '.[compare]'")
    params = run.Program(run.CONFIG, mesh).init(0).params
    assert run.beside_transformers(params, mesh)["ratio"] >= 1.5
