"""Against what is known of programs compiled here, and lines as libtpu's compiler prints them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.estimate.collectives import Collective, _groups, collectives

SIZES = {"data": 4, "model": 2}


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    return Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def compiled_text(mesh, function, out, *shapes_and_specs):
    given = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in shapes_and_specs
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
    return jitted.lower(*given).compile().as_text()


@pytest.mark.parametrize("axis", ["data", "model"])
def test_an_all_gather_has_its_axis_and_the_whole_arrays_bytes(mesh, axis):
    text = compiled_text(mesh, lambda x: x * 2, PartitionSpec(), ((16, 8), PartitionSpec(axis)))
    n = SIZES[axis]
    assert collectives(text, SIZES) == [Collective("all-gather", (axis,), n, 1, 16 * 8 * 4)]
    assert collectives(text, SIZES)[0].sent_bytes == 16 * 8 * 4 * (n - 1) / n


def test_a_product_over_a_split_axis_ends_in_an_all_reduce(mesh):
    split = ((8, 16), PartitionSpec(None, "data")), ((16, 4), PartitionSpec("data"))
    text = compiled_text(mesh, jnp.matmul, PartitionSpec(), *split)
    (found,) = collectives(text, SIZES)
    assert found == Collective("all-reduce", ("data",), 4, 1, 8 * 4 * 4)
    assert found.sent_bytes == 8 * 4 * 4 * 2 * 3 / 4


def test_over_both_axes_the_group_is_all_devices(mesh):
    spec = PartitionSpec(("data", "model"))
    text = compiled_text(mesh, lambda x: x + 1, PartitionSpec(), ((16, 8), spec))
    assert collectives(text, SIZES) == [
        Collective("all-gather", ("data", "model"), 8, 1, 16 * 8 * 4)
    ]


def shifted(mesh, turns, axis="model"):
    """Each device's rows sent on around its group, `turns` times over."""
    n = SIZES[axis]

    def local(x):
        def turn(_, x):
            return jnp.sin(jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)]))

        return jax.lax.fori_loop(0, turns, turn, x)

    spec = PartitionSpec(axis)
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def test_a_loop_counts_as_often_as_it_turns(mesh):
    spec = PartitionSpec("model")
    text = compiled_text(mesh, shifted(mesh, 7), spec, ((16, 8), spec))
    assert collectives(text, SIZES) == [
        Collective("collective-permute", ("model",), 2, 7, 7 * 8 * 8 * 4)
    ]


def test_loops_in_loops_multiply_and_a_loop_of_unknown_length_counts_once(mesh):
    spec = PartitionSpec("data")
    inner = shifted(mesh, 3, "data")

    def function(x, n):
        def outer(x):
            return jax.lax.fori_loop(0, 5, lambda _, x: inner(x), x)

        return jax.lax.fori_loop(0, n[0].astype(int), lambda _, x: outer(x), x)

    given = ((16, 8), spec), ((1,), PartitionSpec())
    text = compiled_text(mesh, function, spec, *given)
    assert [(c.axes, c.count) for c in collectives(text, SIZES)] == [(("data",), 15)]


def test_a_reduce_scatter_counts_what_is_reduced(mesh):
    def local(x):
        return jax.lax.psum_scatter(x, "data", tiled=True)

    spec = PartitionSpec("data")
    scatter = jax.shard_map(local, mesh=mesh, in_specs=PartitionSpec(), out_specs=spec)
    text = compiled_text(mesh, scatter, spec, ((16, 8), PartitionSpec()))
    found = collectives(text, SIZES)
    assert found == [Collective("reduce-scatter", ("data",), 4, 1, 16 * 8 * 4)]
    assert found[0].sent_bytes == 16 * 8 * 4 * 3 / 4


MODEL_GROUPS = [[0, 1], [2, 3], [4, 5], [6, 7]]
DATA_GROUPS = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", MODEL_GROUPS),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={1}", DATA_GROUPS),
        ("replica_groups=[4,2]<=[8], dimensions={0}", MODEL_GROUPS),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", DATA_GROUPS),
        ("replica_groups={}, to_apply=%add", [list(range(8))]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_2'}, x={1}", MODEL_GROUPS),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0))"
            " {'axis_0'}, use_global_device_ids=true",
            MODEL_GROUPS,
        ),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", MODEL_GROUPS),
        ("channel_id=3, source_target_pairs={{0,2},{2,4}}, metadata={}", [[0, 2], [2, 4]]),
    ],
)
def test_groups_are_read_in_every_form_that_xla_prints(text, expected):
    assert sorted(_groups(text, 8).tolist()) == expected


# An excerpt of a step compiled for TPU v5e, shortened: an asynchronous all-gather that three
# fusions overlap, in a loop whose bound is in its condition; a kernel's settings over two lines.
TPU = """HloModule jit__train, is_scheduled=true

%async_collective_fusion.1 (param_0: bf16[64,16], param_1: bf16[64,64]) -> bf16[64,64] {
  %param_0 = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), channel_id=8, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true
}

%fused_computation.2 (param_0: bf16[64,16]) -> bf16[64,64] {
  %param_0.1 = bf16[64,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0} all-gather(%param_0.1), channel_id=8, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}
}

%body (wide.param: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %wide.param = (s32[]{:T(128)}, bf16[64,16]{1,0}) parameter(0)
  %kernel = bf16[8,8]{1,0} custom-call(%wide.param), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="attention"}
  %fusion.1 = bf16[64,64]{1,0} fusion(%kernel), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[64,64]{1,0} fusion(%kernel), kind=kCustom, calls=%fused_computation.2
  %all-reduce.3 = (bf16[4]{0}, /*index=1*/f32[2,2]{1,0:T(4,128)}) all-reduce(%a, %b), \
channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %tuple = (s32[], bf16[64,16]{1,0}) tuple(%wide.param)
}

%condition (param: (s32[], bf16[64,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  %param = (s32[], bf16[64,16]) parameter(0)
  %get-tuple-element.1 = s32[] get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

ENTRY %main (param.1: s32[]) -> s32[] {
  %while.1 = (s32[], bf16[64,16]{1,0}) while(%tuple.1), condition=%condition, body=%body
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), channel_id=1, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %done = f32[32]{0} all-gather-done(%start)
}
"""


def test_text_as_libtpu_prints_it():
    assert sorted(collectives(TPU, SIZES)) == [
        Collective("all-gather", ("data",), 4, 33, 32 * 64 * 64 * 2 + 32 * 4),
        Collective("all-reduce", ("model",), 2, 32, 32 * (4 * 2 + 4 * 4)),
    ]
