"""What the measured operations add up to: the four products of a layer, and whole decode steps, without any gap."""

from collections.abc import Mapping, Sequence
from typing import Any

from omniserve.bench.results import Row

Key = tuple[str, str, str]
"""Kind, name and size of a row."""

PRODUCTS, STEP = "four products", "step"
"""Kinds of the rows that are made here."""

_KV = {"w4a8-g128": "kv4", "w4a8-row": "kv4", "w8a8": "kv8", "w16a16": "kv16"}
"""KV format of whole steps by the format of their weights."""

_ACT = "int8+sum"


def sums(rows: Sequence[Row], layers: int) -> list[dict[str, Any]]:
    """Return the sums whose parts are all there.

    four products  qkv, out, gate_up and down of one layer; peers: their sum over ours
    step           all layers, the 16-bit head and greedy sampling for one produced position in each context
    """
    found = {(row["kind"], row["name"], row["size"]): row for row in rows if "us" in row}
    wanted: dict[Key, dict[Key, int]] = {}
    for form in _KV:
        for kind, name, size in found:
            if (kind, name) == ("gemm", f"{form} qkv"):
                wanted[PRODUCTS, form, size] = {
                    ("gemm", f"{form} {linear}", size): 1 for linear in ("qkv", "out", "gate_up", "down")
                }
        for kind, name, size in found:
            if (kind, name) == ("decode", _KV[form]):
                wanted[STEP, f"{form} {name}", size] = _step(form, size, layers)
    return [_sum(key, parts, found) for key, parts in wanted.items() if parts.keys() <= found.keys()]


def _step(form: str, size: str, layers: int) -> dict[Key, int]:
    """Return how often each operation runs in a step of `rows x context`."""
    count = size.split(" ")[0]
    parts: dict[Key, int] = {("gemm", f"{form} {linear}", count): layers for linear in ("qkv", "out", "down")}
    parts |= {
        ("gate_up_silu", form, count): layers,
        ("add_norm", _ACT, count): 2 * layers,
        ("rope_write", _KV[form], count): layers,
        ("decode", _KV[form], size): layers,
        ("head", "w16", count): 1,
        ("sample", "greedy", count): 1,
    }
    return parts if form == "w16a16" else parts | {("quantize", _ACT, count): layers}


def _sum(key: Key, parts: Mapping[Key, int], found: Mapping[Key, Row]) -> dict[str, Any]:
    rows = [(times, found[part]) for part, times in parts.items()]
    total = sum(times * row["us"] for times, row in rows)
    known = all(row["limit_us"] is not None for _, row in rows)
    limit = sum(times * row["limit_us"] for times, row in rows) if known else None
    peers = [{name: one["us"] for name, one in row.get("peers", {}).items() if "us" in one} for _, row in rows]
    shared = [name for name in peers[0] if all(name in one for one in peers)]
    return {
        "kind": key[0],
        "name": key[1],
        "size": key[2],
        "us": total,
        "limit_us": limit,
        "share": None if limit is None else limit / total,
        "ok": all(row["ok"] for _, row in rows),
        "peers": {
            name: {"us": (theirs := sum(one[name] for one in peers)), "ratio": theirs / total} for name in shared
        },
        "parts": {
            " ".join(part[:2]): times * row["us"] / total for part, (times, row) in zip(parts, rows, strict=True)
        },
    }
