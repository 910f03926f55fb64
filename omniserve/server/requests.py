"""From the body of a request to its answer under way: what the HTTP routes and batch files share."""

from dataclasses import dataclass, replace
from typing import Any

from omniserve.base.errors import RequestError
from omniserve.base.structured import StructuredOutputs
from omniserve.server import protocol
from omniserve.server.answers import Prompt, Reply
from omniserve.server.calls import (
    THINK,
    THOUGHT,
    CallFinder,
    Dialect,
    Listener,
    ThoughtFinder,
    after_thinking,
    grammar,
    lark_of,
)
from omniserve.server.errors import ApiError, unsupported
from omniserve.server.protocol import ChatRequest, CompletionRequest, Sampling
from omniserve.server.service import Service
from omniserve.server.stream import ChatForm, CompletionForm, Form


async def begin(service: Service, body: CompletionRequest | ChatRequest, key: str | None) -> tuple[Reply, Form]:
    """Hand a request to the engine, and return its answer under way and how that is written.

    key  API key that it came with: prefixes are shared below one key only
    Raises ApiError, RequestError or EngineDeadError; then the engine has nothing of it.
    """
    service.accept()
    service.known(body.model)
    body.check()
    if isinstance(body, CompletionRequest):
        return await _completion(service, body, key)
    return await _chat(service, body, key)


async def _completion(service: Service, body: CompletionRequest, key: str | None) -> tuple[Reply, Form]:
    params = body.sampling(service.defaults(), await _form(service, body))
    given = body.prompts()
    most = service.server.limits.max_prompts
    if len(given) > most:
        raise ApiError(400, f"{len(given)} prompts: at most {most} are taken at once", param="prompt")
    service.turn_away(len(given) * params.n)
    prompts = [await _prompt(service, one) for one in given]
    reply = service.open(body, prompts, params, prefix="cmpl", key=key, echo=bool(body.echo))
    return reply, CompletionForm(service.text, lambda ids: service.tokenizer.decode(ids, skip_special=False))


async def _chat(service: Service, body: ChatRequest, key: str | None) -> tuple[Reply, Form]:
    params = body.sampling(service.defaults())
    tools = _tools(service, body)
    service.turn_away(params.n)
    ids, within = await conversation(
        service,
        body.messages,
        body.add_generation_prompt,
        tools=None if tools is None else tools.described,
        variables=body.chat_template_kwargs,
    )
    within = service.reasons and (within or service.server.reasoning_parser == "deepseek_r1")
    if tools is None:
        form = await _form(service, body, within=within)
    else:
        form = await _forced(service, tools, within=within)
    params = replace(params, structured_outputs=form)
    texts = [THINK, THOUGHT] if service.reasons else []
    texts += [] if tools is None else [tools.way.begin, tools.way.end]
    if any(service.tokenizer.special_id(text) is not None for text in texts):
        params = replace(params, skip_special_tokens=False)
    reply = service.open(body, [Prompt(text=None, ids=ids)], params, prefix="chatcmpl", key=key)
    if tools is None and not service.reasons:
        return reply, ChatForm(service.text)

    def listener() -> Listener:
        return Listener(
            ThoughtFinder(within=within) if service.reasons else None,
            None if tools is None else CallFinder(tools.way, many=tools.many),
        )

    return reply, ChatForm(service.text, listener, None if tools is None else tools.way)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """What a request says about tools. forced: functions one of which must be called; many: and more than one may."""

    way: Dialect
    described: list[dict[str, Any]]
    forced: list[dict[str, Any]]
    many: bool


def _tools(service: Service, body: ChatRequest) -> _Tools | None:
    """Return what may be called, None if nothing. Raises ApiError, 501 if this model is not known to call tools."""
    choice = body.choice
    if choice == "none":
        return None
    if service.dialect is None:
        raise ApiError(
            501,
            "how this model calls tools is not known: its chat template is none of hermes, llama3_json and mistral; "
            "if it does, start the server with --tool-call-parser",
            param="tools",
        )
    described = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
    functions = [tool["function"] for tool in described]
    forced = {"auto": [], "required": functions}.get(choice)
    if forced is None:
        forced = [function for function in functions if f"={function['name']}" == choice]
    many = body.parallel_tool_calls is not False and choice in ("auto", "required")
    return _Tools(way=service.dialect, described=described, forced=forced, many=many)


async def _forced(service: Service, tools: _Tools, *, within: bool) -> StructuredOutputs | None:
    """Return the form of an answer that must call a function, made ready; None where the model may choose."""
    if not tools.forced:
        return None
    texts = (tools.way.begin, tools.way.end)
    markers = {text: token for text in texts if (token := service.tokenizer.special_id(text)) is not None}
    lark = grammar(tools.way, tools.forced, markers, many=tools.many)
    try:
        form = StructuredOutputs(
            grammar=after_thinking(lark, service.tokenizer.special_id(THOUGHT)) if within else lark
        )
        await service.compile(form)
    except RequestError as error:
        raise protocol.formless(error, "tools") from None
    return form


async def _form(service: Service, body: Sampling, *, within: bool = False) -> StructuredOutputs | None:
    """Return the form that the answer must have, made ready; nothing is made for a request that finds no place.

    within  the answer begins within the reasoning, which the form is not about
    """
    found = body.form()
    if found is None:
        return None
    service.turn_away(1)
    form, param = found
    try:
        if within:
            lark = lark_of(form)
            if lark is None:
                raise unsupported(param, "a grammar that follows reasoning")
            form = StructuredOutputs(grammar=after_thinking(lark, service.tokenizer.special_id(THOUGHT)))
        await service.compile(form)
    except RequestError as error:
        raise protocol.formless(error, param) from None
    return form


async def _prompt(service: Service, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        return Prompt(text=given, ids=await service.encode(given))
    return Prompt(text=None, ids=given)


async def conversation(
    service: Service,
    messages: list[protocol.Message],
    add_generation_prompt: bool | None,
    *,
    tools: list[dict[str, Any]] | None = None,
    variables: dict[str, Any] | None = None,
) -> tuple[list[int], bool]:
    """Return the tokens of a conversation, and whether it ends within the model's reasoning.

    Raises ApiError or RequestError.
    """
    most = service.server.limits.max_messages
    if len(messages) > most:
        raise ApiError(400, f"{len(messages)} messages: at most {most} are taken", param="messages")
    made = protocol.conversation(messages)
    return await service.encode_chat(
        made, add_generation_prompt=add_generation_prompt is not False, tools=tools, variables=variables
    )
