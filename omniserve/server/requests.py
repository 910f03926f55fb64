"""From the body of a request to its answer under way: what the HTTP routes and batch files share."""

from typing import Any

from omniserve.base.errors import RequestError
from omniserve.base.structured import StructuredOutputs
from omniserve.server import protocol
from omniserve.server.answers import Prompt, Reply
from omniserve.server.errors import ApiError
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
    params = body.sampling(service.defaults(), await _form(service, body))
    service.turn_away(params.n)
    ids = await conversation(service, body.messages, body.add_generation_prompt, variables=body.chat_template_kwargs)
    reply = service.open(body, [Prompt(text=None, ids=ids)], params, prefix="chatcmpl", key=key)
    return reply, ChatForm(service.text)


async def _form(service: Service, body: Sampling) -> StructuredOutputs | None:
    """Return the form that the answer must have, made ready; nothing is made for a request that finds no place."""
    found = body.form()
    if found is None:
        return None
    service.turn_away(1)
    form, param = found
    try:
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
    variables: dict[str, Any] | None = None,
) -> list[int]:
    """Return the tokens of a conversation. Raises ApiError or RequestError."""
    most = service.server.limits.max_messages
    if len(messages) > most:
        raise ApiError(400, f"{len(messages)} messages: at most {most} are taken", param="messages")
    made = protocol.conversation(messages)
    return await service.encode_chat(
        made, add_generation_prompt=add_generation_prompt is not False, variables=variables
    )
