"""/engine/stats: what the pages are used for, latencies, the queue; cheap, and without texts."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omniserve.server.recent import Window
from omniserve.server.watch import CELLS, page_map
from tests.server.harness import Server, serving


def until(server: Server, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first object of the feed for which something holds."""
    found: dict[str, Any] = {}
    end = time.monotonic() + 30
    with server.http.stream("GET", "/engine/stats") as answer:
        for line in answer.iter_lines():
            assert time.monotonic() < end, found
            if line and condition(found := json.loads(line.removeprefix("data: "))):
                return found
    raise AssertionError("the feed has ended")


def pages(stats: dict[str, Any]) -> dict[str, Any]:
    return dict(stats["kv_pages"]["retrieval"])


def test_the_feed_shows_pages_requests_and_the_queue() -> None:
    body = {"prompt": [7] * 200, "max_tokens": 8000, "temperature": 0, "stream": True}
    with serving(null=0.002, options={"max_num_seqs": 2, "kv_cache_memory_bytes": 64 * 512}) as server:
        first = server.stats()
        assert (pages(first)["total"], first["running"], first["queue_age"]) == (512, 0, 0)
        assert (first["ttft_ms"], first["itl_ms"]) == (None, None)
        idle = until(server, lambda stats: pages(stats)["map"] is not None)
        assert pages(idle)["map"] == {"pages": 128, "pages_per_cell": 1, "cells": "f" * 128}

        with server.http.stream("POST", "/v1/completions", json=body) as one:
            first_lines = one.iter_lines()  # kept: a generator that is dropped closes its stream
            next(first_lines)
            with server.http.stream("POST", "/v1/completions", json=body) as two:
                second_lines = two.iter_lines()
                next(second_lines)
                third = threading.Thread(target=server.post, args=("/v1/completions", body | {"max_tokens": 1}))
                third.start()
                busy = until(server, lambda stats: stats["waiting"] == 1 and len(stats["requests"]) == 2)
                assert busy["running"] == 2
                assert until(server, lambda stats: stats["queue_age"] > busy["queue_age"])["queue_age"] > 0
                shown = pages(until(server, lambda stats: pages(stats)["shared"] == 3))
                assert shown["map"]["cells"].count("s") == 3, "the prompt's three full pages, computed once"
                assert shown["map"]["cells"].count("h") >= 2
                assert all(request["held"] == request["read"] >= 4 for request in busy["requests"])
                assert busy["ttft_ms"].keys() == busy["itl_ms"].keys() == {"p50", "p90", "p99"}
                assert 0 < busy["itl_ms"]["p50"] <= busy["itl_ms"]["p99"]
        third.join(30)
        assert not third.is_alive()
        cached = pages(until(server, lambda stats: not pages(stats)["held"] and "c" in pages(stats)["map"]["cells"]))
        assert cached["map"]["cells"].count("c") == cached["cached"]


def test_the_feed_knows_the_model(served: Server) -> None:
    stats = served.stats()
    assert (stats["precision"], stats["max_model_len"]) == ("w8a8kv8", 256)
    assert stats["heads"] == ["rr", "rr"]
    assert stats["kv_bytes_per_token_fp16"] == 2 * 2 * 2 * 2 * 16
    assert 0 < stats["kv_bytes_per_token"] < stats["kv_bytes_per_token_fp16"]


def test_maps_have_at_most_so_many_cells() -> None:
    states = bytes([2, 0, 0, 1, 0, 3])
    assert page_map(states, 8) == {"pages": 8, "pages_per_cell": 1, "cells": "hffcfsff"}
    large = page_map(states, 3 * CELLS)
    assert (large["pages_per_cell"], len(large["cells"])) == (3, CELLS)
    assert large["cells"].startswith("hsff"), "a cell shows the busiest of its pages"


def test_percentiles_are_of_the_last_seconds() -> None:
    window = Window(4, seconds=60)
    assert window.percentiles() is None
    for value in (9.0, 0.001, 0.002, 0.003, 0.004):
        window.add(value)
    assert window.percentiles() == {"p50": 2.0, "p90": 3.0, "p99": 3.0}
    over = Window(4, seconds=-1)
    over.add(1.0)
    assert over.percentiles() is None


def test_sparse_attention_is_shown_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """One of the four key heads streams; the others read two pages of those they hold."""
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t0.1\n0.8\t0.7\n")
    options = {"sparsity": "lserve", "static_sparsity": 0.3, "attn_pattern": str(tmp_path), "token_budget": 128}
    window = {"sink": 64, "local": 64, "prefill_local": 64, "max_num_seqs": 2}
    body = {"prompt": [7] * 200, "max_tokens": 50, "temperature": 0, "ignore_eos": True, "include_engine_stats": True}
    with serving(model=str(tiny), options={"precision": "w8a8kv8", **options, **window}) as server:
        stats = server.stats()
        assert (stats["sparsity"], stats["heads"]) == ("lserve", ["rs", "rr"])
        assert set(stats["kv_pages"]) == {"retrieval", "streaming"}
        answers: list[dict[str, Any]] = []
        seen = threading.Event()

        def ask() -> None:
            while not seen.is_set():  # an answer may be complete between two objects of the feed
                answers.append(server.complete(**body))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            busy = until(server, lambda stats: any(one["held"] > one["read"] for one in stats["requests"]))
        finally:
            seen.set()
            asking.join(60)
        (request,) = busy["requests"]
        assert request["read"] <= 2 + 3, "two of the retrieval heads' pages; sink and window of the streaming head's"
        own = answers[0]["usage"]["omniserve"]
        assert (own["kv_pages_held"], own["kv_pages_read_ratio"]) == (4, 0.5)
        assert "prefill_blocks_skipped_ratio" not in own
        assert server.metric("decode_pages_read_ratio_count") == len(answers)
        assert server.metric("decode_pages_read_ratio_sum") == 0.5 * len(answers)
