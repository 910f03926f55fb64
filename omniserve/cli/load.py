"""`omniserve bench serving`: drawn or recorded traffic against a server that is running."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from omniserve.base.errors import ConfigError, ServerError
from omniserve.cli.connection import place
from omniserve.cli.flags import Common, Whole
from omniserve.cli.loading import cells
from omniserve.cli.output import Bars, as_json, say, table, warn
from omniserve.cli.report import REPORT, check_plot

if TYPE_CHECKING:
    from omniserve.bench.latency import Report
    from omniserve.bench.workload import Planned

TRAFFIC = Group("Traffic", sort_key=0)
PROMPTS = 100
_LATE_MS = 10.0
"""At the 99th percentile the client may be as late as this before its figures are doubted."""


@Parameter(name="*", group=TRAFFIC)
@dataclass(frozen=True, kw_only=True)
class TrafficFlags:
    """What is asked, and when.

    Parameters
    ----------
    num_prompts
        Requests to send (default 100; with --trace all of it).
    input_len
        Tokens of each prompt (default 128).
    output_len
        Tokens of each answer (default 128).
    range_ratio
        Draw lengths evenly from len * (1 - this) to len * (1 + this); 0 to 1.
    trace
        File of recorded traffic instead: Azure's CSV or Mooncake's JSON lines. Its equal hash_ids become equal parts of
        prompts.
    speedup
        Seconds of the trace that pass in one.
    max_input_len
        Cut longer prompts of the trace to this many tokens.
    max_output_len
        Cut longer answers of the trace to this many tokens.
    request_rate
        Requests per second on average, instead of the trace's own times; inf: all at once.
    burstiness
        Shape of the gamma distribution of the gaps: 1 is Poisson, below it burstier, above it steadier.
    max_concurrency
        Most requests under way. Without a rate each answer is followed by the next request.
    endpoint
        completions sends token ids, chat sends words of about one token each.
    vocab_size
        Token ids are drawn below this number.
    ignore_eos
        Answers are made as long as planned, through a field that not every server knows.
    seed
        Equal seeds ask for the same at the same times.
    num_warmups
        Requests before the test, which are not counted.
    """

    num_prompts: Whole | None = None
    input_len: Whole | None = None
    output_len: Whole | None = None
    range_ratio: float = 0.0
    trace: Path | None = None
    speedup: float | None = None
    max_input_len: Whole | None = None
    max_output_len: Whole | None = None
    request_rate: float | None = None
    burstiness: float = 1.0
    max_concurrency: Whole | None = None
    endpoint: Literal["completions", "chat"] = "completions"
    vocab_size: Whole = 256
    ignore_eos: bool = True
    seed: Whole = 0
    num_warmups: Whole = 1


NO_TRAFFIC_FLAGS = TrafficFlags()


def serving(
    *,
    url: str | None = None,
    api_key: str | None = None,
    served_model_name: str | None = None,
    goodput: Annotated[list[str] | None, Parameter(negative="", consume_multiple=True, group=REPORT)] = None,
    metric_percentiles: Annotated[str, Parameter(group=REPORT)] = "50,90,99",
    plot: Annotated[Path | None, Parameter(group=REPORT)] = None,
    json: Annotated[bool, Parameter(negative="", group=REPORT)] = False,
    traffic: TrafficFlags = NO_TRAFFIC_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Send traffic to a server and report throughput, latencies and goodput. Any server of OpenAI's API will do.

    Parameters
    ----------
    url
        Where the server is (default http://127.0.0.1:8000/v1).
    api_key
        Its key; better kept in OMNISERVE_API_KEY, or as api-key in the --config file.
    served_model_name
        The model to ask for (default: the first that the server lists).
    goodput
        Count the requests that keep all of these, in milliseconds: ttft:200 tpot:50 e2el:5000.
    metric_percentiles
        Percentiles of every latency, with commas between them.
    plot
        PNG file for a picture of the latencies and of what was under way.
    json
        Print one JSON object.
    """
    where = place(url, api_key, common)
    _check(traffic, plot)
    from omniserve.bench import workload
    from omniserve.bench.latency import Report, goodput_terms
    from omniserve.bench.latency import plot as draw
    from omniserve.bench.serving import Target, measure
    from omniserve.remote import served_model

    terms, percentiles = goodput_terms(goodput or ()), _percentiles(metric_percentiles)
    requests, cut = _requests(traffic)
    with where.client() as client:
        card = served_model(client, where, served_model_name)
    workload.check_fits(requests, card.max_model_len)
    target = Target(
        place=where,
        model=card.name,
        endpoint=traffic.endpoint,
        prompts=workload.Prompts(vocab=traffic.vocab_size, seed=traffic.seed),
        ignore_eos=traffic.ignore_eos,
    )
    with Bars(quiet=json) as bars:
        run = measure(
            target,
            requests,
            concurrency=traffic.max_concurrency,
            warmups=traffic.num_warmups,
            on_progress=lambda done, total: bars.update("answers", done, total),
        )
    report = Report(run=run, percentiles=percentiles, terms=terms)
    found = {"url": where.base, "model": card.name, **_traffic(traffic, requests, cut), **report.as_object()}
    if not report.good:
        raise ServerError(f"all {len(requests)} requests failed: {next(iter(found['errors']))}")
    if plot is not None:
        draw(report, plot, title=f"{card.name}: {_sentence(found)}")
    _doubts(found)
    if json:
        as_json(found)
    else:
        _print(report, found)


def _check(traffic: TrafficFlags, plot: Path | None) -> None:
    """Raise ConfigError for values that mean nothing, before anything is sent."""
    for name in ("num_prompts", "input_len", "output_len", "max_input_len", "max_output_len", "max_concurrency"):
        value = getattr(traffic, name)
        if value is not None and value < 1:
            raise ConfigError(f"{_flag(name)} {value}: must be 1 or more")
    for name, most in (("request_rate", math.inf), ("burstiness", 1e6), ("speedup", 1e9)):
        value = getattr(traffic, name)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{_flag(name)} {value:g}: must be above 0")
    if not 0 <= traffic.range_ratio <= 1:
        raise ConfigError(f"--range-ratio {traffic.range_ratio:g}: must be 0 to 1")
    for name, least in (("num_warmups", 0), ("seed", 0), ("vocab_size", 2)):
        if getattr(traffic, name) < least:
            raise ConfigError(f"{_flag(name)} {getattr(traffic, name)}: must be {least} or more")
    only = ("input_len", "output_len") if traffic.trace is not None else ("speedup", "max_input_len", "max_output_len")
    for name in only:
        if getattr(traffic, name) is not None:
            how = "does not go" if traffic.trace is not None else "goes"
            raise ConfigError(f"{_flag(name)} {how} with --trace{', which has lengths' if how != 'goes' else ''}")
    if traffic.trace is not None and traffic.range_ratio:
        raise ConfigError("--range-ratio does not go with --trace, which has lengths")
    if traffic.burstiness != 1 and (traffic.request_rate is None or math.isinf(traffic.request_rate)):
        raise ConfigError("--burstiness goes with --request-rate")
    if traffic.speedup is not None and traffic.request_rate is not None:
        raise ConfigError("--speedup and --request-rate: give one of the two")
    check_plot(plot)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0 < one < 100 for one in found):
        raise ConfigError(f"--metric-percentiles {text}: must be numbers between 0 and 100 such as 50,99,99.9")
    return tuple(sorted(set(found)))


def _requests(traffic: TrafficFlags) -> "tuple[list[Planned], int]":
    """Return what is to be sent, and how many of a trace were cut."""
    from omniserve.bench import workload

    cut = 0
    if traffic.trace is not None:
        requests = workload.read_trace(traffic.trace, most=traffic.num_prompts, speedup=traffic.speedup or 1.0)
        requests, cut = workload.cut(requests, traffic.max_input_len, traffic.max_output_len)
        rate = traffic.request_rate
    else:
        requests = workload.drawn(
            traffic.num_prompts or PROMPTS,
            traffic.input_len or 128,
            traffic.output_len or 128,
            spread=traffic.range_ratio,
            seed=traffic.seed,
        )
        rate = traffic.request_rate or math.inf
    if rate is not None:
        times = workload.arrivals(len(requests), rate, traffic.burstiness, traffic.seed)
        requests = workload.timed(requests, times)
    return requests, cut


def _traffic(traffic: TrafficFlags, requests: "list[Planned]", cut: int) -> dict[str, Any]:
    """Return what was sent, for the report."""
    rate = traffic.request_rate
    return {
        "endpoint": traffic.endpoint,
        "trace": None if traffic.trace is None else traffic.trace.name,
        "speedup": (traffic.speedup or 1.0) if traffic.trace is not None and rate is None else None,
        "request_rate": None if rate is None or math.isinf(rate) else rate,
        "burstiness": traffic.burstiness,
        "max_concurrency": traffic.max_concurrency,
        "seed": traffic.seed,
        "planned_prompt_tokens": sum(one.input_len for one in requests),
        "planned_output_tokens": sum(one.output_len for one in requests),
        "cut": cut,
    }


def _sentence(found: dict[str, Any]) -> str:
    """Return what was sent, for people."""
    if found["request_rate"] is not None:
        how = f"{found['request_rate']:g} requests/s, burstiness {found['burstiness']:g}"
    elif found["trace"] is not None:
        how = f"arrivals of {found['trace']}, {found['speedup']:g} times as fast"
    else:
        how = "all at once" if found["max_concurrency"] is None else "one after the other"
    most = "" if found["max_concurrency"] is None else f", at most {found['max_concurrency']} under way"
    return f"{found['requests']} requests, {how}{most}"


def _doubts(found: dict[str, Any]) -> None:
    """Warn of what makes the figures mean less."""
    if found["failed"]:
        told = "; ".join(f"{count} times {error}" for error, count in list(found["errors"].items())[:3])
        warn(f"{found['failed']} of {found['requests']} requests failed: {told}")
    if found["cut"]:
        warn(f"{found['cut']} of {found['requests']} requests were cut by --max-input-len or --max-output-len")
    if found["other_length"]:
        warn(f"{found['other_length']} answers are not as long as planned: does the server know ignore_eos?")
    if not found["tokens_counted_by_server"]:
        warn("the server does not count tokens: chunks are counted instead")
    lag = found["client_lag_ms"]
    if lag is not None and (late := lag.get("p99", lag["max"])) > _LATE_MS:
        warn(f"this client was late by {late:.0f} ms at the 99th percentile: the server may be better than it looks")


def _print(report: "Report", found: dict[str, Any]) -> None:
    """Print the report for people."""
    from omniserve.bench.latency import METRICS

    say(f"{found['model']} at {found['url']}: {_sentence(found)}")
    share = found["goodput_share"]
    rows: list[list[Any]] = [
        ["completed", f"{found['completed']} of {found['requests']}"],
        ["seconds", found["duration_seconds"]],
        ["requests/s", found["requests_per_second"]],
        ["output tokens/s", found["output_tokens_per_second"]],
        ["tokens/s with prompts", found["total_tokens_per_second"]],
        ["prompt tokens (cached)", f"{found['prompt_tokens']:,} ({found['cached_tokens']:,})"],
        ["output tokens", found["output_tokens"]],
        ["most at once", found["most_at_once"]],
    ]
    if share is not None:
        terms = " ".join(f"{name}:{most:g}" for name, most in found["goodput_terms_ms"].items())
        rows.append([f"goodput/s ({terms})", f"{found['goodput_requests_per_second']:.4g} ({share:.0%})"])
    table(["throughput", ""], [cells(row) for row in rows])
    shown = ["mean", *(f"p{one:g}" for one in report.percentiles), "max"]
    lines = {**{f"{name}_ms": words for name, words in METRICS.items()}, "sent_late_ms": "sent late"}
    lines["client_lag_ms"] = "client's own lag"
    table(
        ["milliseconds", *shown],
        [cells([words, *(found[key][one] for one in shown)]) for key, words in lines.items() if found[key] is not None],
    )
