"""What TPU programs send, by libtpu's own compiler: needs the `tpu` extra and no TPU."""

from collections import Counter

import pytest

from lm.config import Config, replace
from lm.estimate.compiled import compile_step
from lm.hardware import topology

D, SEQ_LEN, ROWS = 256, 256, 8
pytestmark = pytest.mark.slow


def compiled(n_layers=4, accumulation=1, slice_="v5p:2x2x2", **mesh):
    """Of one optimizer step: (kind, axes) -> (count, payload bytes)."""
    pytest.importorskip("libtpu")
    config = replace(
        Config(),
        model=dict(
            vocab_size=512, d_model=D, n_layers=n_layers, n_heads=8, n_kv_heads=4, d_ff=512,
            scan_layers=True, dtype="bfloat16",
        ),
        data={"seq_len": SEQ_LEN},
        train={"steps_per_dispatch": 1, "accumulation": accumulation},
        mesh=mesh,
    )  # fmt: skip
    count, payload = Counter(), Counter()
    for one in compile_step(config, topology(slice_), ROWS * accumulation).collectives:
        count[one.kind, one.axes] += one.count
        payload[one.kind, one.axes] += one.payload_bytes
    return count, payload


def of_a_layer(**mesh):
    """Collectives of one more layer, (kind, axes) -> count: those outside the layers drop out."""
    (four, _), (two, _) = compiled(4, **mesh), compiled(2, **mesh)
    return {key: (four[key] - two[key]) / 2 for key in four | two if four[key] != two[key]}


@pytest.mark.parametrize("slice_, mesh", [("v5p:2x2x2", {"model": 2}), ("v4:2x2x1", {})])
def test_under_zero_3_weights_are_gathered_and_gradients_scattered(slice_, mesh):
    _, payload = compiled(slice_=slice_, data=4, zero=3, **mesh)
    assert payload["all-gather", ("data",)] > 0 and payload["reduce-scatter", ("data",)] > 0
    # What is left to all-reduces are the norms' gains, the loss and the like.
    assert payload["all-reduce", ("data",)] < 0.02 * payload["reduce-scatter", ("data",)]


def test_tensor_parallelism_reduces_twice_a_layer_each_way():
    assert of_a_layer(data=4, model=2)["all-reduce", ("model",)] == 4


def test_a_split_residual_gathers_and_scatters_instead():
    found = of_a_layer(data=4, model=2, sequence_sharded=True)
    assert found["reduce-scatter", ("model",)] == 4
    assert found["all-gather", ("model",)] == 4
    _, payload = compiled(data=4, model=2, sequence_sharded=True)
    activations = 2 * ROWS // 4 * SEQ_LEN * D  # bfloat16, of one device's rows
    assert payload["all-reduce", ("model",)] < activations


def test_stages_hand_on_by_permutes_alone():
    count, payload = compiled(accumulation=4, data=4, stage=2)
    assert count["collective-permute", ("stage",)] > 0
    assert not any("stage" in axes and kind == "all-gather" for kind, axes in payload)
