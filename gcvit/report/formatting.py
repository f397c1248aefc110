"""Format numbers, times and lists for readers."""

from datetime import UTC, datetime


def count(value: float | None) -> str:
    """Format a whole number with thin spaces between thousands: 1 281 167."""
    return "–" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def short(value: float | None) -> str:
    """Format with three digits and a prefix for the power of ten: 90.3 M."""
    if value is None:
        return "–"
    rounded = float(f"{value:.3g}")
    for limit, word in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(rounded) >= limit:
            return f"{rounded / (1e3 if word == 'k' else limit):.3g}\u202f{word}"
    return f"{value:.3g}" if abs(rounded) < 1000 else count(value)


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}\u202f%"


def plain(value: float | None, digits: int = 4) -> str:
    """Format with `digits` significant digits."""
    return "–" if value is None else f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Format the two largest units: 3 d 4 h, 5 min 12 s."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2g}\u202fs"
    total = round(seconds)
    units = ((total // 86400, "d"), (total // 3600 % 24, "h"), (total // 60 % 60, "min"), (total % 60, "s"))
    first = next(i for i, (amount, _) in enumerate(units) if amount)
    return " ".join(f"{amount}\u202f{unit}" for amount, unit in units[first : first + 2] if amount)


def gigabytes(value: float | None) -> str:
    if value is None:
        return "–"
    rounded = float(f"{value:.3g}")
    return f"{rounded / 1e9:.3g}\u202fGB" if rounded >= 1e9 else f"{rounded / 1e6:.3g}\u202fMB"


def moment(seconds: float | None) -> str:
    """Format a Unix time, in UTC."""
    try:
        return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return "–"


def plural(amount: float, word: str, words: str | None = None) -> str:
    """Format an amount with its word; `words` is a plural that does not end in s."""
    return f"{count(amount)} {word if amount == 1 else words or f'{word}s'}"


def listing(words: list[str]) -> str:
    """Join words: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
