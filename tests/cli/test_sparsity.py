"""Sparsity on the command line: LServe's flags, what is refused, identify, needle and ruler."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omniserve.base.errors import ConfigError
from omniserve.cli.lserve import translated
from omniserve.sparsity.identify import WINDOW
from omniserve.sparsity.patterns import read_pattern
from tests.cli.commands import Ran

Run = Callable[..., Ran]
SCRIPT = [
    "--static-sparse-attn-load-dir",
    "DIR",
    "--static-sparsity",
    "0.5",
    "--sparse-context-mode",
    "--sparse-decode-mode",
    "1",
    "--ctx-sink-token",
    "128",
    "--ctx-local-token",
    "8192",
    "--dec-sink-token",
    "128",
    "--dec-local-token",
    "256",
    "--sub-chunk-per-block",
    "4",
    "--dynamic-sparse-token-budget",
    "4096",
    "--selector-update-interval",
    "4",
]


def flags(tokens: list[str]) -> dict[str, str]:
    words = translated(tokens)
    return dict(zip(words[::2], words[1::2], strict=True))


def test_the_flags_of_lserves_scripts() -> None:
    assert flags(SCRIPT) == {
        "--static-sparsity": "0.5",
        "--attn-pattern": "DIR",
        "--prefill-local": "8192",
        "--local": "256",
        "--sink": "128",
        "--token-budget": "4096",
        "--reuse-interval": "4",
        "--sparsity": "lserve",
    }


@pytest.mark.parametrize(
    ("changes", "mode", "absent"),
    [
        ({"--static-sparsity": "0.0"}, "dynamic", "--attn-pattern"),
        ({"--sparse-decode-mode": "0"}, "static", "--token-budget"),
        ({"--static-sparsity": "0", "--sparse-decode-mode": "0"}, "off", "--static-sparsity"),
    ],
)
def test_the_mode_follows(changes: dict[str, str], mode: str, absent: str) -> None:
    tokens = [changes.get(before, token) for before, token in zip(["", *SCRIPT], SCRIPT, strict=False)]
    found = flags(tokens)
    assert found["--sparsity"] == mode
    assert absent not in found


def test_other_command_lines_are_left_alone() -> None:
    line = ["serve", "m", "--static-sparsity", "0.5", "--sink=3"]
    assert translated(line) == line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ctx-sink-token 64 --dec-sink-token 128", "must be equal, there is one --sink"),
        ("--sub-chunk-per-block 2", "must be 4, logical pages have 16 tokens"),
        ("--sparse-decode-mode 2", "must be 0 or 1"),
        ("--dec-local-token", "a value is missing"),
    ],
)
def test_lserve_flags_without_a_meaning_here(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translated(line.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--token-budget 128", "token_budget=128: goes with sparsity=dynamic or lserve, not with off"),
        ("--sparsity dynamic --sink 3", "sink=3: goes with sparsity=static or lserve, not with dynamic"),
        ("--sparsity dynamic --token-budget 64", "must be a multiple of 64, the tokens of a page, and at least 128"),
        ("--sparsity dynamic --token-budget 130", "token_budget=130: must be a multiple of 64"),
        ("--sparsity dynamic --prefill-budget 192", "at least 256, for the page of the sink, those of the tile"),
        ("--sparsity dynamic --reuse-interval 65", "reuse_interval=65: must be 1 to 64"),
        ("--sparsity static", "give attn_pattern"),
        ("--sparsity static --static-sparsity 1.5 --attn-pattern x", "static_sparsity=1.5: must be 0 to 1"),
        ("--sparsity static --attn-pattern none", "attn_pattern=none: must be a folder"),
        ("--sparsity static --attn-pattern other", "describes 3 layers of 2 key heads, this model has 2 of 2"),
        ("--sparsity lserve --attn-pattern good --local 0", "local=0: must be 1 or more"),
        ("--sparsity lserve --attn-pattern good --kv-cache-memory-bytes 9000", "windows of the streaming heads"),
    ],
)
def test_what_is_refused(run: Run, tiny: Path, line: str, message: str) -> None:
    for name, layers in (("good", 2), ("other", 3)):
        Path(name).mkdir()
        Path(name, "full_attention_heads.tsv").write_text("1\t0\n" * layers)
    ran = run("generate", tiny, "--prompt", "a", *line.split())
    assert ran.code == 2
    assert message in ran.err


def test_a_model_with_windows_of_its_own(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    ran = run("generate", folder, "--prompt", "a", "--sparsity", "dynamic")
    assert ran.code == 2
    assert "this model has a sliding window of its own" in ran.err


def test_identify_writes_a_pattern_that_serves(run: Run, tiny: Path, tmp_path: Path) -> None:
    short = ("--length", "768", "--samples", "2")
    assert "must be below max_model_len=256" in run("sparsity", "identify", tiny, "-o", "pattern", *short).err
    assert run("sparsity", "identify", tiny, "-o", "x", "--samples", "0").code == 2
    assert "leave it off" in run("sparsity", "identify", tiny, "-o", "x", "--sparsity", "dynamic").err
    folder = tmp_path / "longer"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    ran = run("sparsity", "identify", folder, "-o", "pattern", *short)
    assert ran.code == 0, ran.err
    assert "4 key heads in 2 layers" in ran.out
    values = read_pattern("pattern", layers=2, heads=2).values
    assert all(0 < value <= 1 for line in values for value in line)
    about = json.loads(Path("pattern/config.json").read_text())
    assert (about["samples"], about["local"]) == (2, WINDOW)
    served = run("generate", folder, "--prompt", "a", "--sparsity", "lserve", "--attn-pattern", "pattern")
    assert served.code == 0, served.err


def test_needle_dense_against_sparse_and_again(run: Run, tiny: Path) -> None:
    Path("p").mkdir()
    Path("p/full_attention_heads.tsv").write_text("1\t0\n0\t1\n")
    line = ["eval", "needle", tiny, "-o", "out", "--lengths", "220,250", "--depths", "0,100", "--samples", "1"]
    line += ["--sparsity", "lserve", "--attn-pattern", "p", "--token-budget", "128", "--json"]
    ran = run(*line)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert {(one["run"], one["length"], one["depth"]) for one in found["scores"]} == {
        (run, length, depth) for run in ("dense", "lserve") for length in (220, 250) for depth in (0, 100)
    }
    assert Path("out/needle.png").read_bytes().startswith(b"\x89PNG")
    lines = Path("out/results.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 8
    Path("out/results.jsonl").write_text("\n".join(lines[:6]) + '\n{"run": "lser')  # killed in the middle of a line
    again = run(*line)
    assert json.loads(again.out)["scores"] == found["scores"]
    assert sorted(Path("out/results.jsonl").read_text().splitlines()) == sorted(lines)
    other = run(*line, "--seed", "5")
    assert other.code == 2
    assert "holds results of other settings" in other.err


def test_ruler_tasks(run: Run, tiny: Path) -> None:
    ran = run("eval", "ruler", tiny, "-o", "out", "--lengths", "250", "--depths", "50", "--samples", "1")
    assert ran.code == 0, ran.err
    assert all(task in ran.out for task in ("passkey", "multikey", "lines", "pairs", "tracking"))
    assert run("eval", "ruler", tiny, "-o", "out", "--tasks", "needles").code == 2
    assert "too short" in run("eval", "ruler", tiny, "-o", "b", "--tasks", "pairs", "--lengths", "40").err


def test_longbench(run: Run, tiny: Path) -> None:
    place = Path("data")
    place.mkdir()
    (place / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {input}", "lcc": "{context}"}))
    (place / "dataset2maxlen.json").write_text(json.dumps({"qasper": 5, "lcc": 4}))
    for task in ("qasper", "lcc"):
        items = [{"input": "q?", "context": "word " * n, "answers": ["word"], "all_classes": None} for n in (9, 900)]
        (place / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    line = ["eval", "longbench", tiny, "--data", "data", "-o", "out", "--sparsity", "dynamic", "--token-budget", "128"]
    ran = run(*line, "--json")
    assert ran.code == 0, ran.err
    assert {task: set(of) for task, of in json.loads(ran.out)["scores"].items()} == {
        "qasper": {"dense", "dynamic"},
        "lcc": {"dense", "dynamic"},
    }
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 1 + 2 * 2 * 2
    assert "mean" in run(*line).out
    assert (
        "must both have the task" in run("eval", "longbench", tiny, "--data", "data", "-o", "x", "--tasks", "trec").err
    )


def test_a_pattern_of_the_tests_is_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.5\t-0.1\n1\t0\n")
    assert read_pattern(tmp_path, layers=2, heads=2).values == ((0.5, 0.0), (1.0, 0.0))
