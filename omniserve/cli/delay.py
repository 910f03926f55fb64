"""`omniserve bench latency`: time to the first token and from token to token against the context; LServe's matrix."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omniserve.base.config import Options, Precision, check_model
from omniserve.base.errors import ConfigError
from omniserve.bench.results import Results, Row, ratio, read_rows
from omniserve.cli import machine
from omniserve.cli.cases import Case, Measure, asked, left_over, precision_label, rows_of, run_cases
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, settings, whole_numbers
from omniserve.cli.loading import cells, words
from omniserve.cli.output import Bars, as_json, say, table
from omniserve.cli.report import NO_REPORT_FLAGS, ReportFlags, check_plot, configuration_line, device_of, machine_line
from omniserve.cli.speed import label_of

if TYPE_CHECKING:
    from omniserve import LLM

MODES: dict[str, dict[str, Any]] = {
    "dense": {"sparsity": "off"},
    "static": {"sparsity": "static"},
    "static-256": {"sparsity": "static", "prefill_local": 256},
    "lserve": {"sparsity": "lserve"},
    "lserve+prefill": {"sparsity": "lserve", "prefill_budget": 16384},
}
"""LServe's steps: every head reads everything; half of the heads stream, with the default window at prompt positions
and with that of produced ones; the others choose pages for produced tokens; and for the prompt beyond 32K as well."""

LSERVE = [("w4a8kv4", mode) for mode in MODES] + [("w8a8kv8", "dense"), ("w16a16kv16", "dense")]
"""The engines of the suite, in the order in which they are run."""

SHAPE = "llama-3-8b-1048k"

CONTEXTS = ",".join(str(1024 << step) for step in range(2, 10))
"""4K to 512K."""

KEYS = ("model", "precision", "mode", "context", "options", "device")
"""What tells rows apart."""


def latency(
    model: str | None = None,
    /,
    *,
    input_len: str | None = None,
    output_len: Whole = 64,
    repeats: Whole = 3,
    precisions: str | None = None,
    suite: Literal["lserve"] | None = None,
    report: ReportFlags = NO_REPORT_FLAGS,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Time to the first token, and mean and 99th percentile from token to token, of one request at a time.

    Random prompts, greedy, end of sequence ignored, prefix caching off unless a flag turns it on; sampling and the
    making of text included. Medians of the repeats; 8 tokens after the first one do not count.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    input_len
        Tokens of the prompt (default 1024; of a suite 4096 to 524288), several lengths with commas between them.
    output_len
        Tokens whose gaps are measured.
    repeats
        Measurements, of which the median counts.
    precisions
        Names with commas between them, instead of --precision.
    suite
        Run LServe's matrix with dummy weights (default shape llama-3-8b-1048k): dense, streaming heads, page selection,
        selection for prompts; a random half of the heads streams. A later call goes on with the rows that --results
        does not hold.
    """
    base = Options(enable_prefix_caching=False, max_num_seqs=1)
    if suite is not None:
        base = replace(base, load_format="dummy", shape=SHAPE)
    options = settings(engine, common, base=base)
    contexts = whole_numbers(input_len or ("1024" if suite is None else CONTEXTS), "--input-len")
    for name, value in {"input-len": min(contexts), "output-len": output_len, "repeats": repeats}.items():
        if value < 1:
            raise ConfigError(f"--{name}={value}: must be 1 or more")
    check_plot(report.plot)
    check_model(model, options)
    if suite is not None and options.sparsity != "off":
        raise ConfigError(f"--sparsity {options.sparsity}: --suite {suite} runs every kind, leave it out")
    path = report.results or (None if suite is None else Path(f"bench-{suite}.json"))
    others = [] if report.compare is None else read_rows(report.compare)
    results = Results(path, KEYS)
    chosen = _engines(options, precisions, suite)
    with tempfile.TemporaryDirectory() as folder:
        place = None if suite is None else Path(folder)
        cases = _cases(model, options, asked(options, base), chosen, contexts, output_len, place)
        run_cases(
            cases,
            results,
            _measure(output_len, repeats, options.seed),
            suite=suite is not None,
            quiet=report.json,
            prepare=lambda llm: _warm_up(llm, output_len, options.seed),
        )
        _tell(rows_of(cases, results), others, report, tokens=output_len, repeats=repeats)


def _engines(options: Options, precisions: str | None, suite: str | None) -> list[tuple[str, str]]:
    """Return the precisions and modes to measure."""
    wanted = None if precisions is None else words(precisions, "--precisions")
    for word in wanted or ():
        Precision.parse(word)
    if suite is None:
        mode = "dense" if options.sparsity == "off" else options.sparsity
        return [(word, mode) for word in wanted or [options.precision]]
    if wanted is None and options.precision != "auto":
        wanted = [options.precision]
    return LSERVE if wanted is None else [(word, mode) for word in wanted for mode in MODES]


def _cases(
    model: str | None,
    options: Options,
    told: str,
    engines: Sequence[tuple[str, str]],
    contexts: Sequence[int],
    tokens: int,
    folder: Path | None,
) -> list[Case]:
    """Return an engine for each precision and mode, for the longest context.

    folder  where the pattern of a suite's streaming heads is written; None: no suite
    """
    from omniserve.bench.single import SETTLING

    longest = options.max_model_len or max(contexts) + 1 + SETTLING + tokens
    device, cases = device_of(options), []
    for word, mode in engines:
        one = replace(options, precision=word, max_model_len=longest, **({} if folder is None else MODES[mode]))
        if folder is not None and one.sparsity in ("static", "lserve") and one.attn_pattern is None:
            one = replace(one, attn_pattern=str(_random_pattern(one, folder)))
        head = {"model": label_of(model, one), "precision": precision_label(one), "mode": mode}
        head |= {"options": told, "device": device}
        cases.append(Case(model=model, options=one, heads=[{**head, "context": length} for length in contexts]))
    return cases


def _random_pattern(options: Options, folder: Path) -> Path:
    """Write a pattern that tells the heads of a shape apart by chance, the same every time, and return its folder."""
    import random

    from omniserve.formats.dummy import CONFIGS
    from omniserve.models.families import family
    from omniserve.sparsity.patterns import TSV

    assert options.shape is not None, "a suite has a shape"
    spec = family(CONFIGS[options.shape]).spec(CONFIGS[options.shape])
    draw = random.Random(0)
    lines = ["\t".join(f"{draw.random():.6f}" for _ in range(spec.kv_heads)) for _ in range(spec.layers)]
    (folder / TSV).write_text("\n".join(lines) + "\n")
    return folder


def _warm_up(llm: "LLM", tokens: int, seed: int) -> None:
    from omniserve.bench.single import SETTLING, warm_up

    warm_up(llm, llm.config.limits.max_model_len - 1 - SETTLING - tokens, seed)


def _measure(tokens: int, repeats: int, seed: int) -> Measure:
    """Return what measures one context."""

    def rows(llm: "LLM", head: dict[str, Any], bars: Bars) -> list[dict[str, Any]]:
        from omniserve.bench.single import measure

        found = measure(
            llm,
            head["context"],
            tokens=tokens,
            repeats=repeats,
            seed=seed,
            on_progress=lambda done, total: bars.update(f"{head['context']}", done, total),
        )
        return [
            {
                "runner": llm.config.precision.label,
                "dtype": llm.config.dtype,
                "tokens": tokens,
                "repeats": repeats,
                "first_token_seconds": found.first,
                "token_ms": 1000 * found.mean,
                "token_p99_ms": 1000 * found.p99,
            }
        ]

    return rows


def _tell(rows: list[Row], others: list[Row], report: ReportFlags, *, tokens: int, repeats: int) -> None:
    """Print the rows, and draw them if asked."""
    facts = machine.facts()
    compared = [
        {
            **row,
            "first_against": ratio(row, others, KEYS[:4], "first_token_seconds"),
            "token_against": ratio(row, others, KEYS[:4], "token_ms"),
        }
        for row in rows
    ]
    if report.plot is not None:
        _draw(compared, report.plot, title=machine_line(facts))
    left = left_over(rows)
    if report.json:
        as_json({"model": rows[0]["model"], **facts, "rows": compared})
    else:
        say(machine_line(facts))
        for line in dict.fromkeys(configuration_line(row) for row in rows if "configuration" in row):
            say(line)
        columns = {"engine": "engine", "context": "context", "first token s": "first_token_seconds"}
        columns |= {"token ms": "token_ms", "p99 ms": "token_p99_ms"}
        columns |= {"first against": "first_against", "token against": "token_against"} if others else {}
        made = [{**row, "engine": _engine(row)} for row in compared]
        title = f"{rows[0]['model']}, one request, {tokens} tokens measured, median of {repeats}"
        table(list(columns), [cells([row.get(key) for key in columns.values()]) for row in made], title=title)
    if left is not None:
        say(left)


def _engine(row: Row) -> str:
    """Return what is told of a row's engine, or what became of the row."""
    name = f"{row.get('runner', row['precision'])} {row['mode']}"
    return name if "runner" in row else f"{name}: {row['status']}"


def _draw(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    from omniserve.bench.plots import Panel, draw

    measured = [row for row in rows if "runner" in row]
    titles = {"first_token_seconds": "time to the first token, s", "token_ms": "from token to token, ms"}
    panels = []
    for key, words_ in titles.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in measured:
            lines.setdefault(_engine(row), []).append((row["context"], row[key]))
        panels.append(
            Panel(title=words_, x="context in tokens", y=words_, lines=lines, log_x=True, log_y=key != "token_ms")
        )
    draw(panels, path, title=title)
