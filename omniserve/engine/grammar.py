"""Grammars: which tokens may follow. llguidance compiles them and computes the masks; here they meet slots and rows.

A matcher belongs to a request: it begins with the tokens that were produced so far when the request takes a slot, and
takes each token that is drawn for it. On a GPU tokens are copied to the host behind the step that draws them, and the
next step's masks are computed while its forward pass runs.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch
from torch import Tensor

from omniserve.base.errors import OmniserveError, RequestError
from omniserve.base.structured import Grammar, Matcher, StructuredOutputs
from omniserve.base.types import Admission, Fault
from omniserve.ops.changes import Masked
from omniserve.ops.transfer import Arriving

if TYPE_CHECKING:
    import llguidance

KEPT = 128
"""Grammars that are kept compiled."""
_JSON = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
"""Small models would go on with spaces for ever."""
_ECHOED = 200


class Grammars:
    """Forms made ready for one vocabulary; the latest `KEPT` of them are kept. Threads may share it.

    tokenizer  returns the text of a tokenizer.json
    eos_ids    tokens that end an answer: allowed where the text may end
    vocab      how many tokens have logits
    """

    def __init__(self, tokenizer: Callable[[], str], eos_ids: Sequence[int], vocab: int) -> None:
        self._source = tokenizer
        self._eos_ids = [token for token in sorted(eos_ids) if token < vocab]
        self._vocab = vocab
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()

    def ready(self) -> "llguidance.LLTokenizer":
        """Return the vocabulary as the library wants it. Raises RequestError if that cannot be had."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            return self._tokenizer

    def _load(self) -> "llguidance.LLTokenizer":
        try:
            import llguidance
        except ImportError:
            raise OmniserveError("structured output needs llguidance: pip install 'omniserve[server]'") from None
        core, ends = tokenizers.Tokenizer.from_str(self._source()), self._eos_ids
        if not ends:  # the library must have a token that ends: one that the model has not
            core.add_special_tokens([tokenizers.AddedToken("<|nothing ends|>", special=True, normalized=False)])
            ends = [core.get_vocab(with_added_tokens=True)["<|nothing ends|>"]]
        size = max(self._vocab, 1 + max(core.get_vocab(with_added_tokens=True).values()))
        try:
            return llguidance.LLTokenizer(core.to_str(), n_vocab=size, eos_token=ends)
        except Exception as error:  # the library raises nothing narrower
            raise RequestError(f"structured output is not possible with this tokenizer: {_short(error)}") from None

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """Return a form's grammar. Takes milliseconds, for hostile ones up to seconds; the GIL is free meanwhile.

        Raises RequestError for what is no grammar, allows no text or is too large.
        """
        tokenizer = self.ready()
        with self._lock:
            if wanted.form in self._kept:
                self._kept.move_to_end(wanted.form)
                return self._kept[wanted.form]
        made = _compile(wanted, tokenizer)
        with self._lock:
            self._kept[wanted.form] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made


def _compile(wanted: StructuredOutputs, tokenizer: "llguidance.LLTokenizer") -> "_Compiled":
    import llguidance

    kind, text = wanted.form
    make = llguidance.LLMatcher
    try:
        match kind:
            case "json":
                grammar = make.grammar_from_json_schema(text, defaults=_JSON)  # type: ignore[arg-type]  # plain strings
            case "json_object":
                grammar = make.grammar_from_json_schema('{"type": "object"}', defaults=_JSON)  # type: ignore[arg-type]
            case "choice":
                grammar = make.grammar_from_lark("start: " + " | ".join(map(_quoted, json.loads(text))))
            case "regex":
                grammar = make.grammar_from_regex(text)
            case _:
                grammar = make.grammar_from_lark(text)
    except ValueError as error:
        raise RequestError(f"structured_outputs.{kind}: {_short(error)}") from None
    limits = llguidance.LLParserLimits(  # with these a mask takes milliseconds, or its request ends
        step_lexer_fuel=100_000, step_max_items=50_000, max_lexer_states=20_000, verbose_errors=False
    )
    matcher = make(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first one is the dearest; what allows nothing shows here
    if matcher.is_error():
        reason = _short(matcher.get_error()) if matcher.stop_reason() != "NoExtensionBias" else "it allows no text"
        raise RequestError(f"structured_outputs.{kind}: {reason}")
    return _Compiled(matcher)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _short(error: object) -> str:
    """The library's message in one line, without the grammar, which it may quote."""
    text = " ".join(str(error).replace("<non-verbose/>", " ").split())
    return text[:_ECHOED] or "the grammar is not valid"


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A matcher that has taken nothing; requests get copies."""

    start: "llguidance.LLMatcher"

    def matcher(self, produced: Sequence[int]) -> Matcher:
        """Return a matcher that has taken these tokens."""
        made = _Matcher(self.start.deep_copy())
        made.take(produced)
        return made


class _Matcher:
    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self._matcher = matcher
        self.done = False
        self.failed = False

    def mask(self) -> bytes:
        bits = self._matcher.compute_bitmask()
        self.failed |= self._matcher.is_error()
        return bits

    def take(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(tokens))
        self.failed |= self._matcher.is_error()
        self.done = not self.failed and self._matcher.is_stopped()


# Slots and rows


class Matchers:
    """The matchers of a rank's slots. Mutable."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._words = -(-vocab // 32)
        self._device = device
        self._open: dict[int, Matcher] = {}
        self._drawn: Taking | None = None

    def set(self, slot: int, admission: Admission) -> None:
        """Give a slot its request's matcher, or none."""
        self._open.pop(slot, None)
        if admission.grammar is not None:
            self._open[slot] = admission.grammar.matcher(admission.history[admission.prompt :])

    def rows(self, slots: Sequence[int]) -> Masked | None:
        """Return what the rows with a grammar may draw; waits for the tokens of the step before."""
        if not self._open:
            return None
        rows = [row for row, slot in enumerate(slots) if slot in self._open]
        if not rows:
            return None
        if self._drawn is not None:
            self._drawn.verdicts()
        bits = np.zeros((len(rows), self._words), dtype=np.int32)
        for place, row in enumerate(rows):
            mask = np.frombuffer(self._open[slots[row]].mask(), dtype=np.int32)[: self._words]
            bits[place, : len(mask)] = mask
        return Masked(rows=torch.tensor(rows).to(self._device), bits=torch.from_numpy(bits).to(self._device))

    def note(self, requests: Sequence[str], slots: Sequence[int], tokens: Tensor) -> "Taking | None":
        """Take in what was drawn, int64 [S], once it has landed; None if no row has a grammar."""
        rows = [row for row, slot in enumerate(slots) if slot in self._open] if self._open else []
        if not rows:
            return None
        matchers = [(requests[row], self._open[slots[row]]) for row in rows]
        self._drawn = Taking(matchers, tokens[torch.tensor(rows).to(tokens.device)])
        return self._drawn


class Taking:
    """Drawn tokens on their way to the matchers of their requests."""

    def __init__(self, matchers: Sequence[tuple[str, Matcher]], tokens: Tensor) -> None:
        self._matchers: Sequence[tuple[str, Matcher]] = matchers
        self._tokens = Arriving(tokens)
        self._verdicts: tuple[frozenset[str], dict[str, Fault]] | None = None

    def verdicts(self) -> tuple[frozenset[str], dict[str, Fault]]:
        """Wait for the tokens; return the requests whose grammar is complete, and those that fail by theirs."""
        if self._verdicts is None:
            for (_, matcher), token in zip(self._matchers, self._tokens.tolist(), strict=True):
                if token >= 0 and not matcher.done and not matcher.failed:
                    matcher.take([token])
            self._verdicts = (
                frozenset(request for request, matcher in self._matchers if matcher.done),
                {request: "grammar" for request, matcher in self._matchers if matcher.failed},
            )
        return self._verdicts
