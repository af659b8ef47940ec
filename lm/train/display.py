"""What a run shows while it trains: a live picture on a terminal, a line now and then elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from lm import arithmetic
from lm.config import Config

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_PICTURES = 0.25  # the cores are for training
BARS = "▁▂▃▄▅▆▇█"


class Display:
    """A context; call it with each ``lm.train.loop.Progress``."""

    def __init__(self, config: Config, console: Console | None = None):
        self._config = config
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._losses: list[float] = []
        self._headed = False
        self._began, self._shown = time.monotonic(), -math.inf
        self._live = None
        if self._console.is_terminal:
            preparing = Spinner("dots", "reading the data and compiling")
            self._live = Live(preparing, console=self._console, transient=True)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, at: Any) -> None:
        if not self._headed:
            self._console.print(self._heading(at), markup=False)
            self._headed = True
        if math.isfinite(at.loss):  # that of a skipped step may not be
            self._losses.append(at.loss)
        if at.validation_loss is not None:
            said = f"step {at.step:,}: validation loss {at.validation_loss:.4f} nats a token"
            self._console.print(said, markup=False)
        now = time.monotonic()
        if now - self._shown < (SECONDS_BETWEEN_PICTURES if self._live else SECONDS_BETWEEN_LINES):
            return
        self._shown = now
        if self._live:
            self._live.update(self._picture(at))
        else:
            told = f"step {at.step:,}/{at.n_steps:,}  loss {at.loss:.3f}  {speed(at)}"
            self._console.print(f"{told}  {duration(at.seconds_left)} left", markup=False)

    def _heading(self, at: Any) -> str:
        from lm.train.device import description

        params = arithmetic.parameters(self._config.model, self._config.data.seq_len).total
        tokens, flops = (n / at.step * at.n_steps for n in (at.tokens, at.flops))
        return (
            f"{self._config.name}: {params:,} parameters, {tokens:,.0f} tokens in {at.n_steps:,}"
            f" steps, {flops:.3g} FLOPs on {description()}"
        )

    def _picture(self, at: Any) -> Group:
        bar = Table.grid(padding=(0, 2))
        times = f"{duration(time.monotonic() - self._began)}, {duration(at.seconds_left)} left"
        bar.add_row(
            ProgressBar(total=at.n_steps, completed=at.step, width=40),
            f"step {at.step:,}/{at.n_steps:,}",
            times,
        )
        return Group(bar, f"{sparkline(self._losses, 40)}  loss {at.loss:.3f}", speed(at))


def speed(at: Any) -> str:
    """As "412,345 tokens/s  MFU 31 %  goodput 87 %  0.6 GiB"."""
    from lm.train.device import memory_bytes

    return (
        f"{at.tokens_per_second:,.0f} tokens/s  MFU {100 * at.mfu:.2g} %"
        f"  goodput {100 * at.goodput:.0f} %  {memory_bytes() / 2**30:.2f} GiB"
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` from the first to the last as bars, on a log scale; means where there are many.

    The first tenth, in which a loss falls as it never will again, may be beyond the scale.
    """
    if not values:
        return " " * width
    step = max(1.0, len(values) / width)
    starts = [round(i * step) for i in range(math.ceil(len(values) / step))]
    bins = [values[a:b] for a, b in zip(starts, [*starts[1:], len(values)], strict=True)]
    logs = [math.log(sum(some) / len(some)) for some in bins]
    low, high = min(logs), max(logs[len(logs) // 10 :])
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((min(x, high) - low) * scale)] for x in logs).ljust(width)


def duration(seconds: float) -> str:
    """As "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def shares(seconds: Mapping[str, float], whole: float) -> str:
    """Where time went besides steps, as "compile 6.1 %, evaluate 2.0 %"; zeros are left out."""
    told = ((part, 100 * n / whole) for part, n in seconds.items() if part != "step")
    return ", ".join(f"{part} {percent:.1f} %" for part, percent in told if percent >= 0.05)
