"""Figures as people write them."""

import pytest

from llmq.words import number


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
        (float("inf"), 3, "inf"),
    ],
)
def test_a_large_figure_is_no_power_of_ten(value, digits, text):
    assert number(value, digits) == text
