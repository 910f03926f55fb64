"""What the measured operations add up to: whole decode steps, without any gap between kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

from omniserve.bench.results import Row

Key = tuple[str, str, str]
"""Kind, name and size of a row."""

STEP = "step"
"""Kind of the rows that are made here."""

LSERVE = "lserve"
"""Ends the names of what LServe does: half of the heads stream, the others read chosen pages."""

INTERVAL = 4
"""Steps for which the pages of one choice are read."""

_KV = {"w4a8-g128": "kv4", "w4a8-row": "kv4", "w8a8": "kv8", "w16a16": "kv16"}
"""KV format of whole steps by the format of their weights."""

_CHOICES = {"kv4": ("keys kv4", "bounds"), "kv8": ("keys kv8",), "kv16": ()}
"""Choices of pages that steps with LServe are added up with, by the KV format."""

_ACT = "int8+sum"


def sums(rows: Sequence[Row], layers: int) -> list[dict[str, Any]]:
    """Return the whole steps whose parts are all there.

    All layers, the head (of 8 bits unless weights have 16) and greedy sampling for one produced position in each
    context; with LServe, by either choice of pages, a quarter of it.
    """
    found = {(row["kind"], row["name"], row["size"]): row for row in rows if "us" in row}
    wanted: dict[Key, dict[Key, float]] = {}
    for form, kv in _KV.items():
        for kind, name, size in found:
            if (kind, name) == ("decode", kv):
                wanted[STEP, f"{form} {kv}", size] = step(form, kv, size, layers)
            if kind == "select" and name in _CHOICES[kv]:
                parts = step(form, f"{kv} {LSERVE}", size, layers) | {(kind, name, size): layers / INTERVAL}
                wanted[STEP, f"{form} {kv} {LSERVE}, {name.split(' ')[0]}", size] = parts
    return [_sum(key, parts, found) for key, parts in wanted.items() if parts.keys() <= found.keys()]


def step(form: str, read: str, size: str, layers: int) -> dict[Key, float]:
    """Return how often each operation runs in a step of `rows x context`; `read`: the name of its attention."""
    count, kv = size.split(" ")[0], _KV[form]
    parts: dict[Key, float] = {("gemm", f"{form} {linear}", count): layers for linear in ("qkv", "out", "down")}
    parts |= {
        ("gate_up_silu", form, count): layers,
        ("add_norm", _ACT, count): 2 * layers,
        ("rope_write", kv, count): layers,
        ("decode", read, size): layers,
        ("head", "w16" if form == "w16a16" else "w8", count): 1,
        ("sample", "greedy", count): 1,
    }
    return parts if form == "w16a16" else parts | {("quantize", _ACT, count): layers}


def _sum(key: Key, parts: Mapping[Key, float], found: Mapping[Key, Row]) -> dict[str, Any]:
    rows = [(times, found[part]) for part, times in parts.items()]
    total = sum(times * row["us"] for times, row in rows)
    known = all(row["limit_us"] is not None for _, row in rows)
    limit = sum(times * row["limit_us"] for times, row in rows) if known else None
    return {
        "kind": key[0],
        "name": key[1],
        "size": key[2],
        "us": total,
        "limit_us": limit,
        "share": None if limit is None else limit / total,
        "ok": all(row["ok"] for _, row in rows),
        "parts": {
            " ".join(part[:2]): times * row["us"] / total for part, (times, row) in zip(parts, rows, strict=True)
        },
    }
