"""What a study shows while it runs: a live table on a terminal, a line a finished run elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from lm.sweep.launch import Study
from lm.train.display import duration, shares


class Display:
    """A context; call it with the study and a line to print above (or "")."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._live = None
        self._drawn = 0.0
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, study: Study, line: str) -> None:
        if not self._live:
            if line:
                self._console.print(f"{line}  [{summary(study)}]", markup=False)
            return
        if line:
            self._console.print(line, markup=False)
        if line or time.monotonic() - self._drawn > 0.5:  # the cores are for training
            self._drawn = time.monotonic()
            self._live.update(picture(study), refresh=True)


def summary(study: Study) -> str:
    """As "12/35 runs, 34 % of 3.1e+13 FLOPs, 0:04:10, 0:05:20 left"."""
    total, done = study.total_flops(), study.done_flops()
    n_done = len(study.where("done"))
    parts = [
        f"{n_done}/{_n_runs(study)} runs",
        f"{100 * done / total:.0f} % of {total:.2e} FLOPs",
        duration(time.monotonic() - study.started),
    ]
    left = study.seconds_left()
    if left is not None and done < total:
        parts.append(f"{duration(left)} left")
    return ", ".join(parts)


def picture(study: Study) -> Group:
    """The bar, the budgets and the runs under way."""
    bar = Table.grid(padding=(0, 1))
    share = study.done_flops() / study.total_flops()
    bar.add_row(ProgressBar(total=1.0, completed=share, width=30), summary(study))
    under_way = Table.grid(padding=(0, 1))
    for run_id, at in sorted(study.progress.items()):
        done = at["step"] / at["n_steps"] if at else 0.0
        under_way.add_row(f" {run_id}", ProgressBar(total=1.0, completed=done, width=20), told(at))
    return Group(budgets_table(study), under_way, bar)


def told(progress: dict) -> str:
    """As "step 5/10  loss 3.210  0:00:07 left"; nothing before a run has told anything."""
    if not progress:
        return ""
    left = progress.get("seconds_left")
    return f"step {progress['step']}/{progress['n_steps']}  loss {progress['loss']:.3f}" + (
        f"  {duration(left)} left" if left is not None else ""
    )


def budgets_table(study: Study) -> Table:
    """A row a budget: how many of its runs are done, and where its minimum lies."""
    table = Table()
    for column in (
        "budget, FLOPs",
        "done",
        "under way",
        "failed",
        "set aside",
        "N expected",
        "N at minimum",
        "loss",
    ):
        table.add_column(column, justify="right")
    for budget, found in zip(study.budgets, study.minima(), strict=True):
        states = [study.states[run.run_id] for run in budget.runs]
        table.add_row(
            f"{budget.flops:.3g}",
            f"{states.count('done')}/{len(states)}",
            str(states.count("running")),
            *(_red(states.count(state)) for state in ("failed", "set aside")),
            f"{budget.expected:,.0f}",
            f"{found.params:,.0f}{'' if found.interior else ' (edge)'}" if found else "",
            f"{found.loss:.4f}" if found else "",
        )
    for flops in study.config.sweep.budgets[len(study.budgets) :]:
        table.add_row(f"{flops:.3g}", f"0/{study.config.sweep.sizes}")
    return table


def accounting_line(account: dict) -> str:
    """As "goodput 88.3 % of 2 workers x 612.0 s (compile 6.1 %, ...)"."""
    if account["overhead"] is None:
        return "nothing was trained"
    total = account["workers"] * account["wall_seconds"]
    return (
        f"goodput {100 / account['overhead']:.1f} % of"
        f" {account['workers']} workers x {account['wall_seconds']:.1f} s"
        f" ({shares(account['seconds'], total)})"
    )


def _red(n: int) -> str:
    return f"[red]{n}[/]" if n else "0"


def _n_runs(study: Study) -> int:
    unplanned = len(study.config.sweep.budgets) - len(study.budgets)
    return len(study.runs) + unplanned * study.config.sweep.sizes
