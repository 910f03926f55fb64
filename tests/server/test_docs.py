"""docs/security.md names tests that exist, for every row of the checklist."""

import re

from tests.cli.commands import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_promise_has_a_test() -> None:
    rows = [line.split("|")[1:4] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(number) for number, _, _ in rows] == list(range(1, 27))
    for _, _, tests in rows:
        assert "tests/" in tests or "test_" in tests
        assert "planned" not in tests


def test_the_named_tests_exist() -> None:
    file = ""
    names = re.findall(r"`([\w/]+\.py)?::(\w+)`", PAGE)
    assert len(names) > 50
    assert len(names) == len(re.findall(r"::\w", PAGE))
    for where, name in names:
        file = where or file
        path = ROOT / file if file.startswith("tests/") else ROOT / "tests" / "server" / file
        assert f"def {name}(" in path.read_text(), (file, name)
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", PAGE):
        assert (ROOT / path).exists(), path
