"""A server with what the command line does not offer: `python -m tests.server.program JSON`.

Keys: model, options, server (with limits), null (seconds of a step without a model), engine (a kind of
tests.server.engines), faults (true: those of tests.server.faults), log (level), json.
"""

import asyncio
import json
import signal
import sys
import threading
from typing import Any

from omniserve.base.config import Options
from omniserve.base.serving import server_options
from omniserve.engine.process import Null
from omniserve.server.run import configure_log, serve
from omniserve.server.service import Service
from tests.server import faults
from tests.server.engines import command, no_pickle


def main(settings: dict[str, Any]) -> int:
    sys.addaudithook(no_pickle)
    configure_log(settings.get("log", "info"), as_json=settings.get("json", False))
    if settings.get("faults"):
        faults.install()
    null = settings.get("null")
    engine = settings.get("engine")
    service = Service(
        settings.get("model"),
        Options(**settings.get("options", {})),
        server_options({"port": 0, **settings.get("server", {})}, origin="test"),
        null=None if null is None else Null(step_seconds=null),
        command=None if engine is None else command(engine),
    )
    return serve(service, on_ready=ready)


def ready(address: str) -> None:
    """Say so; from then on SIGUSR1 asks how many tasks and threads there are."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, report)
    say(f"Ready on {address}")


def report() -> None:
    say(f"counted tasks={len(asyncio.all_tasks())} threads={threading.active_count()}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # a program


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
