import json
from pathlib import Path

import pytest

from lm import command
from lm.estimate import __main__ as estimate
from lm.estimate import compiled
from lm.estimate.collectives import Collective
from lm.estimate.compiled import Compiled, CompileError, _needed, compile_step
from lm.hardware import GIB, topology

LLAMA = "--config=configs/llama3.py:8b"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def run(capsys, *arguments):
    code = command.run(estimate.main, estimate.FLAGS, estimate.__doc__, ["estimate", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def told(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.fixture
def compiler(monkeypatch):
    """libtpu's place is taken by a function that says how many GiB each config needs, in turn."""
    needs = []

    def compile_step(config, on, sequences):
        found = [Collective("all-gather", ("data",), 256, 3, 2**30)]
        return Compiled(needs.pop(0) * GIB, on.chip.hbm_bytes, found, 1.5)

    monkeypatch.setattr(estimate, "compile_step", compile_step)
    return needs


def test_counts_of_llama_3_8b(capsys):
    """8.03e9 parameters (Grattafiori et al. 2024); 8 heads of 128, 2 bytes, 32 layers of cache."""
    found = told(capsys, LLAMA)
    assert found["schema"] == 1
    assert found["params"] == found["active_params"] == 8_030_261_248
    assert found["non_embedding_params"] == 8_030_261_248 - 2 * 128_256 * 4_096
    assert found["flops_per_token"]["exact"] == pytest.approx(5.79e10, rel=1e-3)
    assert found["flops_per_token"]["6nd"] == 6 * (8_030_261_248 - 128_256 * 4_096)
    cache = {"batch": 1, "seq_len": 8_192, "bytes": 2 * 32 * 8 * 128 * 2 * 8_192}
    assert found["kv_cache_bytes"] == cache
    assert found["optimizer_bytes"] == 16 * 8_030_261_248
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k != "total")
    assert "peak_bytes_per_chip" not in found


def test_experts_are_active_in_part(capsys):
    """Mixtral 8x7B: 46.7e9 parameters, 12.9e9 active (Jiang et al. 2024)."""
    found = told(capsys, "--config=configs/mixtral.py:8x7b")
    assert found["params"] == pytest.approx(46.7e9, rel=1e-3)
    assert found["active_params"] == pytest.approx(12.9e9, rel=3e-3)


def test_the_cache_is_of_the_batch_and_length_asked_for(capsys):
    """The lecture's 84 GB of 64 heads are 10.5 GB of 8: 80 layers, 32,000 tokens."""
    found = told(capsys, "--config=configs/llama3.py:70b", "--cache_seq_len=32000")
    assert found["kv_cache_bytes"]["bytes"] == pytest.approx(10.5e9, rel=2e-3)
    twice = told(
        capsys, "--config=configs/llama3.py:70b", "--cache_seq_len=32000", "--cache_batch=2"
    )
    assert twice["kv_cache_bytes"]["bytes"] == 2 * found["kv_cache_bytes"]["bytes"]


def test_a_compiled_step_that_fits(capsys, compiler):
    compiler.append(12.5)
    found = told(capsys, LLAMA, "--topology=v5p:4x4x4")
    assert (found["peak_bytes_per_chip"], found["fits"]) == (12.5 * GIB, True)
    assert found["compiled"] and "nearest" not in found
    (gather,) = found["collectives"]
    assert gather["axes"] == ["data"] and gather["sent_bytes"] == int(2**30 * 255 / 256)
    assert 0 < found["roofline"]["mfu"] < 1 and found["roofline"]["limit"] == "compute"


def test_one_that_does_not_fit_is_given_the_nearest_that_does(capsys, compiler):
    compiler += [23.4, 14.0]
    arguments = (LLAMA, "--topology=v5e:16x16", "--config.train.accumulation=1")
    code, out, err = run(capsys, *arguments)
    assert code == 0 and err.count("compiling for v5e:16x16") == 2
    assert "does not fit: 23.4 GiB of 15.75" in out
    assert "the nearest that does: --config." in out and "fits: 14.0 GiB of 15.75" in out
    compiler += [800.0, 14.0]
    found = told(capsys, *arguments)
    assert not found["fits"] and found["nearest"]["fits"] and found["nearest"]["changes"]
    # The compiler found more than was estimated, and so it would of the other.
    more = 800.0 * GIB / found["memory"]["total"]
    assert more > 1 and found["nearest"]["memory"]["total"] * more <= 15.75 * GIB


def test_without_compiling_the_arithmetic_decides(capsys):
    found = told(capsys, LLAMA, "--topology=v5p:4x4x4", "--nocompile")
    assert found["fits"] and not found["compiled"]
    assert found["peak_bytes_per_chip"] == int(found["memory"]["total"])


def test_the_search_gives_a_config_that_the_same_command_accepts(capsys):
    arguments = (LLAMA, "--topology=v5e:16x16", "--nocompile")
    best = told(capsys, *arguments, "--search")["search"]
    settings = [f"--config.{name}={value}" for name, value in best["changes"].items()]
    again = told(capsys, *arguments, *settings)
    assert again["fits"] and again["sequences"] == best["sequences"]
    assert again["peak_bytes_per_chip"] == best["peak_bytes_per_chip"]
    assert again["roofline"] == best["roofline"]


def test_a_studys_largest_run_is_estimated_and_the_study_costed(capsys):
    arguments = ("--config=configs/isoflop_tpu.py:1e20", "--topology=v5e:2x4", "--nocompile")
    found = told(capsys, *arguments)
    assert found["config"].startswith("c1e20") and found["params"] > 3e9 and found["fits"]
    study = found["training"]
    assert (study["runs"], study["chips"], study["mfu_from"]) == (63, 8, "roofline")
    assert study["budgets"][-1]["bytes_per_chip"] == found["peak_bytes_per_chip"]
    out = run(capsys, *arguments, "--mfu=0.4", "--price_per_chip_hour=0.5")[1]
    assert "1.89e+21 FLOPs in 63 runs: 34.7 days on 8 v5e at 40.0 % MFU (given)" in out
    assert "6,662 chip-hours, 3,331 dollars" in out


def test_gpus_are_given_by_name_and_number(capsys):
    arguments = ("--config=configs/isoflop_gpu.py", "--chip=h100", "--chips=8")
    found = told(capsys, *arguments)
    assert found["mesh"]["data"] == 8 and found["fits"] and "roofline" not in found
    assert found["peak_bytes_per_chip"] == int(found["memory"]["total"]) < 60e9
    out = run(capsys, *arguments)[1]
    assert "8 x h100: fits: 44.8 GiB of 55.88" in out
    assert "6.91 days on 8 h100 at 40.0 % MFU (assumed)" in out
    assert "does not fit" in run(capsys, *arguments, "--config.model.remat=none")[1]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--config=configs/tiny.py", "--search"], "--search needs --topology"),
        (["--config=configs/tiny.py", "--topology=v5e:3x4"], "must be one of v5e:1x1, v5e:2x2"),
        (["--config=configs/tiny.py", "--topology=v7:3x4"], "must be one of v4, v5e, v5p, v6e"),
        ([LLAMA, "--topology=v5e:4x4", "--config.mesh.data=3"], "must multiply to the 16 devices"),
        ([LLAMA, "--topology=v5e:4x4", "--sequences=0"], "sequences"),
        ([LLAMA, "--topology=v5e:4x4", "--sequences=20"], "must be a multiple of"),
        ([LLAMA, "--topology=v5e:4x4", "--chips=8"], "give no --chip or --chips"),
        ([LLAMA, "--chips=8"], "give --chip with --chips"),
        ([LLAMA, "--price_per_chip_hour=2"], "give --chip with --chips"),
        ([LLAMA, "--chip=h10", "--chips=8"], "did you mean 'h100'"),
        ([LLAMA, "--chip=h100", "--chips=8", "--mfu=1.1"], "at most 1"),
        ([LLAMA, "--chip=h100", "--chips=8", "--price_per_chip_hour=nan"], "must be above 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(capsys, arguments, line):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and line in err and err.count("\n") == 1 and not out


def test_without_libtpu_one_line_names_the_extra(capsys, monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    code, out, err = run(capsys, LLAMA, "--topology=v5p:4x4x4")
    assert code == 2 and not out
    assert "pip install -e '.[tpu]'" in err and "--nocompile" in err


def test_a_compiler_that_fails_is_one_line_and_code_1(capsys, monkeypatch):
    def fail(*_):
        raise CompileError("compiling for v5p:4x4x4 failed: INTERNAL: no")

    monkeypatch.setattr(estimate, "compile_step", fail)
    code, out, err = run(capsys, LLAMA, "--topology=v5p:4x4x4")
    assert code == 1 and err.endswith("error: compiling for v5p:4x4x4 failed: INTERNAL: no\n")


@pytest.mark.parametrize(
    "message, needed, limit",
    [
        ("the total memory required for HLO temporaries (22.57G) exceeds available HBM (15.75G).",
         22.57, 15.75),
        ("Ran out of memory in memory space hbm. Used 23.40G of 15.75G hbm. Exceeded hbm capacity"
         " by 7.65G.", 23.40, 15.75),
        ("(768.0M) exceeds available HBM (15.75G)", 0.75, 15.75),
    ],
)  # fmt: skip
def test_what_a_program_needs_is_read_from_the_compilers_refusal(message, needed, limit):
    found = _needed(f"RESOURCE_EXHAUSTED: {message}")
    assert found == (pytest.approx(needed * GIB), pytest.approx(limit * GIB))


@pytest.mark.slow
def test_libtpu_compiles_a_small_step_here():
    """With the `tpu` extra: the real compiler, in a process of its own, against the arithmetic."""
    pytest.importorskip("libtpu")
    from lm.config import MESH_AXES, Config, replace
    from lm.estimate.memory import device_memory

    small = {
        "vocab_size": 8_192, "d_model": 512, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4,
        "d_ff": 1_408, "scan_layers": True, "remat": "full", "dtype": "bfloat16",
    }  # fmt: skip
    config = replace(
        Config(),
        model=small,
        data={"seq_len": 1_024},
        train={"steps_per_dispatch": 1},
        mesh={"zero": 1, "model": 2},
    )
    found = compile_step(config, topology("v5e:2x4"), 16)
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": 4, "model": 2}
    assert found.fits and found.peak_bytes == pytest.approx(
        device_memory(config, sizes, 16).total, rel=0.4
    )
    kinds = {(c.kind, c.axes) for c in found.collectives}
    # Float32 parameters from the optimizer's parts; the residual over tensor parallelism.
    assert {("all-gather", ("data",)), ("all-reduce", ("model",))} <= kinds

    huge = replace(config, train={"batch_tokens": 2**24})
    refused = compile_step(huge, topology("v5e:2x4"), 2**14)
    assert not refused.fits and refused.hbm_bytes == 15.75 * GIB and not refused.collectives
