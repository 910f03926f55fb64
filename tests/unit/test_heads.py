"""Which heads stream: the same ones in every process, as many as LServe keeps, ties by layer and head."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniserve.base.errors import ConfigError
from omniserve.sparsity.heads import split
from omniserve.sparsity.patterns import read_pattern, window_of, write_pattern


def kept(values: list[list[float]], sparsity: float) -> list[tuple[int, int]]:
    found = split(values, sparsity)
    return [(layer, head) for layer, order in enumerate(found.order) for head in order[: found.retrieval[layer]]]


@pytest.mark.parametrize(
    ("layers", "heads", "sparsity", "count"),
    [
        (32, 8, 0.25, 192),
        (32, 8, 0.5, 128),
        (32, 8, 0.75, 64),
        (32, 32, 0.25, 768),
        (32, 32, 0.5, 512),
        (32, 32, 0.75, 256),
        (4, 3, 0.0, 12),
        (4, 3, 1.0, 0),
        (1, 1, 0.5, 1),
    ],
)
def test_counts(layers: int, heads: int, sparsity: float, count: int) -> None:
    """Of tables full of ties (every other value is 1), as published ones are."""
    values = [
        [1.0 if (layer + head) % 2 else (layer * heads + head) / 4096 for head in range(heads)]
        for layer in range(layers)
    ]
    assert len(kept(values, sparsity)) == count


@given(
    values=st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=6),
    sparsity=st.integers(0, 99).map(lambda hundredths: hundredths / 100),
)
def test_keeps_as_many_as_the_quantile_and_the_largest(values: list[list[float]], sparsity: float) -> None:
    """LServe keeps what lies at or above numpy's quantile; without ties that is this very set."""
    found = kept(values, sparsity)
    flat = sorted({x for line in values for x in line})
    assert min((values[a][b] for a, b in found), default=1.0) >= max(
        (x for a, line in enumerate(values) for b, x in enumerate(line) if (a, b) not in found), default=0.0
    )
    if len(flat) == 4 * len(values):
        threshold = np.quantile(np.array(values), sparsity)
        assert found == [(a, b) for a, line in enumerate(values) for b, x in enumerate(line) if x >= threshold]


def test_ties_go_to_the_first_layer_and_head() -> None:
    assert kept([[1.0, 0.5, 1.0], [1.0, 1.0, 0.2]], 0.6) == [(0, 0), (0, 2), (1, 0)]


def test_retrieval_heads_lead_in_their_old_order() -> None:
    found = split([[0.1, 0.9, 0.2, 0.8], [1.0, 1.0, 0.0, 0.0]], 0.5)
    assert found.order == ((1, 3, 0, 2), (0, 1, 2, 3))
    assert found.retrieval == (2, 2)
    assert found.streaming == (2, 2)
    assert found.rows(0, 2) == [2, 3, 6, 7, 0, 1, 4, 5]
    assert found.rows(1, 2) is None


def test_two_processes_agree(tmp_path: Path) -> None:
    """The reference breaks ties by unseeded noise: its split differs from run to run."""
    write_pattern(tmp_path, tuple((1.0,) * 8 for _ in range(32)), {})
    code = (
        "from omniserve.sparsity.heads import split; from omniserve.sparsity.patterns import read_pattern\n"
        f"print(split(read_pattern({str(tmp_path)!r}, layers=32, heads=8).values, 0.5))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert "HeadSplit" in runs[0].stdout


def test_a_pattern_comes_back_clipped(tmp_path: Path) -> None:
    write_pattern(tmp_path, ((0.25, -1e-4), (1.5, 1.0)), {"model_name": "m"})
    found = read_pattern(tmp_path, layers=2, heads=2)
    assert found.values == ((0.25, 0.0), (1.0, 1.0))
    assert found.about == {"model_name": "m"}
    assert len(found.digest) == 64


@pytest.mark.parametrize(
    ("content", "config", "message"),
    [
        ("1\t1\n1\t1\n1\t1\n", "{}", "describes 3 layers of 2 key heads, this model has 2 of 2"),
        ("1\t1\n1\n", "{}", "describes 2 layers of 1 or 2 key heads"),
        ("", "{}", "describes 0 layers of no key heads"),
        ("1\t1\n1\tx\n", "{}", "line 2 holds 'x': must be finite numbers"),
        ("1\t1\n1\tnan\n", "{}", "line 2 holds 'nan'"),
        ("1\t1\n1\t1\n", "{", "cannot read config.json"),
        ("1\t1\n1\t1\n", "[]", "config.json must hold an object"),
        (None, "{}", "holds no full_attention_heads.tsv"),
    ],
)
def test_bad_patterns(tmp_path: Path, content: str | None, config: str, message: str) -> None:
    if content is not None:
        (tmp_path / "full_attention_heads.tsv").write_text(content)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message):
        read_pattern(tmp_path, layers=2, heads=2)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder that holds full_attention_heads\.tsv"):
        read_pattern(tmp_path / "none", layers=2, heads=2)


def test_a_pattern_may_name_the_window(tmp_path: Path) -> None:
    write_pattern(tmp_path / "ours", ((1.0, 0.0),), {"local": 2048})
    assert window_of(tmp_path / "ours") == 2048
    write_pattern(tmp_path / "published", ((1.0, 0.0),), {"recent_size": 64})
    assert window_of(tmp_path / "published") is None
    assert window_of(tmp_path / "none") is None, "what is missing is told by those who read the table"
    for wrong in (0, True, "256"):
        write_pattern(tmp_path / "wrong", ((1.0, 0.0),), {"local": wrong})
        with pytest.raises(ConfigError, match="must be a number of tokens, 1 or more"):
            window_of(tmp_path / "wrong")
