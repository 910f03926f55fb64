"""Every refusal and failure as one JSON shape, with the type that OpenAI's clients turn into an exception."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from omniserve.base.errors import OmniserveError
from omniserve.client import EngineDeadError, LogitsError, StepError

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "BadRequestError",
    415: "BadRequestError",
    429: "RateLimitError",
    431: "BadRequestError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
INTERNAL = "internal error: see the server's log"
LONGEST_RETRY = 30
"""Seconds; the most that Retry-After asks for."""
_LONGEST = 600
_GIVEN = 80

TAGS = frozenset(
    {"a text", "a list of texts", "a list of token ids", "a list of lists of token ids", "a list of parts"}
)
"""Names of the shapes that a field may have; they stand in the place of pydantic's errors, but name no key."""


class ApiError(Exception):
    """An answer that is an error.

    param        dotted path of the field that is to blame
    retry_after  seconds, for 429 and 503
    headers      beside those that belong to the status
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if retry_after is None and status == 503:
            retry_after = 1
        if retry_after is not None:
            self.headers["retry-after"] = str(min(max(math.ceil(retry_after), 1), LONGEST_RETRY))
        if status == 501:
            self.headers["x-should-retry"] = "false"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def value(self) -> dict[str, Any]:
        """The object that clients get."""
        message = self.message if len(self.message) <= _LONGEST else self.message[: _LONGEST - 3] + "..."
        error = {"message": message, "type": TYPES[self.status], "param": self.param, "code": self.status}
        return {"error": error}

    @property
    def body(self) -> bytes:
        """The same as bytes of JSON."""
        return msgspec.json.encode(self.value)

    def response(self) -> Response:
        """The same as an answer."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


def unsupported(field: str, what: str) -> ApiError:
    """Return the refusal of a known field that this version does not honour."""
    return ApiError(501, f"{what} is not implemented by this server", param=field)


def from_exception(error: Exception) -> ApiError:
    """Return what a client is told about an exception; nothing of an unexpected one's text."""
    match error:
        case ApiError():
            return error
        case OmniserveError():
            sentence = str(error)
            return ApiError(400, sentence, param=_named(sentence))
        case RequestValidationError():
            return _validation(error.errors())
        case HTTPException():
            return _http(error)
        case EngineDeadError():
            return ApiError(503, "the engine has stopped: the server must be started again", retry_after=LONGEST_RETRY)
        case StepError():
            return ApiError(500, "the step that this request was part of has failed")
        case LogitsError():
            return ApiError(500, str(error))
        case TimeoutError():
            return ApiError(504, "the request took too long")
    return ApiError(500, INTERNAL)


def _named(sentence: str) -> str | None:
    """The parameter that a sentence of SamplingParams begins with (`name=value: must be ...`)."""
    name = sentence.split("=", 1)[0]
    return name if name.isidentifier() else None


def _http(error: HTTPException) -> ApiError:
    status = error.status_code if error.status_code in TYPES else 400
    messages = {
        404: "no such route: see /docs for those there are",
        405: "this route does not take this method: see the header Allow",
        400: "the body is not valid JSON",
    }
    return ApiError(status, messages.get(status, str(error.detail)), headers=error.headers)


def _validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the first mistake, by its place and what was given."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    place = [str(part) for part in first["loc"] if part not in TAGS]
    param = ".".join(place[1:]) or None
    text = str(first["msg"]).strip().rstrip(".")
    if first["type"] == "missing":
        return ApiError(400, f"{param or 'the body'} is missing", param=param)
    given = _shown(first.get("input"))
    return ApiError(400, f"{param or 'the body'}: {text[:1].lower()}{text[1:]}, not {given}", param=param)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = _GIVEN
        self.maxdict = self.maxlist = 3
        self.maxlevel = 2


def _shown(value: object) -> str:
    return _Short().repr(value).encode("ascii", "backslashreplace").decode()[:_GIVEN]
