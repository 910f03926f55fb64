"""From what a user asks for to what a model can do, and from its tokens to text: the offline API's and the server's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omniserve.base.errors import RequestError
from omniserve.base.types import FinishReason, Output, SamplingParams
from omniserve.engine.scheduler import mixed
from omniserve.formats.checkpoint import read_json
from omniserve.text import TextStream, Tokenizer

_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of generation_config.json that are defaults of requests; its eos_token_id is the tokenizer's business."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Sampling parameters that fit the model, and what their texts are in tokens.

    stop_ids   tokens that end an answer: the model's own and the user's
    bad_words  token sequences that are not produced
    """

    params: SamplingParams
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


def check(params: SamplingParams, tokenizer: Tokenizer, vocab: int) -> Checked:
    """Raise RequestError unless the model has all the ids, and something is left to draw."""
    allowed = params.allowed_token_ids or ()
    for name, ids in (
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", allowed),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if (largest := max(ids, default=0)) >= vocab:
            raise RequestError(f"{name}={largest}: the model has {vocab} tokens, ids must be 0 to {vocab - 1}")
    bad_words = tuple(sequence for word in params.bad_words for sequence in bad_word(word, tokenizer, vocab))
    own = frozenset[int]() if params.ignore_eos else tokenizer.eos_ids
    stop_ids = frozenset(token for token in own if token < vocab) | frozenset(params.stop_token_ids)
    forbidden = {sequence[0] for sequence in bad_words if len(sequence) == 1}
    if params.min_tokens:
        forbidden |= stop_ids
    if not (set(allowed) - forbidden if allowed else vocab - len(forbidden)):
        raise RequestError("allowed_token_ids, bad_words and min_tokens together leave no token: allow another one")
    return Checked(params=params, stop_ids=tuple(sorted(stop_ids)), bad_words=bad_words)


def bad_word(word: str, tokenizer: Tokenizer, vocab: int) -> list[tuple[int, ...]]:
    """Return the token sequences of a word, at the start of a text and behind a space.

    Source: vLLM's SamplingParams.update_from_tokenizer. Raises RequestError for a word without tokens of the model.
    """
    text = word.lstrip()
    plain, spaced = (tuple(tokenizer.encode(start + text, special=False)) for start in ("", " "))
    if not text or not plain:
        raise RequestError(f"bad_words: {word!r} holds no token; give words that hold more than spaces")
    if max(plain + spaced) >= vocab:
        raise RequestError(f"bad_words: {word!r} holds a token that the model does not have; leave it out")
    another = len(plain) == len(spaced) and plain[0] != spaced[0]
    return [plain, spaced] if another else [plain]


def seeded(params: SamplingParams, place: int) -> SamplingParams:
    """Return the parameters of one of n continuations: with a seed, each has a seed of its own."""
    if params.seed is None or place == 0:
        return params
    return replace(params, seed=mixed(params.seed, place))


def generation_defaults(folder: Path) -> Mapping[str, Any]:
    """Return the sampling defaults beside a model's weights; what the file sets to null it leaves open.

    Raises CheckpointError for a file that is no JSON.
    """
    file = folder / "generation_config.json"
    found = read_json(file) if file.is_file() else {}
    return {name: found[name] for name in _GENERATION if found.get(name) is not None}


class Answer:
    """One continuation as text, made as its outputs come.

    tokens  how many have come; text: what has come; finish: why it ended, None while it goes on
    """

    def __init__(
        self, params: SamplingParams, stop_ids: tuple[int, ...] | frozenset[int], tokenizer: Tokenizer
    ) -> None:
        self.tokens = 0
        self.finish: FinishReason | None = None
        self._stop_ids = stop_ids
        self._keeps_stop = params.include_stop_str_in_output
        self._stream: TextStream | None = None
        if params.detokenize:
            self._stream = TextStream(
                tokenizer,
                params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )

    def take(self, output: Output) -> str:
        """Return the text of an output's tokens. A stop string ends the answer: what comes after it is dropped.

        A token that ends the answer is no text, unless that is asked for.
        """
        ids = output.new_tokens
        self.tokens += len(ids)
        if self._stream is None:
            self.finish = output.finish
            return ""
        if output.finish == "stop" and ids and ids[-1] in self._stop_ids and not self._keeps_stop:
            ids = ids[:-1]
        piece = self._stream.push(ids, output.finish is not None)
        self.finish = "stop" if self._stream.stopped else output.finish
        return piece

    @property
    def text(self) -> str:
        """All text so far."""
        return "" if self._stream is None else self._stream.text
