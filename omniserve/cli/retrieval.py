"""`omniserve eval needle`, `ruler` and `longbench`: long contexts, dense against sparse."""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from omniserve.base.config import Options
from omniserve.base.errors import ConfigError
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, settings, whole_numbers
from omniserve.cli.loading import load, words
from omniserve.cli.output import Bars, as_json, say, table

if TYPE_CHECKING:
    from omniserve import LLM
    from omniserve.evals.retrieval import Case, Cell, Results

SPARSITY = (
    "static_sparsity", "attn_pattern", "sink", "local", "prefill_local", "max_prefills", "token_budget",
    "reuse_interval", "page_scores", "prefill_budget",
)  # fmt: skip
"""Options that go with `sparsity`; a dense run leaves them out."""

Output = Annotated[Path, Parameter(name=["--output", "-o"])]


def needle(
    model: str | None = None,
    /,
    *,
    output: Output,
    lengths: str = "512,1024,2048",
    depths: str = "0,25,50,75,100",
    samples: Whole = 2,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Needle in a haystack: a number hidden in filler text, for every length and depth, as table and heat map.

    With --sparsity the dense model is asked the same questions first. A killed run goes on where it was when it is
    started again with the same output folder.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME).
    output
        Folder for results.jsonl and needle.png.
    lengths
        Tokens of the prompts with their answers, with commas between them.
    depths
        Where the needle lies, in percent of the text.
    samples
        Questions per length and depth.
    json
        Print one JSON object.
    """
    options = settings(engine, common)
    _run(model, options, ("needle",), output, lengths, depths, samples, json=json)


def ruler(
    model: str | None = None,
    /,
    *,
    output: Output,
    tasks: str = "passkey,multikey,lines,pairs,tracking",
    lengths: str = "512,1024,2048",
    depths: str = "10,50,90",
    samples: Whole = 2,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Tasks in the manner of RULER: a passkey, several keys, lines, key-value pairs, variable tracking.

    Otherwise like `eval needle`.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME).
    output
        Folder for results.jsonl and a heat map for each task.
    tasks
        Some of needle, passkey, multikey, lines, pairs, tracking, with commas between them.
    lengths
        Tokens of the prompts with their answers, with commas between them.
    depths
        Where the (first) answer lies, in percent of the text.
    samples
        Questions per task, length and depth.
    json
        Print one JSON object.
    """
    options = settings(engine, common)
    _run(model, options, tuple(words(tasks, "--tasks")), output, lengths, depths, samples, json=json)


def _run(
    model: str | None,
    options: Options,
    tasks: tuple[str, ...],
    folder: Path,
    lengths: str,
    depths: str,
    samples: int,
    *,
    json: bool,
) -> None:
    from omniserve.evals import retrieval

    for task in tasks:
        if task not in retrieval.TASKS:
            raise ConfigError(f"--tasks {task}: must be of {', '.join(retrieval.TASKS)}")
    sizes, places = whole_numbers(lengths, "--lengths"), whole_numbers(depths, "--depths")
    if max(places) > 100:
        raise ConfigError(f"--depths {depths}: must be 0 to 100, in percent of the text")
    if samples < 1:
        raise ConfigError(f"--samples {samples}: must be 1 or more")
    cells = [
        retrieval.Cell(task=task, length=length, depth=depth, sample=sample)
        for task in tasks
        for length in sizes
        for depth in places
        for sample in range(samples)
    ]
    options = replace(options, max_model_len=options.max_model_len or max(sizes))
    if options.max_model_len is not None and max(sizes) > options.max_model_len:
        raise ConfigError(f"--lengths {lengths}: must be at most max_model_len={options.max_model_len}")
    about = _about(model, options)
    results = retrieval.Results(folder / "results.jsonl", about)

    def ask(llm: "LLM", run: str, todo: "list[Cell]", progress: Callable[[int, int], None]) -> None:
        make = retrieval.questions(llm, options.seed)
        retrieval.measure(llm, run, todo, results, make=make, rate=retrieval.score, on_progress=progress)

    runs = _both(model, options, cells, results, ask, json=json)
    _report(results, runs, cells, tasks, folder, about, json=json)


def longbench(
    model: str | None = None,
    /,
    *,
    data: Path,
    output: Output,
    tasks: str = "all",
    samples: Whole | None = None,
    plain: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """LongBench v1, English and code tasks, from your own copy of its data; dense against sparse, resumable.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME).
    data
        Folder with dataset2prompt.json, dataset2maxlen.json and <task>.jsonl of LongBench.
    output
        Folder for results.jsonl.
    tasks
        Names with commas between them, or "all": those whose file is there.
    samples
        First items of each task; default: all.
    plain
        Use no chat template; few-shot and code tasks never do.
    json
        Print one JSON object.
    """
    from omniserve.evals import longbench as bench
    from omniserve.evals import retrieval

    options = settings(engine, common)
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples {samples}: must be 1 or more")
    names = words(tasks, "--tasks") if tasks != "all" else [t for t in bench.METRICS if (data / f"{t}.jsonl").exists()]
    if not names:
        raise ConfigError(f"{data}: holds none of {', '.join(bench.METRICS)} as <task>.jsonl")
    items = {task: bench.read_items(data, task)[:samples] for task in names}
    cells = [
        retrieval.Cell(task=task, length=0, depth=0, sample=number)
        for task, of in items.items()
        for number in range(len(of))
    ]
    about = _about(model, options) | {"plain": plain, "max_model_len": options.max_model_len}
    results = retrieval.Results(output / "results.jsonl", about)

    def make(llm: "LLM", cell: "Cell") -> "Case":
        item = items[cell.task][cell.sample]
        room = llm.config.limits.max_model_len - item.max_tokens
        bare = plain or cell.task in bench.NO_TEMPLATE
        ids = bench.cut(llm.tokenizer.encode(item.prompt, special=bare), room if bare else max(room - 64, 2))
        if not bare:  # the text is cut before the template is put around it
            ids = llm.tokenizer.chat([{"role": "user", "content": llm.tokenizer.decode(ids)}])[:room]
        return retrieval.Case(cell=cell, ids=tuple(ids), answers=item.answers, max_tokens=item.max_tokens)

    def rate(one: "Case", text: str) -> float:
        return bench.score(one.cell.task, text, items[one.cell.task][one.cell.sample])

    def ask(llm: "LLM", run: str, todo: "list[Cell]", progress: Callable[[int, int], None]) -> None:
        retrieval.measure(llm, run, todo, results, make=partial(make, llm), rate=rate, on_progress=progress)

    runs = _both(model, options, cells, results, ask, json=json)
    rows = [[retrieval.mean(results.scores[run], task=task) for run in runs] for task in names]
    if json:
        scores = {task: dict(zip(runs, row, strict=True)) for task, row in zip(names, rows, strict=True)}
        as_json({**about, "scores": scores})
        return
    means = [sum(value or 0.0 for value in column) / len(column) for column in zip(*rows, strict=True)]
    lines = [[task, *_numbers(row)] for task, row in [*zip(names, rows, strict=True), ("mean", means)]]
    columns = ["task", *runs, *(["difference"] if len(runs) > 1 else [])]
    table(columns, lines, title=f"{model}: LongBench, {len(cells)} items")
    say(f"every answer: {output / 'results.jsonl'}")


def _about(model: str | None, options: Options) -> dict[str, Any]:
    """Return what a file of results is of."""
    said = {name: getattr(options, name) for name in SPARSITY if getattr(options, name) is not None}
    return {
        "model": model,
        "precision": options.precision,
        "seed": options.seed,
        "sparsity": options.sparsity,
        **said,
    }


def _both(
    model: str | None,
    options: Options,
    cells: "list[Cell]",
    results: "Results",
    ask: "Callable[[LLM, str, list[Cell], Callable[[int, int], None]], None]",
    *,
    json: bool,
) -> list[str]:
    """Ask the dense model, then the sparse one, whatever is not known yet; return the names of the runs."""
    off: dict[str, Any] = {"sparsity": "off", **dict.fromkeys(SPARSITY)}
    runs = {"dense": replace(options, **off)}
    if options.sparsity != "off":
        runs[options.sparsity] = options
    for run, chosen in runs.items():
        if all(cell in results.scores.get(run, {}) for cell in cells):
            continue
        with load(model, chosen, quiet=json, role=f"{run}: ") as llm, Bars(quiet=json) as bars:
            ask(llm, run, cells, partial(bars.update, run))
    return list(runs)


def _report(
    results: "Results",
    runs: list[str],
    cells: "list[Cell]",
    tasks: tuple[str, ...],
    folder: Path,
    about: dict[str, Any],
    *,
    json: bool,
) -> None:
    from omniserve.evals.heatmap import heatmap
    from omniserve.evals.retrieval import COUNTED, counted, mean

    asked = set(cells)
    scores = {run: {c: v for c, v in results.scores[run].items() if c in asked} for run in runs}
    pictures = []
    for task in tasks:
        picture = heatmap(scores, task=task, title=f"{about['model']}: {task}")
        if picture is not None:
            pictures.append(folder / f"{task}.png")
            pictures[-1].write_bytes(picture)
    good = counted(scores["dense"])
    rows = []
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        rows.append((task, length, [mean(scores[run], task=task, length=length) for run in runs]))
    of_good = [_over(scores[run], good) for run in runs]
    if json:
        entries = [{"run": run, **asdict(cell), "score": value} for run in runs for cell, value in scores[run].items()]
        counts = {"cells": len(good), **dict(zip(runs, of_good, strict=True))}
        as_json({**about, "scores": entries, f"where_dense_has_{COUNTED:.0f}": counts})
        return
    columns = ["task", "tokens", *runs, *(["difference"] if len(runs) > 1 else [])]
    lines = [[task, str(length), *_numbers(values)] for task, length, values in rows]
    lines.append([f"{len(good)} cells where dense has {COUNTED:.0f}", "", *_numbers(of_good)])
    table(columns, lines, title=f"{about['model']}: answers found, percent")
    say(f"every answer: {folder / 'results.jsonl'}" + "".join(f"; {path}" for path in pictures))
    if not pictures:
        say("no heat map: pip install matplotlib")


def _over(scores: "dict[Cell, float]", good: list[tuple[str, int, int]]) -> float | None:
    values = [value for cell, value in scores.items() if (cell.task, cell.length, cell.depth) in good]
    return sum(values) / len(values) if values else None


def _numbers(values: list[float | None]) -> list[str]:
    shown = ["–" if value is None else f"{value:.1f}" for value in values]
    if len(values) > 1:
        first, last = values[0], values[-1]
        shown.append("–" if first is None or last is None else f"{last - first:+.1f}")
    return shown


assert set(SPARSITY) < {option.name for option in fields(Options)}
