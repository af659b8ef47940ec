"""How numbers are written in figures, page and terminal: one notation for all three."""

import math

_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SUFFIXES = ((1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))
MISSING = "–"


def count(x: float | None, digits: int = 3) -> str:
    """Parameters and tokens as the papers write them: 73.4k, 1.2B, 5T."""
    if x is None or not math.isfinite(x):
        return MISSING
    rounded = float(f"{x:.{digits}g}")
    scale, suffix = next(((s, t) for s, t in _SUFFIXES if rounded >= s), (1, ""))
    return f"{float(f'{rounded / scale:.{digits}g}'):g}{suffix}"


def power(x: float | None, digits: int = 2) -> str:
    """FLOPs as 3×10¹², or 10¹² where the mantissa is 1."""
    if x is None or not math.isfinite(x) or x <= 0:
        return MISSING
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    tens = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    mantissa = f"{float(mantissa):g}"
    return tens if mantissa == "1" else f"{mantissa}×{tens}"


def decimal(x: float | None, places: int = 3, sign: str = "-") -> str:
    """A fixed number of places; `sign` "+" writes it always."""
    return MISSING if x is None or not math.isfinite(x) else _minus(f"{x:{sign}.{places}f}")


def significant(x: float | None, digits: int = 4) -> str:
    """Fixed notation with so many significant digits: 477.8, 0.3473."""
    return decimal(x, significant_places(x, digits))


def significant_places(x: float | None, digits: int = 4) -> int:
    """Decimal places with which `x` shows so many significant digits."""
    if x is None or not math.isfinite(x) or x == 0:
        return 0
    return max(0, digits - 1 - math.floor(math.log10(abs(x))))


def interval(bounds: tuple[float, float] | None, places: int = 3) -> str:
    """(0.488, 0.502); a dash where there is none."""
    if bounds is None or any(x is None or not math.isfinite(x) for x in bounds):
        return MISSING
    return _minus(f"({bounds[0]:.{places}f}, {bounds[1]:.{places}f})")


def percent(log_ratio: float | None, places: int = 2) -> str:
    """A difference of logarithms as a signed percentage."""
    if log_ratio is None or not math.isfinite(log_ratio):
        return MISSING
    return _minus(f"{100 * math.expm1(log_ratio):+.{places}f} %")


def _minus(text: str) -> str:
    return text.replace("-", "−")
