"""What a load test asks, and when: drawn lengths and arrivals, or a trace of a real service.

Two formats of traces are read, as published:

Azure     CSV, header TIMESTAMP,ContextTokens,GeneratedTokens; a time of day with a fraction, and two counts of tokens
Mooncake  JSON lines with timestamp (ms), input_length, output_length (tokens) and hash_ids: one id for each 512 tokens
          of the prompt, equal for prompts that begin alike
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from omniserve.base.errors import ConfigError

BLOCK = 512
"""Tokens that one of Mooncake's hash ids stands for."""
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its "
    "about into than them can only other new some could time these two may then do first any my now such like our "
    "over man me even most made after also did many before must through back years where much your way well down"
)
WORDS = tuple(_WORDS.split())
"""Words that are one token each, with the space before them, in most vocabularies."""
_OWN = 1 << 40
_KEPT = 8192
"""Blocks of prompts that are not drawn again."""

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request to come.

    at      seconds after the start
    blocks  ids of the prompt's blocks of 512 tokens; equal ids are equal tokens. Empty: a prompt like no other
    """

    at: float
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Return when requests arrive, in seconds; their average rate is `rate` per second, inf: all at once.

    burstiness  shape of the gamma distribution of the gaps: 1 is a Poisson process, less is burstier, more is steadier
    Source: vLLM's `bench serve`, the last arrival's correction included.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng([seed, 0]).gamma(burstiness, 1 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return [float(time) for time in times * (count / rate / times[-1])]


def drawn(count: int, input_len: int, output_len: int, *, spread: float, seed: int) -> list[Planned]:
    """Return requests that all arrive at 0, with lengths drawn evenly from len * (1 - spread) to len * (1 + spread)."""
    draw = np.random.default_rng([seed, 1])

    def lengths(middle: int) -> list[int]:
        low, high = max(1, math.floor(middle * (1 - spread))), max(1, math.ceil(middle * (1 + spread)))
        return [int(length) for length in draw.integers(low, high, count, endpoint=True)]

    pairs = zip(lengths(input_len), lengths(output_len), strict=True)
    return [Planned(at=0.0, input_len=first, output_len=second) for first, second in pairs]


def timed(requests: Sequence[Planned], times: Sequence[float]) -> list[Planned]:
    """Return the requests with other arrivals."""
    return [replace(one, at=at) for one, at in zip(requests, times, strict=True)]


# Traces


def read_trace(path: Path, *, most: int | None = None, speedup: float = 1.0) -> list[Planned]:
    """Return the requests of a trace, the first of them at 0, in the order of their arrival.

    most     read so many only
    speedup  seconds of the trace in a second
    Raises ConfigError for a file that is none, with the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            kind = _mooncake if first.lstrip().startswith("{") else _azure
            found = list(kind(path, file, most))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such trace") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no trace: not UTF-8 text (byte {error.start})") from None
    if not found:
        raise ConfigError(f"{path}: holds no requests")
    found.sort(key=lambda one: one.at)
    start = found[0].at
    return [replace(one, at=(one.at - start) / speedup) for one in found]


def _azure(path: Path, file: Iterable[str], most: int | None) -> Iterator[Planned]:
    rows = csv.DictReader(file)
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if rows.fieldnames is None or not set(columns) <= set(rows.fieldnames):
        raise ConfigError(
            f"{path}: is no trace: must begin with {','.join(columns)} (Azure), or hold JSON lines with timestamp, "
            "input_length, output_length and hash_ids (Mooncake)"
        )

    def one(row: dict[str, Any]) -> Planned:
        when, asked, answered = (row[name] for name in columns)
        return _planned(datetime.fromisoformat(when.strip()).timestamp(), int(asked), int(answered))

    for row in rows:
        if most is not None:
            if most == 0:
                return
            most -= 1
        yield _checked(path, rows.line_num, one, row)


def _mooncake(path: Path, file: Iterable[str], most: int | None) -> Iterator[Planned]:
    def one(line: str) -> Planned:
        row = json.loads(line)
        made = _planned(row["timestamp"] / 1000, row["input_length"], row["output_length"])
        blocks = tuple(row["hash_ids"])
        if any(type(block) is not int or not 0 <= block < _OWN for block in blocks):
            raise ValueError("hash_ids must be whole numbers, 0 or more")
        if blocks and len(blocks) != -(-made.input_len // BLOCK):
            raise ValueError(f"{len(blocks)} hash_ids for {made.input_len} tokens, {BLOCK} each")
        return replace(made, blocks=blocks)

    for number, line in enumerate(file, start=1):
        if line.strip():
            if most is not None:
                if most == 0:
                    return
                most -= 1
            yield _checked(path, number, one, line)


def _planned(at: float, input_len: Any, output_len: Any) -> Planned:
    for name, value in (("prompt", input_len), ("answer", output_len)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{value!r} tokens of the {name}: must be a whole number, 1 or more")
    if not math.isfinite(at):
        raise ValueError(f"the time {at}")
    return Planned(at=at, input_len=input_len, output_len=output_len)


def _checked(path: Path, number: int, one: Callable[[Row], Planned], row: Row) -> Planned:
    """Return a line's request. Raises ConfigError with its number."""
    try:
        return one(row)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} line {number}: {what}") from None


# Limits


def cut(requests: Sequence[Planned], input_len: int | None, output_len: int | None) -> tuple[list[Planned], int]:
    """Return the requests with longer lengths cut to these, and how many were cut."""
    made = [
        replace(
            one,
            input_len=min(one.input_len, input_len or one.input_len),
            output_len=min(one.output_len, output_len or one.output_len),
        )
        for one in requests
    ]
    return made, sum(before != after for before, after in zip(requests, made, strict=True))


def check_fits(requests: Sequence[Planned], longest: int | None) -> None:
    """Raise ConfigError if a request is longer than the server takes; None is not known."""
    if longest is None:
        return
    sizes = [one.input_len + one.output_len for one in requests]
    if beyond := sum(size > longest for size in sizes):
        raise ConfigError(
            f"{beyond} of {len(sizes)} requests need more than the server's max_model_len of {longest} tokens (the "
            f"longest {max(sizes)}): cut them with --max-input-len and --max-output-len"
        )


# Prompts


class Prompts:
    """Makes prompts of given lengths. Equal seeds make equal prompts; equal blocks are equal parts.

    vocab  token ids are drawn below it
    """

    def __init__(self, *, vocab: int, seed: int) -> None:
        self._vocab = vocab
        self._seed = seed
        self._block = lru_cache(maxsize=_KEPT)(lambda name, below: self._part(name, BLOCK, below))

    def ids(self, number: int, request: Planned) -> list[int]:
        """Return the token ids of a request's prompt; `number` is its place among the requests."""
        return self._draw(number, request, self._vocab)

    def text(self, number: int, request: Planned) -> str:
        """Return a text of about as many tokens: a word for each."""
        return "".join(f" {WORDS[draw]}" for draw in self._draw(number, request, len(WORDS)))

    def _draw(self, number: int, request: Planned, below: int) -> list[int]:
        if not request.blocks:
            return self._part(_OWN + number, request.input_len, below)
        parts: list[int] = []
        for block in request.blocks[: -(-request.input_len // BLOCK)]:
            parts += self._block(block, below)
        return parts[: request.input_len]

    def _part(self, name: int, length: int, below: int) -> list[int]:
        drawn: list[int] = np.random.default_rng([self._seed, 2, name]).integers(below, size=length).tolist()
        return drawn
