"""What a config may hold, and the one line that each mistake in it becomes."""

import dataclasses
import json

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.command import BadInput
from lm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScalingConfig,
    SweepConfig,
    TrainConfig,
    differences,
    from_config_dict,
    read_config,
    replace,
    to_config_dict,
    to_dict,
)
from lm.config_file import load

FILE = """
from lm.config import Config, to_config_dict

def get_config():
    config = to_config_dict(Config())
    config.name = "mine"
    {line}
    return config
"""


@pytest.fixture
def write(tmp_path):
    def write(line="pass", text=None):
        path = tmp_path / "mine.py"
        path.write_text(FILE.format(line=line) if text is None else text)
        return str(path)

    return write


def refusal(call, *arguments, **named):
    with pytest.raises(BadInput) as refused:
        call(*arguments, **named)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_file_and_its_overrides(write):
    config = load(
        write("config.model.d_model = 32"),
        [
            "model.n_heads=8",
            "model.tied=true",
            "train.tokens=3e6",
            "data.seq_len=6.4e1",
            "optimizer.schedule=wsd",
            "sweep.budgets=1e11,3e11",
            "sweep.shapes=[(32, 88, 4, 8, 2)]",
            "name=2024",
            "model.n_heads=4",
            "model.rope_scaling.kind=ntk",
            "model.rope_scaling.factor=2",
        ],
    )
    assert (config.model.d_model, config.model.n_heads, config.model.head_width) == (32, 4, 8)
    assert config.model.tied is True and config.train.tokens == 3e6 and config.data.seq_len == 64
    assert isinstance(config.data.seq_len, int) and isinstance(config.train.tokens, float)
    assert config.optimizer.schedule == "wsd" and config.name == "2024"
    assert config.model.rope_scaling == RopeScalingConfig("ntk", 2.0)
    assert config.sweep.budgets == (1e11, 3e11) and config.sweep.shapes == ((32, 88, 4, 8, 2),)


@pytest.mark.parametrize(
    "override, says",
    [
        ("model.d_modle=3", "--config.model.d_modle: unknown key; did you mean 'model.d_model'"),
        ("d_model=3", "did you mean 'model.d_model'? (known: data, mesh, model, name,"),
        ("modle.d_model=3", "did you mean 'model.d_model'?"),
        ("model.d_model.x=3", "--config.model.d_model.x: unknown key"),
        ("model=3", "--config.model: a section; set one of attention_kernel"),
        ("model.rope_scaling=ntk", "a section; set one of attention_factor, factor, fast_turns"),
        ("model.moe.n_expert=3", "unknown key; did you mean 'model.moe.n_experts'"),
        ("model.tied", "must be written --config.model.tied=VALUE"),
        ("model.d_model=wide", "model.d_model = 'wide': must be of type int, not str"),
        ("model.d_model=3.5", "model.d_model = 3.5: must be of type int, not float"),
        ("model.d_model=True", "model.d_model = True: must be of type int, not bool"),
        ("model.tied=1", "model.tied = 1: must be of type bool, not int"),
        ("train.tokens=1e999", "train.tokens = inf: must be finite"),
        ("train.tokens=None", "train.tokens = None: must be of type float, not NoneType"),
        ("sweep.budgets=1e11", "sweep.budgets = 100000000000.0: must be a tuple"),
        ("sweep.budgets=1e11,x", "sweep.budgets = '1e11,x': must be a tuple"),
        ("sweep.shapes=((1, 2),)", "sweep.shapes[0] = (1, 2): must have 5 entries"),
        ("model.n_kv_heads=3", "must divide model.n_heads = 4, so one of 1, 2, 4"),
        ("optimizer.schedule=cosin", "must be one of cosine, wsd, constant; did you mean 'cosine'"),
    ],
)
def test_wrong_overrides_are_one_line(write, override, says):
    assert says in refusal(load, write(), [override])


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(:", "mine.py: SyntaxError: "),
        ("import lm_nowhere", "mine.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1", "mine.py: has no get_config()"),
        ("def get_config():\n    return 1 / 0", "mine.py, line 2: ZeroDivisionError"),
        ("def get_config():\n    raise SystemExit", "mine.py, line 2: SystemExit"),
        ("def get_config():\n    return {}", "must return a ConfigDict, not dict"),
        ("def get_config(size): pass", "needs an argument, as "),
        (FILE.format(line="config.model.d_modle = 3"), 'Did you mean "d_model" instead'),
        (FILE.format(line="config.model.d_model = 'x'"), "line 7: TypeError: Could not override"),
    ],
)
def test_wrong_files_are_one_line(write, text, says):
    assert says in " ".join(refusal_of_file(write(text=text)).split())


def refusal_of_file(path):
    with pytest.raises(BadInput) as refused:
        load(path)
    assert len(str(refused.value)) < 300
    return str(refused.value)


def test_missing_files_and_surplus_arguments(write, tmp_path, monkeypatch):
    assert "takes no argument" in refusal(load, write() + ":small")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").touch()
    monkeypatch.chdir(tmp_path)
    assert "no such file; here are configs/tiny.py" in refusal(load, "configs/tyni.py")


YARN = RopeScalingConfig("yarn", 2.0, 64)
NTK = RopeScalingConfig("ntk", 2.0)
LONGROPE = RopeScalingConfig("longrope", 2.0, 64, short_factors=(1.0,), long_factors=(2.0,))


@pytest.mark.parametrize(
    "kind, values, says",
    [
        (ModelConfig, dict(d_model=0), "model.d_model = 0: must be above 0"),
        (ModelConfig, dict(d_model=30), "model.n_heads = 4: must divide model.d_model = 30"),
        (ModelConfig, dict(n_kv_heads=8), "model.n_kv_heads = 8: must divide model.n_heads = 4"),
        (ModelConfig, dict(head_width=7), "model.head_width = 7: must be even"),
        (ModelConfig, dict(norm="batch"), "model.norm = 'batch': must be one of rms, layer"),
        (ModelConfig, dict(d_model=9, n_heads=1, n_kv_heads=1, position="sinusoidal"), "be even"),
        (ModelConfig, dict(sliding_window=-1), "model.sliding_window = -1: must be 0 or more"),
        (DataConfig, dict(corpus="text"), "files go with corpus 'text'"),
        (DataConfig, dict(files="*.txt"), "files go with corpus 'text'"),
        (DataConfig, dict(corpus="mixture"), "a mixture goes with corpus 'mixture'"),
        (DataConfig, dict(corpus="mixture", mixture=(("lm1b", 0.0),)), "weight of 'lm1b' = 0.0"),
        (OptimizerConfig, dict(beta2=1.0), "optimizer.beta2 = 1.0: must lie in [0, 1)"),
        (OptimizerConfig, dict(decay_fraction=2.0), "optimizer.decay_fraction = 2.0: must lie in"),
        (OptimizerConfig, dict(learning_rate_rule="mup"), "must be one of fixed, width,"),
        (OptimizerConfig, dict(learning_rate=0.0), "optimizer.learning_rate = 0.0: must be above"),
        (TrainConfig, dict(tokens=0.0), "train.tokens = 0.0: must be above 0"),
        (TrainConfig, dict(seed=2**32), "train.seed = 4294967296: must be below 2**32"),
        (TrainConfig, dict(accumulation=0), "train.accumulation = 0: must be above 0"),
        (TrainConfig, dict(batch_rule="step-law"), "did you mean 'step_law'"),
        (MeshConfig, dict(data=-1, model=-1), "only one axis can take what is left"),
        (MeshConfig, dict(model=0), "mesh.model = 0: must be at least 1, or -1"),
        (SweepConfig, dict(budgets=(2.0, 1.0)), "must be positive, ascending and different"),
        (SweepConfig, dict(widths=(12,)), "12 must be a multiple of sweep.head_width = 8"),
        (SweepConfig, dict(spread=1.0), "sweep.spread = 1.0: must be above 1"),
        (RopeScalingConfig, dict(kind="yarm"), "did you mean 'yarn'"),
        (RopeScalingConfig, dict(factor=0.5), "rope_scaling.factor = 0.5: must be 1 or more"),
        (
            RopeScalingConfig,
            dict(kind="yarn"),
            "rope_scaling.original_positions = 0: must be above",
        ),
        (RopeScalingConfig, dict(fast_turns=0.5), "must be above model.rope_scaling.slow_turns"),
        (ModelConfig, dict(rope_scaling=YARN, position="learned"), "so that must be 'rope'"),
        (ModelConfig, dict(rope_scaling=LONGROPE), "short_factors: must be 8 numbers above 0"),
        (ModelConfig, dict(rope_scaling=NTK, head_width=2), "must be above 2 under"),
        (Config, dict(model=ModelConfig(sliding_window=500)), "at most data.seq_len = 128"),
        (Config, dict(sweep=SweepConfig(branches=True)), "branches need 'wsd'"),
    ],
)
def test_impossible_settings_are_refused_by_name(kind, values, says):
    assert says in refusal(kind, **values)


def test_unknown_keys_and_types_of_a_plain_dict():
    assert "config.model.d_modle: unknown key; did you mean 'd_model'" in refusal(
        from_config_dict, {"model": {"d_modle": 3}}
    )
    assert "config.model = 3: must be a section (vocab_size" in refusal(
        from_config_dict, {"model": 3}
    )
    assert "config.data.mixture[0][1] = 'x': must be of type float" in refusal(
        from_config_dict, {"data": {"corpus": "mixture", "mixture": [["lm1b", "x"]]}}
    )


configs = st.builds(
    Config,
    name=st.text(max_size=5),
    model=st.builds(
        ModelConfig,
        d_model=st.sampled_from([32, 64]),
        n_heads=st.sampled_from([2, 4]),
        n_kv_heads=st.sampled_from([1, 2]),
        head_width=st.sampled_from([0, 8, 16]),
        tied=st.booleans(),
        position=st.sampled_from(["rope", "learned"]),
    ),
    train=st.builds(TrainConfig, tokens=st.floats(1, 1e12), seed=st.integers(0, 100)),
    sweep=st.builds(SweepConfig, budgets=st.sampled_from([(), (1e9,), (1e9, 1e12)])),
)


@settings(max_examples=30)
@given(configs)
def test_a_config_survives_its_dict_forms(config):
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(to_dict(config)) == config


@settings(max_examples=30)
@given(configs, st.sampled_from([48, 96]), st.integers(0, 9))
def test_replace_changes_what_it_is_told_and_what_follows(config, d_model, seed):
    changed = replace(config, model={"d_model": d_model}, train={"seed": seed}, name="other")
    follows = config.model.head_width * config.model.n_heads == config.model.d_model
    width = d_model // config.model.n_heads if follows else config.model.head_width
    expected = dataclasses.replace(config.model, d_model=d_model, head_width=width)
    assert changed.model == expected and changed.name == "other"
    assert changed.train == dataclasses.replace(config.train, seed=seed)
    assert (changed.data, changed.sweep) == (config.data, config.sweep)


def test_a_damaged_file_of_a_config_is_refused_naming_it(tmp_path):
    path, held = tmp_path / "config.json", {"schema": 1, "config": to_dict(Config())}
    path.write_text(json.dumps(held))
    assert read_config(path) == Config()
    for text, says in (
        (path.read_text()[:-9], "not JSON"),
        ("{}", "key 'config' is missing"),
        ('{"config": {"model": {"d_modle": 1}}}', "d_modle: unknown key; did you mean"),
    ):
        path.write_text(text)
        assert f"{path}: " in (told := refusal(read_config, path)) and says in told


def test_differences_name_each_changed_setting():
    old, new = Config(), replace(Config(), model={"d_model": 32, "n_kv_heads": 2}, name="other")
    assert list(differences(to_dict(old), to_dict(new))) == [
        "config.name: 'base' -> 'other'",
        "config.model.d_model: 64 -> 32",
        "config.model.n_kv_heads: 4 -> 2",
        "config.model.head_width: 16 -> 8",
    ]
    assert not list(differences(to_dict(old), to_dict(Config())))
    assert list(differences({"a": 1}, {"b": 2})) == ["config.a: 1 -> None", "config.b: None -> 2"]


def test_replace_refuses_unknown_settings():
    with pytest.raises(BadInput, match="config.model.d_modle: unknown key"):
        replace(Config(), model={"d_modle": 3})


def test_the_dict_form_is_locked():
    config = to_config_dict(Config())
    assert isinstance(config, ml_collections.ConfigDict)
    with pytest.raises(AttributeError):
        config.model.d_modle = 3
