"""Numbers as a reader wants them: no more digits than mean something."""

from __future__ import annotations

import json
import math
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def show_value(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def show_loss(value: float | None) -> str:
    """Four decimals; few digits and an exponent for what these cannot show."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def show_perplexity(value: float) -> str:
    """Two decimals below a million."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2e}"


def show_percent(value: float) -> str:
    """A share as a percentage; 100 % only where it is."""
    return "just under 100 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"


def show_small(value: float) -> str:
    """Two digits, with a power of ten where the number is far from 1."""
    if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 99.5:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def show_rough(value: float) -> str:
    """A large number by its first two digits, written out."""
    return f"{float(f'{value:.1e}'):,.0f}"


def show_duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
