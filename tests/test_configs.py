"""Every shipped config loads, refuses a wrong argument, and has the size its docstring states."""

import csv
import os
import runpy
from pathlib import Path

import pytest

from lm import arithmetic
from lm.checkpoint import claim
from lm.command import BadInput
from lm.config import Config, differences, replace, to_dict
from lm.config_file import load
from lm.data.tokenizers import train_bpe
from lm.estimate.study import training
from lm.hardware import PEAK_FLOPS, topology
from lm.sweep import grid
from lm.train.recipe import resolve

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(os.environ.get("LM_PUBLISHED_RUNS", ROOT.parent / "shared" / "data"))

ARGUMENTS = {  # the documented arguments; without an entry, none
    "chinchilla": ["", "44m", "16183m"],
    "isoflop_cpu": ["quick", "full", "smoke"],
    "isoflop_tpu": ["", "1e20"],
    "llama3": ["8b", "70b", "405b"],
    "mixtral": ["tiny", "8x7b", "8x22b"],
    "switch": ["base", "large", "xxl", "c"],
}
SHIPPED = [
    f"configs/{path.name}" + (f":{argument}" if argument else "")
    for path in sorted(ROOT.glob("configs/[!_]*.py"))
    if path.stem != "finetune"  # of a folder; below
    for argument in ARGUMENTS.get(path.stem, [""])
]

PUBLISHED_EXPERTS = {  # parameters, and those of a token (not in Switch's Table 9)
    "configs/mixtral.py:8x7b": (46.7e9, 12.9e9),
    "configs/mixtral.py:8x22b": (141e9, 39e9),
    "configs/deepseek_moe.py": (16.4e9, 2.8e9),
    "configs/switch.py:base": (7e9, None),
    "configs/switch.py:large": (26e9, None),
    "configs/switch.py:xxl": (395e9, None),
    "configs/switch.py:c": (1571e9, None),
}
STATED = {  # stored parameters, N, exact FLOPs of the run
    "configs/chinchilla.py": (64.69e9, 64.69e9, 5.66e23),
    "configs/chinchilla.py:44m": (41.6e6, 41.6e6, 3.08e17),
    "configs/llama3.py:8b": (8.03e9, 7.50e9, 8.69e23),
    "configs/llama3.py:70b": (70.55e9, 69.50e9, 7.22e24),
    "configs/llama3.py:405b": (405.85e9, 403.75e9, 4.10e25),
    "configs/mixtral.py:8x7b": (46.70e9, 46.57e9, 8.94e22),
    "configs/mixtral.py:8x22b": (140.63e9, 140.43e9, 2.51e23),
    "configs/deepseek_moe.py": (16.38e9, 16.17e9, 3.71e22),
    "configs/switch.py:base": (7.41e9, 7.387e9, 7.43e20),
    "configs/switch.py:large": (27.05e9, 27.02e9, 2.43e21),
    "configs/switch.py:xxl": (393.06e9, 392.9e9, 3.32e22),
    "configs/switch.py:c": (1571.12e9, 1571.05e9, 5.31e21),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("spec", SHIPPED)
def test_loads_and_is_documented(spec):
    config = load(spec)
    path, _, argument = spec.partition(":")
    assert config.name.startswith(Path(path).stem)
    if path != "configs/base.py":
        command = f"--config={path}" + (f":{argument}" if argument == "quick" else "")
        assert command in Path(path).read_text()


@pytest.mark.parametrize("spec", SHIPPED)
def test_describes_runs_that_can_be_run(spec):
    config = load(spec)
    if config.sweep.budgets:
        grid.check(config)
        runs = [run for budget in grid.plan(config, {}) for run in budget.runs]
    else:
        runs = [config]
    for run in runs:
        recipe = resolve(getattr(run, "config", run))
        assert recipe.n_steps > 20 and 1e-5 < recipe.learning_rate < 0.1
        assert recipe.warmup_tokens <= 0.1 * recipe.tokens * 1.001


@pytest.mark.parametrize(("position", "wanted"), [("rope", 2048), ("learned", 4096)])
def test_finetune_of_a_long_context_reads_shorter_texts(tmp_path, position, wanted):
    claim(tmp_path, replace(Config(), model={"position": position}, data={"seq_len": 4096}))
    config = load(f"configs/finetune.py:{tmp_path}", ["data.files=chats/*.jsonl"])
    assert (config.data.seq_len, config.data.validation_tokens) == (wanted, wanted)
    assert resolve(config).n_steps > 20


def test_finetune_has_the_folders_model_and_tokenizer(tmp_path):
    spec, files = f"configs/finetune.py:{tmp_path}", "data.files=chats/*.jsonl"
    with pytest.raises(BadInput, match="no run here"):
        load(spec, [files])
    run = replace(Config(), model={"d_model": 48, "n_layers": 3, "d_ff": 88}, data={"seq_len": 256})
    claim(tmp_path, run)
    config = load(spec, [files, "model.lora.rank=4", "data.seq_len=512"])
    start = config.train.init_from, config.data.tokenizer, config.data.seq_len, config.data.corpus
    assert start == (str(tmp_path), "bytes", 512, "chat")
    assert config.model == replace(run, model={"lora": {"rank": 4}}).model
    assert resolve(config).n_steps > 20
    (tmp_path / "tokenizer.json").write_text(train_bpe(["ab ab ab ab abc"], 259))
    assert load(spec, [files]).data.tokenizer == str(tmp_path / "tokenizer.json")
    with pytest.raises(BadInput, match="files go with corpus 'text' or 'chat'"):
        load(spec)


@pytest.mark.parametrize("path", sorted({spec.partition(":")[0] for spec in SHIPPED}))
def test_refuses_an_unknown_argument_in_one_line(path):
    with pytest.raises(BadInput) as refused:
        load(f"{path}:nonsense")
    assert "\n" not in str(refused.value)
    assert "takes no argument" in str(refused.value) or "'nonsense': must be one of" in str(
        refused.value
    )


@pytest.mark.parametrize("spec", STATED)
def test_has_the_size_that_its_docstring_states(spec):
    config = load(spec)
    count = arithmetic.parameters(config.model, config.data.seq_len)
    flops = arithmetic.training_flops(config.model, config.data.seq_len, config.train.tokens)
    stored, params, stated_flops = STATED[spec]
    assert count.total == pytest.approx(stored, rel=1e-3)
    assert count.blocks_and_head == pytest.approx(params, rel=1e-3)
    assert flops == pytest.approx(stated_flops, rel=2e-3)


@pytest.mark.parametrize("spec", PUBLISHED_EXPERTS)
def test_mixtures_of_experts_have_the_published_sizes(spec):
    """Switch's are two stacks with cross-attention, of which ours is one without (to 6 %)."""
    config = load(spec)
    count = arithmetic.parameters(config.model, config.data.seq_len)
    total, active = PUBLISHED_EXPERTS[spec]
    assert count.total == pytest.approx(total, rel=0.06 if "switch" in spec else 3e-3)
    if active:
        assert count.active == pytest.approx(active, rel=0.011)
        stated = f"{count.active / 1e9:.2f}e9"
        assert stated in Path(spec.partition(":")[0]).read_text()


def test_the_tiny_mixtral_costs_what_the_tiny_decoder_does():
    """But for its routers: 2 layers x 32 x 8 weights, 6 FLOPs each."""
    dense, experts = (load(f"configs/{name}").model for name in ("tiny.py", "mixtral.py:tiny"))
    difference = arithmetic.flops_per_token(experts, 128) - arithmetic.flops_per_token(dense, 128)
    assert difference == 6 * 2 * 32 * 8


def test_chinchilla_is_the_papers_70_billion_with_its_relative_positions():
    model = load("configs/chinchilla.py").model
    count = arithmetic.parameters(model)
    assert count.total + count.attention / 4 == pytest.approx(70e9, rel=2e-3)


def test_chinchilla_has_every_shape_of_table_a9():
    path = PUBLISHED / "chinchilla_tableA9_shapes.csv"
    if not path.exists():
        pytest.skip("Table A9 is not here; set LM_PUBLISHED_RUNS")
    names = ("d_model", "ffw_size", "kv_size", "n_heads", "n_layers")
    published = [
        (int(row["params"]) // 10**6, *(int(row[name]) for name in names))
        for row in csv.DictReader(path.open())
    ]
    assert list(runpy.run_path("configs/chinchilla.py")["TABLE_A9"]) == published
    assert list(load("configs/isoflop_tpu.py").sweep.shapes) == [row[1:] for row in published]


def test_isoflop_tpu_spans_1e18_to_1e21_and_starts_within_its_shapes():
    sweep, shorter = load("configs/isoflop_tpu.py").sweep, load("configs/isoflop_tpu.py:1e20").sweep
    assert (sweep.budgets[0], sweep.budgets[-1]) == (1e18, 1e21)
    assert shorter.budgets == sweep.budgets[:7] and shorter.budgets[-1] == 1e20
    sizes = [
        arithmetic.parameters(load(f"configs/chinchilla.py:{name}").model).blocks_and_head
        for name in ("44m", "16183m")
    ]
    assert sizes[0] < sweep.first_optimum < sizes[1]


def test_isoflop_gpu_differs_from_its_namesake_on_tpus_in_what_the_machine_asks_for_alone():
    gpu, tpu = load("configs/isoflop_gpu.py"), load("configs/isoflop_tpu.py:1e20")
    told = {text.partition(":")[0] for text in differences(to_dict(tpu), to_dict(gpu), "")}
    assert told == {".name", ".model.remat", ".train.accumulation", ".mesh.zero"}


@pytest.mark.parametrize(
    "spec, chip, chips, slices",
    [
        ("configs/isoflop_tpu.py", "v5p", 256, "v5p:4x8x8"),
        ("configs/isoflop_tpu.py:1e20", "v5e", 8, "v5e:2x4"),
        ("configs/isoflop_gpu.py", "h100", 8, None),
    ],
)
def test_a_study_costs_what_its_docstring_states(spec, chip, chips, slices):
    path = spec.partition(":")[0]
    text = " ".join(runpy.run_path(path)["__doc__"].split())
    config = load(spec)
    cost = training(config, chip, chips, mfu=0.4)
    budgets, hours = cost["budgets"], float(f"{cost['chip_hours']:.3g}")
    expected = [f"{cost['runs']} runs", plain(cost["flops"], 2), plain(PEAK_FLOPS[chip], 2)]
    expected += [f"{cost['days']:.2g} days", f"{hours:,.0f} chip-hours", "at 40 % of"]
    expected += [plain(budgets[end]["params"][end], 2) for end in (0, -1)]
    if slices:
        by_roofline = training(config, chip, chips, topology(slices))
        assert all(budget["fits"] for budget in by_roofline["budgets"])
        expected += [f"{by_roofline['days']:.2g} days", plain(budgets[-1]["tokens"][1], 1)]
        if spec == path:
            for budget in (by_roofline["budgets"][0], by_roofline["budgets"][-1]):
                mfu = budget["flops"] / (budget["seconds"] * chips * PEAK_FLOPS[chip])
                expected.append(f"{100 * mfu:.0f} %")
    else:
        expected.append(f"{budgets[-1]['bytes_per_chip'] / 1e9:.0f} GB")
    assert [part for part in expected if part not in text] == []


def plain(x, digits):
    """As 1.9e21 or 4e7."""
    return f"{x:.{digits}e}".replace("e+", "e").replace("e0", "e")
