"""`omniserve bench throughput`: tokens per second of whole batches, beside transformers if asked; QServe's matrix."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from omniserve.base.config import Options, Precision, check_model
from omniserve.base.errors import ConfigError
from omniserve.bench.results import Results, Row, ratio, read_rows
from omniserve.cli import machine
from omniserve.cli.cases import Case, Measure, asked, left_over, precision_label, rows_of, run_cases
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, settings, whole_numbers
from omniserve.cli.loading import cells, leaving_at_once, words
from omniserve.cli.output import Bars, as_json, say, table
from omniserve.cli.report import NO_REPORT_FLAGS, ReportFlags, check_plot, configuration_line, device_of, machine_line

if TYPE_CHECKING:
    from omniserve import LLM
    from omniserve.bench.throughput import Runner, Speed

QSERVE = (
    "llama-3-8b", "llama-2-7b", "llama-2-13b", "mistral-7b", "yi-34b", "llama-30b", "llama-2-70b", "qwen1.5-72b",
)  # fmt: skip
"""The models of QServe's paper, in the order in which they are run."""

KEYS = ("model", "precision", "batch", "input_len", "output_len", "options", "device", "beside")
"""What tells rows apart; `beside`: of a peer's row, the precision that it was measured in turn with."""

DUMMY = " (dummy weights)"
"""Ends the name of a model that is only a shape."""

METRIC = "output_tokens_per_second"


def throughput(
    model: str | None = None,
    /,
    *,
    batch: Annotated[str | None, Parameter(name=("--num-prompts", "--batch"))] = None,
    input_len: Whole | None = None,
    output_len: Whole | None = None,
    repeats: Whole = 3,
    precisions: str | None = None,
    suite: Literal["qserve"] | None = None,
    peer: Literal["transformers"] | None = None,
    report: ReportFlags = NO_REPORT_FLAGS,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Tokens per second of random prompts that are submitted at once: greedy, end of sequence ignored.

    Medians of the repeats, from the first submit to the last token, after one short warm-up; prefix caching is off
    unless a flag turns it on.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    batch
        Prompts submitted at once (default 8; of a suite 1024,256,64); several sizes with commas between them (1,8).
    input_len
        Tokens of each prompt (default 128; of a suite 1024).
    output_len
        Tokens to produce for each prompt (default 128; of a suite 512).
    repeats
        Measurements, of which the median counts.
    precisions
        Names with commas between them, instead of --precision.
    suite
        Run the models of QServe's paper with dummy weights (default precision w4a8kv4), one model per call or that of
        --shape; a later call goes on with the rows that --results does not hold.
    peer
        Measure this as well, in turn with the engine: same weights, prompts, lengths, dtype and threads.
    """
    base = Options(enable_prefix_caching=False)
    if suite is not None:
        base = replace(base, load_format="dummy", precision="w4a8kv4")
    options = settings(engine, common, base=base)
    batches = whole_numbers(batch or ("8" if suite is None else "1024,256,64"), "--num-prompts")
    usual = (128, 128) if suite is None else (1024, 512)
    lengths = tuple(one if given is None else given for given, one in zip((input_len, output_len), usual, strict=True))
    numbers = {"num-prompts": min(batches), "input-len": lengths[0], "output-len": lengths[1], "repeats": repeats}
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"--{name}={value}: must be 1 or more")
    check_plot(report.plot)
    path = report.results or (None if suite is None else Path(f"bench-{suite}.json"))
    shapes = [options.shape] if suite is None or options.shape is not None else list(QSERVE)
    for shape in shapes:
        check_model(model, replace(options, shape=shape))
    if peer is not None and (path is not None or model is None):
        why = "--results keeps rows of the engine alone" if path else "dummy weights are its own, give a model"
        raise ConfigError(f"--peer {peer}: {why}")
    others = [] if report.compare is None else read_rows(report.compare)
    results = Results(path, KEYS)
    chosen = _precisions(options, precisions)
    cases = _cases(model, options, asked(options, base), shapes, chosen, batches, lengths)
    run_cases(cases, results, _measure(model, repeats, options.seed, peer), suite=suite is not None, quiet=report.json)
    _tell(rows_of(cases, results), others, report, repeats=repeats, peer=peer is not None)


def _precisions(options: Options, precisions: str | None) -> list[str]:
    """Return the precisions to measure. Raises ConfigError for an unknown one."""
    if precisions is None:
        return [options.precision]
    chosen = words(precisions, "--precisions")
    for word in chosen:
        Precision.parse(word)
    return chosen


def _cases(
    model: str | None,
    options: Options,
    told: str,
    shapes: Sequence[str | None],
    precisions: Sequence[str],
    batches: Sequence[int],
    lengths: Sequence[int],
) -> list[Case]:
    """Return an engine for each shape and precision, large enough for every batch."""
    most = max(batches)
    wide = replace(
        options,
        max_num_seqs=options.max_num_seqs or most,
        max_num_batched_tokens=options.max_num_batched_tokens or (None if most <= 512 else max(8192, most)),
        max_model_len=options.max_model_len or sum(lengths),
    )
    device, cases = device_of(options), []
    for shape in shapes:
        for word in precisions:
            one = replace(wide, precision=word, shape=shape)
            head = {"model": label_of(model, one), "precision": precision_label(one), "options": told, "device": device}
            size = {"input_len": lengths[0], "output_len": lengths[1]}
            cases.append(Case(model=model, options=one, heads=[{**head, "batch": count, **size} for count in batches]))
    return cases


def label_of(model: str | None, options: Options) -> str:
    """Return what the output calls the model."""
    return f"{options.shape}{DUMMY}" if model is None else model


def _measure(model: str | None, repeats: int, seed: int, peer: str | None) -> Measure:
    """Return what measures one batch: the engine's row, then the peer's."""
    peers: dict[str, Runner] = {}

    def rows(llm: "LLM", head: dict[str, Any], bars: Bars) -> list[dict[str, Any]]:
        from omniserve.bench.throughput import engine_runner, measure, random_prompts, transformers_runner

        label, dtype = llm.config.precision.label, llm.config.dtype
        runners, names = [engine_runner(llm)], [label]
        if peer is not None and model is not None:
            if dtype not in peers:
                with leaving_at_once():
                    peers[dtype] = transformers_runner(model, dtype=dtype)
            runners.append(peers[dtype])
            names.append(peer)
        speeds = measure(
            runners,
            random_prompts(head["batch"], head["input_len"], llm.spec.vocab, seed=seed),
            head["output_len"],
            repeats=repeats,
            step_tokens=llm.config.limits.max_step_tokens,
            on_progress=lambda done, total: bars.update(f"batch {head['batch']}", done, total),
        )
        at_once = llm.plan.kv_tokens // (head["input_len"] + head["output_len"])
        about = {"dtype": dtype, "dummy_weights": model is None, "repeats": repeats, "kv_holds": at_once}
        return [
            {"runner": name, **about, **_row(speed, speeds[1:]), "beside": label if place else None}
            for place, (name, speed) in enumerate(zip(names, speeds, strict=True))
        ]

    return rows


def _row(speed: "Speed", peers: "list[Speed]") -> dict[str, Any]:
    """Return a row; against the peer the rate of decoding and the share of equal tokens are given."""
    other = peers[0] if peers and peers[0] is not speed else None
    rate, theirs = speed.decode_tokens_per_second, None if other is None else other.decode_tokens_per_second
    equal = [] if other is None else [a == b for a, b in zip(_flat(speed), _flat(other), strict=True)]
    return {
        "prompt_seconds": speed.prompt_seconds,
        "first_token_seconds": speed.first_seconds,
        "total_seconds": speed.total_seconds,
        "prompt_tokens_per_second": speed.prompt_tokens_per_second,
        "decode_tokens_per_second": rate,
        METRIC: speed.output_tokens_per_second,
        "decode_ratio": None if rate is None or theirs is None else rate / theirs,
        "same_tokens": sum(equal) / len(equal) if equal else None,
    }


def _flat(speed: "Speed") -> list[int]:
    return [token for tokens in speed.tokens for token in tokens]


def _tell(rows: list[Row], others: list[Row], report: ReportFlags, *, repeats: int, peer: bool) -> None:
    """Print the rows, and draw them if asked."""
    facts = machine.facts()
    compared = [{**row, "against": ratio(row, others, (*KEYS[:5], "beside"), METRIC)} for row in rows]
    if report.plot is not None:
        _draw(compared, report.plot, title=machine_line(facts))
    left = left_over(rows)
    if report.json:
        first = rows[0]
        named = {"model": first["model"], "dummy_weights": first["model"].endswith(DUMMY)}
        as_json({**named, "repeats": repeats, **facts, "rows": compared})
    else:
        say(machine_line(facts))
        for line in dict.fromkeys(configuration_line(row) for row in rows if "configuration" in row):
            say(line)
        _print(compared, peer=peer, against=bool(others), repeats=repeats)
    if left is not None:
        say(left)


def _print(rows: list[dict[str, Any]], *, peer: bool, against: bool, repeats: int) -> None:
    first, several = rows[0], len({row["model"] for row in rows}) > 1
    columns = {"model": "model"} if several else {}
    columns |= {"runner": "runner", "batch": "batch"}
    if not several:
        columns |= {"prompt tok/s": "prompt_tokens_per_second", "decode tok/s": "decode_tokens_per_second"}
    columns |= {"output tok/s": METRIC, "first token s": "first_token_seconds", "total s": "total_seconds"}
    if peer:
        columns |= {"decode vs peer": "decode_ratio", "same tokens": "same_tokens"}
    if against:
        columns["against"] = "against"
    if several:
        columns["status"] = "status"
    short = [{"runner": row["precision"], **row, "model": row["model"].removesuffix(DUMMY)} for row in rows]
    dtypes = " ".join(sorted({row["dtype"] for row in rows if "dtype" in row}))
    title = (
        f"{'dummy weights' if several else first['model']}, {first['input_len']} prompt tokens, {first['output_len']} "
        f"produced, {dtypes}, median of {repeats}"
    )
    table(list(columns), [cells([row.get(key) for key in columns.values()]) for row in short], title=title)


def _draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    from omniserve.bench.plots import Panel, draw

    measured = [row for row in rows if METRIC in row]
    names = sorted({(row["model"], row["runner"]) for row in measured})
    lines = {
        " ".join(name): sorted((row["batch"], row[METRIC]) for row in measured if (row["model"], row["runner"]) == name)
        for name in names
    }
    draw([Panel(title="throughput", x="requests", y="output tokens/s", lines=lines, log_x=True)], path, title=title)
