"""A server with what the command line does not offer: `python -m tests.server.program JSON`.

Keys: model, options, server (with limits), null (seconds of a step without a model), engine (a kind of
tests.server.engines), log (level), json.
"""

import json
import sys
from typing import Any

from omniserve.base.config import Options
from omniserve.base.serving import server_options
from omniserve.engine.process import Null
from omniserve.server.run import configure_log, serve
from omniserve.server.service import Service
from tests.server.engines import command, no_pickle


def main(settings: dict[str, Any]) -> int:
    sys.addaudithook(no_pickle)
    configure_log(settings.get("log", "info"), as_json=settings.get("json", False))
    null = settings.get("null")
    engine = settings.get("engine")
    service = Service(
        settings.get("model"),
        Options(**settings.get("options", {})),
        server_options({"port": 0, **settings.get("server", {})}, origin="test"),
        null=None if null is None else Null(step_seconds=null),
        command=None if engine is None else command(engine),
    )
    return serve(service, on_ready=lambda address: print(f"Ready on {address}", file=sys.stderr, flush=True))  # noqa: T201  # a program


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
