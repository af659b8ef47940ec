"""What `lm.estimate` prints for people."""

from rich.console import Console
from rich.table import Table

from lm.hardware import GIB
from lm.report.notation import count


def print_estimate(result: dict) -> None:
    """The dict of `lm.estimate --json` as tables."""
    console = Console(highlight=False)
    _print_table(console, f"{result['config']}", _counts(result))
    if "search" in result:
        _print_candidate(console, "best", result["search"], result)
    else:
        _print_memory(console, result)
        if "fits" in result:
            _print_verdict(console, result, result)
            if "nearest" in result:
                _print_candidate(console, "the nearest that does", result["nearest"], result)
    if "training" in result:
        _print_training(console, result["training"])
    if "assumptions" in result:
        console.print("[dim]The times assume:[/]")
    for assumption in result.get("assumptions", ()):
        console.print(f"[dim]  {assumption}[/]", soft_wrap=True)


def _print_table(
    console: Console, title: str, rows: list[tuple[str, ...]], headings: tuple[str, ...] = ("", "")
) -> None:
    table = Table(show_header=any(headings))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(title, style="italic", soft_wrap=True)
    console.print(table)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.2f} GiB"


def _counts(result: dict) -> list[tuple[str, str]]:
    cache = result["kv_cache_bytes"]
    flops = result["flops_per_token"]
    return [
        ("parameters", f"{result['params']:,}"),
        ("  active", f"{result['active_params']:,}"),
        ("  without embeddings", f"{result['non_embedding_params']:,}"),
        *((f"FLOPs a token, {name}", f"{value:.4g}") for name, value in flops.items()),
        (f"KV cache, {cache['batch']} x {cache['seq_len']:,} tokens", _gib(cache["bytes"])),
        ("weights, AdamW, gradients", _gib(result["optimizer_bytes"])),
    ]


def _print_memory(console: Console, found: dict) -> None:
    mesh = found["mesh"]
    used = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if axis != "zero" and n > 1)
    rows = [(name, _gib(n_bytes)) for name, n_bytes in found["memory"].items()]
    rows.append(("mesh", f"{used or 'one device'}, zero {mesh['zero']}"))
    rows.append(("global batch", f"{found['sequences']:,} sequences"))
    _print_table(console, "bytes of one device at a step's peak, by arithmetic", rows)


def _print_verdict(console: Console, found: dict, result: dict) -> None:
    peak, limit = found["peak_bytes_per_chip"] / GIB, result["hbm_bytes_per_chip"] / GIB
    how = f"compiled, {found['compile_seconds']:.0f} s" if found["compiled"] else "by arithmetic"
    verdict = "[green]fits[/]" if found["fits"] else "[red]does not fit[/]"
    where = result.get("topology") or f"{result['chips']} x {result['chip']}"
    console.print(f"{where}: {verdict}: {peak:.1f} GiB of {limit:.2f} ({how})")
    if "topology" not in result:
        return
    time = found["roofline"]
    if time is None:
        console.print("[yellow]no roofline: this mesh does not lie on the torus[/]")
    else:
        chips, tokens = result["chips"], time["tokens_per_second"]
        links = {f"links of {axis}": seconds for axis, seconds in time["link_seconds"].items()}
        parts = {"compute": time["compute_seconds"], "HBM": time["hbm_seconds"]} | links
        flops = result["flops_per_token"]
        visible = flops["exact_causal"] / flops["exact"]
        rows = [(name, f"{seconds:.4g}") for name, seconds in parts.items()]
        if time["bubble"]:
            rows.append(("share of bubble", f"{time['bubble']:.3f}"))
        rows += [
            ("step, at least", f"{time['bound_seconds']:.4g}"),
            ("step, predicted", f"{time['step_seconds']:.4g}"),
            ("tokens a second and chip", f"{tokens / chips:,.0f}"),
            ("MFU, predicted", f"{100 * time['mfu']:.1f} %"),
            ("  by exact_causal", f"{100 * time['mfu'] * visible:.1f} %"),
        ]
        title = f"seconds of a step; {time['limit']} takes longest"
        _print_table(console, title, rows)
    if found.get("collectives"):
        rows = [
            (c["kind"], ", ".join(c["axes"]), f"{c['count']:,}", _gib(c["payload_bytes"]),
             _gib(c["sent_bytes"]))
            for c in found["collectives"]
        ]  # fmt: skip
        headings = ("", "mesh axes", "times", "arrays", "sent by a chip")
        _print_table(console, "collectives of a step", rows, headings)


def _print_training(console: Console, training: dict) -> None:
    """What the run costs to its end; of a study its budgets, and what all cost together."""
    days, text = training.get("days"), f"training: {training['flops']:.4g} FLOPs"
    if training["runs"] > 1:
        text += f" in {training['runs']:,} runs"
        headings, rows = ("FLOPs", "runs", "parameters", "tokens"), []
        headings += ("largest a chip",) * ("chip" in training) + ("days",) * bool(days)
        for b in training["budgets"]:
            row = f"{b['budget']:.4g}", str(b["runs"]), _range(b["params"]), _range(b["tokens"])
            if "chip" in training:
                size = _gib(b["bytes_per_chip"])
                row += (size if b["fits"] else f"[red]{size}[/]",)
            rows.append(row + ((f"{b['seconds'] / 86_400:,.3g}",) if days else ()))
        title = "the study by arithmetic, its optima where its prior expects them"
        _print_table(console, title, rows, headings)
    if days:
        text += f": {days:,.3g} days on {training['chips']:,} {training['chip']}"
        text += f" at {100 * training['mfu']:.1f} % MFU ({training['mfu_from']})"
        text += f", {training['chip_hours']:,.0f} chip-hours"
    if training.get("dollars"):
        text += f", {training['dollars']:,.0f} dollars"
    console.print(text, soft_wrap=True)


def _range(pair: list[float]) -> str:
    return " to ".join(dict.fromkeys(map(count, pair)))


def _print_candidate(console: Console, what: str, found: dict | None, result: dict) -> None:
    if found is None:
        console.print(f"[yellow]{what}: none was found[/]")
        return
    settings = " ".join(f"--config.{name}={value}" for name, value in found["changes"].items())
    console.print(f"[bold]{what}[/]: {settings or 'the config as it is'}", soft_wrap=True)
    _print_memory(console, found)
    _print_verdict(console, found, result)
