"""`omniserve bench throughput`: tokens per second of whole batches, beside transformers if asked."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from omniserve.base.config import Options, Precision, check_model
from omniserve.base.errors import ConfigError
from omniserve.cli import machine
from omniserve.cli.flags import NO_FLAGS, Common, EngineFlags, Whole, settings, whole_numbers
from omniserve.cli.loading import cells, leaving_at_once, load, words
from omniserve.cli.output import Bars, as_json, say, table

if TYPE_CHECKING:
    from omniserve.bench.throughput import Runner, Speed


def throughput(
    model: str | None = None,
    /,
    *,
    batch: Annotated[str, Parameter(name=("--num-prompts", "--batch"))] = "8",
    input_len: Whole = 128,
    output_len: Whole = 128,
    repeats: Whole = 3,
    precisions: str | None = None,
    peer: Literal["transformers"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: EngineFlags = NO_FLAGS,
    common: Common = Common(),  # noqa: B008  # frozen
) -> None:
    """Tokens per second of random prompts that are submitted at once: greedy, end of sequence ignored.

    The median of the repeats after one warm-up; prefix caching is off unless a flag turns it on.

    Parameters
    ----------
    model
        A .gguf file, a model folder or a name on huggingface.co (ORG/NAME); with --dummy-weights none.
    batch
        Prompts submitted at once; several sizes with commas between them (1,8).
    input_len
        Tokens of each prompt.
    output_len
        Tokens to produce for each prompt.
    repeats
        Measurements, of which the median counts.
    precisions
        Names with commas between them, instead of --precision.
    peer
        Measure this as well, in turn with the engine: same weights, prompts, lengths, dtype and threads.
    json
        Print one JSON object.
    """
    base = Options(enable_prefix_caching=False)
    options = settings(engine, common, base=base)
    check_model(model, options)
    if model is None and peer is not None:
        raise ConfigError(f"--peer {peer}: dummy weights are this engine's own, give a model")
    shown_model = f"{options.shape} (dummy weights)" if model is None else model
    batches = whole_numbers(batch, "--num-prompts")
    for name, value in (("num-prompts", min(batches)), ("input-len", input_len), ("output-len", output_len)):
        if value < 1:
            raise ConfigError(f"--{name}={value}: must be 1 or more")
    if repeats < 1:
        raise ConfigError(f"--repeats={repeats}: must be 1 or more")
    chosen = [options.precision] if precisions is None else words(precisions, "--precisions")
    for word in chosen if precisions is not None else []:
        Precision.parse(word)
    options = replace(
        options,
        max_num_seqs=options.max_num_seqs or max(batches),
        max_num_batched_tokens=options.max_num_batched_tokens or (None if max(batches) <= 512 else max(8192, *batches)),
        max_model_len=options.max_model_len or input_len + output_len,
    )
    rows: list[dict[str, Any]] = []
    peers: dict[str, Runner] = {}
    for word in chosen:
        rows += _measure(
            model,
            replace(options, precision=word),
            batches,
            (input_len, output_len),
            repeats=repeats,
            peers=None if peer is None else peers,
            quiet=json,
        )
    facts = machine.facts()
    if json:
        named = {"model": shown_model, "dummy_weights": model is None}
        as_json({**named, "repeats": repeats, **facts, "rows": rows})
        return
    say(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['isa']}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    )
    shown = {
        "runner": "runner", "batch": "batch", "prompt tok/s": "prompt_tokens_per_second",
        "decode tok/s": "decode_tokens_per_second", "output tok/s": "output_tokens_per_second",
        "total s": "total_seconds", "decode vs peer": "decode_ratio", "same tokens": "same_tokens",
    }  # fmt: skip
    columns = [name for name, key in shown.items() if peer is not None or key not in ("decode_ratio", "same_tokens")]
    dtype, threads = rows[0]["dtype"], facts["threads"]
    label = f"{shown_model}, " if model is None else ""
    title = f"{label}{input_len} prompt tokens, {output_len} produced, {dtype}, {threads} threads, median of {repeats}"
    table(
        columns,
        [cells([row[shown[column]] for column in columns]) for row in rows],
        title=title,
    )


def _measure(
    model: str | None,
    options: Options,
    batches: list[int],
    lengths: tuple[int, int],
    *,
    repeats: int,
    peers: "dict[str, Runner] | None",
    quiet: bool,
) -> list[dict[str, Any]]:
    """Return the rows of one precision: for each batch the engine's, then the peer's.

    peers  the peer in each dtype, filled here and kept from one precision to the next; None without a peer
    """
    rows: list[dict[str, Any]] = []
    with load(model, options, quiet=quiet) as llm, Bars(quiet=quiet) as bars:
        from omniserve.bench.throughput import engine_runner, measure, random_prompts, transformers_runner

        runners, names = [engine_runner(llm)], [llm.config.precision.label]
        dtype = llm.config.dtype
        if peers is not None and model is not None:
            if dtype not in peers:
                with leaving_at_once():
                    peers[dtype] = transformers_runner(model, dtype=dtype)
            runners.append(peers[dtype])
            names.append("transformers")
        for batch in batches:
            prompts = random_prompts(batch, lengths[0], llm.spec.vocab, seed=options.seed)
            speeds = measure(
                runners,
                prompts,
                lengths[1],
                repeats=repeats,
                on_progress=lambda done, total, batch=batch: bars.update(f"batch {batch}", done, total),  # type: ignore[misc]  # a lambda's default
            )
            rows += [_row(name, dtype, speed, speeds[1:]) for name, speed in zip(names, speeds, strict=True)]
    return rows


def _row(name: str, dtype: str, speed: "Speed", peers: "list[Speed]") -> dict[str, Any]:
    """Return a row; against the peer the rate of decoding and the share of equal tokens are given."""
    other = peers[0] if peers and peers[0] is not speed else None
    rate, theirs = speed.decode_tokens_per_second, None if other is None else other.decode_tokens_per_second
    equal = [] if other is None else [a == b for a, b in zip(_flat(speed), _flat(other), strict=True)]
    return {
        "runner": name,
        "dtype": dtype,
        "batch": speed.batch,
        "input_len": speed.input_len,
        "output_len": speed.output_len,
        "prompt_seconds": speed.prompt_seconds,
        "total_seconds": speed.total_seconds,
        "prompt_tokens_per_second": speed.prompt_tokens_per_second,
        "decode_tokens_per_second": rate,
        "output_tokens_per_second": speed.output_tokens_per_second,
        "decode_ratio": None if rate is None or theirs is None else rate / theirs,
        "same_tokens": sum(equal) / len(equal) if equal else None,
    }


def _flat(speed: "Speed") -> list[int]:
    return [token for tokens in speed.tokens for token in tokens]
