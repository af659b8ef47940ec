import pytest

from experiments.tpu_fit.run import share
from lm import arithmetic
from lm.config import MESH_AXES, Config, replace
from lm.estimate.roofline import ASSUMPTIONS, REALISED, roofline, sent_bytes
from lm.hardware import CHIPS, topology

ONE = dict.fromkeys(MESH_AXES, 1)
LARGE = {
    "vocab_size": 32_000, "d_model": 4_096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8,
    "d_ff": 14_336, "scan_layers": True, "dtype": "bfloat16",
}  # fmt: skip


def config(remat="none", seq_len=4_096, train=None, mesh=None, **model):
    changed = replace(Config(), model={**LARGE, "remat": remat, **model}, data={"seq_len": seq_len})
    return replace(changed, train=train or {}, mesh=mesh or {})


def bound(config, name="v5e:16x16", sizes=None, sequences=256, **given):
    on = topology(name)
    return roofline(config, on, ONE | (sizes or {"data": on.n_chips}), sequences, **given)


def test_compute_without_rematerialisation_is_exact_flops_at_the_peak():
    unfused = bound(config(), fused_attention=False)
    exact = arithmetic.flops_per_token(config().model, 4_096, "exact")
    assert unfused.compute_seconds == pytest.approx(exact * 256 * 4_096 / 256 / 197e12)
    # Were nothing else to take time, that would be an MFU of one.
    share_of_compute = unfused.compute_seconds / unfused.bound_seconds
    assert unfused.mfu == pytest.approx(share_of_compute * REALISED["v5e"])


def test_full_rematerialisation_costs_a_third_of_the_blocks_compute():
    model = config().model
    head = 6 * model.d_model * model.vocab_size * 4_096 / 197e12
    plain, full = (bound(config(r), fused_attention=False) for r in ("none", "full"))
    again = full.compute_seconds - plain.compute_seconds
    assert again == pytest.approx((plain.compute_seconds - head) / 3)


def test_policies_are_ordered_by_what_they_compute_again():
    times = [
        bound(config(remat), fused_attention=False).compute_seconds
        for remat in ("none", "dots", "dots_with_no_batch_dims", "full")
    ]
    assert times[0] == times[1] < times[2] < times[3]


def test_a_fused_attention_computes_half_the_scores_and_them_once_more():
    long = config(seq_len=65_536)
    plain, fused = (bound(long, fused_attention=f).compute_seconds for f in (False, True))
    products = bound(config(seq_len=128), fused_attention=False).compute_seconds / 128
    scores = plain / 65_536 - products
    assert fused / 65_536 - products == pytest.approx(scores / 2 * 3.5 / 3, rel=0.01)


def test_int8_doubles_the_rate_of_products():
    slow, fast = bound(config()), bound(config(quantization="int8"))
    assert slow.compute_seconds > 1.6 * fast.compute_seconds


WEIGHTS = 2 * (32 * (2 * 4_096 * 4_096 * 1.25 + 3 * 4_096 * 14_336) + 2 * 32_000 * 4_096)


@pytest.mark.parametrize(
    "zero, passes",
    # All-reduce of bfloat16 gradients; and float32 parameters gathered; reduce-scatter and those;
    # two gathers and a reduce-scatter in bfloat16.
    [(0, 2), (1, 2 + 2), (2, 1 + 2), (3, 3)],
)
def test_bytes_over_data_follow_the_zero_stage(zero, passes):
    sent = sent_bytes(config(mesh={"zero": zero}), ONE | {"data": 8}, 256)["data"]
    assert sent == pytest.approx(passes * WEIGHTS * 7 / 8, rel=1e-3)


def test_zero_3_gathers_in_every_micro_batch():
    one, four = (
        sent_bytes(config(mesh={"zero": 3}, train={"accumulation": n}), ONE | {"data": 8}, 256)
        for n in (1, 4)
    )
    assert four["data"] == 4 * one["data"]


def test_tensor_parallelism_reduces_the_residual_four_times_a_layer():
    """Shoeybi et al. 2019: two all-reduces a layer each way; a third each way more for `full`."""
    residual = 2 * 256 * 4_096 * 4_096 / 4
    sizes = ONE | {"data": 4, "model": 8}
    plain, full = (sent_bytes(config(r), sizes, 256)["model"] for r in ("none", "full"))
    assert plain == pytest.approx(2 * 7 / 8 * residual * (4 * 32 + 2))
    assert full - plain == pytest.approx(2 * 7 / 8 * residual * 32)


def test_context_parallelism_gathers_keys_and_values():
    sent = sent_bytes(config(), ONE | {"context": 4}, 16)["context"]
    own = 2 * 16 * 4_096 / 4 * 2 * 8 * 128
    assert sent == 32 * 2 * 3 * own


def test_a_pipeline_waits_its_bubble_and_circular_rounds_shorten_it():
    sizes = {"stage": 4, "data": 64}
    gpipe = bound(config(train={"accumulation": 8}), sizes=sizes)
    circular = bound(config(train={"accumulation": 8}, mesh={"rounds": 2}), sizes=sizes)
    assert gpipe.bubble == pytest.approx(3 / 11) and circular.bubble == pytest.approx(3 / 19)


def test_a_small_batch_on_many_chips_is_limited_by_links():
    assert bound(config(), sequences=2048).limit == "compute"
    little = config(seq_len=128, mesh={"zero": 3}, train={"accumulation": 1})
    assert bound(little, "v5e:16x16", sequences=256).limit == "links of data"


def test_tokens_a_second_are_the_batch_over_the_predicted_step():
    found = bound(config())
    assert found.step_seconds == pytest.approx(found.bound_seconds / REALISED["v5e"])
    assert found.tokens_per_second == pytest.approx(256 * 4_096 / found.step_seconds)


def test_no_roofline_where_the_mesh_does_not_lie_on_the_torus():
    assert bound(config(), "v5e:4x4", {"data": 5, "model": 3}) is None


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_the_realised_share_is_what_published_runs_reach(chip):
    assert REALISED[chip] == pytest.approx(share(chip), abs=0.006)
    assert REALISED.keys() == CHIPS.keys() and ASSUMPTIONS
