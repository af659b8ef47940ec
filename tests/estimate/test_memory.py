import jax
import pytest
from jax.sharding import AbstractMesh

from lm import arithmetic
from lm.config import MESH_AXES, Config, ModelConfig, replace
from lm.estimate.memory import compute_width, device_memory, fuses_attention, kept_bytes
from lm.model.kernels import choose_kernel
from lm.sharding import layout, make_mesh, placed
from lm.train.step import Program

ONE = dict.fromkeys(MESH_AXES, 1)
SMALL = {"vocab_size": 256, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 176}
GPT = {"feed_forward": "gelu", "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "d_ff": 256}


def config(sections=None, **model):
    base = replace(Config(), model={**SMALL, "scan_layers": True, **model}, data={"seq_len": 128})
    base = replace(base, train={"steps_per_dispatch": 1})
    return replace(base, **(sections or {}))


def temporary_bytes(config, sequences):
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    compiled = program.lower_train(sequences).compile({"xla_backend_optimization_level": 0})
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "remat",
    [
        "full",
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("dots", marks=pytest.mark.slow),
        pytest.param("dots_with_no_batch_dims", marks=pytest.mark.slow),
    ],
)
def test_another_layer_costs_what_xla_allocates_for_it_within_an_eighth(remat):
    """By XLA's memory analysis of the real step: what a layer keeps, and its gradients."""
    sequences, shallow, deep = 16, config(n_layers=4, remat=remat), config(n_layers=8, remat=remat)
    allocated = (temporary_bytes(deep, sequences) - temporary_bytes(shallow, sequences)) / 4
    gradients = 4 * (_parameters(deep) - _parameters(shallow)) / 4
    kept = kept_bytes(deep.model, ONE, scores=128)[remat] * sequences * 128
    assert allocated == pytest.approx(kept + gradients, rel=1 / 8)


def _parameters(config):
    return arithmetic.parameters(config.model).total


def test_what_products_and_norms_need_is_korthikantis_count():
    """Equation 2 without dropout, s b h (8 + 24 / t) and 2 a s^2 b / t bytes, in a GPT's block.

    jax keeps more: of each norm three float32 arrays instead of one value, attention's output once
    more than its query and context (3 for 2), and a third array of the activation.
    """
    model = ModelConfig(**GPT, dtype="bfloat16")
    h, a, s = model.d_model, model.n_heads, 128
    for t in (1, 2, 4):
        found = kept_bytes(model, ONE | {"model": t}, scores=s)["none"]
        more = 2 * (12 - 2) * h + 2 * h / t + 2 * 4 * h / t
        assert found == pytest.approx(h * (8 + 24 / t) + 2 * a * s / t + more)


def test_rematerialisation_keeps_less_and_full_the_residual_alone():
    model = ModelConfig(**SMALL, dtype="bfloat16")
    kept = kept_bytes(model, ONE)
    assert kept["none"] > kept["dots"] > kept["dots_with_no_batch_dims"] > kept["full"] == 2 * 64
    assert kept_bytes(model, ONE | {"model": 2}, True)["full"] == 64


def memory(sections, sizes=None, sequences=64, **model):
    return device_memory(config(sections, **model), ONE | (sizes or {}), sequences)


def test_zero_splits_moments_then_gradients_then_parameters():
    n = 8
    stages = [
        memory({"mesh": {"zero": zero}, "train": {"accumulation": 2}}, {"data": n})
        for zero in range(4)
    ]
    whole = stages[0]
    assert whole.parameters == 4 * _parameters(config()) == whole.moments / 2
    assert [whole.parameters / m.parameters for m in stages] == [1, 1, 1, n]
    assert [whole.moments / m.moments for m in stages] == [1, n, n, n]
    # A micro-batch's gradients go to the optimizer's place at once, the sum from stage 2 on.
    assert stages[2].gradients < stages[1].gradients / 2 < whole.gradients


def test_activations_are_in_proportion_to_a_devices_tokens():
    whole = memory({}).activations
    for sizes in ({"data": 4}, {"replica": 4}, {"context": 4}, {"replica": 2, "data": 2}):
        assert memory({}, sizes).activations == whole / 4
    assert memory({"train": {"accumulation": 4}}).activations == whole / 4
    assert memory({}, sequences=128).activations == 2 * whole
    assert memory({}, {"stage": 2}, n_layers=4).activations == 2 * memory({}).activations / 2


def test_a_chunked_loss_keeps_a_chunks_logits():
    large = {"vocab_size": 65_536, "remat": "full"}
    whole = memory({}, **large)
    chunked = memory({"train": {"loss_chunk": 16}}, **large)
    assert whole.working == (4 + 4) * 64 * 128 * 65_536
    assert chunked.working == whole.working / 8


def test_a_bfloat16_value_is_half_a_float32():
    assert [compute_width(ModelConfig(dtype=d)) for d in ("bfloat16", "float32")] == [2, 4]


@pytest.mark.parametrize(
    "seq_len, context, kernel, fused",
    [(256, 1, "auto", True), (512, 4, "auto", True), (256, 4, "auto", False),
     (96, 1, "auto", False), (256, 1, "einsum", False)],
)  # fmt: skip
def test_attention_is_fused_where_the_decoder_chooses_splash(seq_len, context, kernel, fused):
    given = replace(
        Config(),
        data={"seq_len": seq_len},
        model={"attention_kernel": kernel},
        mesh={"context": context},
    )
    sizes = ONE | {"context": context}
    assert fuses_attention(given, sizes) is fused
    mesh = AbstractMesh(tuple(sizes.values()), MESH_AXES)
    with placed(mesh, layout(given, mesh)):  # as on a TPU
        chosen = choose_kernel(kernel, seq_len, 16, "float32", 0.0)
    assert (chosen == "splash") is fused
