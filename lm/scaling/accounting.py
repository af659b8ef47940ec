"""The same runs under another count of parameters and FLOPs: the exponent is a convention, too."""

from lm.scaling.table import RunTable

PARAMS_CONVENTIONS = ("total", "non_embedding", "blocks_and_head", "effective")
FLOPS_CONVENTIONS = ("6nd", "exact", "kaplan", "chinchilla")


def recount(runs: RunTable, *, params: str = "blocks_and_head", flops: str = "6nd") -> RunTable:
    """`runs` with params and FLOPs recounted under the named conventions, tokens and loss as they are.

    Needs the shape columns d_model, n_layers, n_heads, n_kv_heads, vocab_size, seq_len, tied (those that the
    convention needs). "6nd" is 6 x the chosen params x tokens. Raises BadInput naming the missing columns.
    """
    raise NotImplementedError


def exponents_by_accounting(runs: RunTable, fit, conventions=None) -> list[dict]:
    """One row a convention: params, flops, and `a` with its 80 % interval, by `fit(table) -> AllocationFit`."""
    raise NotImplementedError
