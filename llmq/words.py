"""Figures as people write them."""


def number(value: float, digits: int = 3) -> str:
    """So many digits, and no power of ten where it is large: 0.0123, 4.57, 60000."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text
