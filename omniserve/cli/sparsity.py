"""`omniserve sparsity identify`: which key heads of a model retrieve."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from omniserve.base.errors import ConfigError
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, settings
from omniserve.cli.loading import leaving_at_once, need_torch
from omniserve.cli.output import Bars, result

if TYPE_CHECKING:
    from omniserve.engine.build import Built
    from omniserve.sparsity.identify import Prose, Sample, Values
    from omniserve.text import Tokenizer

OUTSIDE = 256
"""Tokens between a passkey and either end of the text, at least: more than sink and window."""


def identify(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    length: Whole = 1024,
    samples: Whole = 12,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Find the key heads that need the whole context and write a folder for --attn-pattern.

    The model reads texts with a passkey that is repeated at the end, and plain ones, four times as long. Key heads are
    ranked by the share of their attention that falls on the passkey where it is repeated, and by how much the output of
    attention changes in plain text when they see sink and window alone; the better rank counts (no training).

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME).
    output
        Folder for full_attention_heads.tsv and config.json.
    length
        Tokens of a text with a passkey.
    samples
        Texts of each kind to read.
    """
    options = settings(engine, common)
    if samples < 1 or length < 3 * OUTSIDE:
        raise ConfigError(
            f"--samples {samples} --length {length}: must be 1 or more samples of {3 * OUTSIDE} tokens or more"
        )
    need_torch()
    with leaving_at_once():
        from omniserve.engine.identify import identify as measured
        from omniserve.sparsity.identify import WINDOW, merged
        from omniserve.sparsity.patterns import write_pattern
    with Bars() as bars:
        probe, built = measured(
            model,
            options,
            lambda built: [
                *passkeys(built, length=length, samples=samples, seed=options.seed),
                *prose(built, length=4 * length, samples=samples),
            ],
            on_load=bars.update,
            on_progress=lambda done, total: bars.update("read", done, total),
        )
    built.engine.close()
    about = {
        "model_name": built.plan.model,
        "method": "attention on passkeys, change of attention in prose: the better rank",
        "length": length,
        "samples": samples,
        "seed": options.seed,
        "precision": built.config.precision.name,
        "local": WINDOW,
    }
    shares, changes = probe.passkeys(), probe.prose()
    values = merged(shares, changes)
    write_pattern(output, values, about)
    kept = sorted((value for line in values for value in line), reverse=True)
    least = kept[(len(kept) - 1) // 2]
    held = [_held(values, measure, least) for measure in (shares, changes)]
    result(
        f"{output}: {len(kept)} key heads in {len(values)} layers; the first half holds {held[0]:.0f} % of the "
        f"attention on passkeys and {held[1]:.0f} % of what streaming changes in prose"
    )


def _held(values: "Values", measure: "Values", least: float) -> float:
    """Return the percentage of a measure that the heads of at least this value hold."""
    pairs = [pair for lines in zip(values, measure, strict=True) for pair in zip(*lines, strict=True)]
    return 100 * sum(x for value, x in pairs if value >= least) / (sum(x for _, x in pairs) or 1)


def _tokenizer(built: "Built") -> "Tokenizer":
    from omniserve.text import Tokenizer

    return Tokenizer.load(built.source, None, max_prompt_bytes=16 * built.config.limits.max_model_len)


def prose(built: "Built", *, length: int, samples: int) -> "list[Prose]":
    """Return pieces of the text that ships with the package, of `length` tokens or what the context holds."""
    from omniserve.quantize.calibration import shipped_text
    from omniserve.sparsity.identify import Prose

    tokenizer = _tokenizer(built)
    ids = tokenizer.encode(shipped_text(), special=False)
    length = min(length, built.config.limits.max_model_len - 1)
    gap = (len(ids) - length) // max(samples - 1, 1)
    return [Prose(ids=ids[n * gap : n * gap + length], start=max(length // 4, 2 * OUTSIDE)) for n in range(samples)]


def passkeys(built: "Built", *, length: int, samples: int, seed: int) -> "list[Sample]":
    """Return texts of `length` tokens with a passkey that is repeated at the end. Raises ConfigError."""
    from omniserve.evals.retrieval import sentence
    from omniserve.sparsity.identify import Sample

    limit = built.config.limits.max_model_len
    if length >= limit:
        raise ConfigError(f"--length {length}: must be below max_model_len={limit}")
    tokenizer = _tokenizer(built)
    bos = tokenizer.encode("")
    found = []
    for number in range(samples):
        draw = random.Random(f"{seed} {number}")
        secret = " ".join(str(draw.randint(10000, 99999)) for _ in range(2))
        key = tokenizer.encode(f" {secret}", special=False)
        before = tokenizer.encode("The secret passkey is", special=False)
        after = tokenizer.encode(". Remember it. ", special=False)
        asking = tokenizer.encode(
            "\n\nQuestion: What is the secret passkey?\nAnswer: The secret passkey is", special=False
        )
        room = length - sum(map(len, (bos, before, key, after, asking, key)))
        filler: list[int] = []
        while len(filler) < room:
            filler += tokenizer.encode(sentence(draw), special=False)
        at = draw.randint(OUTSIDE, max(room - OUTSIDE, OUTSIDE))
        ids = [*bos, *filler[:at], *before]
        span = range(len(ids), len(ids) + len(key))
        ids += [*key, *after, *filler[at:room], *asking]
        # A key's first token is predicted from the question's last one, its last token from the one before it.
        found.append(Sample(ids=[*ids, *key], span=span, asking=range(len(ids) - 1, len(ids) + len(key) - 1)))
    return found
