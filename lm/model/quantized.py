"""Quantised training through qwix: the blocks' products in int8 or fp8, forward and backward.

Parameters stay float32; each product rounds its operands anew, by the largest absolute value of
each row of activations, column of the kernel or row of gradients. Embedding, norms, router,
attention's own products and head stay as they are, as in MaxText's recipes, whose number formats
these are.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from lm.command import BadInput

# Operands and incoming gradient. Gradients need range more than precision (Micikevicius et al.
# 2022, "FP8 formats for deep learning", 3).
FORMATS = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


@functools.cache
def _provider(quantization: str) -> Any:
    try:
        import qwix
    except ImportError as error:
        raise BadInput(
            f"model.quantization = {quantization!r}: needs the extra quant: pip install '.[quant]'"
        ) from error
    operand, gradient = FORMATS[quantization]
    rule = qwix.QtRule(
        module_path=".*", weight_qtype=operand, act_qtype=operand, bwd_qtype=gradient
    )
    return qwix.QtProvider([rule])


class _Alone(nn.Module):
    """Calls a provider's product where no parameter is near: qwix takes an operand for one of the
    calling module's if it has its shape, and two such operands for an error."""

    def __call__(self, product: Callable, *args) -> jax.Array:
        return product(*args)


def matmul(x: jax.Array, kernel: jax.Array, quantization: str = "none") -> jax.Array:
    """``x @ kernel`` of rows (..., R, D) and one matrix (D, F), or of (E, R, D) and (E, D, F).

    Raises ``BadInput`` where qwix is not installed.
    """
    if quantization == "none":
        return x @ kernel
    experts = tuple(range(kernel.ndim - 2))
    dimensions = ((x.ndim - 1,), (kernel.ndim - 2,)), (experts, experts)
    return _Alone().apply({}, _provider(quantization).dot_general, x, kernel, dimensions)


def ragged_dot(
    rows_RD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array, quantization: str = "none"
) -> jax.Array:
    """``jax.lax.ragged_dot``: each run of rows by its own matrix, (R, F). Raises as ``matmul``."""
    if quantization == "none":
        return jax.lax.ragged_dot(rows_RD, kernels_EDF, sizes_E)
    return _Alone().apply({}, _provider(quantization).ragged_dot, rows_RD, kernels_EDF, sizes_E)
