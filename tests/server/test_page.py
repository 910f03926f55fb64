"""The web page without a browser: one small file, nothing from elsewhere, nothing that its policy would block."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from omniserve.base.serving import ServerOptions
from omniserve.server.pages import page_headers, peers, web_page
from tests.server.harness import Server, serving

PAGE = web_page()
_SKIP = re.compile(
    r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`"""
    r"""|(?<=[=(,:!&|?;{}])\s*/(?![*/])(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+/[a-z]*""",
    re.DOTALL,
)
"""Comments, strings and regular expressions of JavaScript."""


class Tags(HTMLParser):
    """All tags with their attributes; `open_tags` is empty if every tag that needs it is closed."""

    VOID = frozenset({"meta", "link", "input", "br", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open_tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag, self.getpos()


TAGS = Tags(PAGE)


def script() -> str:
    (found,) = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    return str(found)


def test_it_is_one_small_file() -> None:
    assert len(PAGE.encode()) < 100_000
    assert not TAGS.open_tags
    names = [tag for tag, _ in TAGS.tags]
    assert (names.count("script"), names.count("style")) == (1, 1)
    assert not {"iframe", "object", "embed", "base", "img", "video", "audio"} & set(names)


def test_it_loads_nothing() -> None:
    for tag, attributes in TAGS.tags:
        assert "src" not in attributes, tag
        assert "srcset" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("#", "data:image/")), attributes
        assert "action" not in attributes, tag
    assert "@import" not in PAGE
    assert not re.search(r"\burl\(", PAGE)
    assert "import(" not in script()


def test_its_policy_lets_it_work() -> None:
    for tag, attributes in TAGS.tags:
        assert "style" not in attributes, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        if tag in ("script", "style"):
            assert not attributes, "the hashes are taken of bare tags"


def test_text_is_never_parsed_as_html() -> None:
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert way not in PAGE, way
    assert "localStorage" not in PAGE
    assert "sessionStorage" not in PAGE
    assert "cookie" not in PAGE


def test_the_script_and_the_page_know_each_other() -> None:
    ids = [attributes["id"] for _, attributes in TAGS.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    asked = set(re.findall(r'\$\("([\w-]+)"\)', script()))
    assert len(asked) > 30
    assert asked <= set(ids), asked - set(ids)
    for _, attributes in TAGS.tags:
        for name in ("aria-controls", "aria-labelledby", "list"):
            assert attributes.get(name) in {None, *ids}, attributes


def test_the_script_is_well_formed() -> None:
    """Brackets are closed in their order; a browser reads it for real in `test_browser.py`."""
    pairs = {")": "(", "]": "[", "}": "{"}
    opened: list[str] = []
    for sign in re.sub(r"[^()\[\]{}]", "", _SKIP.sub(" ", script())):
        if sign in pairs:
            assert opened, "a bracket too many"
            assert opened.pop() == pairs[sign]
        else:
            opened.append(sign)
    assert not opened


def test_everything_can_be_reached_by_name() -> None:
    """Each field has a label, each picture a role that takes one, each button a text."""
    labelled = re.findall(r"<label[^>]*>[^<]+<(?:input|textarea) id=\"([\w-]+)\"", PAGE)
    for tag, attributes in TAGS.tags:
        if tag in ("input", "textarea"):
            assert attributes.get("aria-label") or attributes["id"] in labelled, attributes
        if tag == "canvas":
            assert attributes["role"] == "img"
    assert not re.findall(r"<button[^>]*>\s*</button>", PAGE)


def test_the_headers_of_the_page(served: Server) -> None:
    answer = served.http.get("/")
    assert answer.text == PAGE
    style = re.search(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert style
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (script(), style[1])]
    assert answer.headers["content-security-policy"] == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; connect-src 'self'; "
        "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("origin", "reachable"),
    [
        ("http://127.0.0.1:8001", True),
        ("https://models.example.org", True),
        ("http://[::1]:8001", True),
        ("*", False),
        ("null", False),
        ("http://a.example; script-src *", False),
        ("http://a.example 'unsafe-inline'", False),
        ("http://a.example\r\nx: y", False),
    ],
)
def test_the_page_may_call_the_servers_that_may_call_it(origin: str, reachable: bool) -> None:
    found = peers(ServerOptions(allowed_origins=(origin,)))
    assert found == ((origin,) if reachable else ())
    policy = page_headers(PAGE, found)["content-security-policy"]
    assert f"connect-src 'self'{' ' + origin if reachable else ''}; img-src" in policy


def test_no_ui() -> None:
    with serving(null=0.004, server={"ui": False}) as server:
        assert server.http.get("/").status_code == 404
        assert server.http.get("/version").status_code == 200
