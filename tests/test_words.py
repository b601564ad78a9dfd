"""Figures as people write them."""

import pytest

from llmq.words import money, number


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.01234, 3, "0.0123"),
        (4.567, 3, "4.57"),
        (999.7, 3, "1000"),
        (24_512.4, 3, "24512"),
        (59_400.0, 6, "59400"),
        (2_000_000.0, 6, "2000000"),
        (0.0, 3, "0"),
        (0.00001234, 3, "0.0000123"),
        (float("inf"), 3, "inf"),
    ],
)
def test_a_figure_is_no_power_of_ten(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("usd", "text"),
    [(0, "0.00"), (1234.5, "1,234.50"), (0.5, "0.50"), (0.0123, "0.0123"), (0.0031, "0.0031"), (0.000012, "0.000012")],
)
def test_little_money_is_not_none(usd, text):
    assert money(usd) == text
