"""The bodies of requests, and what they mean to the engine. Strict: a text is no number, NaN and infinity are refused.

Bounds stand here as well as in SamplingParams, so that the OpenAPI file shows them and an error names its field.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag
from pydantic_core import PydanticCustomError

from omniserve.base import log
from omniserve.base.errors import RequestError
from omniserve.base.structured import StructuredOutputs
from omniserve.base.types import SamplingParams
from omniserve.server.errors import ApiError, unsupported

_LOG = log.get(__name__)

_TOP = 20
_SEED = 2**63


def _proper(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("text", "must not hold the character NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("text", "must be valid Unicode, without half a surrogate pair") from None
    return text


Str = Annotated[str, AfterValidator(_proper)]
Text = Annotated[Str, Tag("a text")]
Texts = Annotated[list[Annotated[Str, Field(min_length=1)]], Field(min_length=1), Tag("a list of texts")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1), Tag("a list of token ids")]
IdLists = Annotated[
    list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1), Tag("a list of lists of token ids")
]


def _shape(value: object) -> str | None:
    """Name the shape of a prompt or a stop."""
    if isinstance(value, str):
        return "a text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, str):
        return "a list of texts"
    return "a list of lists of token ids" if isinstance(first, list) else "a list of token ids"


def _text_or_list(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "a list of texts" if isinstance(value, list) else None


def _text_or_parts(value: object) -> str | None:
    return "a text" if isinstance(value, str) else "a list of parts" if isinstance(value, list) else None


Prompt = Annotated[
    Union[Annotated[Str, Field(min_length=1), Tag("a text")], Texts, Ids, IdLists],  # noqa: UP007  # `|` cannot join annotated types here
    Discriminator(
        _shape,
        custom_error_type="shape",
        custom_error_message="must be a text, a list of texts, a list of token ids, or a list of such lists",
    ),
]
Stop = Annotated[
    Union[  # noqa: UP007
        Text,
        Annotated[list[Annotated[Str, Field(min_length=1)]], Field(max_length=16), Tag("a list of texts")],
    ],
    Discriminator(_text_or_list, custom_error_type="shape", custom_error_message="must be a text or a list of texts"),
]


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    """Bodies that the OpenAPI file shows: any server must take them."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Sampling(Body):
    """Fields of both endpoints; null is as good as absent everywhere."""

    model: Str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, lt=_SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    bad_words: Annotated[list[Annotated[Str, Field(min_length=1, max_length=256)]], Field(max_length=128)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=4096)] | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    cache_salt: Annotated[Str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    user: Str | None = None
    include_engine_stats: bool | None = None

    def check(self) -> None:
        """Raise ApiError 501 for a known field that is not honoured; note the unknown ones."""
        extra = self.model_extra or {}
        for name, what in _UNSUPPORTED.items():
            if extra.get(name) not in (None, False, [], {}):
                raise unsupported(name, what)
        if extra.get("best_of") not in (None, self.n or 1):
            raise unsupported("best_of", "best_of other than n")
        for name in ("structural_tag", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if (self.structured_outputs or {}).get(name) not in (None, False):
                raise unsupported(f"structured_outputs.{name}", name)
        unknown = [name for name in extra if name not in _UNSUPPORTED]
        if unknown:
            _LOG.debug("ignored fields %s", log.fields(names=",".join(sorted(unknown))[:200]))

    def form(self) -> tuple[StructuredOutputs, str] | None:
        """Return the form that the answer must have, and the field that says so. Raises ApiError."""
        described = self.structured_outputs or {}
        given = {name: value for name, value in described.items() if value not in (None, False)}
        wanted, param = self.response_format, "response_format"
        if wanted is not None and wanted.type != "text":
            if given:
                raise ApiError(400, "give response_format or structured_outputs, one of the two", param=param)
            given = {"json_object": True}
            if wanted.type == "json_schema":
                param = "response_format.json_schema.schema"
                schema = (wanted.json_schema or {}).get("schema")
                if not isinstance(schema, dict):
                    raise ApiError(400, f"{param} must be a JSON Schema, an object", param=param)
                given = {"json": schema}
        elif given:
            param = "structured_outputs"
        else:
            return None
        try:
            return StructuredOutputs.of(given), param
        except RequestError as error:
            raise formless(error, param) from None

    def params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        form: StructuredOutputs | None = None,
    ) -> SamplingParams:
        """Return how tokens are drawn: what the body says, else `defaults`. Raises RequestError."""
        values: dict[str, Any] = dict(defaults)
        for name in _SAMPLING:
            if (given := getattr(self, name)) is not None:
                values[name] = given
        if self.logit_bias is not None:
            values["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(
            **values,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=form,
        )


def formless(error: RequestError, param: str) -> ApiError:
    """Return the refusal of a form, by the field that described it."""
    _, _, reason = str(error).partition(": ")
    return ApiError(400, f"{param}: {reason}", param=param)


_SAMPLING = (
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
    "bad_words", "allowed_token_ids", "skip_special_tokens",
)  # fmt: skip
_UNSUPPORTED = {
    "use_beam_search": "beam search",
    "length_penalty": "beam search",
    "logits_processors": "a logits processor",
    "prompt_logprobs": "prompt_logprobs (use echo with logprobs)",
    "prompt_embeds": "a prompt of embeddings",
    "truncate_prompt_tokens": "truncation of prompts",
    "guided_json": "guided_json",
    "guided_regex": "guided_regex",
    "guided_choice": "guided_choice",
    "guided_grammar": "guided_grammar",
    "functions": "functions",
    "function_call": "function_call",
    "audio": "audio",
    "prediction": "a predicted output",
    "web_search_options": "web search",
    "documents": "documents",
    "chat_template": "a chat template in a request",
    "continue_final_message": "continue_final_message",
    "mm_processor_kwargs": "multimodal input",
    "kv_transfer_params": "kv_transfer_params",
}
"""Fields of OpenAI and vLLM that would change the answer: refused unless null, false or empty."""


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    model_config = _examples({"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0})

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_TOP)] | None = None
    suffix: Str | None = None

    def check(self) -> None:
        """Raise ApiError 501 for a known field that is not honoured."""
        super().check()
        if self.suffix:
            raise unsupported("suffix", "a suffix")

    def sampling(self, defaults: Mapping[str, Any], form: StructuredOutputs | None = None) -> SamplingParams:
        """Return how tokens are drawn. Raises RequestError."""
        return self.params(
            defaults,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            form=form,
        )

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]
        return given


class Part(Body):
    """A part of a message's content."""

    type: str
    text: Str | None = None


FunctionName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(Body):
    """A function that the model may call; parameters: a JSON Schema of its arguments."""

    name: FunctionName
    description: Str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """A function that was called; arguments: the text of a JSON object."""

    name: Str
    arguments: Str


class ToolCall(Body):
    """A call that the model has made."""

    id: Str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: (
        Annotated[
            Union[Text, Annotated[list[Part], Field(max_length=2048), Tag("a list of parts")]],  # noqa: UP007
            Discriminator(
                _text_or_parts, custom_error_type="shape", custom_error_message="must be a text or a list of parts"
            ),
        ]
        | None
    ) = None
    name: Str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Str | None = None
    reasoning_content: Str | None = None


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    model_config = _examples({"messages": [{"role": "user", "content": "Is water wet?"}], "max_tokens": 8})

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise ApiError for a known field that is not honoured, or that goes with another one."""
        super().check()
        if self.choice != "none":
            if self.response_format is not None and self.response_format.type != "text":
                raise unsupported("response_format", "a response_format beside tools")
            if self.structured_outputs:
                raise unsupported("structured_outputs", "structured_outputs beside tools")
        if (self.model_extra or {}).get("echo"):
            raise unsupported("echo", "echo of a conversation")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", param="top_logprobs")

    @property
    def choice(self) -> str:
        """Which tools the model may use: none, auto, required, or `=` and the name of a function. Raises ApiError."""
        match self.tool_choice:
            case None | "auto":
                return "auto" if self.tools else "none"
            case "none":
                return "none"
            case "required":
                name = None
            case {"type": "function", "function": {"name": str(name)}}:
                pass
            case _:
                raise ApiError(400, f"tool_choice must be {_CHOICES}", param="tool_choice")
        names = [tool.function.name for tool in self.tools or ()]
        if not names:
            raise ApiError(400, "tool_choice goes with tools, and there are none", param="tool_choice")
        if name is not None and name not in names:
            known = ", ".join(names)[:200]
            raise ApiError(400, f"tool_choice: no tool has the name {name[:80]!r}: {known}", param="tool_choice")
        return "required" if name is None else f"={name}"

    def sampling(self, defaults: Mapping[str, Any], form: StructuredOutputs | None = None) -> SamplingParams:
        """Return how tokens are drawn; without a limit the rest of the context is the limit. Raises RequestError."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.params(defaults, max_tokens=most, logprobs=logprobs, form=form)


_CHOICES = 'none, auto, required or {"type": "function", "function": {"name": ...}}'


def conversation(messages: list[Message]) -> list[dict[str, Any]]:
    """Return messages as the chat template gets them: content is a text. Raises ApiError."""
    return [_message(message, f"messages.{place}") for place, message in enumerate(messages)]


def _message(message: Message, place: str) -> dict[str, Any]:
    made: dict[str, Any] = {"role": message.role}
    match message.content:
        case None:
            if not message.tool_calls:
                raise ApiError(400, f"{place}.content is missing", param=f"{place}.content")
            made["content"] = ""
        case str() as text:
            made["content"] = text
        case parts:
            made["content"] = "\n".join(_part(part, f"{place}.content.{n}") for n, part in enumerate(parts))
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            _called(call, f"{place}.tool_calls.{number}") for number, call in enumerate(message.tool_calls)
        ]
    return made


def _called(call: ToolCall, place: str) -> dict[str, Any]:
    """Return a call as templates want it: arguments are an object."""
    param = f"{place}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"{param} must be the text of a JSON object", param=param)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _part(part: Part, place: str) -> str:
    if part.type != "text":
        if part.type in _MEDIA:
            raise unsupported(f"{place}.type", f"content of type {part.type}")
        raise ApiError(400, f"{place}.type must be text, not {part.type[:80]!r}", param=f"{place}.type")
    if part.text is None:
        raise ApiError(400, f"{place}.text is missing", param=f"{place}.text")
    return part.text


_MEDIA = frozenset(
    {
        "image_url",
        "image",
        "input_image",
        "input_audio",
        "audio_url",
        "video_url",
        "video",
        "file",
        "input_file",
        "refusal",
    }
)


class TokenizeRequest(Body):
    """Body of /tokenize: a prompt, or a conversation."""

    model_config = _examples({"prompt": "Is water wet?"})

    model: Str | None = None
    prompt: Str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model_config = _examples({"tokens": [0, 1, 2]})

    model: Str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool | None = None


# Answers, for the OpenAPI file


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class Error(BaseModel):
    """The one shape of every error."""

    error: ErrorBody


class Card(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class Cards(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[Card]


class CachedTokens(BaseModel):
    """Tokens of the prompt that were found in the prefix cache."""

    cached_tokens: int


class UsageBody(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    omniserve: dict[str, float] | None = None


class CompletionLogprobs(BaseModel):
    """How likely tokens were, as lists of equal length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody


class ChatMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    """How likely a token was; bytes is null where a token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """How likely a token of the answer was, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """How likely the tokens of an answer were."""

    content: list[ChatLogprob]


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class Tokens(BaseModel):
    """Answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    """Answer of /detokenize."""

    prompt: str


class VersionBody(BaseModel):
    """Answer of /version."""

    version: str
