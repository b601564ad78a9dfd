"""Figures as people write them."""

from decimal import Decimal


def number(value: float, digits: int = 3) -> str:
    """So many digits, and no power of ten: 0.0123, 4.57, 60000."""
    text = f"{value:.{digits}g}"
    if "e+" in text:
        return f"{value:.0f}"
    return format(Decimal(text), "f") if "e-" in text else text


def money(usd: float) -> str:
    """US dollars: cents, and as much of less as tells something."""
    if usd == 0 or usd >= 1:
        return f"{usd:,.2f}"
    return f"{usd:.4f}".removesuffix("00") if usd >= 0.01 else number(usd, 2)
