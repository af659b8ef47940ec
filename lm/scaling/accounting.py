"""The same runs under another count of parameters and FLOPs: the exponent is a convention, too.

What the conventions count is defined in lm.arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from lm import arithmetic
from lm.command import BadInput, one_of
from lm.scaling.allocation import AllocationFit, CannotFit
from lm.scaling.table import RunTable

PARAMS_CONVENTIONS = ("total", "non_embedding", "blocks_and_head", "effective")
FLOPS_CONVENTIONS = ("6nd", "exact", "exact_blocks", "kaplan", "chinchilla")
CONVENTIONS = (
    ("total", "6nd"),
    ("non_embedding", "kaplan"),
    ("blocks_and_head", "6nd"),
    ("effective", "6nd"),
    ("blocks_and_head", "exact"),
    ("total", "chinchilla"),
)

_NEEDED = ("d_model", "n_layers", "n_heads", "vocab_size", "seq_len")
_OPTIONAL = (
    "n_kv_heads", "head_width", "d_ff", "tied", "feed_forward", "position", "norm", "norm_position",
    "qk_norm", "qkv_bias",
)  # fmt: skip


def recount(runs: RunTable, *, params: str = "blocks_and_head", flops: str = "6nd") -> RunTable:
    """`runs` with params and FLOPs counted anew; tokens and losses stay as they are.

    params: `total`; `non_embedding` (Kaplan et al.'s); `blocks_and_head` (Porian et al.'s standard
    count); `effective` (blocks and head, attention scores folded in: exact FLOPs a token over 6).
    flops: `6nd` is 6 x those params x tokens; `exact`, `exact_blocks` (without the head), `kaplan`
    (6 x non-embedding x tokens) and `chinchilla` (Hoffmann et al., appendix F) are lm.arithmetic's.
    Needs the columns d_model, n_layers, n_heads, vocab_size, seq_len, and takes n_kv_heads, d_ff,
    tied, feed_forward, ... where they stand. Raises BadInput naming the missing ones.
    """
    one_of("params", params, PARAMS_CONVENTIONS)
    one_of("flops", flops, FLOPS_CONVENTIONS)
    missing = [name for name in _NEEDED if name not in runs.columns]
    if missing:
        raise BadInput(
            f"counting params as {params} and flops as {flops} needs the runs' shapes: "
            f"no column {', '.join(missing)}"
        )
    experts = runs.columns.get("n_experts")
    if experts is not None and experts.dtype.kind == "f" and np.any(experts > 0):
        raise BadInput(
            f"counting params as {params} and flops as {flops}: run"
            f" {runs.run_id[experts > 0][0]} has experts, whose shapes a table does not hold"
        )
    model = arithmetic.model_columns(**_shapes(runs))
    seq_len = runs.columns["seq_len"].astype(np.int64)
    if params == "effective":
        counted = arithmetic.effective_parameters(model, seq_len)
    else:
        counted = getattr(arithmetic.parameters(model, seq_len), params)
    counted = np.asarray(counted, float)
    if flops == "6nd":
        cost = 6 * counted * runs.tokens
    else:
        cost = np.asarray(arithmetic.training_flops(model, seq_len, runs.tokens, flops), float)
    return replace(runs, params=counted, flops=cost)


def exponents_by_accounting(
    runs: RunTable,
    fit: Callable[[RunTable], AllocationFit],
    conventions: Sequence[tuple[str, str]] = CONVENTIONS,
) -> list[dict]:
    """One row a convention: {"params", "flops", "a", "a_interval80", "a_interval95", "reason"}.

    fit: from a table to a fit, as `functools.partial(fit_parametric, bootstrap=1000)`. Where it
    refuses a recounted table, `a` is None and `reason` says why. Raises BadInput as recount does.
    """
    rows = []
    for params, flops in conventions:
        row = {"params": params, "flops": flops, "a": None}
        row |= {"a_interval80": None, "a_interval95": None, "reason": ""}
        try:
            fitted = fit(recount(runs, params=params, flops=flops))
        except CannotFit as error:
            row["reason"] = str(error)
        else:
            row |= {"a": fitted.a}
            row |= {"a_interval80": fitted.a_interval80, "a_interval95": fitted.a_interval95}
        rows.append(row)
    return rows


def _shapes(runs: RunTable) -> dict[str, object]:
    """The model columns of the table. A text column must hold one value."""
    shapes = {}
    for name in (*_NEEDED[:-1], *(name for name in _OPTIONAL if name in runs.columns)):
        values = runs.columns[name]
        if values.dtype.kind == "f":
            bad = ~np.isfinite(values)
            if bad.any():
                raise BadInput(f"column {name} is empty for run {runs.run_id[bad][0]}")
            shapes[name] = values.astype(np.int64)
            continue
        kinds = sorted(set(map(str, values)))
        if len(kinds) > 1:
            raise BadInput(f"column {name} mixes {', '.join(kinds)}: a table must be of one kind")
        shapes[name] = {"true": 1, "false": 0}.get(kinds[0].lower(), kinds[0])
    return shapes
