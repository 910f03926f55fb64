"""`omniserve eval perplexity`: how well a model predicts a text through the served path."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from omniserve.base.config import Options, Precision
from omniserve.base.errors import ConfigError
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, read_text, settings, whole_numbers
from omniserve.cli.loading import cells, load, words
from omniserve.cli.output import Bars, as_json, table

if TYPE_CHECKING:
    from omniserve import LLM
    from omniserve.evals.perplexity import Score

WINDOW = 2048


def perplexity(
    model: str | None = None,
    /,
    *,
    text: Path,
    windows: str | None = None,
    length: Whole = WINDOW,
    stride: Whole | None = None,
    reference: str | None = None,
    precisions: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Perplexity of a text through the served path: paged, with the quantized KV cache.

    The text is tokenized as one string without special tokens and cut into independent windows; positions start
    at 0 in each and its first token is context only.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    text
        UTF-8 text file.
    windows
        Which windows, such as 0,10 or 0-19 (both ends included); default: all that are whole.
    length
        Tokens of a window, at most the model's context.
    stride
        Tokens from the start of one window to the next; default: the length.
    reference
        Compare with this precision of the same model (w16a16kv16), or with this model, by KL divergence and by
        agreement on the likeliest token.
    precisions
        Names with commas between them, or "all" for all nine: one row each, instead of --precision.
    json
        Print one JSON object.
    """
    options = settings(engine, common)
    content = read_text(text, "text file")
    which = None if windows is None else whole_numbers(windows, "--windows")
    check_lengths(length, stride)
    rows = _choices(options, precisions)
    other = None if reference is None else _reference(model, reference, options)
    one = for_windows(options, length)
    found: list[tuple[str, Score]] = []
    second = None if other is None else load(other[0], for_windows(other[1], length), quiet=json, role="reference ")
    try:
        for choice in rows:
            with load(model, replace(one, precision=choice), quiet=json) as llm:
                score, used = _measure(llm, second, content, length, stride or length, which, quiet=json)
                found.append((llm.config.precision.label, score))
                name = llm.plan.model
    finally:
        if second is not None:
            second.close()
    what = {"model": name, "text": str(text), "length": length, "stride": stride or length, "windows": used}
    if json:
        as_json({**what, "reference": reference, "rows": [score_row(label, score) for label, score in found]})
        return
    columns = ["precision", "perplexity", "mean NLL", "predictions", "seconds"]
    compared = ["KL (nats)", "top-1 agreement"] if second is not None else []
    title = f"{name}, {text.name}, windows {spans(used)} of {length} tokens"
    table(
        columns + compared, [cells(list(score_row(*f).values())[: len(columns + compared)]) for f in found], title=title
    )


def score_row(label: str, score: "Score") -> dict[str, Any]:
    """Return a score as a row of JSON, in the order of the table's columns."""
    return {
        "precision": label,
        "perplexity": _finite(score.perplexity),
        "nll": _finite(score.nll),
        "predictions": score.predictions,
        "seconds": score.seconds,
        "kl": _finite(score.kl),
        "top1_agreement": score.agreement,
    }


def _measure(
    llm: "LLM",
    second: "LLM | None",
    content: str,
    length: int,
    stride: int,
    which: list[int] | None,
    *,
    quiet: bool,
) -> "tuple[Score, list[int]]":
    from omniserve.evals.perplexity import cut, measure

    ids = llm.tokenizer.encode(content, special=False)
    if second is not None and (
        second.spec.vocab != llm.spec.vocab or second.tokenizer.encode(content, special=False) != ids
    ):
        raise ConfigError("--reference: this model has other tokens, so the two cannot be compared")
    chosen = cut(ids, length=length, stride=stride, which=which)
    with Bars(quiet=quiet) as bars:
        score = measure(
            llm,
            list(chosen.values()),
            reference=second,
            on_progress=lambda done, total: bars.update("measure", done, total),
        )
    return score, list(chosen)


def check_lengths(length: int, stride: int | None) -> None:
    """Raise ConfigError unless windows of this length and stride can be cut."""
    if length < 2:
        raise ConfigError(f"--length={length}: must be 2 or more, the first token is context only")
    if stride is not None and stride < 1:
        raise ConfigError(f"--stride={stride}: must be 1 or more")


def _choices(options: Options, precisions: str | None) -> list[str]:
    """Return the words of `--precision` to measure."""
    if precisions is None:
        return [options.precision]
    if options.precision != "auto":
        raise ConfigError(f"--precision {options.precision} and --precisions {precisions}: give one of the two")
    if precisions == "all":
        return [f"{weight}kv{bits}" for weight in ("w16a16", "w8a8", "w4a8") for bits in (16, 8, 4)]
    chosen = words(precisions, "--precisions")
    for word in chosen:
        Precision.parse(word)
    return chosen


def _reference(model: str | None, reference: str, options: Options) -> tuple[str | None, Options]:
    """Return model and options of the reference: a precision of the same model, or another model."""
    if Path(reference).exists():
        return reference, replace(options, precision="w16a16kv16", lm_head="auto")
    try:
        Precision.parse(reference)
    except ConfigError:
        raise ConfigError(
            f"--reference={reference!r}: must be a precision such as w16a16kv16, a .gguf file or a model folder"
        ) from None
    return model, replace(options, precision=reference, lm_head="auto")


def for_windows(options: Options, length: int) -> Options:
    """Return options of an engine that scores one window at a time, unless the user asks for more."""
    return replace(options, max_model_len=options.max_model_len or length, max_num_seqs=options.max_num_seqs or 1)


def spans(numbers: list[int]) -> str:
    """Return numbers for people: 0-19 for a run, 0,10 for others."""
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return ",".join(str(number) for number in numbers)


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None
