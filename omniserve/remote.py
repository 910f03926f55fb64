"""An OpenAI-compatible server, ours or another, as a client sees it. No torch here.

httpx is imported where a connection is made.
"""

import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from omniserve.base.errors import ConfigError, ServerError
from omniserve.base.types import SamplingParams, Usage

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000/v1"
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 600.0
"""Without a byte from the server an answer is given up; ours sends a comment every 15 s."""
_DEFAULTS = SamplingParams()
_OWN = ("top_k", "min_p", "repetition_penalty", "ignore_eos")
"""Parameters that OpenAI's API does not have: sent only where they were changed, other servers refuse them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a server is. base: URL of its API, mostly ending in /v1; key: API key."""

    base: str
    key: str | None = None

    @staticmethod
    def at(url: str, key: str | None = None) -> "Place":
        """Return the place that a URL means; without a path its API is at /v1. Raises ConfigError."""
        parts = urlsplit(url)
        try:
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number
            good = False
        if not good or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"url={url!r}: must be like {DEFAULT_URL}")
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise ConfigError("the API key must be printable ASCII text without spaces around it")
        path = parts.path.rstrip("/") or "/v1"
        return Place(base=f"{parts.scheme}://{parts.netloc}{path}", key=key)

    @property
    def root(self) -> str:
        """Where the routes beside the API are: /engine/stats, /metrics."""
        return self.base.removesuffix("/v1")

    @property
    def headers(self) -> dict[str, str]:
        """What every request brings."""
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}

    @property
    def proxied(self) -> bool:
        """Whether the environment's proxies are for this place: never for this machine itself."""
        host = urlsplit(self.base).hostname or ""
        try:
            return not ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host != "localhost"

    def client(self) -> "httpx.Client":
        """Return an HTTP client for paths below `base`; the caller closes it."""
        import httpx

        return httpx.Client(
            base_url=self.base + "/",
            headers=self.headers,
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            trust_env=self.proxied,
        )


@contextmanager
def reported(place: Place) -> Iterator[None]:
    """Turn what goes wrong with a connection into a ServerError of one sentence."""
    import httpx

    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ServerError(
            f"no server answers at {place.base} ({_reason(error)}): `omniserve serve MODEL` starts one, --url tells "
            "where it is"
        ) from None
    except httpx.TimeoutException:
        raise ServerError(f"{place.base}: silent for {SILENCE_SECONDS:g} s, given up") from None
    except httpx.HTTPError as error:
        raise ServerError(f"{place.base}: the connection broke off ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def refusal(status: int, body: bytes) -> str:
    """Return what a server says about a request that it did not serve, in OpenAI's form or another one."""
    try:
        value = json.loads(body)
    except ValueError:
        return f"status {status}"
    told = value.get("error", value.get("detail")) if isinstance(value, dict) else None
    message = told.get("message") if isinstance(told, Mapping) else told
    return f"status {status}: {' '.join(str(message).split())[:400]}" if message else f"status {status}"


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of bytes that come in pieces. Only a line feed ends one: JSON may hold all other separators."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def events(content: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects of server-sent events until [DONE].

    Raises ServerError for an error among them, and if [DONE] never comes.
    """
    for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ServerError("the server sent an event that is no JSON object")
        if value.get("error"):
            raise ServerError(f"the server ended the answer with {refusal(200, data).removeprefix('status 200: ')}")
        yield value
    raise ServerError("the server closed the stream before its end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A served model. max_model_len: longest sequence, None if the server does not tell."""

    name: str
    max_model_len: int | None = None


def served_model(client: "httpx.Client", place: Place, wanted: str | None) -> Card:
    """Return the wanted one of the served models, or the first. Raises ServerError."""
    cards = _cards(client, place)
    if wanted is None:
        if not cards:
            raise ServerError(f"{place.base} lists no models: name one with --served-model-name")
        return cards[0]
    for card in cards:
        if card.name == wanted:
            return card
    if cards:
        names = ", ".join(card.name for card in cards[:10])
        raise ServerError(f"{place.base} has no model {wanted!r}: it has {names}")
    return Card(name=wanted)


def _cards(client: "httpx.Client", place: Place) -> list[Card]:
    with reported(place):
        answer = client.get("models")
    if answer.status_code != 200:
        raise ServerError(f"{place.base}/models: {refusal(answer.status_code, answer.content)}")
    try:
        told = [(str(card["id"]), card.get("max_model_len")) for card in answer.json()["data"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ServerError(f"{place.base}/models: the answer is no list of models: is this OpenAI's API?") from None
    return [Card(name=name, max_model_len=longest if type(longest) is int else None) for name, longest in told]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one event of a stream brought; ids of tokens are not told. usage comes once, near the end."""

    text: str
    token_ids: tuple[int, ...] = ()
    error: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None


class RemoteModel:
    """A model behind a server, with the part of LLM's interface that a conversation needs.

    model  name to ask for; None: the first that the server lists
    Raises ServerError.
    """

    def __init__(self, place: Place, model: str | None = None) -> None:
        self._place = place
        self._client = place.client()
        try:
            self.model = served_model(self._client, place, model).name
        except BaseException:
            self._client.close()
            raise

    def stream_chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> Iterator[Chunk]:
        """Answer one conversation, yielding text as it comes; closing the iterator drops the request.

        Raises ServerError.
        """
        body = {"model": self.model, "messages": list(messages), **request_fields(params)}
        with reported(self._place), self._client.stream("POST", "chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ServerError(refusal(answer.status_code, answer.read()))
            for event in events(lines(answer.iter_bytes())):
                yield _chunk(event)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> "RemoteModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def request_fields(params: SamplingParams) -> dict[str, Any]:
    """Return sampling parameters as the fields of a streamed chat request."""
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    fields |= {"temperature": params.temperature, "top_p": params.top_p}
    for name in ("presence_penalty", "frequency_penalty", *_OWN):
        if (value := getattr(params, name)) != getattr(_DEFAULTS, name):
            fields[name] = value
    if params.max_tokens is not None:
        fields["max_completion_tokens"] = params.max_tokens
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.seed is not None:
        fields["seed"] = params.seed
    return fields


def _chunk(event: Mapping[str, Any]) -> Chunk:
    """Return what an event says. Raises ServerError for one that is no chunk of a chat."""
    try:
        first: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        delta = first.get("delta") or {}
        usage = event.get("usage")
        return Chunk(
            text=(delta.get("reasoning_content") or "") + (delta.get("content") or ""),
            finish_reason=first.get("finish_reason"),
            usage=None if not usage else usage_of(usage),
        )
    except (AttributeError, TypeError, KeyError, ValueError):
        raise ServerError("the server sent an event that is no chunk of a chat: is this OpenAI's API?") from None


def usage_of(told: Mapping[str, Any]) -> Usage:
    """Return the token counts that a server tells."""
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(told["prompt_tokens"]),
        completion_tokens=int(told["completion_tokens"]),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )
