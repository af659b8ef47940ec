"""One smooth loss under five metrics: which jump? Schaeffer et al.'s test. Writes results/."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from experiments.results import as_csv, save
from lm.command import write_atomically
from lm.scaling import (
    TokenLossLaw,
    brier_score,
    emergence_score,
    exact_match,
    expected_edit_distance,
    multiple_choice_accuracy,
    sharpness,
    token_accuracy,
)
from lm.scaling.emergence import log_exact_match, measured

RESULTS = Path(__file__).parent / "results"
LAW = TokenLossLaw(c=1e6, alpha=-0.2)
PARAMS = np.logspace(4, 10, 49)
LENGTHS = (1, 5, 10, 30)
TEST_SIZE = 1000


def table() -> list[tuple]:
    """(metric, length or choices, sharpness, emergence score, N first visible in a test)."""
    p = token_accuracy(LAW.loss(PARAMS))
    rows = []
    for steps in LENGTHS:
        metric = exact_match(p, steps)
        visible = LAW.smallest_visible_params(steps, TEST_SIZE)
        rows.append(
            ("exact match", steps, sharpness(metric, PARAMS), emergence_score(metric), visible)
        )
    for steps in LENGTHS:
        metric = expected_edit_distance(p, steps)
        rows.append(
            ("edit distance", steps, sharpness(metric, PARAMS), emergence_score(metric), None)
        )
    for spread in (1.0, 0.1):
        metric = multiple_choice_accuracy(p, 4, spread)
        name = f"multiple choice of 4, item spread {spread:g}"
        rows.append((name, 4, sharpness(metric, PARAMS), emergence_score(metric), None))
    metric = brier_score(p, 4)
    rows.append(("Brier score", 4, sharpness(metric, PARAMS), emergence_score(metric), None))
    return rows


def nonlinearity() -> float:
    """The largest relative second difference of log exact match in the length: 0 is a line."""
    lengths = np.arange(1, 101)
    log_accuracy = np.log(exact_match(token_accuracy(LAW.loss(PARAMS))[:, None], lengths))
    exact = log_exact_match(LAW.loss(PARAMS)[:, None], lengths)
    assert np.allclose(log_accuracy, exact, rtol=1e-9, atol=0)
    return float(np.abs(np.diff(exact, 2) / exact[:, 2:]).max())


def figure(path: Path) -> None:
    p = token_accuracy(LAW.loss(PARAMS))
    axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")[1]
    for steps in LENGTHS:
        (line,) = axes[0].plot(PARAMS, exact_match(p, steps), label=f"L = {steps}")
        test = measured(exact_match(p[::4], steps), TEST_SIZE)
        axes[0].plot(PARAMS[::4], test, ".", color=line.get_color())
        axes[2].plot(PARAMS, expected_edit_distance(p, steps) / steps, color=line.get_color())
    axes[0].set(xscale="log", xlabel="parameters", title=f"exact match (dots: {TEST_SIZE} items)")
    axes[0].legend(fontsize=8)
    lengths = np.arange(1, 31)
    for params in (1e4, 1e6, 1e8, 1e10):
        axes[1].plot(lengths, log_exact_match(LAW.loss(params), lengths), label=f"N = {params:.0e}")
    axes[1].set(xlabel="tokens in the answer", title="log exact match: lines")
    axes[1].legend(fontsize=8)
    axes[2].set(xscale="log", xlabel="parameters", title="edit distance per token: one curve")
    for spread in (1.0, 0.3, 0.1):
        axes[3].plot(
            PARAMS, multiple_choice_accuracy(p, 4, spread), label=f"item spread {spread:g}"
        )
    axes[3].plot(PARAMS, 1 - brier_score(p, 4), "k--", label="1 - Brier")
    axes[3].axhline(0.25, color="0.7", lw=0.8)
    axes[3].set(xscale="log", xlabel="parameters", title="multiple choice of 4")
    axes[3].legend(fontsize=8)
    for axis in axes:
        axis.title.set_fontsize(9)
    save(plt.gcf(), path, dpi=100)


def main() -> None:
    rows = [("metric", "length_or_choices", "sharpness", "emergence_score", "visible_params")]
    for metric, length, sharp, score, visible in table():
        seen = "" if visible is None else f"{visible:.3g}"
        rows.append((metric, length, f"{float(sharp):.4g}", f"{float(score):.4g}", seen))
    write_atomically(RESULTS / "metrics.csv", as_csv(rows))
    figure(RESULTS / "emergence.png")
    print(as_csv(rows), end="")
    half, most = exact_match([0.5, 0.9], 3)
    print(f"0.5^3 = {half:.1%}, 0.9^3 = {most:.1%}")
    print(f"log exact match against length, largest second difference: {nonlinearity():.1e}")


if __name__ == "__main__":
    main()
