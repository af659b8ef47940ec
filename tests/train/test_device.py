"""What is asked of the devices, by devices that the test makes up."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lm.train import device


def devices(monkeypatch, kind, *memory):
    found = [SimpleNamespace(device_kind=kind, memory_stats=lambda m=m: m) for m in memory]
    monkeypatch.setattr(jax, "devices", lambda: found)
    monkeypatch.setattr(jax, "local_devices", lambda: found)
    monkeypatch.setattr(jax, "device_count", lambda: len(found))
    device.peak_flops.cache_clear()


@pytest.mark.parametrize(
    "kind, peak", [("TPU v5 lite", 197e12), ("TPU v6e", 918e12), ("NVIDIA H100 80GB HBM3", 989e12)]
)
def test_the_peak_of_a_known_chip_is_the_published_one(monkeypatch, kind, peak):
    devices(monkeypatch, kind, None, None)
    assert device.peak_flops("float32") == device.peak_flops("bfloat16") == 2 * peak


def test_any_other_is_measured_once(monkeypatch):
    devices(monkeypatch, "abacus", None)
    asked = []
    monkeypatch.setattr(device, "matmul_peak", lambda dtype: asked.append(dtype) or 7.0)
    assert [device.peak_flops("float32") for _ in range(3)] == [7.0] * 3 and asked == ["float32"]
    device.peak_flops.cache_clear()


def test_memory_is_the_fullest_devices_peak(monkeypatch):
    full, empty = {"peak_bytes_in_use": 900, "bytes_in_use": 1}, {"peak_bytes_in_use": 100}
    devices(monkeypatch, "TPU v4", empty, full)
    assert device.memory_bytes() == 900


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_without_its_own_it_is_the_processs():
    told = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert device.memory_bytes() == pytest.approx(1024 * int(told.group(1)), rel=0.05)
