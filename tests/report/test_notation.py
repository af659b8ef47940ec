import math

import pytest

from lm.report.notation import count, decimal, interval, percent, power, significant


@pytest.mark.parametrize(
    "value, text",
    [(8_000, "8k"), (73_412, "73.4k"), (999_900, "1M"), (1.2e9, "1.2B"), (5, "5"), (0.5, "0.5"),
     (2e17, "200Q"), (math.nan, "–"), (None, "–")],
)  # fmt: skip
def test_counts_are_written_as_the_papers_write_them(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(1e12, "10¹²"), (3e11, "3×10¹¹"), (5.76e23, "5.8×10²³"), (9.99e11, "10¹²"), (0, "–")],
)
def test_powers_of_ten(value, text):
    assert power(value) == text


def test_what_is_missing_is_a_dash():
    assert interval((math.nan, math.nan)) == interval(None) == interval((None, 1.0)) == "–"
    assert decimal(math.inf) == percent(None) == "–"


def test_signs_and_places():
    assert interval((-0.0213, 0.5)) == "(−0.021, 0.500)"
    assert percent(math.log(0.98), 1) == "−2.0 %"
    assert [significant(x) for x in (477.826, 0.34731, 2143.4)] == ["477.8", "0.3473", "2143"]
