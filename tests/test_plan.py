import json
from dataclasses import replace

import numpy as np
import pytest

from lm import arithmetic, plan
from lm.command import run
from lm.config import Config, ModelConfig, from_config_dict
from lm.scaling.data_limited import MUENNIGHOFF2023
from lm.scaling.inference import SARDANA2024, flops_for_loss
from lm.scaling.parametric import BESIROGLU2024, ParametricLaw


def command(capsys, *flags):
    """(exit code, stdout, stderr) of `python -m lm.plan FLAGS`."""
    code = run(plan.main, plan.FLAGS, plan.__doc__, ["lm.plan", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def planned(capsys, *flags):
    code, out, err = command(capsys, *flags, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def law_json(tmp_path):
    rng = np.random.default_rng(0)
    law = BESIROGLU2024
    centre = np.array([law.E, law.A, law.B, law.alpha, law.beta])
    draws = centre * np.exp(rng.normal(0, 0.002, (1000, 5)))
    path = tmp_path / "law.json"
    constants = dict(zip(("E", "A", "B", "alpha", "beta"), centre, strict=True))
    isoflop = {"a": 0.5, "b": 0.5, "k_N": 0.1, "k_D": 1.6, "flags": ["a", "b"]}
    approaches = {"parametric": constants | {"draws": draws.tolist()}, "isoflop": isoflop}
    path.write_text(json.dumps({"approaches": approaches, "flops_range": [1e18, 1e21]}))
    return path, draws


def test_twenty_tokens_a_parameter_is_exact_and_says_why_there_is_no_loss(capsys):
    result = planned(capsys, "--law=tokens_per_parameter:20", "--flops=1.2e24")
    assert (result["params"], result["tokens"], result["flops"]) == (1e11, 2e12, 1.2e24)
    assert result["tokens_per_parameter"] == 20
    assert result["loss"] is None and result["loss_interval80"] is None
    assert "not a law of loss" in result["reasons"]["loss"]


def test_hoffmanns_unrounded_constants_give_59_tokens_a_parameter(capsys):
    result = planned(capsys, "--law=hoffmann2022:parametric", "--flops=5.88e23")
    assert result["tokens_per_parameter"] == pytest.approx(59.0, abs=0.05)
    assert result["loss"] == pytest.approx(1.9177, abs=1e-4)
    assert "no joint draws" in result["reasons"]["loss_interval80"]


@pytest.mark.parametrize(
    "law", ["hoffmann2022:envelope", "hoffmann2022:isoflop", "kaplan2020", "llama3"]
)
def test_every_named_law_plans_a_whole_run(capsys, law):
    result = planned(capsys, f"--law={law}", "--flops=1e21")
    assert 6 * result["params"] * result["tokens"] == pytest.approx(1e21)
    assert result["config"]["optimizer"]["learning_rate"] > 0
    assert (result["loss"] is None) == (law != "kaplan2020")
    code, out, _ = command(capsys, f"--law={law}", "--flops=1e21")
    assert code == 0 and "tokens per parameter" in out


def test_sardanas_case_from_the_command_line(capsys):
    flops = float(flops_for_loss(SARDANA2024, 1.947))
    result = planned(capsys, "--law=sardana2024", f"--flops={flops!r}", "--inference_tokens=2e12")
    assert result["params"] == pytest.approx(2.418e10, rel=2e-4)
    assert result["tokens"] == pytest.approx(2.657e12, rel=2e-4)
    assert result["loss"] == pytest.approx(1.947)
    assert result["lifetime_saving"] == pytest.approx(1 - 0.9522, abs=5e-5)
    assert result["flops"] == pytest.approx(6 * result["params"] * result["tokens"])
    assert result["compute_optimal"]["flops"] == flops


def test_unique_tokens_are_repeated_and_many_change_nothing(capsys):
    few = planned(capsys, "--law=muennighoff2023", "--flops=1e21", "--unique_tokens=1e9")
    best = MUENNIGHOFF2023.optimum(1e21, 1e9)
    assert few["params"] == pytest.approx(float(best.params))
    assert few["epochs"] == pytest.approx(few["tokens"] / 1e9)
    many = planned(capsys, "--law=muennighoff2023", "--flops=1e21", "--unique_tokens=1e13")
    plain = planned(capsys, "--law=muennighoff2023", "--flops=1e21")
    assert many["params"] == pytest.approx(plain["params"], rel=1e-6) and many["epochs"] == 1


def test_interval_is_that_of_the_joint_draws(capsys, law_json):
    path, draws = law_json
    result = planned(capsys, f"--law={path}", "--flops=1e20")
    assert result["law"] == "law.json:parametric"
    losses = ParametricLaw(*draws.T).loss(result["params"], result["tokens"])
    assert result["loss_interval80"] == pytest.approx(list(np.quantile(losses, [0.1, 0.9])))
    low, high = result["loss_interval80"]
    assert low < result["loss"] < high
    drawn = ParametricLaw(*draws.T).optimum(1e20).params
    assert result["params_interval80"] == pytest.approx(list(np.quantile(drawn, [0.1, 0.9])))

    limited = planned(capsys, f"--law={path}", "--flops=1e20", "--unique_tokens=1e8")
    law = replace(MUENNIGHOFF2023, base=ParametricLaw(*draws.T))
    losses = law.loss(limited["params"], limited["tokens"], 1e8)
    assert limited["loss_interval80"] == pytest.approx(list(np.quantile(losses, [0.1, 0.9])))


def test_another_approach_of_the_file_is_selectable(capsys, law_json):
    result = planned(capsys, f"--law={law_json[0]}:isoflop", "--flops=1e20")
    assert (result["params"], result["tokens"]) == pytest.approx((1e9, 1.6e10))
    assert result["loss"] is None and "not a loss" in result["reasons"]["loss"]


@pytest.mark.parametrize("counted", ["non_embedding", "effective", "blocks_and_head", "total"])
def test_the_decoder_is_counted_as_the_laws_table_counted(capsys, law_json, counted):
    path, _ = law_json
    content = json.loads(path.read_text())
    content["accounting"] = {"params": counted, "flops": "exact"}
    path.write_text(json.dumps(content))
    result = planned(capsys, f"--law={path}", "--flops=1e19", "--seq_len=4096")
    assert result["params_counted"] == counted
    assert result["config_params"][counted] == pytest.approx(result["params"], rel=0.02)
    model = ModelConfig(**result["config"]["model"])
    effective = arithmetic.effective_parameters(model, 4096)
    assert result["config_params"].get("effective", effective) == pytest.approx(effective, rel=1e-6)
    assert any("count FLOPs as 'exact'" in text for text in result["warnings"])


def test_extrapolation_and_the_fits_doubts_are_said(capsys, law_json):
    path, _ = law_json
    assert planned(capsys, f"--law={path}", "--flops=1e21")["warnings"] == []
    (doubt,) = planned(capsys, f"--law={path}:isoflop", "--flops=1e21")["warnings"]
    assert doubt.endswith("flagged: a, b")
    (far,) = planned(capsys, f"--law={path}", "--flops=1e24")["warnings"]
    assert "1e+03 times the largest budget (1e+21)" in far
    (near,) = planned(capsys, f"--law={path}", "--flops=1e16", "--vocab_size=256")["warnings"]
    assert "below the smallest budget (1e+18)" in near
    assert "warning" in command(capsys, f"--law={path}", "--flops=1e24")[1]


def test_chips_hours_and_dollars_are_budgets(capsys):
    by_time = planned(capsys, "--law=besiroglu2024", "--chips=64", "--hours=72", "--mfu=0.5",
                      "--peak_flops=1e15", "--price_per_chip_hour=2")  # fmt: skip
    assert by_time["flops"] == pytest.approx(64 * 72 * 3600 * 0.5 * 1e15)
    assert by_time["training"]["days"] == pytest.approx(3)
    assert by_time["training"]["dollars"] == pytest.approx(64 * 72 * 2)
    by_money = planned(capsys, "--law=besiroglu2024", "--dollars=9216", "--price_per_chip_hour=2",
                       "--mfu=0.5", "--peak_flops=1e15")  # fmt: skip
    assert by_money["flops"] == pytest.approx(by_time["flops"])
    assert by_money["training"]["days"] is None
    named = planned(capsys, "--law=besiroglu2024", "--chips=1", "--hours=1", "--chip=h100")
    assert named["flops"] == pytest.approx(3600 * 0.4 * 989e12)


@pytest.mark.parametrize("params", [3e6, 7e7, 1.3e9, 7e10, 4e11])
def test_decoder_shape_is_near_and_its_count_is_exact(params):
    for counted in ("total", "non_embedding", "blocks_and_head"):
        model, sizes = plan.decoder_shape(params, 8000, counted)
        assert sizes[counted] == pytest.approx(params, rel=0.02)
        count = arithmetic.parameters(ModelConfig(**model))
        assert {name: getattr(count, name) for name in sizes} == sizes
        assert model["n_heads"] * model["head_width"] == model["d_model"]
        assert model["d_ff"] >= 8 / 3 * model["d_model"] > model["d_ff"] - 64
        if params > 5e7:
            assert 70 < model["d_model"] / model["n_layers"] < 140


def test_a_vocabulary_larger_than_the_model_is_said(capsys):
    result = planned(capsys, "--law=besiroglu2024", "--flops=2e15", "--vocab_size=4000000")
    assert any("no decoder of this rule" in text for text in result["warnings"])


def test_config_is_one_that_training_accepts_and_rules_are_the_named_ones(capsys):
    rules = ("--learning_rate_rule=porian2024", "--batch_rule=porian2024")
    result = planned(capsys, "--law=besiroglu2024", "--flops=1e20", *rules)
    config = from_config_dict(result["config"])
    assert isinstance(config, Config)
    n = result["config_params"]["blocks_and_head"]
    assert config.optimizer.learning_rate == pytest.approx(3.7 * n**-0.36)
    assert config.train.batch_tokens == pytest.approx(0.7576 * n**0.703, rel=0.25)
    assert config.train.batch_tokens % config.data.seq_len == 0
    assert result["steps"] == pytest.approx(config.train.tokens / config.train.batch_tokens, abs=1)
    default = planned(capsys, "--law=besiroglu2024", "--flops=1e20")
    n, d = default["config_params"]["non_embedding"], default["tokens"]
    rate = default["config"]["optimizer"]["learning_rate"]
    assert rate == pytest.approx(1.79 * n**-0.713 * d**0.307)


def test_tables_are_printed_with_their_misprints(capsys):
    code, out, _ = command(capsys, "--tables")
    assert code == 0 and out.count("MISPRINT") == 4
    assert "Table 3" in out and "Table A3" in out


def test_a_sweep_is_planned_from_a_prior_law(capsys):
    flags = ("--sweep", "--law=besiroglu2024", "--flops=1e18", "--lowest_flops=1e17")
    result = planned(capsys, *flags, "--half_width=0.2")
    assert result["reached"] and 0 < result["half_width"] <= 0.2
    assert result["runs"] == len(result["budgets"]) * result["sizes"]
    assert (result["budgets"][0], result["budgets"][-1]) == pytest.approx((1e17, 1e18))
    for flops, (low, high) in zip(result["budgets"], result["params"], strict=True):
        best = float(BESIROGLU2024.optimum(flops).params)
        assert (low, high) == pytest.approx((best / 6, best * 6))
    code, out, _ = command(capsys, *flags, "--half_width=0.2")
    assert code == 0 and "cheapest sweep" in out and out.count("parameters") == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--flops=1e21", "--law is missing"),
        ("--law=besiroglu2024", "no budget"),
        ("--law=besiroglu2024 --flops=-1", "--flops=-1: must be above 0"),
        ("--law=besiroglu2024 --flops=inf", "--flops=inf"),
        ("--law=besiroglu2024 --flops=nan", "--flops=nan"),
        ("--law=besiroglu2024 --flops=1e60", "at most 1e+35"),
        ("--law=besiroglu2024 --flops=much", "--flops=much"),
        ("--law=besiroglu --flops=1e20", "did you mean 'besiroglu2024'"),
        ("--law=besiroglu2024 --flops=1e21 --chips=8", "two budgets, --flops and --chips"),
        ("--law=besiroglu2024 --flops=1e21 --dollars=8", "two budgets, --flops and --dollars"),
        ("--law=besiroglu2024 --chips=8", "no budget"),
        ("--law=besiroglu2024 --dollars=8", "--dollars needs --price_per_chip_hour"),
        ("--law=besiroglu2024 --flops=1e21 --mfu=40", "--mfu=40"),
        ("--law=besiroglu2024 --flops=1e21 --chip=v9", "--chip"),
        ("--law=besiroglu2024 --flops=1e21 --vocab_size=0", "--vocab_size=0"),
        ("--law=besiroglu2024 --flops=1e21 --batch_rule=steplaw", "did you mean 'step_law'"),
        ("--law=llama3 --flops=1e21 --inference_tokens=1e9", "has no L(N, D)"),
        ("--law=kaplan2020 --flops=1e21 --unique_tokens=1e9", "has no L(N, D)"),
        ("--law=besiroglu2024 --flops=1e21 --unique_tokens=1e9 --inference_tokens=1e9", "give one"),
        ("--law=kaplan2020 --flops=1e25 --learning_rate_rule=kaplan2020", "reaches zero"),
        ("--law=besiroglu2024 --flops=1e21 --flosp=1", "did you mean 'flops'"),
        ("--law=absent.json --flops=1e21", "absent.json: cannot be read"),
        ("--sweep --law=llama3 --flops=1e19", "has none"),
        ("--sweep --law=besiroglu2024", "needs --flops"),
        ("--sweep --law=besiroglu2024 --flops=1e19 --lowest_flops=5e18", "a tenth"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_2(capsys, flags, message):
    code, out, err = command(capsys, *flags.split())
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_help_is_exit_0(capsys):
    code, out, _ = command(capsys, "--help")
    assert code == 0 and "--inference_tokens" in out
