"""The web page in a headless Chromium: chat, stop, keys, hostile texts, the engine tab, two servers side by side.

`apt-get install -y chromium chromium-driver`; without them these tests fail, and say so.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, environment
from tests.server.browser import Page, chromium
from tests.server.harness import Server, eventually, free_ports, program, serving

pytestmark = pytest.mark.long

KEY = "a-key-of-the-test"
HOSTILE = """<script>window.hit=1</script><img src=x onerror="window.hit=2">

# <b>head</b>

- <svg onload=window.hit=3>
- **<i>bold</i>** and `<u>code</u>`

[a](javascript:window.hit=4) [b](data:text/html,<script>window.hit=5</script>) [c](https://example.org/?q="onclick=1)

```html
</code></pre><script>window.hit=6</script>
```
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_was_blocked(page: Page) -> Iterator[None]:
    """No test leaves a violation of the policy, or an error in the console, behind."""
    page.complaints()
    yield
    assert page.blocked() == []
    assert page.complaints() == []


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model says hostile things, for as long as it may."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    server = program(null=0.004, engine=f"say {HOSTILE}", options={"chat_template": str(template)})
    yield server
    server.close()


@pytest.fixture(scope="module")
def keyed(tiny: Path) -> Iterator[Server]:
    """The tiny model behind a key."""
    options = {"precision": "w8a8kv8", "kv_cache_memory_bytes": 1 << 20}
    server = program(model=str(tiny), options=options, server={"api_key": [KEY]})
    yield server
    server.close()


def enter_key(page: Page, key: str) -> None:
    page.until("document.getElementById('key-dialog').open")
    page.get("key").clear()
    page.get("key").send_keys(key + "\n")


def test_chat_behind_a_key(page: Page, keyed: Server) -> None:
    page.open(keyed.url, wait="needs a key")
    enter_key(page, "wrong")
    page.until("document.getElementById('key-note').textContent.includes('does not know this key')")
    enter_key(page, KEY)
    page.until("document.getElementById('state').textContent === 'ready'")
    assert page.get("precision").text == "w8a8kv8"
    page.get("settings-button").click()
    page.get("max_tokens").send_keys("24")
    page.get("temperature").send_keys("0")
    page.get("settings-button").click()
    page.send("Is water wet?")
    first = page.answered()
    assert first
    meta = page.all(".meta")[0].text
    assert re.search(r"first token [\d.]+ (ms|s)\b.*tokens 24\b.*cached 0 of \d+", meta, re.DOTALL), meta
    assert "cut off at the limit" in meta

    page.all(".again")[0].click()
    assert page.answered() == first, "greedy"
    assert len(page.all(".turn")) == 2
    page.send("And fire?")
    page.answered(2)
    assert len(page.all(".again")) == 1, "only the last answer can be made again"

    storage = page.run("return [document.cookie, {...localStorage}, {...sessionStorage}, document.body.outerHTML]")
    assert KEY not in str(storage)
    page.open(keyed.url, wait="needs a key")


def copied(page: Page, name: str) -> str:
    page.run("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.all(f".{name}")[-1].click()
    return str(page.until("window.copied"))


def test_what_is_copied_runs(page: Page, keyed: Server, tmp_path: Path) -> None:
    """The shell and Python take the copies as they are; the key is not in them."""
    page.open(keyed.url, wait="needs a key")
    enter_key(page, KEY)
    page.until("document.getElementById('state').textContent === 'ready'")
    page.get("settings-button").click()
    page.get("max_tokens").send_keys("8")
    page.get("temperature").send_keys("0")
    page.send('it\'s "quoted" \\ $HOME `date` é')
    page.answered()
    curl = copied(page, "copy-curl")
    python = copied(page, "copy-python")
    for text in (curl, python):
        assert KEY not in text
    keys = environment() | {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, env=keys, check=True, timeout=60)
    answer = json.loads(ran.stdout)["choices"][0]["message"]["content"]
    assert answer == page.run("return turns.at(-1).content")
    ran = subprocess.run(
        [sys.executable, "-c", python], capture_output=True, text=True, env=keys, check=True, timeout=60
    )
    assert ran.stdout == answer + "\n"


def test_answers_that_follow_a_schema(page: Page, keyed: Server) -> None:
    page.open(keyed.url, wait="needs a key")
    enter_key(page, KEY)
    page.until("document.getElementById('state').textContent === 'ready'")
    page.get("settings-button").click()
    schema = {"type": "object", "properties": {"wet": {"enum": ["yes", "no"]}}, "required": ["wet"]}
    page.get("schema").send_keys(json.dumps(schema | {"additionalProperties": False}))
    page.send("Is water wet?")
    assert json.loads(page.answered())["wet"] in ("yes", "no")
    assert page.all(".turn.assistant .text > pre > code")


def test_stop(page: Page, parrot: Server) -> None:
    page.open(parrot.url)
    page.send("Go on for ever")
    page.until("document.querySelector('.turn.assistant .text').textContent.length > 300")
    assert not page.get("send").is_displayed()
    page.get("stop").click()
    page.answered()
    assert "stopped" in page.all(".meta")[0].text
    eventually(parrot.idle)
    assert page.get("send").is_displayed()
    page.send("Again")
    page.until("document.querySelectorAll('.turn.assistant.busy .text')[0]?.textContent.length > 100")
    page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    page.answered(2)
    eventually(parrot.idle)
    page.get("clear").click()
    assert not page.all(".turn")


def test_hostile_texts_stay_texts(page: Page, parrot: Server) -> None:
    page.open(parrot.url)
    page.get("settings-button").click()
    page.get("max_tokens").send_keys(str(len(HOSTILE)))
    page.get("settings-button").click()
    page.run("document.getElementById('prompt').value = arguments[0]", HOSTILE)
    page.get("send").click()
    page.answered()
    assert page.run("return window.hit") is None
    user, model = page.all(".turn.user")[0], page.all(".turn.assistant .text")[0]
    assert user.text == HOSTILE.strip()
    assert page.run("return arguments[0].children.length", user) == 0
    tags = page.run("return [...arguments[0].querySelectorAll('*')].map((one) => one.tagName)", model)
    assert set(tags) == {"P", "H3", "UL", "LI", "STRONG", "CODE", "PRE", "A"}
    text = page.run("return arguments[0].textContent", model)
    for piece in ("<script>window.hit=1</script>", "<b>head</b>", "<svg onload", "<i>bold</i>", "<u>code</u>"):
        assert piece in text
    assert "[a](javascript:window.hit=4)" in text, "no link is made of it"
    links = page.run("return [...arguments[0].querySelectorAll('a')].map((one) => [one.href, one.rel])", model)
    assert links == [["https://example.org/?q=%22onclick=1", "noopener noreferrer"]]


def test_the_policy_bites(page: Page, parrot: Server) -> None:
    """What would come of it if the page did parse a text as HTML: nothing."""
    page.open(parrot.url)
    page.run(
        "document.body.insertAdjacentHTML('beforeend', '<p style=\"color:red\" onclick=\"window.hit=1\" id=bad>x</p>');"
        "document.getElementById('bad').click(); fetch('http://127.0.0.2:9/').catch(() => {});"
    )
    page.until("window.blocked.length >= 3")
    assert set(page.blocked()) == {"style-src-attr", "script-src-attr", "connect-src"}
    assert page.run("return window.hit") is None
    page.complaints()
    page.open(parrot.url)


def test_refusals_are_shown(page: Page, parrot: Server) -> None:
    page.open(parrot.url)
    page.get("settings-button").click()
    page.get("schema").send_keys("{")
    page.send("Hello")
    page.until("document.getElementById('toast').textContent.includes('no JSON')")
    assert not page.all(".turn")
    page.get("schema").clear()
    page.get("max_tokens").send_keys("100000000000000000000")
    page.get("send").click()
    page.until("document.querySelector('.turn .error')")
    assert "max_tokens" in page.all(".turn .error")[0].text


def test_keyboard(page: Page, parrot: Server) -> None:
    page.open(parrot.url)
    page.get("tab-chat").send_keys("\ue014")  # arrow right
    page.until("!document.getElementById('engine').hidden")
    assert page.run("return document.activeElement.id") == "tab-engine"
    assert page.get("tab-engine").get_attribute("aria-selected") == "true"
    page.get("tab-engine").send_keys("\ue012")  # arrow left
    page.until("document.getElementById('engine').hidden")
    for _ in range(3):
        page.get("theme").click()
    assert page.get("theme").text == "Theme: auto"
    page.get("prompt").send_keys("one\ue008\ue007\ue008two\ue007")  # shift and enter between, enter at the end
    page.until("document.querySelector('.turn.user')")
    assert page.all(".turn.user")[0].text == "one\ntwo"
    page.get("stop").click()
    page.answered()


def test_engine_tab(page: Page, tiny: Path) -> None:
    options = {"precision": "w8a8kv8", "max_num_seqs": 1, "kv_cache_memory_bytes": 1 << 20}
    with serving(model=str(tiny), options=options) as server:
        page.open(server.url + "/#engine")
        page.until("document.querySelector('#maps canvas[aria-label]')")
        assert page.get("heads-size").text == "2 layers, 2 key heads each"
        assert "dense" in page.get("read-note").text
        assert "no streaming heads" in page.get("heads-note").text
        assert page.all("#bytes .value")[1].text == "256"
        assert "times more tokens fit" in page.get("bytes-note").text
        body = {"prompt": [7] * 130, "max_tokens": 120, "n": 8, "temperature": 1, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            page.until("document.getElementById('running').textContent === '1'")
            page.until("Number(document.getElementById('waiting').textContent) > 0")
            page.until("/^3 \\/ 3|^4 \\/ 4/.test(document.querySelector('#requests .value')?.textContent)")
            page.until("/p50 [0-9.]+ ms/.test(document.getElementById('itl-figures').textContent)")
            assert "running" not in page.get("requests").text
            label = page.until("document.querySelector('#maps canvas').getAttribute('aria-label')")
            assert re.search(r"\d of \d+ pages held", label), label
        page.until("document.getElementById('running').textContent === '0'")
        page.get("tab-chat").click()
        eventually(lambda: "path=/engine/stats status=200" in server.log.splitlines()[-1])  # nobody watches any more
        page.leave()


def test_engine_tab_of_a_sparse_server(page: Page, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t0.1\n0.8\t0.7\n")
    options = {"sparsity": "lserve", "static_sparsity": 0.3, "attn_pattern": str(tmp_path), "token_budget": 128}
    with serving(model=str(tiny), options={"precision": "w8a8kv8", "max_num_seqs": 2, **options}) as server:
        page.open(server.url + "/#engine")
        page.until("document.querySelectorAll('#maps canvas[aria-label]').length === 2")
        assert page.all("#maps canvas")[1].get_attribute("aria-label").startswith("streaming heads: 0 of")
        assert "Sparsity lserve" in page.get("read-note").text
        assert page.get("heads").get_attribute("aria-label") == "3 retrieval heads, 1 streaming heads"
        assert "choose the pages" in page.get("heads-note").text
        page.leave()


def test_side_by_side(page: Page, tiny: Path) -> None:
    """Two servers that name each other; their answers part, or not, at the token that the servers say."""
    with serving(model=str(tiny), options={"precision": "w16a16kv16"}) as alone:
        page.open(alone.url + "/#engine")
        page.until("document.querySelector('#maps canvas')")
        page.get("c-url").send_keys("http://127.0.0.1:9")
        page.get("c-run").click()
        page.until("document.getElementById('verdict').className === 'error'")
        assert "--allowed-origins" in page.get("verdict").text
        assert page.blocked() == ["connect-src"]
        page.run("window.blocked = []")
        page.complaints()
        page.leave()

    ports = free_ports(2)
    origins = [f"http://127.0.0.1:{port}" for port in ports]
    made = [
        {"model": str(tiny), "options": {"precision": precision}, "server": {"port": port, "allowed_origins": [origin]}}
        for precision, port, origin in zip(("w16a16kv16", "w4a8kv4"), ports, reversed(origins), strict=True)
    ]
    made[1]["server"] |= {"api_key": [KEY]}  # type: ignore[operator]
    with serving(**made[0]) as left, serving(**made[1]) as right:
        page.open(left.url + "/#engine")
        page.until("document.querySelector('#peers option')")
        for url, key, verdict in ((right.url + "/v1/", KEY, "The answers part"), (left.url, "", "No difference")):
            for name, value in (("c-url", url), ("c-key", key)):
                page.get(name).clear()
                page.get(name).send_keys(value)
            page.get("c-run").click()
            page.until(f"document.getElementById('verdict').textContent.startsWith({json.dumps(verdict)})")
            if key:
                number = int(re.findall(r"token (\d+):", page.get("verdict").text)[0])
                assert [mark.text != "" for mark in page.all("#sides mark")] == [True, True]
                assert "w16a16kv16" in page.get("head-0").text
                assert "w4a8kv4" in page.get("head-1").text
        body = {
            "messages": [{"role": "user", "content": page.get("c-prompt").get_attribute("value")}],
            "temperature": 0, "max_tokens": 96, "logprobs": True,
        }  # fmt: skip
        tokens = []
        for server, headers in ((left, {}), (right, {"authorization": f"Bearer {KEY}"})):
            answer = server.post("/v1/chat/completions", body, headers=headers).json()
            tokens.append([one["token"] for one in answer["choices"][0]["logprobs"]["content"]])
        assert tokens[0][: number - 1] == tokens[1][: number - 1]
        assert tokens[0][number - 1 : number] != tokens[1][number - 1 : number]
        page.leave()


def test_it_can_be_read_on_a_phone(tmp_path: Path, parrot: Server) -> None:
    with chromium(tmp_path, width=390, height=844, dark=True) as phone:
        for tab in ("#chat", "#engine"):
            phone.open(parrot.url + "/" + tab)
            wide = phone.run("return [document.documentElement.scrollWidth, innerWidth]")
            assert wide[0] <= wide[1] == 390, "nothing sticks out to the right"
        ink, paper = phone.run("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
        assert sum(map(int, re.findall(r"\d+", ink))) > 600 > 120 > sum(map(int, re.findall(r"\d+", paper)))


def test_screenshots(smollm2: Path, tmp_path: Path) -> None:
    """The pictures of the docs can be made anew."""
    command_line = [sys.executable, "-m", "tests.server.screenshots", str(smollm2), str(tmp_path)]
    subprocess.run(command_line, cwd=ROOT, env=environment(), check=True, timeout=600)
    kept = {path.name for path in (ROOT / "docs" / "images").glob("page-*.png")}
    made = {path.name for path in tmp_path.glob("page-*.png")}
    assert kept == made
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("page-*.png"))
