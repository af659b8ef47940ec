"""What `lm.fit` prints: the exponents beside the published ones, and what to know of them."""

from rich.console import Console
from rich.table import Table

from lm.report.notation import count, decimal, interval, power
from lm.report.study import APPROACH_NAMES, TABLE_2, Study


def print_exponents(study: Study, console: Console) -> None:
    """The fitted exponents beside the rows of Chinchilla's Table 2; refusals, flags, comparison."""
    table = Table(title="N_opt ~ C^a, D_opt ~ C^b, with 80 % intervals", title_justify="left")
    for heading in ("", "a", "", "b", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, label in APPROACH_NAMES.items():
        if name in study.fits:
            _add(table, label, study.fits[name], style="bold")
        elif name in study.refused:
            table.add_row(label, "refused", style="yellow")
    table.add_section()
    for published in TABLE_2:
        _add(table, published.label, published)
    console.print(table)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    for name, reason in study.refused.items():
        say(f"[yellow]{name} refused[/] {reason}")
    for name, fit in study.fits.items():
        if fit.flags:
            say(f"[yellow]{name} flagged[/] {', '.join(fit.flags)}")
    if study.runs.excluded:
        say(f"left out: {'; '.join(study.runs.excluded)}")
    fit, flops = study.headline, study.top_flops
    params, tokens = fit.optimal_params(flops), fit.optimal_tokens(flops)
    say(
        f"{fit.approach} at {power(flops)} FLOPs: {count(params)} parameters,"
        f" {count(tokens)} tokens, {tokens / params:.3g} tokens a parameter"
    )
    if study.comparison:
        console.print(_comparison(study.comparison))


def _add(table: Table, label: str, row, **style) -> None:
    cells = (decimal(row.a), interval(row.a_interval80), decimal(row.b), interval(row.b_interval80))
    table.add_row(label, *cells, **style)


def _comparison(comparison: dict) -> Table:
    title = f"beside {comparison['with']}; N_opt at {power(comparison['flops'])} FLOPs, as a ratio"
    table = Table(title=title, title_justify="left")
    for heading in ("", "", "here", "there", "difference", "95 %"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in comparison["rows"]:
        exponent = row["quantity"] in ("a", "b")
        write, places = (decimal, 3) if exponent else (count, 2)
        difference = decimal(row["difference"], places, "+" if exponent else "-")
        numbers = write(row["this"]), write(row["other"]), difference
        table.add_row(
            row["approach"], row["quantity"], *numbers, interval(row["interval95"], places)
        )
    return table
