"""Chat templates: the families' formats against transformers, and templates that would harm the process that asks."""

import gc
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers

from omniserve.base.errors import RequestError
from omniserve.templates import ChatTemplate
from omniserve.text import Tokenizer

Messages = list[dict[str, Any]]

SYSTEM: Messages = [{"role": "system", "content": "Be brief."}]
ONE: Messages = [{"role": "user", "content": " Hi 🙂 "}]
TWO: Messages = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
]

# The families' formats, as they are published, written down in our own words.

LLAMA_2 = """
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- for m in (messages[1:] if system is not none else messages) %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- bos_token + '[INST] ' }}
        {{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system is not none }}
        {{- m['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m['content'].strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA_3 = """
{%- for m in messages %}
    {%- set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{% set text = bos_token + text %}{% endif %}
    {{- text }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA_3_1 = """
{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if builtin_tools is defined or tools is not none %}{{ 'Environment: ipython\\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for m in messages %}
    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {{- raise_exception('This model only supports single tool-calls at once!') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL_V1 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
MISTRAL_V3 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m['role'] == 'user' %}
        {%- if m == users[-1] and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + m['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif m['role'] == 'assistant' %}
        {{- ' ' + m['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
MIXTRAL = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ ' [INST] ' + m['content'] + ' [/INST]' }}
    {%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
CHATML = """
{%- for m in messages %}
    {%- if loop.first and m['role'] != 'system' and DEFAULT %}{{ '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWEN_3 = """
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.searching and m.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- set ns.searching = false %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
VICUNA = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "A chat between a curious user and an artificial intelligence assistant. " +
        "The assistant gives helpful, detailed, and polite answers to the user's questions." %}
{%- endif %}
{{- bos_token + system }}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{ ' USER: ' + m['content'] | trim }}
    {%- else %}{{ ' ASSISTANT: ' + m['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""


def chatml(default: str) -> str:
    return CHATML.replace("DEFAULT", repr(default))


class Family(NamedTuple):
    template: str
    bos: str
    eos: str
    system: str | None
    """What is written for a system message and one question; None: refused."""
    turns: str
    """What is written for two questions and the answer to the first."""
    variables: Mapping[str, object] = {}


def llama_3(*turns: tuple[str, str]) -> str:
    return "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns)


def im(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


QUESTIONS = (("user", "2+2?"), ("assistant", "4"), ("user", "Sure?"))
ASKED = (("system", "Be brief."), ("user", " Hi 🙂 "))
L3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
IM = "<|im_start|>assistant\n"
FAMILIES = {
    "Llama 2": Family(
        LLAMA_2, "<s>", "</s>",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi 🙂 [/INST]",
        "<s>[INST] 2+2? [/INST] 4 </s><s>[INST] Sure? [/INST]",
    ),
    "Llama 3": Family(
        LLAMA_3, "<|begin_of_text|>", "<|eot_id|>",
        "<|begin_of_text|>" + llama_3(("system", "Be brief."), ("user", "Hi 🙂")) + L3_ANSWER,
        "<|begin_of_text|>" + llama_3(*QUESTIONS) + L3_ANSWER,
    ),
    "Llama 3.1": Family(
        LLAMA_3_1, "<|begin_of_text|>", "<|eot_id|>",
        "<|begin_of_text|>" + llama_3(("system", DATE + "Be brief."), ("user", "Hi 🙂")) + L3_ANSWER,
        "<|begin_of_text|>" + llama_3(("system", DATE), *QUESTIONS) + L3_ANSWER,
    ),
    "Mistral v0.1": Family(
        MISTRAL_V1, "<s>", "</s>", None, "<s>[INST] 2+2? [/INST]4</s>[INST] Sure? [/INST]"
    ),
    "Mistral v0.3": Family(
        MISTRAL_V3, "<s>", "</s>",
        "<s>[INST] Be brief.\n\n Hi 🙂 [/INST]",
        "<s>[INST] 2+2?[/INST] 4</s>[INST] Sure?[/INST]",
    ),
    "Mixtral": Family(
        MIXTRAL, "<s>", "</s>", None, "<s> [INST] 2+2? [/INST] 4</s> [INST] Sure? [/INST]"
    ),
    "Qwen 2": Family(
        chatml("You are a helpful assistant."), "", "<|im_end|>",
        im(*ASKED) + IM, im(("system", "You are a helpful assistant."), *QUESTIONS) + IM,
    ),
    "Qwen 2.5": Family(
        chatml(QWEN), "", "<|im_end|>", im(*ASKED) + IM, im(("system", QWEN), *QUESTIONS) + IM
    ),
    "Qwen 3": Family(QWEN_3, "", "<|im_end|>", im(*ASKED) + IM, im(*QUESTIONS) + IM),
    "Qwen 3, told to think": Family(
        QWEN_3, "", "<|im_end|>", im(*ASKED) + IM, im(*QUESTIONS) + IM, {"enable_thinking": True}
    ),
    "Qwen 3, told not to": Family(
        QWEN_3, "", "<|im_end|>",
        im(*ASKED) + IM + "<think>\n\n</think>\n\n", im(*QUESTIONS) + IM + "<think>\n\n</think>\n\n",
        {"enable_thinking": False},
    ),
    "SmolLM2": Family(
        chatml(SMOL), "<|im_start|>", "<|im_end|>", im(*ASKED) + IM, im(("system", SMOL), *QUESTIONS) + IM
    ),
    "Vicuna": Family(
        VICUNA, "<s>", "</s>",
        "<s>Be brief. USER: Hi 🙂 ASSISTANT:",
        f"<s>{POLITE} USER: 2+2? ASSISTANT: 4</s> USER: Sure? ASSISTANT:",
    ),
    "Yi": Family(chatml(""), "<|startoftext|>", "<|im_end|>", im(*ASKED) + IM, im(*QUESTIONS) + IM),
    "Zephyr": Family(
        ZEPHYR, "<s>", "</s>",
        "<|system|>\nBe brief.</s>\n<|user|>\n Hi 🙂 </s>\n<|assistant|>\n",
        "<|user|>\n2+2?</s>\n<|assistant|>\n4</s>\n<|user|>\nSure?</s>\n<|assistant|>\n",
    ),
}  # fmt: skip


def tokenizer(template: str | None, **words: str) -> Tokenizer:
    """A tokenizer without a vocabulary, for what it renders."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    return Tokenizer(core, words=words, add_bos=False, eos_ids=frozenset(), template=template)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str, theirs: Any) -> None:
    family = FAMILIES[name]
    words = {"bos_token": family.bos, "eos_token": family.eos}
    mine = tokenizer(family.template, **words)
    for messages, expected in ((SYSTEM + ONE, family.system), (TWO, family.turns)):
        if expected is None:
            with pytest.raises(RequestError, match="refuses the conversation: "):
                mine.render(messages)
            continue
        assert mine.render(messages, variables=family.variables) == expected
        for prompt in (True, False):
            rendered = mine.render(messages, add_generation_prompt=prompt, variables=family.variables)
            assert rendered == theirs.apply_chat_template(
                messages,
                chat_template=family.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **words,
                **family.variables,
            )


def test_qwen_3_forgets_what_it_thought_before(theirs: Any) -> None:
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
    messages = [TWO[0], thought, TWO[2]]
    assert tokenizer(QWEN_3).render(messages) == im(*QUESTIONS) + IM
    assert theirs.apply_chat_template(
        messages, chat_template=QWEN_3, tokenize=False, add_generation_prompt=True
    ) == tokenizer(QWEN_3).render(messages)


@pytest.mark.parametrize("name", ["Llama 2", "Mistral v0.1"])
def test_roles_must_alternate(name: str) -> None:
    with pytest.raises(RequestError, match="refuses the conversation: Conversation roles must alternate"):
        tokenizer(FAMILIES[name].template, bos_token="<s>", eos_token="</s>").render(ONE + ONE)


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="the model has no chat template: give one with --chat-template FILE"):
        tokenizer(None).render(ONE)


@pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt", "tools"])
def test_variables_do_not_replace_what_is_given(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is no variable"):
        tokenizer("x", bos_token="<s>").render(ONE, variables={name: []})


def test_output_is_bounded() -> None:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    mine = Tokenizer(
        core,
        words={},
        add_bos=False,
        eos_ids=frozenset(),
        template="{{ messages[0].content }}",
        max_prompt_bytes=40,
    )
    assert mine.render([{"role": "user", "content": "é" * 20}]) == "é" * 20
    with pytest.raises(RequestError, match="writes more than 40 bytes for this conversation: shorten it"):
        mine.render([{"role": "user", "content": "é" * 20 + "x"}])


# Templates that would do harm

HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "access to attribute '__init__'",
    "{{ self.__init__.__globals__ }}": "'__init__'",
    "{{ messages.__class__.x }}": "'__class__'",
    "{{ lipsum.__globals__['os'].system('id') }}": "'__globals__'",
    "{{ (''|attr('__class__')).__mro__ }}": "'__mro__'|undefined|has no attribute|unsafe",
    "{{ '{0.__class__.__mro__}'.format(1) }}": "'__class__'",
    "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}": "'__class__'",
    "{{ raise_exception.__globals__.x }}": "'__globals__'",
    "{{ strftime_now.__closure__[0] }}": "'__closure__'",
    "{{ namespace.__init__.__globals__ }}": "'__init__'",
    "{% include '/etc/passwd' %}": "loader",
    "{% import 'os' as os %}": "loader",
    "{% set x = messages.append(1) %}": "'append'",
    "{{ range(10 ** 9) | list }}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "recursion",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}": "recursion|nested|too many|complex",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: "recursion|nested|too many|complex",
}
LARGE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ 'a' * (messages | length) * 10 ** 8 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ [1] | batch(10 ** 9, 0) | list }}",
    "{% set ns = namespace(x='a') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ (messages | length + 6) ** (10 ** 8) % 5 }}",
    "{{ lipsum(n=10 ** 6) }}",
]
MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[None]:
    """Assert that this process holds not much more than before, at no time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 32 * 1024


@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:40])
def test_hostile_templates_are_refused(template: str, memory: None) -> None:
    sandboxed = ChatTemplate(template)
    with pytest.raises(RequestError) as caught:
        sandboxed.render({"messages": ONE}, max_bytes=MIB)
    assert re.search(f"refuses the conversation: .*({HOSTILE[template]})", str(caught.value)), caught.value
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("template", LARGE, ids=lambda template: template[:40])
def test_memory_is_bounded(template: str, memory: None) -> None:
    sandboxed = ChatTemplate("{% if messages %}" + template + "{% endif %}fine")
    with pytest.raises(RequestError, match=r"needs more than|writes more than|ran for more than"):
        sandboxed.render({"messages": ONE}, max_bytes=MIB)
    assert sandboxed.worker is None
    assert sandboxed.render({"messages": []}, max_bytes=MIB) == "fine"


@pytest.mark.parametrize("template", ENDLESS, ids=lambda template: template[:40])
def test_time_is_bounded(template: str, memory: None) -> None:
    sandboxed = ChatTemplate("{% if messages %}" + template + "{% endif %}fine", seconds=1)
    assert sandboxed.render({"messages": []}, max_bytes=MIB) == "fine"
    first = sandboxed.worker
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"ran for more than 1 s: mend it, or give another with --chat-template"):
        sandboxed.render({"messages": ONE}, max_bytes=MIB)
    assert time.monotonic() - began < 2
    assert first is not None
    assert gone(first)
    assert sandboxed.render({"messages": []}, max_bytes=MIB) == "fine"
    assert sandboxed.worker not in (None, first)


def test_two_seconds_by_default() -> None:
    began = time.monotonic()
    with pytest.raises(RequestError, match=r"ran for more than 2 s"):
        tokenizer(ENDLESS[0]).render(ONE)
    assert 2 <= time.monotonic() - began < 5


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_worker_that_is_killed_is_replaced() -> None:
    template = ChatTemplate("{{ x }}")
    assert template.render({"x": 1}, max_bytes=9) == "1"
    assert template.worker is not None
    process = template._worker.process  # type: ignore[union-attr]  # just asked for
    process.kill()
    process.wait()
    assert template.render({"x": 2}, max_bytes=9) == "2"


def test_a_worker_that_dies_at_work_is_told_from_a_slow_one() -> None:
    template = ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", seconds=9)
    template._start()
    assert template.worker is not None
    killer = threading.Timer(0.1, os.kill, (template.worker, signal.SIGKILL))
    killer.start()
    with pytest.raises(RequestError, match="ended the process that renders it"):
        template.render({}, max_bytes=9)
    killer.join()


def test_the_worker_goes_with_its_template() -> None:
    template = ChatTemplate("x")
    template.render({}, max_bytes=9)
    process = template.worker
    template.close()
    assert process is not None
    assert gone(process)
    assert template.worker is None
    template.render({}, max_bytes=9)
    process = template.worker
    del template
    gc.collect()
    assert process is not None
    assert gone(process)


def test_the_worker_goes_with_a_program_that_is_killed() -> None:
    code = (
        "from omniserve.templates import ChatTemplate; t = ChatTemplate('x'); t.render({}, max_bytes=9); "
        "import os; print(t.worker, flush=True); os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    process = int(ran.stdout)
    until = time.monotonic() + 10
    while not (gone(process) or is_zombie(process)) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone(process) or is_zombie(process)


def is_zombie(process: int) -> bool:
    """Whether the process has ended and merely waits for a parent that asks (in a container nobody may)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_worker_has_no_torch_and_little_memory() -> None:
    template = ChatTemplate("x")
    template.render({}, max_bytes=9)
    mapped = Path(f"/proc/{template.worker}/maps").read_text()
    assert "torch" not in mapped
    status = Path(f"/proc/{template.worker}/status").read_text()
    held = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert held is not None
    assert int(held[1]) < 64 * 1024


def test_threads_take_turns() -> None:
    template = ChatTemplate("{{ x }}{% for i in range(1000) %}{% endfor %}")
    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(lambda x: template.render({"x": x}, max_bytes=9), range(100)))
    assert rendered == [str(x) for x in range(100)]


def test_long_conversations_pass_through() -> None:
    text = "ä\n\ud83d" * 700_000
    rendered = ChatTemplate("{{ x }}").render({"x": text}, max_bytes=8 * MIB)
    assert rendered == text


def test_values_must_be_json() -> None:
    with pytest.raises(RequestError, match="messages must hold texts, numbers"):
        tokenizer("x").render([{"role": "user", "content": {1, 2}}])
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(RequestError, match="messages must hold texts, numbers"):
        tokenizer("x").render([{"role": "user", "content": endless}])
