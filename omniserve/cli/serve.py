"""`omniserve serve`: an HTTP server that speaks OpenAI's API."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NoReturn

from cyclopts import Group, Parameter

from omniserve.base.config import Options
from omniserve.base.serving import NAMES, ServerOptions
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, server_layers
from omniserve.cli.flags import settings as engine_settings
from omniserve.cli.loading import leaving_at_once, need_torch
from omniserve.cli.output import Bars, say, warn

SERVER = Group("Server", sort_key=0)
Several = Annotated[list[str] | None, Parameter(negative="", consume_multiple=False)]


@Parameter(name="*", group=SERVER)
@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """Flags of the server; those that are not given are None.

    Parameters
    ----------
    host
        Address to listen at (default 127.0.0.1: this machine only).
    port
        Port to listen at (default 8000).
    uds
        Listen at this unix socket instead, which this user alone can connect to.
    api_key
        Key that requests must bring; may be given several times. Better kept in the --config file, as api-key.
    served_model_name
        Name of the model for clients; may be given several times.
    allowed_origins
        Origin whose web pages may call this server; may be given several times.
    ui
        Serve a web page at /.
    metrics_prefix
        Prefix of the metrics' names (default omniserve; vllm gives vLLM's names).
    shutdown_timeout
        Seconds that requests under way get after SIGTERM (default 30).
    max_num_queued_reqs
        Sequences that may wait and run (default 1024); more are answered with 503.
    max_num_queued_tokens
        Prompt tokens that may wait for their first token; default: no limit.
    tool_call_parser
        How the model writes tool calls; default: as its chat template says.
    reasoning_parser
        How it writes its reasoning; default: between <think> and </think> if its chat template knows them.
    log_json
        Log one JSON object per line.
    otlp_traces_endpoint
        Send spans of requests to this OTLP collector by HTTP, such as http://127.0.0.1:4318/v1/traces.
    """

    host: str | None = None
    port: Whole | None = None
    uds: str | None = None
    api_key: Several = None
    served_model_name: Several = None
    allowed_origins: Several = None
    ui: bool | None = None
    metrics_prefix: str | None = None
    shutdown_timeout: float | None = None
    max_num_queued_reqs: Whole | None = None
    max_num_queued_tokens: Whole | None = None
    tool_call_parser: Literal["auto", "hermes", "llama3_json", "mistral"] | None = None
    reasoning_parser: Literal["auto", "deepseek_r1", "qwen3"] | None = None
    log_json: Annotated[bool | None, Parameter(negative="")] = None
    otlp_traces_endpoint: str | None = None


def serve(
    model: str | None = None,
    /,
    *,
    server: ServerFlags = ServerFlags(),
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> NoReturn:
    """Serve a model over HTTP with OpenAI's API. SIGTERM lets requests finish, Ctrl-C does not.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co.
    """
    options, serving = settings(server, engine, common)
    serve_until_stopped(model, options, serving)


def serve_until_stopped(
    model: str | None,
    options: Options,
    serving: ServerOptions,
    *,
    on_ready: Callable[[str], None] = lambda address: None,
) -> NoReturn:
    """Serve until a signal or the engine's death, then end the process with the code for it.

    on_ready  called with the address once requests are taken in
    """
    with leaving_at_once():
        from omniserve.base.config import check_model
        from omniserve.client import LoadError
        from omniserve.server.run import configure_log
        from omniserve.server.run import serve as run
        from omniserve.server.service import Service
    need_torch()
    check_model(model, options)
    configure_log(serving.log_level, as_json=serving.log_json)
    if not (serving.loopback or serving.uds or serving.api_key):
        warn(f"others can reach {serving.host} and there is no API key: give one with api-key in the --config file")
    with Bars(quiet=serving.log_json) as bars:

        def ready(address: str) -> None:
            bars.__exit__(None, None, None)
            loaded = service.ready
            assert loaded is not None
            for sentence in loaded.warnings:
                warn(sentence)
            if not serving.log_json:
                say(f"Ready on {address} (page, docs, metrics); model {service.names[0]}")
            on_ready(address)

        service = Service(model, options, serving, on_progress=bars.update)
        try:
            code = run(service, on_ready=ready)
        except LoadError as error:
            raise RuntimeError(f"the engine was not loaded: {error}") from None
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process now: a thread may be in the middle of an import, or of a long text, and nobody waits for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def settings(server: ServerFlags, engine: EngineFlags, common: Common) -> tuple[Options, ServerOptions]:
    """Return the options of engine and server: flag, then environment, then `--config` file."""
    options = engine_settings(engine, common)
    values = {one.name: getattr(server, one.name) for one in fields(server)}
    values["log_level"] = common.log_level
    known = {name: value for name, value in values.items() if name in NAMES and value is not None}
    return options, server_layers(known, common)[0]
