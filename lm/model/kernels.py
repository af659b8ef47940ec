"""Causal attention by place: ``attend``, with one meaning, and the kernel that suits a platform.

einsum  anywhere, and what the others are held to; its gradient is written out
cudnn   NVIDIA's fused kernel, through ``jax.nn.dot_product_attention``
splash  Pallas's block-sparse kernel for TPU: blocks in which nothing is visible cost nothing
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lm.command import BadInput
from lm.sharding import devices_along, here, platform

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite
BY_PLATFORM = {"gpu": "cudnn", "tpu": "splash"}
LANES = 128  # of a TPU's registers; splash works in multiples of them


def attend(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys that ``visible`` gives each query, (B, T, N, H).

    N = K * G query heads over K key/value heads, S = T.

    Args:
      segments_BT: int32, a number a document (None: a row is one document).
      sliding_window: keys that a query sees, its own included (0: all up to its own).
      soft_cap: scores become soft_cap * tanh(score / soft_cap) (0: stay).
      kernel: see ``choose_kernel``, which raises ``BadInput``.
    """
    _, t, _, h = query_BTNH.shape
    kernel = choose_kernel(kernel, t, h, str(query_BTNH.dtype), soft_cap)
    if kernel == "einsum":
        mask_BTS = visible(t, sliding_window, segments_BT)
        return einsum(query_BTNH, key_BSKH, value_BSKH, mask_BTS, soft_cap)
    if kernel == "cudnn":
        return cudnn(query_BTNH, key_BSKH, value_BSKH, segments_BT, sliding_window)
    return splash(query_BTNH, key_BSKH, value_BSKH, segments_BT, sliding_window, soft_cap)


def choose_kernel(
    kernel: str, n_positions: int, head_width: int, dtype: str, soft_cap: float
) -> str:
    """The kernel's name; for ``auto`` the platform's own, or einsum where that one can't do this.

    The platform and the chunks of a sequence are those of what is being traced.

    Raises:
      BadInput: ``kernel`` is named and can't do this.
    """
    place, chunks = platform(), devices_along("positions")
    needs = {
        "einsum": (),
        "cudnn": (
            (place == "gpu", f"the platform {place}: must be a GPU"),
            (dtype == "bfloat16", f"model.dtype = {dtype!r}: must be 'bfloat16'"),
            (
                head_width % 8 == 0 and head_width <= 128,
                f"model.head_width = {head_width}: must be a multiple of 8, at most 128",
            ),
            (n_positions % 2 == 0, f"data.seq_len = {n_positions}: must be even"),
            (not soft_cap, f"model.attention_soft_cap = {soft_cap}: must be 0"),
            (chunks == 1, f"mesh.context = {chunks}: must be 1"),
        ),
        "splash": (
            (place == "tpu", f"the platform {place}: must be a TPU"),
            (
                n_positions % (LANES * chunks) == 0,
                f"data.seq_len = {n_positions}: must be a multiple of {LANES} x mesh.context"
                f" = {LANES * chunks}",
            ),
        ),
    }
    auto = kernel == "auto"
    if auto:
        kernel = BY_PLATFORM.get(place, "einsum")
    refused = [why for met, why in needs[kernel] if not met]
    if refused and not auto:
        raise BadInput(f"model.attention_kernel = {kernel!r} with {refused[0]}")
    return "einsum" if refused else kernel


def visible(
    n_positions: int, sliding_window: int = 0, segments_BT: jax.Array | None = None
) -> jax.Array:
    """Which keys S a query T may see, as bool (1 or B, T, S): none ahead, none beyond the window
    (``sliding_window`` keys, the query's own included), none of another document."""
    query, key = jnp.arange(n_positions)[:, None], jnp.arange(n_positions)[None, :]
    mask_TS = key <= query
    if sliding_window:
        mask_TS &= key > query - sliding_window
    mask_BTS = mask_TS[None]
    if segments_BT is not None:
        mask_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return mask_BTS


def einsum(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask_BTS: jax.Array,
    soft_cap: float = 0.0,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys of any mask, (B, T, N, H); S and T are free."""
    b, t, n, h = query_BTNH.shape
    k = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(b, t, k, n // k, h) * h**-0.5
    query_BKTGH = query_BTKGH.swapaxes(1, 2)
    key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
    out_BKTGH = _attend(query_BKTGH, key_BKSH, value_BKSH, mask_BTS, soft_cap)
    return out_BKTGH.swapaxes(1, 2).reshape(b, t, n, h)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query_BKTGH, key_BKSH, value_BKSH, mask_BTS, soft_cap: float) -> jax.Array:
    """softmax(q k^T) v, (B, K, T, G, H), with its gradient written out below.

    XLA on CPU is slow at what autodiff makes of it: the score-sized arrays are copied into
    transposed order, and the softmax's row sum is fused with a product. Here the score-sized
    arrays enter every product as they lie, and the row sum is taken over H (Dao et al. 2022,
    FlashAttention, appendix B.2).
    """
    return _attend_forward(query_BKTGH, key_BKSH, value_BKSH, mask_BTS, soft_cap)[0]


def _rows(x_BKTGS: jax.Array) -> jax.Array:
    """Merges a head group's queries, so that every product is a plain batch of matrices.

    T comes before G, so that positions over several devices stay there.
    """
    return x_BKTGS.reshape(*x_BKTGS.shape[:2], -1, x_BKTGS.shape[-1])


def _scores(query_BKRH: jax.Array, key_BKSH: jax.Array) -> jax.Array:
    """q k^T in float32 whatever the operands' type: a bfloat16 score of 10 is off by 0.03."""
    return jnp.matmul(query_BKRH, key_BKSH.mT, preferred_element_type=jnp.float32)


def _attend_forward(query_BKTGH, key_BKSH, value_BKSH, mask_BTS, soft_cap):
    shape = query_BKTGH.shape
    query_BKRH = _rows(query_BKTGH)
    score_BKRS = _scores(query_BKRH, key_BKSH)
    if soft_cap:
        score_BKRS = soft_cap * jnp.tanh(score_BKRS / soft_cap)
    score_BKTGS = score_BKRS.reshape(*shape[:4], -1)
    score_BKRS = _rows(jnp.where(mask_BTS[:, None, :, None], score_BKTGS, MASKED))
    exp_BKRS = jnp.exp(score_BKRS - jnp.max(score_BKRS, -1, keepdims=True))
    total_BKR1 = jnp.sum(exp_BKRS, -1, keepdims=True)
    exp_BKRS = exp_BKRS.astype(value_BKSH.dtype)
    # The narrow output is divided by the softmax's total, not the wide weights.
    out_BKRH = ((exp_BKRS @ value_BKSH) / total_BKR1).astype(value_BKSH.dtype)
    saved = query_BKRH, key_BKSH, value_BKSH, exp_BKRS, total_BKR1, out_BKRH
    return out_BKRH.reshape(shape), saved


def _attend_backward(soft_cap, saved, d_out_BKTGH):
    query_BKRH, key_BKSH, value_BKSH, exp_BKRS, total_BKR1, out_BKRH = saved
    d_out_BKRH = _rows(d_out_BKTGH) / total_BKR1
    row_sum_BKR1 = jnp.sum(d_out_BKRH * out_BKRH, -1, keepdims=True)
    d_out_BKRH = d_out_BKRH.astype(out_BKRH.dtype)
    d_weight_BKRS = d_out_BKRH @ value_BKSH.mT
    d_score_BKRS = exp_BKRS * (d_weight_BKRS - row_sum_BKR1)
    if soft_cap:
        d_score_BKRS *= 1 - jnp.tanh(_scores(query_BKRH, key_BKSH) / soft_cap) ** 2
    d_score_BKRS = d_score_BKRS.astype(exp_BKRS.dtype)
    d_query_BKTGH = (d_score_BKRS @ key_BKSH).reshape(d_out_BKTGH.shape)
    d_key_BKSH = (query_BKRH.mT @ d_score_BKRS).mT
    d_value_BKSH = (d_out_BKRH.mT @ exp_BKRS).mT
    return d_query_BKTGH, d_key_BKSH, d_value_BKSH, None


_attend.defvjp(_attend_forward, _attend_backward)


def _on_each_device(function: Callable, *logical: tuple, extra: tuple = ()) -> Callable:
    """``function`` of each device's own rows and heads: the fused kernels are opaque to XLA, which
    would gather their arguments.

    ``logical``: the axes of the result, then of the arguments; ``extra``: specs of further ones.
    """
    places = [here(*axes) for axes in logical]
    if places[0] is None:
        return function
    out, *args = (place.spec for place in places)
    mesh = places[0].mesh
    return jax.shard_map(
        function, mesh=mesh, in_specs=(*args, *extra), out_specs=out, check_vma=False
    )


def _key_heads_by_device(x_BSKH: jax.Array) -> jax.Array:
    """Where devices share the query heads and are more than the key/value heads: as many copies
    as give each device those of its own queries."""
    k = x_BSKH.shape[2]
    repeats = math.lcm(k, devices_along("act_heads")) // k
    return jnp.repeat(x_BSKH, repeats, axis=2) if repeats > 1 else x_BSKH


QUERIES = ("batch", "positions", "act_heads", None)
KEYS = ("batch", "keys", "act_heads", None)


def cudnn(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    sliding_window: int = 0,
    implementation: str = "cudnn",
) -> jax.Array:
    """cuDNN's fused attention. Segments cost a mask of (B, T, S): jax has no other way to them."""

    def attention(query_BTNH, key_BSKH, value_BSKH, segments_BT):
        mask_B1TS = None
        if segments_BT is not None:
            mask_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        return jax.nn.dot_product_attention(
            *(query_BTNH, key_BSKH, value_BSKH),
            mask=mask_B1TS,
            is_causal=True,
            local_window_size=(sliding_window - 1, 0) if sliding_window else None,
            implementation=implementation,
        )

    run = _on_each_device(attention, QUERIES, QUERIES, KEYS, KEYS, ("batch", "keys"))
    key_BSKH, value_BSKH = map(_key_heads_by_device, (key_BSKH, value_BSKH))
    return run(query_BTNH, key_BSKH, value_BSKH, segments_BT)


def splash(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    segments_BT: jax.Array | None = None,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """Pallas's splash attention; where chunks of a sequence are split, each sees all keys.

    ``interpret`` runs it on CPU, slowly.
    """
    # A quarter of a second, which only a TPU's process need spend.
    from jax.experimental.pallas.ops.tpu import splash_attention

    _, t, n, h = query_BTNH.shape
    chunks = devices_along("positions")
    if sliding_window:
        mask_TS = splash_attention.LocalMask((t, t), (sliding_window - 1, 0), 0)
    else:
        mask_TS = splash_attention.CausalMask((t, t))
    # The widest blocks up to 512: the fewest passes over the keys that the fast memory allows.
    q, kv = (next(b for b in (512, 384, 256, LANES) if x % b == 0) for x in (t // chunks, t))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask_TS] * n),
        block_sizes=splash_attention.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), q),
            **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), kv),
        ),
        head_shards=devices_along("act_heads"),
        q_seq_shards=chunks,
        attn_logits_soft_cap=soft_cap or None,
        interpret=interpret,
    )

    def attention(query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, kernel):
        by_heads = (x.swapaxes(1, 2) for x in (query_BTNH, key_BSKH, value_BSKH))
        segments = None
        if segments_BT is not None:
            segments = splash_attention.SegmentIds(segments_BT, segments_BS)
        return jax.vmap(kernel)(*by_heads, segments).swapaxes(1, 2)

    blocks = here("act_heads", "positions")
    run = _on_each_device(
        attention,
        *(QUERIES, QUERIES, KEYS, KEYS, ("batch", "positions"), ("batch", "keys")),
        extra=(blocks and kernel.manual_sharding_spec(blocks),),
    )
    key_BSKH, value_BSKH = map(_key_heads_by_device, (key_BSKH, value_BSKH))
    return run(query_BTNH * h**-0.5, key_BSKH, value_BSKH, segments_BT, segments_BT, kernel)
