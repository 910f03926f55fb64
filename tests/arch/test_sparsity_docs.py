"""docs/sparsity.md names tests that exist."""

import re

from tests.cli.commands import ROOT


def test_the_named_tests_exist() -> None:
    page = (ROOT / "docs" / "sparsity.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 12
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)
