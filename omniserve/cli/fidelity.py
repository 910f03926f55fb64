"""`omniserve eval fidelity`: how far a quantized checkpoint is from its 16-bit model, through the served path."""

import importlib.resources
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from omniserve.base.errors import ConfigError
from omniserve.cli.exits import GATE, OK
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, read_text, settings, whole_numbers
from omniserve.cli.loading import cells, load
from omniserve.cli.output import Bars, as_json, say, table, warn
from omniserve.cli.quality import WINDOW, check_lengths, for_windows, score_row, spans

if TYPE_CHECKING:
    from omniserve import LLM

SHIPPED = "roosevelt-1905.txt"
"""The text that comes with the package (cli/data/README.md)."""


def fidelity(
    model: str,
    /,
    *,
    reference: str,
    text: Path | None = None,
    windows: str | None = None,
    length: Whole = WINDOW,
    stride: Whole | None = None,
    max_kl: float | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> int:
    """KL divergence, top-1 agreement and perplexity of a quantized checkpoint against its 16-bit model.

    A checkpoint with 4-bit KV is measured with 8-bit KV as well; if KV is what costs, a warning says so.

    Parameters
    ----------
    model
        The quantized checkpoint.
    reference
        The model it was made of: a .gguf file or a model folder, served in 16 bit.
    text
        UTF-8 text file; default: a speech of 1905 that comes with the package, good for a first look only.
    windows
        Which windows, such as 0,10 or 0-19 (both ends included); default: all that are whole.
    length
        Tokens of a window, at most the model's context.
    stride
        Tokens from the start of one window to the next; default: the length.
    max_kl
        Largest KL divergence in nats that passes; above it the exit code is 4.
    json
        Print one JSON object.
    """
    options = settings(engine, common)
    content = _shipped() if text is None else read_text(text, "text file")
    which = None if windows is None else whole_numbers(windows, "--windows")
    check_lengths(length, stride)
    if max_kl is not None and not max_kl >= 0:
        raise ConfigError(f"--max-kl={max_kl}: must be 0 or more")
    one = for_windows(options, length)
    wide = replace(one, precision="w16a16kv16", lm_head="auto")

    def opened(word: str) -> "LLM":
        return load(model, one if word == "auto" else replace(one, precision=word), quiet=json)

    with load(reference, wide, quiet=json, role="reference ") as other:
        from omniserve.evals.fidelity import fidelity as measured
        from omniserve.evals.perplexity import cut

        ids = other.tokenizer.encode(content, special=False)
        chosen = cut(ids, length=length, stride=stride or length, which=which)

        def checked(word: str) -> "LLM":
            llm = opened(word)
            _comparable(llm, other, content, ids)
            return llm

        with Bars(quiet=json) as bars:
            found = measured(checked, other, list(chosen.values()), on_progress=bars.update)
        name = other.plan.model
    rows = {f"{name} w16a16kv16": found.reference, found.precision: found.served}
    if found.kv8 is not None:
        rows[f"with kv8: {found.kv8_precision}"] = found.kv8
    kl = found.served.kl
    passed = max_kl is None or (kl is not None and kl <= max_kl)
    if json:
        as_json(
            {
                "model": model,
                "reference": reference,
                "text": SHIPPED if text is None else str(text),
                "length": length,
                "stride": stride or length,
                "windows": list(chosen),
                "rows": [score_row(label, score) for label, score in rows.items()],
                "kv4_costs": found.kv4_costs,
                "advice": found.advice,
                "max_kl": max_kl,
                "passed": passed,
            }
        )
    else:
        columns = ["served", "perplexity", "KL (nats)", "top-1 agreement", "predictions", "seconds"]
        lines = [
            cells([label, score.perplexity, score.kl, score.agreement, score.predictions, score.seconds])
            for label, score in rows.items()
        ]
        table(columns, lines, title=f"{Path(model).name}, windows {spans(list(chosen))} of {length} tokens")
    if found.advice is not None:
        warn(found.advice)
    if not passed:
        say(f"omniserve: quality gate failed: KL {kl:.4g} is above --max-kl {max_kl:g}")
    return OK if passed else GATE


def _comparable(llm: "LLM", other: "LLM", content: str, ids: list[int]) -> None:
    """Raise ConfigError unless both models cut the text into the same tokens and have the same vocabulary."""
    if llm.spec.vocab != other.spec.vocab:
        raise ConfigError(
            f"--reference: this model has {other.spec.vocab} tokens, the checkpoint {llm.spec.vocab}: they cannot be "
            "compared"
        )
    if llm.tokenizer.encode(content, special=False) != ids:
        raise ConfigError("--reference: this model cuts the text into other tokens, so they cannot be compared")


def _shipped() -> str:
    return importlib.resources.files("omniserve.cli").joinpath("data", SHIPPED).read_text("utf-8")
