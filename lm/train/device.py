"""The machine a run meets: compiled programs kept between processes, its peak and memory."""

import functools
import os
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from lm.hardware import DEVICE_KINDS, PEAK_FLOPS


def keep_compiled(directory: str | os.PathLike | None = None) -> None:
    """Keeps compiled programs in ``directory``, JAX_COMPILATION_CACHE_DIR or ~/.cache/lm."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lm" / "compiled"
    directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or default
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def description() -> str:
    """As "cpu x 1" or "TPU v5 lite x 8"."""
    return f"{jax.devices()[0].device_kind} x {jax.device_count()}"


@functools.cache
def peak_flops(dtype: str) -> float:
    """FLOP/s of all devices, the yardstick of MFU (Chowdhery et al. 2022, PaLM, appendix B).

    Of a known accelerator the published one, dense bfloat16 whatever ``dtype``; else measured.
    """
    chip = DEVICE_KINDS.get(jax.devices()[0].device_kind)
    return PEAK_FLOPS[chip] * jax.device_count() if chip else matmul_peak(dtype)


def memory_bytes() -> int:
    """The most that was in use so far: on the fullest device, or by this process on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found]:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matmul_peak(dtype: str, size: int = 0) -> float:
    """FLOP/s of the best of a few square matmuls in ``dtype`` on every device, measured now.

    The yardstick of "share of the peak": a product this large is what the machine does best.
    """
    size = size or (1024 if jax.default_backend() == "cpu" else 8192)
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best * jax.device_count()
