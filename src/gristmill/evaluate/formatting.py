"""Figures as people read them: errors decide the digits, large numbers get a prefix."""

import itertools
import math
import re
from collections.abc import Sequence

from gristmill.evaluate.run_report import FunnelRow, Result


def with_error(value: float, error: float, unit: str = "") -> str:
    """'0.612 ± 0.022': as many decimals as show two digits of the error; unit '%' turns a share into per cent."""
    if unit == "%":
        return f"{100 * value:.1f} % ± {100 * error:.1f}"
    decimals = 3 if error == 0 else min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}" + (f" {unit}" if unit else "")


def figure(result: Result) -> str:
    """A result with its standard error and unit."""
    return with_error(result.value, result.standard_error, result.unit)


def count(number: float | None, *, trim: bool = False) -> str:
    """'950', '12.3 k', '4.50 M'; an empty string for None. `trim` drops zeros after the point, for axes: '4.5 M'."""
    text = _prefixed(number, 1000, ("", "k", "M", "G", "T"))
    return re.sub(r"\.?0+(?= )", "", text) if trim and "." in text else text


def flops(number: float | None) -> str:
    """Floating-point operations: '3.40 TFLOP'; an empty string for None."""
    text = _prefixed(number, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))
    return text and (f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP")


def memory(number: float | None) -> str:
    """Bytes in powers of 1024: '1.25 GiB'; an empty string for None."""
    return _prefixed(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def duration(seconds: float) -> str:
    """'0.4 s', '42 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    """A share in [0, 1] as '12.3 %'; an empty string for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def dropped(rows: Sequence[FunnelRow]) -> list[str]:
    """What each step of a funnel took away: '1,024 (12.3 %)', or an empty string for nothing."""
    texts = [""] if rows else []
    for before, after in itertools.pairwise(rows):
        gone = before.documents - after.documents
        texts.append(f"{gone:,} ({percent(gone / before.documents)})" if gone else "")
    return texts


def _prefixed(number: float | None, base: int, prefixes: tuple[str, ...]) -> str:
    if number is None:
        return ""
    value, place = float(number), 0
    # 999.5 would round up to a fourth digit, so it already takes the next prefix.
    while abs(value) >= (base if place == 0 else base * 0.9995) and place < len(prefixes) - 1:
        value, place = value / base, place + 1
    if place == 0:
        return f"{value:.0f} {prefixes[0]}".rstrip()
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {prefixes[place]}"
