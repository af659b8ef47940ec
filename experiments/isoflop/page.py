"""The full study's own sections of report.html, after those that lm.report writes of any study."""

from lm.report import html
from lm.report.html import cell
from lm.report.notation import count, decimal, interval, power


def sections(summary: dict, figures: dict[str, str]) -> list[str]:
    """HTML of ``summary.json``'s parts, each with its figure."""
    smaller = summary["over_training"]
    return [
        _held_out(summary["held_out"], figures["held_out"]),
        _ladder(summary["ladder"], figures["ladder"]),
        _elsewhere(summary["elsewhere"], figures["exponents"]),
        _over_training(smaller, figures["over_training"]) if smaller else "",
        _estimators(summary["estimators"]),
        _forms(summary["forms"]),
        _trust(summary),
    ]


def _held_out(found: dict, figure: str) -> str:
    line, law, seen = found["isoflop"], found["parametric"], found["observed"]
    rows = [
        ("N<sub>opt</sub>, Approach 2", count(line["params"]),
         f"({count(line['interval95'][0])}, {count(line['interval95'][1])})",
         count(seen["params"]), _off(line["params"], seen)),
        ("N<sub>opt</sub>, Approach 3", count(law["params"]), "",
         count(seen["params"]), _off(law["params"], seen)),
        ("lowest loss, Approach 3", decimal(law["loss"]), interval(law["loss_interval95"]),
         decimal(seen["loss"]), f"{100 * law['loss_error']:+.2f} %"),
    ]  # fmt: skip
    return (
        f"<h2>{power(found['flops'])} FLOPs, foreseen from the budgets below</h2>"
        + html.figure(figure, "The top budget's runs, which what is foreseen was not fitted to.")
        + _table(("", "foreseen", "95 %", "observed", "off by"), rows)
    )


def _off(params: float, seen: dict) -> str:
    by_parabola, by_akima = params / seen["params"], params / seen["akima_params"]
    return f"factor {by_parabola:.2f} (by Akima’s minimum {by_akima:.2f})"


def _ladder(rows: list[dict], figure: str) -> str:
    cells = [
        (row["rung"], f"{row['params']}, {row['flops']}".replace("_", " "),
         decimal(row["a"]) if row["a"] else row["reason"], interval(row.get("interval95")),
         *(decimal(row[name]) for name in ("akima", "a_upper", "a_once", "porian2024")))
        for row in rows
    ]  # fmt: skip
    caption = (
        "Approach 2 on the four lower budgets. Above, one of Kaplan’s settings at a time; below,"
        " all of them, then one after the other undone, beside Porian et al. 2024 (RefinedWeb)."
    )
    head = ("", "N, C", "a", "95 %", "by Akima", "without 10¹¹", "without repeats")
    return (
        "<h2>Why Kaplan’s exponent is another</h2>"
        + html.figure(figure, caption)
        + _table((*head, "Porian et al."), cells)
    )


def _elsewhere(rows: list[dict], figure: str) -> str:
    cells = [
        (row["name"], str(row["runs"]), decimal(row["a"]) if row["a"] else row["reason"],
         interval(row.get("interval80")), interval(row.get("interval95")))
        for row in rows
    ]  # fmt: skip
    caption = "The exponents of this study beside the published ones; 80 % thick, 95 % thin."
    return (
        "<h2>Another corpus, another tokenizer</h2>"
        + html.figure(figure, caption)
        + _table(("", "runs", "a", "80 %", "95 %"), cells)
    )


def _over_training(rows: list[dict], figure: str) -> str:
    cells = [
        (count(row["params"]), f"{row['times_smaller']:.2f}",
         decimal(row["cost"], 2) if row["cost"] else "beyond the runs",
         interval(row["interval95"], 2), decimal(row["cost_by_the_law"], 2))
        for row in rows
    ]  # fmt: skip
    caption = "Dotted: where a smaller model comes to the loss of the optimal one."
    head = ("parameters", "times smaller", "FLOPs over the optimal’s", "95 %", "by the law")
    return (
        "<h2>Smaller models at equal loss</h2>" + html.figure(figure, caption) + _table(head, cells)
    )


def _estimators(rows: list[dict]) -> str:
    cells = [
        (row["fit"], decimal(row["a"]), interval(row["interval80"]), interval(row["interval95"]))
        for row in rows
    ]
    return "<h2>The same runs, fitted in other ways</h2>" + _table(("", "a", "80 %", "95 %"), cells)


def _forms(rows: list[dict]) -> str:
    cells = [
        (row["form"].replace("_opt", "<sub>opt</sub>"), str(row["runs"]),
         f"{100 * row['rms_log_residual']:.2f} %", decimal(row["a"]), decimal(row["gamma"], 2),
         f"{100 * row['top_budget']:+.2f} %")
        for row in rows
    ]  # fmt: skip
    head = ("", "runs", "residual, rms", "a", "γ", "top budget foreseen")
    return "<h2>The form of the law</h2>" + _table(head, cells)


def _exponents(by_approach: dict[str, float]) -> str:
    return ", ".join(f"{name} {a:.3f}" for name, a in by_approach.items())


def _trust(summary: dict) -> str:
    scatter = ", ".join(f"{k}: {100 * v:.2f} %" for k, v in summary["seed_scatter"].items())
    once = _exponents({name: found["a"] for name, found in summary["without_repeats"].items()})
    budgets = ", ".join(
        f"{power(float(k))} {a:.3f}" for k, a in summary["without_each_budget"].items()
    )
    main = summary["cost"]["main"]
    facts = (
        f"Runs that differ in their seed alone scatter in loss by ({scatter} parameters).",
        f"Approach 2’s a without one of the budgets: {budgets}.",
        f"Residuals of Approach 3: {100 * summary['rms_log_residual']:.2f} % rms.",
        f"{len(summary['repeated'])} runs saw their corpus more than once; without them a: {once}.",
        "Without the run that was added to widen a budget (PROTOCOL.md, Amended) a: "
        f"{_exponents(summary['without_wider'])}.",
        f"The main sweep: {main['runs']} runs, {power(main['flops'])} FLOPs, {main['hours']:.2f}"
        f" hours; steps had {100 * main['goodput']:.0f} % of the runs’ time.",
    )
    items = "".join(f'<li class="fact">{fact}</li>' for fact in facts)
    return f'<h2>Noise, repeats, cost</h2>\n<ul class="flags">{items}</ul>'


def _table(head, rows) -> str:
    written = [html.row([f"<td>{first}</td>", *map(cell, others)]) for first, *others in rows]
    return html.table(head, written)
