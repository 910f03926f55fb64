"""`omniserve top`, without a terminal: what the screen says, and a feed that comes, ends and comes back."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from textual.widgets import DataTable, Sparkline, Static

from omniserve.cli.dashboard import Dashboard, numbers, pages
from omniserve.cli.top import feed, snapshot
from omniserve.remote import Place
from tests.cli.commands import Ran, check_refusal
from tests.cli.others import other
from tests.server.harness import serving

Run = Callable[..., Ran]
KEY = "the-key"
FOUND: dict[str, Any] = {
    "time": 1.0,
    "state": "ready",
    "model": "m",
    "precision": "w4a8kv4",
    "running": 2,
    "waiting": 1,
    "open_sequences": 3,
    "queue_age": 1.25,
    "preemptions": 4,
    "kv_pages": {
        "retrieval": {
            "total": 100,
            "held": 25,
            "cached": 3,
            "shared": 2,
            "map": {"pages": 8, "pages_per_cell": 2, "cells": "fchs"},
        }
    },
    "requests": [{"held": 20, "read": 5}, {"held": 5, "read": 5}],
    "prefix_cache": {"queries": 1000, "hits": 250},
    "prompt_tokens_per_second": 10.0,
    "tokens_per_second": 70.5,
    "ttft_ms": {"p50": 12.0, "p90": 20.0, "p99": 30.0},
    "itl_ms": None,
    "kv_bytes_per_token": 6480,
    "kv_bytes_per_token_fp16": 23040,
}
LOADING = FOUND | {
    "state": "loading", "precision": None, "kv_pages": {}, "requests": [], "ttft_ms": None, "kv_bytes_per_token": None,
    "queue_age": 0, "prefix_cache": {"queries": 0, "hits": 0},
}  # fmt: skip


def words(app: Dashboard, name: str) -> str:
    return str(app.query_one(f"#{name}", Static).render())


def test_what_the_numbers_say() -> None:
    text = numbers(FOUND).plain
    for part in ("running 2", "waiting 1 (oldest 1.2 s)", "preemptions 4", "prefix cache 25% of 1,000 tokens"):
        assert part in text
    assert "TTFT p50 12.0 p90 20.0 p99 30.0 ms   ITL -   KV 6,480 B per token (16 bit: 23,040 B)" in text
    assert "waiting 1   " in numbers(LOADING).plain
    text = pages(FOUND["kv_pages"]).plain
    assert "25 of 100 held (25.0%), 2 of them shared, 3 cached" in text
    assert "·▪■■" in text
    assert "the first 8 pages, 2 pages each" in text
    assert pages({}).plain == ""
    without = {"retrieval": FOUND["kv_pages"]["retrieval"] | {"map": None}}
    assert "■" not in pages(without).plain


def test_the_screen_follows_the_feed() -> None:
    """Snapshots are drawn, a lost server is told of and its numbers stay, p pauses, q leaves."""
    news: asyncio.Queue[dict[str, Any] | str] = asyncio.Queue()

    async def come() -> AsyncIterator[dict[str, Any] | str]:
        while True:
            yield await news.get()

    async def test() -> None:
        app = Dashboard("http://h:1", LOADING, come())

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not condition():
                    await pilot.pause(0.02)

        async with app.run_test(size=(120, 50)) as pilot:
            await until(lambda: "loading" in words(app, "title"))
            assert " m  -  loading  http://h:1" in words(app, "title")
            assert words(app, "ttft_ms-words").endswith("median): -, highest 0.0")
            news.put_nowait(FOUND)
            await until(lambda: "ready" in words(app, "title"))
            assert "running 2" in words(app, "numbers")
            assert "retrieval pages" in words(app, "pages")
            assert words(app, "tokens_per_second-words") == "tokens/s: 70.5, highest 70.5"
            assert app.query_one("#tokens_per_second", Sparkline).data == [70.5, 70.5]
            table = app.query_one(DataTable)
            assert [table.get_row_at(row) for row in range(table.row_count)] == [["1", "20", "5"], ["2", "5", "5"]]
            news.put_nowait("no answer: gone")
            await until(lambda: "no answer: gone" in words(app, "title"))
            assert "running 2" in words(app, "numbers")
            await pilot.press("p")
            await until(lambda: "paused" in words(app, "title"))
            news.put_nowait(FOUND | {"running": 9})
            news.put_nowait("still there")
            await until(lambda: "still there" in words(app, "title"))
            assert "running 2" in words(app, "numbers")
            await pilot.press("p")
            news.put_nowait(FOUND | {"running": 9})
            await until(lambda: "running 9" in words(app, "numbers"))
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(test())


def test_a_real_server() -> None:
    """Its snapshot is drawn as it is; the feed goes on, and says so when the server has gone."""
    with serving(null=0.002, server={"api_key": [KEY]}) as server:
        where = Place.at(server.url, KEY)
        first = snapshot(where)
        assert (first["model"], first["running"]) == ("null", 0)

        async def test() -> None:
            app = Dashboard(where.root, first, feed(where))
            async with app.run_test(size=(120, 50)) as pilot, asyncio.timeout(90):
                while "free  " not in words(app, "pages"):  # the map comes with a later snapshot
                    await pilot.pause(0.05)
                assert re.search(r"of \d[\d,]* held", words(app, "pages"))
                assert words(app, "title").startswith(" null  ")
                await asyncio.to_thread(server.close)
                while not re.search("no answer|status 503|has ended", words(app, "title")):
                    await pilot.pause(0.05)

        asyncio.run(test())


def test_what_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refusal(run("top", "--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1/v1")
    with other(models=b"data: {}\n\n") as (url, _):
        check_refusal(run("top", "--url", url), "is no feed of an omniserve server")
    with other(models=b'data: {"kv_pages": {}}\n\n') as (url, _):
        check_refusal(run("top", "--url", url), "needs a terminal", f"{url}/engine/stats")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_refusal(run("top"), "pip install 'omniserve[top]'")
