"""LongBench's metrics against values worked out by hand, and its files against what may be wrong in them."""

import json
from pathlib import Path

import pytest

from omniserve.base.errors import ConfigError
from omniserve.evals.longbench import METRICS, Item, cut, read_items, score


def item(*answers: str, classes: tuple[str, ...] = ()) -> Item:
    return Item(prompt="", answers=answers, classes=classes, max_tokens=1)


@pytest.mark.parametrize(
    ("task", "output", "right", "value"),
    [
        ("qasper", "The Eiffel Tower!", item("eiffel tower"), 100),
        ("qasper", "a tower in Paris", item("eiffel tower", "Paris"), 50),  # 2 * 1 / (3 + 1)
        ("qasper", "", item("x"), 0),
        ("triviaqa", "\nParis\nQuestion: more", item("Paris"), 100),
        ("gov_report", "a b c d", item("a x c d e"), 100 * 2 * 3 / 9),
        ("trec", "Number or Distance", item("Distance", classes=("Number", "Distance", "Date")), 50),
        ("trec", "Other number", item("Other number", classes=("number", "Other number")), 100),
        ("trec", "nothing", item("Distance", classes=("Number", "Distance")), 0),
        ("passage_count", "I count 8, not 7", item("8"), 50),
        ("passage_count", "none", item("8"), 0),
        ("passage_retrieval_en", "Paragraph 12", item("Paragraph 12"), 100),
        ("passage_retrieval_en", "1 or 12", item("Paragraph 12"), 50),
        ("lcc", "# comment\nreturn x", item("return x"), 100),
    ],
)
def test_metrics(task: str, output: str, right: Item, value: float) -> None:
    assert score(task, output, right) == pytest.approx(value)


def test_long_prompts_are_cut_in_the_middle() -> None:
    assert cut(range(10), 10) == list(range(10))
    assert cut(range(10), 5) == [0, 1, 7, 8, 9]


def folder(place: Path, **changes: object) -> Path:
    entry = {"input": "how?", "context": "text {input}", "answers": ["so"], "all_classes": None} | changes
    (place / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} Q: {input}", "lcc": "{context}"}))
    (place / "dataset2maxlen.json").write_text(json.dumps({"qasper": 7}))
    (place / "qasper.jsonl").write_text(json.dumps({k: v for k, v in entry.items() if v != "absent"}) + "\n")
    return place


def test_items(tmp_path: Path) -> None:
    (found,) = read_items(folder(tmp_path), "qasper")
    assert (found.answers, found.classes, found.max_tokens) == (("so",), (), 7)
    assert found.prompt == "text {input} Q: how?"
    assert len(METRICS) == 16


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        ({"context": "absent"}, "qasper", r"line 1 has no field context: LongBench v1 items have it"),
        ({"input": 3}, "qasper", "input and context must be texts"),
        ({"answers": []}, "qasper", "line 1 has no answer"),
        ({"answers": "so"}, "qasper", "answers and all_classes lists"),
        ({}, "lcc", "must both have the task 'lcc'"),
        ({}, "dureader", "--tasks dureader: must be of narrativeqa"),
    ],
)
def test_bad_files(tmp_path: Path, changes: dict[str, object], task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_items(folder(tmp_path, **changes), task)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data is a folder with LongBench's files"):
        read_items(tmp_path, "qasper")
