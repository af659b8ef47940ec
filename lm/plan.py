"""Plans the next run: a law and a budget in, parameters, tokens, loss and a decoder out.

    python -m lm.plan --law=besiroglu2024 --flops=1e21
    python -m lm.plan --law=results/law.json:parametric --chips=64 --hours=72 --mfu=0.4 --json
    python -m lm.plan --law=sardana2024 --flops=3.7e23 --inference_tokens=2e12
    python -m lm.plan --law=muennighoff2023 --flops=1e21 --unique_tokens=1e10
    python -m lm.plan --tables
    python -m lm.plan --sweep --law=besiroglu2024 --flops=1e19 --half_width=0.02

LAW: hoffmann2022:envelope|isoflop|parametric, besiroglu2024, kaplan2020, llama3, muennighoff2023,
sardana2024, tokens_per_parameter:20, or a law.json of lm.fit (law.json:isoflop picks an approach).
"""

import json
import math
import sys
from dataclasses import replace

import numpy as np
from absl import flags

from lm import arithmetic, command
from lm.command import BadInput, one_of
from lm.hardware import PEAK_FLOPS
from lm.scaling.data_limited import MUENNIGHOFF2023
from lm.scaling.inference import lifetime_optimum
from lm.scaling.intervals import percentile_interval
from lm.scaling.parametric import ParametricLaw
from lm.scaling.published import NamedLaw, hoffmann_tables, models_table, named_law
from lm.scaling.sweep_design import plan_sweep

LARGEST = 1e35  # of any number given: far beyond use, and its powers stay finite
FAR_OUTSIDE = 10.0  # times the largest budget of a law's runs, or below the smallest by as much

FLAGS = flags.FlagValues()
flags.DEFINE_string("law", None, "the law to plan with, see above", flag_values=FLAGS)
flags.DEFINE_string("chip", "v5p", f"one of {', '.join(PEAK_FLOPS)}", flag_values=FLAGS)
flags.DEFINE_integer("vocab_size", 32_000, "of the decoder", flag_values=FLAGS)
flags.DEFINE_integer("seq_len", 2_048, "tokens a sequence", flag_values=FLAGS)
_RATE_RULES, _BATCH_RULES = ("kaplan2020", "porian2024", "step_law"), ("porian2024", "step_law")
for name, choices in (("learning_rate_rule", _RATE_RULES), ("batch_rule", _BATCH_RULES)):
    flags.DEFINE_string(name, "step_law", " | ".join(choices), flag_values=FLAGS)
for name, meaning in (
    ("json", "print JSON"),
    ("tables", "print Hoffmann's Tables 3 and A3 recomputed, and models' tokens per parameter"),
    ("sweep", "plan an isoFLOP sweep whose top budget is at most --flops"),
):
    flags.DEFINE_boolean(name, False, meaning, flag_values=FLAGS)
_POSITIVE = {
    "flops": (None, "training budget C in FLOPs"),
    "chips": (None, "number of chips: with --hours a budget"),
    "hours": (None, "wall-clock hours on --chips"),
    "mfu": (0.4, "model FLOPs utilisation, at most 1"),
    "peak_flops": (None, "FLOP/s of one chip, instead of --chip"),
    "dollars": (None, "budget in money, with --price_per_chip_hour"),
    "price_per_chip_hour": (None, "dollars; from you, never guessed"),
    "inference_tokens": (
        None,
        "tokens to serve: the model that is cheapest over its life and as good as the budget's",
    ),
    "unique_tokens": (None, "tokens there are: the best size and number of epochs"),
    "aspect_ratio": (100.0, "wanted d_model / n_layers"),
    "half_width": (0.02, "--sweep: wanted 95 % half-width of a"),
    "lowest_flops": (None, "--sweep: lowest budget; --flops / 300 where not given"),
    "noise": (0.003, "--sweep: relative noise of a loss"),
}
for name, (default, meaning) in _POSITIVE.items():
    flags.DEFINE_float(name, default, meaning, flag_values=FLAGS)


def main() -> int:
    _check_numbers()
    if FLAGS.tables:
        print(hoffmann_tables(), models_table(), sep="\n\n")
        return command.DONE
    if FLAGS.law is None:
        raise BadInput("--law is missing: a published law's name or a law.json, see --help")
    if FLAGS.sweep:
        return _sweep()
    flops, chips = budget()
    settings = ("inference_tokens", "unique_tokens", "vocab_size", "seq_len", "aspect_ratio")
    settings += ("learning_rate_rule", "batch_rule")
    result = plan(named_law(FLAGS.law), flops, **{name: FLAGS[name].value for name in settings})
    result["training"] = _training(result["flops"], chips)
    print(json.dumps(result, indent=2) if FLAGS.json else describe(result))
    return command.DONE


def _check_numbers() -> None:
    for name in (*_POSITIVE, "vocab_size", "seq_len"):
        value = FLAGS[name].value
        if value is not None and not 0 < value <= LARGEST:
            raise BadInput(f"--{name}={value:g}: must be above 0 and at most {LARGEST:g}")
    if FLAGS.mfu > 1:
        raise BadInput(f"--mfu={FLAGS.mfu:g}: is a share of the peak, above 0 and at most 1")
    one_of("--chip", FLAGS.chip, list(PEAK_FLOPS))
    one_of("--learning_rate_rule", FLAGS.learning_rate_rule, _RATE_RULES)
    one_of("--batch_rule", FLAGS.batch_rule, _BATCH_RULES)


def budget() -> tuple[float, float | None]:
    """(training FLOPs, chips or None) from the one budget that the flags give. Raises BadInput."""
    given = [name for name in ("flops", "hours", "dollars") if FLAGS[name].value is not None]
    if FLAGS.flops is not None and FLAGS.chips is not None:
        given = ["flops", "chips"]
    if len(given) > 1:
        raise BadInput(
            f"two budgets, --{' and --'.join(given)}: give one of --flops, "
            "--chips with --hours, --dollars with --price_per_chip_hour"
        )
    if FLAGS.flops is not None:
        return FLAGS.flops, None
    if FLAGS.dollars is not None:
        if FLAGS.price_per_chip_hour is None:
            raise BadInput("--dollars needs --price_per_chip_hour")
        return FLAGS.dollars / FLAGS.price_per_chip_hour * 3600 * _chip_flops(), FLAGS.chips
    if FLAGS.chips is None or FLAGS.hours is None:
        raise BadInput(
            "no budget: give --flops, or --chips with --hours, or --dollars with "
            "--price_per_chip_hour"
        )
    return FLAGS.chips * FLAGS.hours * 3600 * _chip_flops(), FLAGS.chips


def _chip_flops() -> float:
    """FLOP/s that one chip really gives to the model."""
    return FLAGS.mfu * (FLAGS.peak_flops or PEAK_FLOPS[FLAGS.chip])


def _training(flops: float, chips: float | None) -> dict:
    chip_days = flops / _chip_flops() / 86_400
    price = FLAGS.price_per_chip_hour
    return {
        "chip": "given by --peak_flops" if FLAGS.peak_flops else FLAGS.chip,
        "mfu": FLAGS.mfu,
        "chip_days": chip_days,
        "chips": chips,
        "days": chip_days / chips if chips else None,
        "dollars": chip_days * 24 * price if price else None,
    }


def plan(
    named: NamedLaw,
    flops: float,
    *,
    inference_tokens: float | None = None,
    unique_tokens: float | None = None,
    vocab_size: int = 32_000,
    seq_len: int = 2_048,
    aspect_ratio: float = 100.0,
    learning_rate_rule: str = "step_law",
    batch_rule: str = "step_law",
) -> dict:
    """The plan of one run as `--json` prints it, but for "training".

    What the law cannot give is None, and `reasons` says why. With `inference_tokens` the run has
    the loss of the compute-optimal one and costs least over its life; its own `flops` exceed the
    budget's. With `unique_tokens` repeated tokens count for less (Muennighoff's decay constants on
    the law given). Raises BadInput where the law has no loss to trade with, or for both at once.
    """
    law, extra, interval_of = named.law, {}, None
    if inference_tokens and unique_tokens:
        raise BadInput(
            "--inference_tokens and --unique_tokens: give one, no published law joins them"
        )
    if (inference_tokens or unique_tokens) and not isinstance(law, ParametricLaw):
        raise BadInput(
            f"law {named.name!r} has no L(N, D) to trade size against tokens with; use a parametric"
            " one, as hoffmann2022:parametric, besiroglu2024 or law.json:parametric"
        )
    if inference_tokens:
        usual = law.optimum(flops)
        best = lifetime_optimum(law, usual.loss, inference_tokens)
        usual_lifetime = flops + 2 * usual.params * inference_tokens
        extra = {
            "inference_tokens": inference_tokens,
            "lifetime_flops": float(best.lifetime_flops),
            "compute_optimal": {
                "params": float(usual.params),
                "tokens": float(usual.tokens),
                "flops": flops,
                "lifetime_flops": float(usual_lifetime),
            },
            "lifetime_saving": float(1 - best.lifetime_flops / usual_lifetime),
        }
    elif unique_tokens:
        limited = replace(MUENNIGHOFF2023, base=law)
        best = limited.optimum(flops, unique_tokens)
        extra = {
            "unique_tokens": unique_tokens,
            "epochs": max(1.0, float(best.tokens / unique_tokens)),
            "repetition": {
                "r_tokens": limited.r_tokens,
                "r_params": limited.r_params,
                "source": limited.source,
            },
        }

        def interval_of(draws):
            return replace(limited, base=draws).loss(best.params, best.tokens, unique_tokens)
    else:
        best = law.optimum(flops)

    reasons = {}
    loss = float(best.loss)
    if not math.isfinite(loss):
        loss, reasons["loss"] = None, named.no_loss
    interval = None
    if loss is not None and named.draws is not None:
        draws = ParametricLaw(*named.draws.T)
        losses = interval_of(draws) if interval_of else draws.loss(best.params, best.tokens)
        interval = list(percentile_interval(losses, 0.80))
        if not extra:
            drawn = draws.optimum(flops)
            extra["params_interval80"] = list(percentile_interval(drawn.params, 0.80))
            extra["tokens_interval80"] = list(percentile_interval(drawn.tokens, 0.80))
    else:
        reasons["loss_interval80"] = reasons.get("loss") or named.no_interval
    training_flops = float(best.flops)
    model, sizes = decoder_shape(
        float(best.params), vocab_size, named.params_counted, aspect_ratio, seq_len
    )
    sequences, rate = _batch_and_rate(
        sizes, float(best.tokens), seq_len, learning_rate_rule, batch_rule
    )
    return {
        "schema": 1,
        "params": float(best.params),
        "tokens": float(best.tokens),
        "flops": training_flops,
        "tokens_per_parameter": float(best.tokens / best.params),
        "loss": loss,
        "loss_interval80": interval,
        "law": named.name,
        "source": named.source,
        "params_counted": named.params_counted,
        "warnings": _warnings(named, training_flops, float(best.params), sizes),
        "reasons": reasons,
        **extra,
        "config": {
            "model": model,
            "data": {"seq_len": seq_len},
            "optimizer": {"learning_rate": rate, "learning_rate_rule": "fixed"},
            "train": {"tokens": float(best.tokens), "batch_tokens": float(sequences * seq_len)},
        },
        "config_params": sizes,
        "steps": math.ceil(float(best.tokens) / (sequences * seq_len)),
        "rules": {
            "shape": f"d_model / n_layers near {aspect_ratio:g}, d_ff 8/3 d_model, SwiGLU",
            "learning_rate": learning_rate_rule,
            "batch": batch_rule,
        },
    }


def decoder_shape(
    params: float,
    vocab_size: int,
    counted: str = "total",
    aspect_ratio: float = 100.0,
    seq_len: int = 2_048,
) -> tuple[dict, dict]:
    """(model settings, exact parameter counts) of the decoder nearest to `params`.

    Rule: head width 128 from d_model 1024 up (64 from 256, else 16), d_model in multiples of it and
    of 512 from 4096 up, d_ff = 8/3 d_model up to a multiple of 64, and among the depths and widths
    within 2 % of `params` the one nearest to `aspect_ratio`; the nearest in size where none is
    within 2 %. `counted`: total, non_embedding, blocks_and_head, or effective, to which
    `seq_len` matters.
    """
    steps = ((16, 256, 16), (256, 1024, 64), (1024, 4096, 128), (4096, 65_537, 512))
    width = np.concatenate([np.arange(*step) for step in steps])
    d_model, n_layers = (x.ravel() for x in np.meshgrid(width, np.arange(1, 257)))
    head_width = np.select([d_model >= 1024, d_model >= 256], [128, 64], 16)
    settings = {
        "vocab_size": np.full_like(d_model, vocab_size),
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": d_model // head_width,
        "n_kv_heads": d_model // head_width,
        "head_width": head_width,
        "d_ff": -(-8 * d_model // 192) * 64,
    }
    columns = arithmetic.model_columns(**settings)
    count = arithmetic.parameters(columns)
    sizes = {n: getattr(count, n) for n in ("total", "blocks_and_head", "non_embedding")}
    if counted not in sizes:
        sizes["effective"] = arithmetic.effective_parameters(columns, seq_len)
    miss = np.abs(np.log(sizes[counted] / params))
    off_aspect = np.abs(np.log(d_model / n_layers / aspect_ratio))
    best = int(np.argmin(np.where(miss <= 0.02, off_aspect, 1e3 + miss)))
    model = {name: int(values[best]) for name, values in settings.items()} | {
        "feed_forward": "swiglu"
    }
    return model, {n: int(np.broadcast_to(size, miss.shape)[best]) for n, size in sizes.items()}


def _batch_and_rate(
    sizes: dict, tokens: float, seq_len: int, learning_rate_rule: str, batch_rule: str
):
    """Sequences a step and peak learning rate. Porian's N has the head, the others' has not."""

    def n(rule: str) -> float:
        return sizes["blocks_and_head" if rule == "porian2024" else "non_embedding"]

    batch = arithmetic.batch_tokens(batch_rule, 1.0, n(batch_rule), tokens)
    rate = arithmetic.learning_rate(learning_rate_rule, 1.0, n(learning_rate_rule), tokens, 1, 1)
    return int(arithmetic.round_batch(batch / seq_len)), float(rate)


def _warnings(named: NamedLaw, flops: float, params: float, sizes: dict) -> list[str]:
    warnings = []
    if named.flags:
        warnings.append(f"the fit of {named.name} was flagged: {', '.join(named.flags)}")
    if named.flops_range is not None:
        low, high = named.flops_range
        if flops > FAR_OUTSIDE * high:
            warnings.append(
                f"extrapolation: {flops:.3g} FLOPs is {flops / high:.3g} times the largest budget"
                f" ({high:.3g}) behind {named.name}"
            )
        elif flops < low / FAR_OUTSIDE:
            warnings.append(
                f"extrapolation: {flops:.3g} FLOPs is {low / flops:.3g} times below the smallest"
                f" budget ({low:.3g}) behind {named.name}"
            )
    if (
        isinstance(named.law, ParametricLaw)
        and named.flops_counted in arithmetic.FLOPS_CONVENTIONS[1:]
    ):
        warnings.append(
            f"the runs behind {named.name} count FLOPs as {named.flops_counted!r}; this plan spends"
            " 6 N D, which its L(N, D) trades"
        )
    got = sizes[named.params_counted]
    if abs(math.log(got / params)) > 0.02:
        warnings.append(
            f"no decoder of this rule and vocabulary has {params:.4g} parameters"
            f" ({named.params_counted}); the nearest has {got:.4g}"
        )
    return warnings


def describe(result: dict) -> str:
    """The plan as text, one fact a line."""
    reasons, training, config = result["reasons"], result["training"], result["config"]
    model, optimizer, rules = config["model"], config["optimizer"], result["rules"]
    loss = result["loss"]

    def interval(name: str, digits: str) -> str:
        low, high = result[name]
        return f"80 %: {low:{digits}} to {high:{digits}}"

    rows = [
        ("law", f"{result['law']} ({result['source']})"),
        ("training FLOPs", f"{result['flops']:.4g}"),
        ("parameters", f"{result['params']:.4g} ({result['params_counted']})"),
        ("tokens", f"{result['tokens']:.4g}"),
        ("tokens per parameter", f"{result['tokens_per_parameter']:.4g}"),
    ]
    if "params_interval80" in result:
        rows.insert(3, ("", interval("params_interval80", ".4g")))
        rows.insert(5, ("", interval("tokens_interval80", ".4g")))
    rows += [
        ("expected loss", f"{loss:.4f} nats per token" if loss
         else f"not given: {reasons['loss']}"),
        ("", interval("loss_interval80", ".4f") if result["loss_interval80"]
         else f"80 %: not given: {reasons['loss_interval80']}"),
    ]  # fmt: skip
    if "epochs" in result:
        rows.append(("epochs", f"{result['epochs']:.3g} of {result['unique_tokens']:.4g} tokens"))
    if "lifetime_flops" in result:
        usual = result["compute_optimal"]
        saving = f"{100 * result['lifetime_saving']:.1f} % less than the compute-optimal model's"
        rows += [
            ("tokens served", f"{result['inference_tokens']:.4g}"),
            ("lifetime FLOPs", f"{result['lifetime_flops']:.4g}, {saving}"),
            ("  instead of", f"{usual['params']:.4g} parameters, {usual['tokens']:.4g} tokens"),
        ]
    heads = f"{model['n_heads']} heads of {model['head_width']}"
    rows += [
        ("decoder", f"d_model {model['d_model']}, {model['n_layers']} layers, {heads}"),
        ("  and", f"d_ff {model['d_ff']}, vocabulary {model['vocab_size']}; {rules['shape']}"),
        ("  has", ", ".join(f"{n:,} {name}" for name, n in result["config_params"].items())),
        ("batch", f"{config['train']['batch_tokens']:,.0f} tokens ({rules['batch']})"),
        ("steps", f"{result['steps']:,}"),
        ("learning rate", f"{optimizer['learning_rate']:.3g} ({rules['learning_rate']})"),
        ("chip-days", f"{training['chip_days']:.4g} ({training['chip']}, MFU {training['mfu']:g})"),
    ]
    if training["days"]:
        rows.append(("days", f"{training['days']:.4g} on {training['chips']:g} chips"))
    if training["dollars"]:
        rows.append(("dollars", f"{training['dollars']:,.0f}"))
    rows += [("warning", text) for text in result["warnings"]]
    return "\n".join(f"{label:<22}{text}" for label, text in rows)


def _sweep() -> int:
    named = named_law(FLAGS.law)
    if not isinstance(named.law, ParametricLaw):
        raise BadInput(
            f"--sweep simulates losses; law {named.name!r} has none (use a parametric law)"
        )
    if FLAGS.flops is None:
        raise BadInput("--sweep needs --flops, the highest budget of one run")
    lowest = FLAGS.lowest_flops or FLAGS.flops / 300
    if lowest > FLAGS.flops / 10:
        raise BadInput(
            f"--lowest_flops={lowest:g}: must be a tenth of --flops={FLAGS.flops:g} or less"
        )
    best, tried = plan_sweep(named.law, lowest, FLAGS.flops, FLAGS.half_width, noise=FLAGS.noise)
    shown = best or min(tried, key=lambda design: design.half_width)
    finite = math.isfinite(shown.half_width)  # not so where most simulated sweeps are refused
    result = {"schema": 1, "law": named.name, "reached": best is not None, "runs": shown.runs}
    result |= {"wanted_half_width": FLAGS.half_width, "designs_tried": len(tried)}
    result |= shown._asdict() | {
        "half_width": shown.half_width if finite else None,
        "bias": shown.bias if finite else None,
        "budgets": shown.budgets.tolist(),
        "params": [[float(n / 6), float(n * 6)] for n in named.law.optimum(shown.budgets).params],
    }
    if FLAGS.json:
        print(json.dumps(result, indent=2))
        return command.DONE
    head = "cheapest sweep" if best else "NOT REACHED; the most precise tried"
    print(
        f"{head}: 95 % half-width of a {shown.half_width:.4f} (wanted {FLAGS.half_width:g}), bias"
        f" {shown.bias:+.4f}, {len(tried)} designs simulated with {FLAGS.noise:g} noise"
    )
    print(
        f"{shown.runs} runs of {shown.sizes} sizes a budget, {shown.total_flops:.3g} FLOPs in all"
    )
    for flops, (low, high) in zip(shown.budgets, result["params"], strict=True):
        print(f"  {flops:.3g} FLOPs: {low:.3g} to {high:.3g} parameters")
    return command.DONE


if __name__ == "__main__":
    sys.exit(command.run(main, FLAGS, __doc__))
