"""LongBench v1, English and code tasks: the user's copy of the data, its prompts, and its metrics.

A data folder holds `dataset2prompt.json` and `dataset2maxlen.json` of the LongBench repository and a `<task>.jsonl` for
each task. A prompt longer than the model's window is cut in the middle. Metrics follow the published description; the
edit similarity of code is difflib's ratio.
Source: LongBench (arXiv 2308.14508).
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from omniserve.base.errors import ConfigError

FIRST_LINE = ("trec", "triviaqa", "samsum")
"""Tasks of which the first line of an output is scored."""

NO_TEMPLATE = (*FIRST_LINE, "lcc", "repobench-p")
"""Few-shot and code tasks, which are continued as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: its prompt, what is right, the names of all classes, most tokens of the answer."""

    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    max_tokens: int


def read_items(folder: Path, task: str) -> list[Item]:
    """Return the items of a task. Raises ConfigError naming the file and line of what is missing or of a wrong kind."""
    if task not in METRICS:
        raise ConfigError(f"--tasks {task}: must be of {', '.join(METRICS)}")
    prompts, lengths = (_table(folder / f"{name}.json") for name in ("dataset2prompt", "dataset2maxlen"))
    template, most = prompts.get(task), lengths.get(task)
    if not isinstance(template, str) or type(most) is not int:
        raise ConfigError(f"{folder}: dataset2prompt.json and dataset2maxlen.json must both have the task {task!r}")
    path = folder / f"{task}.jsonl"
    lines = _text(path).splitlines()
    items = []
    for number, line in enumerate(lines, 1):
        entry = _entry(path, number, line)
        # In one pass: a context may hold the word {input} itself.
        prompt = re.sub(r"\{(context|input)\}", lambda match, entry=entry: entry[match[1]], template)  # type: ignore[misc]
        items.append(
            Item(
                prompt=prompt,
                answers=tuple(entry["answers"]),
                classes=tuple(entry.get("all_classes") or ()),
                max_tokens=most,
            )
        )
    if not items:
        raise ConfigError(f"{path}: holds no items")
    return items


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --data is a folder with LongBench's files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error)[:100]}") from None


def _table(path: Path) -> Mapping[str, object]:
    try:
        found = json.loads(_text(path))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return found


def _entry(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        raise ConfigError(f"{path}: line {number} is no JSON") from None
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: line {number} is no JSON object")
    missing = [name for name in ("input", "context", "answers", "all_classes") if name not in entry]
    if missing:
        raise ConfigError(f"{path}: line {number} has no field {', '.join(missing)}: LongBench v1 items have it")
    texts = isinstance(entry["input"], str) and isinstance(entry["context"], str)
    lists = (entry["answers"], entry["all_classes"] or [])
    if not texts or not all(isinstance(of, list) and all(isinstance(x, str) for x in of) for of in lists):
        raise ConfigError(
            f"{path}: line {number}: input and context must be texts, answers and all_classes lists of them"
        )
    if not entry["answers"]:
        raise ConfigError(f"{path}: line {number} has no answer")
    return entry


def cut(ids: Sequence[int], room: int) -> list[int]:
    """Return the ids, or where they are more than `room`, their first and last half of it."""
    half = room // 2
    return list(ids) if len(ids) <= room else [*ids[:half], *ids[len(ids) - (room - half) :]]


def score(task: str, output: str, item: Item) -> float:
    """Return the score of an output in percent: that of the best answer."""
    if task in FIRST_LINE:
        output = output.lstrip("\n").split("\n")[0]
    return 100 * max(METRICS[task](output, answer, item.classes) for answer in item.answers)


def _normal(text: str) -> list[str]:
    """Words in lower case without punctuation and articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _f1(output: str, answer: str, classes: Sequence[str]) -> float:
    got, wanted = _normal(output), _normal(answer)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted)) if common else 0.0


def _rouge(output: str, answer: str, classes: Sequence[str]) -> float:
    """Rouge-L F: of the longest common subsequence of words."""
    got, wanted = output.split(), answer.split()
    row = [0] * (len(wanted) + 1)
    for word in got:
        before = 0
        for place, other in enumerate(wanted, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return 2 * row[-1] / (len(got) + len(wanted)) if row[-1] else 0.0


def _classes(output: str, answer: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in output and not (name in answer and name != answer)]
    return 1 / len(named) if answer in named else 0.0


def _numbers(output: str, wanted: str) -> float:
    found = re.findall(r"\d+", output)
    return found.count(wanted) / len(found) if found else 0.0


def _count(output: str, answer: str, classes: Sequence[str]) -> float:
    return _numbers(output, answer)


def _retrieval(output: str, answer: str, classes: Sequence[str]) -> float:
    match = re.search(r"Paragraph (\d+)", answer)
    return _numbers(output, match[1]) if match else 0.0


def _code(output: str, answer: str, classes: Sequence[str]) -> float:
    lines = output.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return SequenceMatcher(None, line, answer).ratio()


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), _f1),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), _rouge),
    "trec": _classes,
    "passage_count": _count,
    "passage_retrieval_en": _retrieval,
    **dict.fromkeys(("lcc", "repobench-p"), _code),
}
"""By task, called with output, one answer and the names of all classes; 0 to 1."""
