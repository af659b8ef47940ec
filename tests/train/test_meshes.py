"""The same run on every mesh, in parts of the size promised, by the collectives expected.

The meshes and their measures are those of ``experiments/sharding``.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.sharding.pipeline import n_iterations

PATH = Path(__file__).resolve().parents[2] / "experiments" / "sharding" / "run.py"
SPEC = importlib.util.spec_from_file_location("sharding_run", PATH)
sharding = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sharding)

LAYERS = sharding.BASE.model.n_layers
pytestmark = pytest.mark.slow
each = pytest.mark.parametrize("name", sharding.CASES)


@functools.cache
def _run(case: str):
    return sharding.run(json.loads(case))


def run(name):
    return _run(json.dumps(sharding.CASES[name]))


# Of the gradient norm: XLA combines them with others, or they go by themselves.
SCALARS = re.compile(r"= \(?(f32\[\](, )?(/\*index=\d+\*/)?)+\)? all-reduce\(")


def sent(name, axis, scalars=True):
    """{kind: (count, payload)} over all devices of a mesh axis, in one optimizer step."""
    found, size = run(name), run(name).program.mesh.shape[axis]
    if not scalars:
        lines = (line for line in found.hlo.splitlines() if not SCALARS.search(line))
        found = found._replace(hlo="\n".join(lines))
    collectives = (c for c in sharding.sent(found) if c.axes == (axis,) and c.group_size == size)
    return {c.kind: (c.count, c.payload_bytes) for c in collectives}


def parameter_bytes():
    params = run("data 8").program.abstract_state.params
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


@each
def test_any_mesh_is_the_same_run(name):
    found, wanted = run(name), _run(json.dumps(sharding.reference(sharding.CASES[name])))
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=1e-5)
    assert wanted.losses[-1] < 0.6 * wanted.losses[0]  # there was something to agree on
    assert sharding.largest_difference(found.gradient, wanted.gradient) < 1e-4


def test_zero_splits_bytes_by_eight():
    for row in sharding.bytes_rows():
        for stage, name in ((1, "optimizer"), (2, "gradients"), (3, "parameters")):
            share = row[f"{name}_share"]
            assert share <= 1 / 8 * 1.02 if row["zero"] >= stage else share == 1


# On CPU an all-reduce and a slice stand for a reduce-scatter.


def test_data_parallelism_reduces_gradients_and_zero_gathers_parameters():
    whole = parameter_bytes()
    gathers = {"data 8": 0, "data 8, zero 1": 1, "data 8, zero 2": 1, "data 8, zero 3": 2}
    for name, times in gathers.items():
        found = sent(name, "data")
        assert 0.96 * whole < found["all-reduce"][1] < 1.01 * whole, name
        gathered = found.get("all-gather", (0, 0))[1]
        # Once after the update; in parts twice, for the forward and the backward pass, but for
        # the embedding, whose gradient needs no embedding.
        assert 0.96 * times * whole <= gathered <= 1.01 * times * whole, name


def test_tensor_parallelism_reduces_twice_a_layer_each_way():
    count, _ = sent("data 4 x model 2", "model", scalars=False)["all-reduce"]
    outside = 5  # the embedding, the logits' maximum, sum, target, and the head's gradient
    assert 4 * LAYERS <= count <= 4 * LAYERS + outside
    assert "all-gather" not in sent("data 4 x model 2", "model")
    name = "data 2 x model 4, sequence-sharded"
    found = sent(name, "model", scalars=False)
    assert 4 * LAYERS <= found["all-gather"][0] <= 4 * LAYERS + 2  # and one of each for the head
    norms = LAYERS  # whose gains' gradients are sums over positions
    assert 4 * LAYERS <= found["all-reduce"][0] <= 4 * LAYERS + outside + norms


def test_context_parallelism_gathers_keys_and_values_once_a_layer():
    segments = 1
    count, payload = sent("context 4", "context")["all-gather"]
    assert count == 2 * LAYERS + segments
    model, rows = sharding.BASE.model, sharding.ROWS * sharding.BASE.data.seq_len
    heads = 2 * LAYERS * rows * model.n_kv_heads * model.head_width * 4
    assert payload == heads + rows * 4


@pytest.mark.parametrize("name, rounds", [("stage 4", 1), ("stage 4, 2 rounds", 2)])
def test_stages_talk_by_permutes(name, rounds):
    """Of activations: in every iteration to the next stage, of stage 0's next micro-batch, and of
    the last stage's result; then of all micro-batches home in two parts. Of each parameter in
    rounds: to three stages. All of them forwards and back."""
    found = sent(name, "stage")
    a_layer = len(jax.tree.leaves(run(name).program.abstract_state.params["layers"]))
    activations = 3 * n_iterations(8, 4, rounds) + 2
    assert found["collective-permute"][0] == 2 * (activations + (rounds - 1) * 3 * a_layer)
    # Else only what every stage has a share of: the loss and three gradients.
    assert found.keys() == {"collective-permute", "all-reduce"}
    outside = [run(name).program.abstract_state.params[x] for x in ("embedding", "head")]
    assert found["all-reduce"][1] < 1.6 * sum(x.size * 4 for x in jax.tree.leaves(outside))


def test_a_pipeline_scores_as_one_device_does():
    batch = jax.tree.map(lambda x: x[0], sharding.batches())
    nats = []
    for name in ("accumulation 2", "stage 2 x data 2 x model 2"):
        program = run(name).program
        nats.append(float(program.nats(program.init(seed=1).params, program.put(batch))))
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)
