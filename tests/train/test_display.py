"""What a run shows, on consoles that the test reads."""

import io
import math

import pytest
from rich.console import Console

from lm import command
from lm.config import Config
from lm.train import __main__ as main
from lm.train import display
from lm.train.display import Display, shares, sparkline
from lm.train.loop import Progress


def progress(step, validation_loss=None, loss=None):
    loss = loss or math.exp(4 - step / 50)
    return Progress(
        *(step, 200, step * 1000, step * 1e6, loss, validation_loss),
        tokens_per_second=41234.5, mfu=0.314, goodput=0.87, seconds_left=200.0 - step,
    )  # fmt: skip


def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch):
    now, text = 0.0, io.StringIO()
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    with Display(Config(), Console(file=text, highlight=False, soft_wrap=True)) as show:
        for step in range(10, 210, 10):
            show(progress(step, 2.5 if step == 100 else None))
            now += 10
    heading, *lines = text.getvalue().splitlines()
    assert heading.startswith("base: ") and "200,000 tokens in 200 steps, 2e+08 FLOPs" in heading
    assert [line.split()[1].rstrip(":") for line in lines] == [
        "10/200", "40/200", "70/200", "100", "100/200", "130/200", "160/200", "190/200",
    ]  # fmt: skip
    assert lines[3] == "step 100: validation loss 2.5000 nats a token"
    said = "step 40/200  loss 24.533  41,234 tokens/s  MFU 31 %  goodput 87 %  "
    assert lines[1].startswith(said) and lines[1].endswith(" GiB  0:02:40 left")


def test_a_picture_on_a_terminal():
    console = Console(force_terminal=True, width=100, file=io.StringIO(), record=True)
    with Display(Config(), console) as show:
        for step in (50, 100, 150):
            show(progress(step - 1, loss=math.nan))
            show(progress(step))
            show(progress(step + 1, loss=math.inf))
    console.print("\n", show._picture(progress(150)))
    seen = console.export_text().splitlines()[-3:]
    assert seen[0].startswith("━━━") and "step 150/200" in seen[0] and "0:00:50 left" in seen[0]
    assert seen[1].split() == ["█▅▁", "loss", "2.718"]  # equal steps of the logarithm
    assert "41,234 tokens/s  MFU 31 %" in seen[2]


def test_sparklines_of_any_length():
    assert sparkline([], 4) == "    "
    assert sparkline([2.0], 4) == "▁   "
    assert sparkline([math.exp(x) for x in range(8, 0, -1)], 8) == "█▇▆▅▄▃▂▁"
    for n in range(1, 300):
        line = sparkline([1.0 + 1 / i for i in range(1, n + 1)], 40)
        assert len(line) == 40 and line.rstrip()[-1] == "▁"


def test_shares_leave_out_steps_and_zeros():
    seconds = {"step": 50.0, "compile": 49.96, "data": 0.0, "other": 0.04}
    assert shares(seconds, 100.0) == "compile 50.0 %"


@pytest.mark.parametrize("given", ["20:10", "x"])
def test_a_bad_profile_is_one_line(given, tmp_path, capsys):
    argv = ["lm.train", "--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"]
    argv += [f"--profile={given}"]
    assert command.run(main.main, main.FLAGS, main.__doc__, argv) == command.BAD_INPUT
    error = capsys.readouterr().err
    assert f"--profile={given}: must be FIRST:LAST" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
