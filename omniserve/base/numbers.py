"""Arithmetic that every floor needs."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def align_up(a: int, to: int) -> int:
    """Return the smallest multiple of `to` that is not below `a`."""
    return ceil_div(a, to) * to


def power_of_two(a: int) -> int:
    """Return the smallest power of two that is not below a positive `a`."""
    return 1 << (a - 1).bit_length()


def human_bytes(count: int) -> str:
    """Return a byte count for people: 1536 -> '1.5 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError(count)
