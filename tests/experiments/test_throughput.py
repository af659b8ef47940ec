"""The comparison with PyTorch: both sides learn the same from the same weights."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "throughput"


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("throughput_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_fifty_losses_agree_with_pytorch(run):
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason=f"{name} is in the extra `compare`")
    row = run.compare("64,2,4,2,176,64,16,64", 1, 1, "cpu", sides=("eager", "lm"))
    assert row["largest_loss_difference"] < run.LOSS_TOLERANCE
    first, last = row["first_and_last_loss"]
    assert last < 0.8 * first  # there was something to agree on


def test_without_pytorch_it_says_what_to_install():
    code = (
        "import importlib.util, runpy, sys; sys.argv = ['run.py']; "
        "importlib.util.find_spec = lambda name: None; "
        f"runpy.run_path({str(FOLDER / 'run.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install -e '.[compare]'" in done.stderr


def test_a_table_row(run):
    row = {
        "shape": "1,2,3",
        "tokens_per_second": {"eager": 1000, "lm": 2500},
        "ratio": 2.5,
        "target": 1.2,
        "largest_loss_difference": 1e-6,
    }
    assert run.table([row]).splitlines()[-1] == (
        "| 1, 2, 3 | 1,000 | - | 2,500 | **2.50** | 1.2 | 1.0e-06 |"
    )
