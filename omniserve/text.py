"""Text and tokens: tokenizer, chat template, incremental text, stop strings. Plain Python, never in the engine.

A tokenizer comes from the metadata of a GGUF file or from the tokenizer.json of a Hugging Face folder.
"""

import itertools
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from omniserve.base.errors import CheckpointError, ConfigError, RequestError
from omniserve.formats.checkpoint import Source, open_checkpoint, read_json
from omniserve.formats.dummy import DummySource
from omniserve.formats.gguf import GGUFSource, shown
from omniserve.templates import ChatTemplate

Messages = Sequence[Mapping[str, object]]
"""A conversation: objects with a "role" and mostly a "content"."""
MAX_PROMPT_BYTES = 16 * 131072
"""Longest rendered conversation where nothing else is said: 16 bytes for each token of a long context."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
"""Token types of tokenizer.ggml.token_type."""
_TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"})
"""Control tokens that end a turn whatever eos_token_id says; many GGUF files name the end of a text there."""
_HALF = "\ufffd"
"""What a decoder shows for each byte, or for all bytes, of a character that is not whole."""


class Tokenizer:
    """Text to token ids and back, and the model's chat template. Immutable.

    bos       id of the token that begins a text, or None
    add_bos   whether `encode` puts it in front
    eos_ids   tokens that end an answer
    template  source of the chat template, or None
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        words: Mapping[str, str],
        add_bos: bool,
        eos_ids: frozenset[int],
        template: str | None,
        max_prompt_bytes: int = MAX_PROMPT_BYTES,
    ) -> None:
        self._core = core
        self._words = dict(words)
        self._template = None if template is None else ChatTemplate(template)
        self._max_prompt_bytes = max_prompt_bytes
        bos = words.get("bos_token")
        self.bos: int | None = None if bos is None else core.token_to_id(bos)
        self.add_bos = add_bos and self.bos is not None
        self.eos_ids = eos_ids
        self.vocab = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in core.get_added_tokens_decoder().items() if token.special)
        self.template = template
        self._texts: dict[int, str] = {}

    def files(self, *, max_model_len: int | None = None) -> dict[str, bytes]:
        """Return the files of a Hugging Face folder that say the same as this tokenizer, by name.

        max_model_len  longest sequence of the model, if the files are to tell it
        """
        settings: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self._words,
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        if max_model_len is not None:
            settings["model_max_length"] = max_model_len
        if self.template is not None:
            settings["chat_template"] = self.template
        made = {
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False),
            "generation_config.json": json.dumps({"eos_token_id": sorted(self.eos_ids)}, indent=2),
        }
        return {"tokenizer.json": self._stored().encode()} | {name: text.encode() for name, text in made.items()}

    def _stored(self) -> str:
        """Return tokenizer.json. What other libraries put around a text is what `encode` puts there: BOS or nothing."""
        text = self._core.to_str()
        if self._core.encode("a", add_special_tokens=True).ids == self.encode("a"):
            return text
        stored = tokenizers.Tokenizer.from_str(text)
        stored.post_processor = None
        if self.add_bos:
            bos = self._words["bos_token"]
            stored.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, self.bos)]
            )
        return stored.to_str()

    @staticmethod
    def load(
        source: Source | str | Path,
        chat_template: str | None = None,
        *,
        max_prompt_bytes: int = MAX_PROMPT_BYTES,
    ) -> "Tokenizer":
        """Return the tokenizer of a checkpoint.

        chat_template     file with a Jinja template that replaces the model's
        max_prompt_bytes  longest text that a chat template may write for a conversation
        Raises CheckpointError if there is none or it is of an unknown kind, ConfigError for an unreadable template.
        """
        if isinstance(source, str | Path):
            source = open_checkpoint(source)
        template = None if chat_template is None else _read_template(Path(chat_template))
        if isinstance(source, DummySource):
            return _made_up(source.config, template)
        if isinstance(source, GGUFSource):
            return _from_gguf(source, template, max_prompt_bytes)
        return _from_folder(source.path, source.config, template, max_prompt_bytes)

    def as_json(self) -> str:
        """Return the text of a tokenizer.json with this vocabulary, for libraries that look at its tokens."""
        return self._core.to_str()

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, None for a text that is none."""
        token: int | None = self._core.token_to_id(text)
        return token if token in self.special_ids else None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written out in it become tokens.

        special  begin with BOS if the model wants it
        Raises RequestError if `text` is not valid Unicode.
        """
        try:
            # a batch of one: `encode` would keep Python's lock, and a long text would stall all other threads
            ids: list[int] = self._core.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError("the text is not valid Unicode: it holds half a surrogate pair") from None
        return [self.bos, *ids] if special and self.add_bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; ids beyond the vocabulary have none."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special)

    def decode_one(self, token: int) -> str:
        """Return the text of one token, special or not; each is decoded once and kept."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._core.decode([token], skip_special_tokens=False)
        return text

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the conversation as the model's chat template writes it.

        tools      functions that the model may call, as OpenAI's API describes them
        variables  what this template knows beside the conversation, for instance {"enable_thinking": False}
        Raises RequestError if there is no template, it refuses the messages, or needs more than it may have.
        """
        _check_messages(messages)
        if self._template is None:
            raise RequestError("the model has no chat template: give one with --chat-template FILE")
        values: dict[str, object] = {
            "messages": [dict(message) for message in messages],
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._words,
        }
        for name in variables or {}:
            if not isinstance(name, str) or name in values:
                raise RequestError(f"{repr(name)[:60]} is no variable of a chat template that a request may set")
        return self._template.render(values | dict(variables or {}), max_bytes=self._max_prompt_bytes)

    def chat(self, messages: Messages, *, variables: Mapping[str, object] | None = None) -> list[int]:
        """Return the token ids of a conversation, ready for the model's answer; the template alone writes BOS."""
        return self.encode(self.render(messages, variables=variables), special=False)


def _check_messages(messages: Messages) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a non-empty list of objects with role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be an object with a role, a string")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template={str(path)!r}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"chat_template={str(path)!r}: is not UTF-8 text") from None


def _made_up(config: Mapping[str, object], template: str | None) -> Tokenizer:
    """Return the tokenizer of dummy weights: a token for each byte, the others made-up words, none ends an answer.

    A text is encoded byte by byte; what such a model produces is words, so that streams flow as those of a real one.
    """
    texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = max(int(str(config["vocab_size"])) - len(texts), 0)
    texts += [
        "Ġ" + "".join(letters)
        for letters in itertools.islice(itertools.product(string.ascii_lowercase, repeat=4), size)
    ]
    vocab = {text: number for number, text in enumerate(texts)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return Tokenizer(core, words={}, add_bos=False, eos_ids=frozenset(), template=template)


# Tokenizers of Hugging Face folders


def _from_folder(folder: Path, config: Mapping[str, object], template: str | None, max_prompt_bytes: int) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing: save the tokenizer with transformers, whose fast ones write that file"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: is no tokenizer ({' '.join(str(error).split())[:200]})") from None
    core.no_padding()
    core.no_truncation()
    settings = _optional_json(folder / "tokenizer_config.json")
    words: dict[str, str] = {}
    for origin in (_optional_json(folder / "special_tokens_map.json"), settings):
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            word = origin.get(name)
            word = word.get("content") if isinstance(word, dict) else word
            if isinstance(word, str):
                words[name] = word
    for name in ("bos_token", "eos_token"):
        if name in words and core.token_to_id(words[name]) is None:
            raise CheckpointError(f"{folder}: {name}={words[name]!r} is not in the vocabulary of tokenizer.json")
    generation = _optional_json(folder / "generation_config.json")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    eos_ids = {end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int}
    if (end := core.token_to_id(words.get("eos_token", ""))) is not None:
        eos_ids.add(end)
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        first = core.encode("a", add_special_tokens=True).ids[:1]
        add_bos = "bos_token" in words and first == [core.token_to_id(words["bos_token"])]
    return Tokenizer(
        core,
        words=words,
        add_bos=add_bos,
        eos_ids=frozenset(eos_ids),
        template=template if template is not None else _folder_template(folder, settings),
        max_prompt_bytes=max_prompt_bytes,
    )


def _optional_json(file: Path) -> dict[str, object]:
    return read_json(file) if file.is_file() else {}


def _folder_template(folder: Path, settings: Mapping[str, object]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_template(file)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


# Tokenizers of GGUF files

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splitter:
    """How a byte-level vocabulary cuts text before merging.

    pattern  regular expression of the pieces; None is GPT-2's
    digits   every digit is a piece, before anything else
    nfc      text is composed first
    whole    a piece that is a token needs no merges
    bos      texts begin with BOS unless the file says otherwise
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False

    def apply(self, core: tokenizers.Tokenizer) -> None:
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if self.nfc:
            core.normalizer = normalizers.NFC()
        core.decoder = decoders.ByteLevel()


_GPT2 = _Splitter()
_QWEN2 = _Splitter(pattern=_QWEN2_SPLIT, nfc=True)
_LLAMA3 = _Splitter(pattern=_LLAMA3_SPLIT, whole=True, bos=True)
_SPLITTERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _Splitter(digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""By `tokenizer.ggml.pre`. The patterns are those of the models' own tokenizer.json."""


class _Vocabulary:
    """The `tokenizer.ggml.*` keys of a file, checked."""

    def __init__(self, source: GGUFSource) -> None:
        self._source = source
        tokens = self.value("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise self.fail("tokens is missing or no list of strings")
        self.tokens: list[str] = tokens
        self.ids = {token: i for i, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            twice = next(token for i, token in enumerate(tokens) if self.ids[token] != i)
            raise self.fail(f"tokens holds {shown(twice)} twice")
        self.types = self._numbers("token_type", "iu")
        if self.types is None:
            self.types = np.full(len(tokens), _NORMAL)
        self.scores = self._numbers("scores", "f")

    def value(self, key: str) -> object:
        return self._source.metadata.get(f"tokenizer.ggml.{key}")

    def fail(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self._source.path}: tokenizer.ggml.{sentence}")

    def _numbers(self, key: str, kinds: str) -> np.ndarray | None:
        numbers = self.value(key)
        if numbers is None:
            return None
        if not isinstance(numbers, np.ndarray) or numbers.dtype.kind not in kinds or len(numbers) != len(self.tokens):
            raise self.fail(f"{key} must hold one number for each of the {len(self.tokens)} tokens")
        return numbers

    def of_type(self, kind: int) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(self.types == kind)]

    def token_id(self, name: str) -> int | None:
        token = self.value(f"{name}_token_id")
        if token is None:
            return None
        if type(token) is not int or not 0 <= token < len(self.tokens):
            raise self.fail(f"{name}_token_id is {shown(token)}, it must be 0 to {len(self.tokens) - 1}")
        return token

    def merges(self) -> list[tuple[str, str]]:
        lines = self.value("merges")
        if not isinstance(lines, list):
            raise self.fail("merges is missing or no list of strings")
        pairs = []
        for index, line in enumerate(lines):
            left, gap, right = line.partition(" ") if isinstance(line, str) else ("", "", "")
            if not gap or " " in right:
                raise self.fail(f"merges holds no pair of tokens at {index}")
            pairs.append((left, right))
        return pairs

    def merges_by_score(self) -> list[tuple[str, str]]:
        """Return the merges that SentencePiece makes: always the adjacent pair whose union has the best score.

        As a list of pairs this is exact but for unions that can be cut in two ways, whose pairs share a score there
        and follow each other here.
        """
        if self.scores is None or not np.isfinite(self.scores).all():
            raise self.fail("scores is missing or holds values that are not finite")
        if sum(len(token) ** 2 for token in self.tokens) > 1 << 30:
            raise self.fail("tokens holds absurdly long strings")
        known = set(self.of_type(_NORMAL))
        pairs = []
        for i in np.argsort(-self.scores, kind="stable"):
            token = self.tokens[i]
            if token in known:
                halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
                pairs += [(left, right) for left, right in halves if left in known and right in known]
        return pairs


def _from_gguf(source: GGUFSource, template: str | None, max_prompt_bytes: int) -> Tokenizer:
    vocabulary = _Vocabulary(source)
    builders: dict[object, Callable[[_Vocabulary], tuple[tokenizers.Tokenizer, bool]]] = {
        "gpt2": _byte_level,
        "llama": _sentence_piece,
    }
    kind = vocabulary.value("model")
    if not isinstance(kind, str) or kind not in builders:
        raise vocabulary.fail(
            f"model is {shown(kind)}, this version reads gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    core, add_bos = builders[kind](vocabulary)
    special = vocabulary.of_type(_UNKNOWN) + vocabulary.of_type(_CONTROL)
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special if token])
    plain = vocabulary.of_type(_USER_DEFINED)
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain if token])
    words = {
        f"{name}_token": vocabulary.tokens[token]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := vocabulary.token_id(key)) is not None
    }
    ends = {vocabulary.token_id(name) for name in ("eos", "eot", "eom")}
    ends |= {vocabulary.ids[token] for token in vocabulary.of_type(_CONTROL) if token in _TURN_ENDS}
    told = vocabulary.value("add_bos_token")
    own = source.metadata.get("tokenizer.chat_template")
    return Tokenizer(
        core,
        words=words,
        add_bos=told if isinstance(told, bool) else add_bos,
        eos_ids=frozenset(end for end in ends if end is not None),
        template=template if template is not None else own if isinstance(own, str) else None,
        max_prompt_bytes=max_prompt_bytes,
    )


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a byte-level BPE tokenizer, and whether such texts begin with BOS."""
    name = vocabulary.value("pre")
    name = "default" if name is None else name
    if not isinstance(name, str) or name not in _SPLITTERS:
        raise vocabulary.fail(f"pre is {shown(name)}, this version knows {', '.join(sorted(_SPLITTERS))}")
    splitter = _SPLITTERS[name]
    core = _bpe(vocabulary, vocabulary.merges(), ignore_merges=splitter.whole)
    splitter.apply(core)
    return core, splitter.bos


def _sentence_piece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a SentencePiece BPE tokenizer, and whether such texts begin with BOS."""
    unknown = vocabulary.of_type(_UNKNOWN)
    core = _bpe(
        vocabulary,
        vocabulary.merges_by_score(),
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=bool(vocabulary.of_type(_BYTE)),
    )
    prefix = vocabulary.value("add_space_prefix") is not False
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core, True


def _bpe(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **settings: object) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, **settings))
    except Exception as error:  # the library raises nothing narrower
        raise vocabulary.fail(f"tokens and merges do not fit together ({' '.join(str(error).split())[:200]})") from None


# Streams


class Detokenizer:
    """Text of tokens that come bit by bit. Its pieces joined are the text of all tokens; none ends within a character.

    Source: the window of text-generation-inference and vLLM: a token's text may depend on the one before it, so the
    tokens of the last piece are decoded again as context of the next.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset[int]()
        self._context: list[int] = []
        self._before = ""  # the text of _context
        self._fresh: list[int] = []
        self._sent = 0  # characters of the text of _fresh that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        # An id that the tokenizer does not know has no text, and would be decoded again with every token after it.
        fresh = [token for token in ids if token not in self._skip and token < self._tokenizer.vocab]
        if not fresh:
            return ""
        self._fresh += fresh
        text = self._text()
        safe = len(text.rstrip(_HALF))
        piece = text[self._sent : safe]
        if text and safe == len(text):
            self._context, self._fresh, self._sent = self._fresh, [], 0
            self._before = self._alone(self._context)
        else:
            self._sent = max(self._sent, safe)
        return piece

    def flush(self) -> str:
        """Return what was held back: characters that no token completed any more."""
        piece = self._text()[self._sent :] if self._fresh else ""
        self._context, self._before, self._fresh, self._sent = [], "", [], 0
        return piece

    def _alone(self, ids: list[int]) -> str:
        # Mostly it is one token, for every token of every answer.
        return self._tokenizer.decode_one(ids[0]) if len(ids) == 1 else self._tokenizer.decode(ids, skip_special=False)

    def _text(self) -> str:
        if not self._context:
            return self._alone(self._fresh)
        return self._tokenizer.decode(self._context + self._fresh, skip_special=False)[len(self._before) :]


class StopFinder:
    """Finds stop strings in text that comes bit by bit, wherever the pieces are cut.

    found  the stop string that was met first (the longest of those that end there), or None
    """

    def __init__(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return text that no stop string can begin in; nothing more once one was found."""
        if not self._stop:
            return text
        if self.found is not None:
            return ""
        self._held += text
        met = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        if met:
            end, _, self.found = min(met)
            return self._take(end if self._include else end - len(self.found))
        return self._take(len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0))

    def flush(self) -> str:
        """Return what was held back; the text is over, so no stop string can be completed."""
        return "" if self.found is not None else self._take(len(self._held))

    def _take(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


class TextStream:
    """The text of one request: tokens in, text out, ended by a stop string.

    min_tokens  in the text of so many tokens no stop string is looked for
    text        what was returned so far; stopped: whether a stop string ended it
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._finder = StopFinder(stop, include_stop=include_stop)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._pieces: list[str] = []

    def push(self, ids: Sequence[int], finished: bool = False) -> str:
        """Return the text that these tokens bring; `finished` returns what was held back as well."""
        self._tokens += len(ids)
        piece = self._detokenizer.push(ids)
        if finished:
            piece += self._detokenizer.flush()
        if self._tokens > self._min_tokens:
            piece = self._finder.push(piece)
        if finished:
            piece += self._finder.flush()
        self._pieces.append(piece)
        return piece

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self._finder.found is not None

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._pieces)
