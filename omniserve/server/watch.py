"""What /engine/stats shows: numbers about the engine, small enough to be sent a few times a second, never texts.

The map of the pages is asked of the engine only while somebody watches, and is one interval old.
"""

import time
from typing import TYPE_CHECKING, Any

from omniserve.base.numbers import ceil_div
from omniserve.cache.pool import CACHED, FREE, HELD, SHARED
from omniserve.server.pages import peers

if TYPE_CHECKING:
    from omniserve.server.service import Service

CELLS = 1024
"""Cells of a map; a pool with more used pages has several of them in a cell."""
LETTERS = {FREE: "f", CACHED: "c", HELD: "h", SHARED: "s"}
REQUESTS = 64
"""Running requests that are told of, those with the most pages first."""
_SMALLEST_MAP = 128


class Watch:
    """Sums up a service. `extent`: how far the used pages of each pool have ever reached."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._extent: dict[str, int] = {}

    def snapshot(self) -> dict[str, Any]:
        """Return what there is to see now, and ask the engine for the map of the next time."""
        service = self._service
        metrics, ready, view = service.metrics, service.ready, service.engine.view
        stats, recent = metrics.stats, metrics.recent
        service.engine.look()
        prompt, produced = recent.speeds(3.0)
        states = {} if view is None else view.states
        requests = [] if view is None else sorted(view.requests, reverse=True)
        snapshot = {
            "time": time.time(),
            "state": service.state,
            "model": service.names[0],
            "peers": peers(service.server),
            "running": stats.running,
            "waiting": stats.waiting,
            "open_sequences": service.queue.sequences,
            "queue_age": service.queue_age(),
            "preemptions": stats.preemptions,
            "kv_pages": {
                kind: self._pages(kind, total, stats.held.get(kind, 0), stats.cached.get(kind, 0), states.get(kind))
                for kind, total in ({} if ready is None else ready.pages).items()
            },
            "requests": [{"held": held, "read": read} for held, read in requests[:REQUESTS]],
            "prefix_cache": {"queries": stats.prefix_queries, "hits": stats.prefix_hits},
            "prompt_tokens_per_second": round(prompt, 1),
            "tokens_per_second": round(produced, 1),
            "ttft_ms": recent.ttft.percentiles(),
            "itl_ms": recent.itl.percentiles(),
        }
        return snapshot | self._fixed()

    def _fixed(self) -> dict[str, Any]:
        """Return what does not change once the model is loaded."""
        ready = self._service.ready
        if ready is None:
            names = ("precision", "sparsity", "kv_bytes_per_token", "kv_bytes_per_token_fp16", "heads", "max_model_len")
            return dict.fromkeys(names)
        return {
            "precision": ready.config.precision.name,
            "sparsity": ready.config.sparsity.name,
            "kv_bytes_per_token": ready.kv_token_bytes,
            "kv_bytes_per_token_fp16": ready.kv_token_bytes_fp16,
            "heads": ready.heads,
            "max_model_len": ready.config.limits.max_model_len,
        }

    def _pages(self, kind: str, total: int, held: int, cached: int, states: bytes | None) -> dict[str, Any]:
        counts = {"total": total, "held": held, "cached": cached}
        if states is None:
            return counts | {"shared": 0, "map": None}
        extent = max(self._extent.get(kind, _SMALLEST_MAP), 1 << (len(states) - 1).bit_length())
        self._extent[kind] = extent
        return counts | {"shared": states.count(SHARED), "map": page_map(states, min(extent, total))}


def page_map(states: bytes, extent: int) -> dict[str, Any]:
    """Return the first `extent` pages of a pool as at most CELLS letters; a cell shows the busiest of its pages."""
    each = ceil_div(extent, CELLS)
    cells = (_busiest(states[start : start + each]) for start in range(0, extent, each))
    return {"pages": extent, "pages_per_cell": each, "cells": "".join(LETTERS[cell] for cell in cells)}


def _busiest(states: bytes) -> int:
    """Return the busiest of some states; looking for each is many times as fast as `max` over the bytes."""
    return SHARED if SHARED in states else HELD if HELD in states else CACHED if CACHED in states else FREE
