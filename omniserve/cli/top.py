"""`omniserve top`: what a server is doing, in the terminal."""

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Iterable
from typing import Any

from omniserve.base.errors import ConfigError, ServerError
from omniserve.cli.connection import place
from omniserve.cli.flags import Common
from omniserve.cli.output import say
from omniserve.remote import CONNECT_SECONDS, Place, lines, refusal, reported

AGAIN_SECONDS = 1.0
SILENT_SECONDS = 10.0
"""The feed brings numbers several times a second; after this long without any the server counts as lost."""


def top(*, url: str | None = None, api_key: str | None = None, common: Common = Common()) -> None:  # noqa: B008  # frozen
    """Watch a running omniserve server: requests, speed, latencies and its KV pages. q leaves, p pauses.

    Parameters
    ----------
    url
        Where the server is (default http://127.0.0.1:8000/v1).
    api_key
        Its key; better kept in OMNISERVE_API_KEY, or as api-key in the --config file.
    """
    where = place(url, api_key, common)
    if importlib.util.find_spec("textual") is None:
        raise ConfigError("top needs textual: pip install 'omniserve[top]'")
    first = snapshot(where)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(f"top needs a terminal; without one, {where.root}/engine/stats has the numbers")
    from omniserve.cli.dashboard import Dashboard

    error = Dashboard(where.root, first, feed(where)).run()
    if error is not None:
        say(error)


def snapshot(where: Place) -> dict[str, Any]:
    """Return what the server shows now. Raises ServerError, also for a server of another kind."""
    with reported(where), where.client() as client, client.stream("GET", f"{where.root}/engine/stats") as answer:
        if answer.status_code != 200:
            told = refusal(answer.status_code, answer.read())
            hint = ": only omniserve has it" if answer.status_code == 404 else ""
            raise ServerError(f"{where.root}/engine/stats: {told}{hint}")
        for found in _objects(lines(answer.iter_bytes())):
            return found
    raise ServerError(f"{where.root}/engine/stats: is no feed of an omniserve server")


async def feed(where: Place) -> AsyncIterator[dict[str, Any] | str]:
    """Yield what the server shows, whenever that is, and sentences while it cannot be reached; without an end."""
    import httpx

    timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
    async with httpx.AsyncClient(headers=where.headers, timeout=timeout, trust_env=where.proxied) as client:
        while True:
            try:
                async with client.stream("GET", f"{where.root}/engine/stats") as answer:
                    if answer.status_code != 200:
                        yield refusal(answer.status_code, await answer.aread())
                    else:
                        rest = b""
                        async for piece in answer.aiter_bytes():
                            *whole, rest = (rest + piece).split(b"\n")
                            for found in _objects(whole):
                                yield found
                        yield "the server has ended the feed"
            except httpx.HTTPError as error:
                yield f"no answer: {' '.join(str(error).split()) or type(error).__name__}"
            await asyncio.sleep(AGAIN_SECONDS)


def _objects(content: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in content:
        if line.startswith(b"data: {"):
            try:
                found = json.loads(line[6:])
            except ValueError:
                continue
            if "kv_pages" in found:
                yield found
