"""Texts that hide something and questions that ask for it: needle, and tasks in the manner of RULER.

Every text is made from a seed, of sentences of our own, to a length in tokens of the model; a score is the share of the
expected answers that the output holds. Nothing here knows what is measured: dense and sparse runs get the same texts.
Source of the tasks: RULER (arXiv 2404.06654), LongChat lines (lmsys.org, 2023); the sentences are ours.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from omniserve.base.errors import ConfigError, OmniserveError
from omniserve.base.types import SamplingParams

if TYPE_CHECKING:
    from omniserve.llm import LLM

COUNTED = 80.0
"""A cell counts in the comparison if the dense model scores at least so much there."""

_WHO = (
    "The baker", "A sailor", "The old teacher", "My neighbour", "The night train", "A careful gardener", "The clerk",
    "The river", "A young painter", "The post office", "An engineer", "The library", "A shepherd", "The orchestra",
)  # fmt: skip
_DID = (
    "waited for", "wrote about", "walked past", "remembered", "repaired", "described", "looked for", "carried",
    "forgot about", "talked about", "returned to", "took a picture of", "dreamt of", "paid for",
)  # fmt: skip
_WHAT = (
    "the wooden bridge", "a letter from the coast", "the first snow", "an empty chair", "the blue door",
    "a box of apples", "the market square", "a broken clock", "the long winter", "a map of the valley",
    "the quiet harbour", "a story without an end", "the tall pine trees", "a cup of tea",
)  # fmt: skip
_WHEN = (
    "in the morning", "before the rain came", "without a word", "on the way home", "for the second time",
    "late in the evening", "at the end of the week", "while the others slept", "as always", "with a smile",
)  # fmt: skip
_NAMES = (
    "amber", "birch", "cedar", "delta", "ember", "falcon", "garnet", "hazel", "indigo", "jasper", "lotus", "maple",
    "nectar", "onyx", "pearl", "quartz", "raven", "saffron", "tulip", "umber", "violet", "willow", "yarrow", "zephyr",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One question: its task, the length of its text in tokens, where the answer lies in percent, which sample."""

    task: str
    length: int
    depth: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A text with its question, ready for a model. answers: what the output must hold."""

    cell: Cell
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    max_tokens: int


Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""


def sentence(random: random.Random) -> str:
    """Return one filler sentence."""
    return f"{random.choice(_WHO)} {random.choice(_DID)} {random.choice(_WHAT)} {random.choice(_WHEN)}. "


def _filled(encode: Encode, draw: random.Random, room: int, line: Callable[[random.Random], str]) -> list[str]:
    """Return lines of at most `room` tokens in all."""
    found: list[str] = []
    while True:
        one = line(draw)
        room -= len(encode(one))
        if room < 0:
            return found
        found.append(one)


def _hide(lines: list[str], hidden: Sequence[str], depth: int, draw: random.Random) -> str:
    """Return the lines with the first hidden one at `depth` percent and the others anywhere."""
    places = [round(len(lines) * depth / 100), *(draw.randint(0, len(lines)) for _ in hidden[1:])]
    for place, one in sorted(zip(places, hidden, strict=True), reverse=True):
        lines.insert(place, one)
    return "".join(lines)


def _number(draw: random.Random) -> str:
    return str(draw.randint(10000, 99999))


def needle(encode: Encode, draw: random.Random, room: int, depth: int, keys: int = 1) -> tuple[str, str, list[str]]:
    """One magic number among filler; more keys: others with other names, which must not be taken for it."""
    names, numbers = draw.sample(_NAMES, keys), [_number(draw) for _ in range(keys)]
    hidden = [f"The magic number of {name} is {n}. " for name, n in zip(names, numbers, strict=True)]
    head = "Some magic numbers are hidden in the following text. Remember them.\n\n"
    tail = f"\n\nQuestion: What is the magic number of {names[0]}?\nAnswer: The magic number of {names[0]} is"
    room -= sum(len(encode(part)) for part in (head, tail, *hidden))
    return head + _hide(_filled(encode, draw, room, sentence), hidden, depth, draw), tail, [numbers[0]]


def multikey(encode: Encode, draw: random.Random, room: int, depth: int) -> tuple[str, str, list[str]]:
    """Four magic numbers, one of which is asked for."""
    return needle(encode, draw, room, depth, keys=4)


def passkey(encode: Encode, draw: random.Random, room: int, depth: int) -> tuple[str, str, list[str]]:
    """One secret number among filler, which nothing but its sentence names."""
    number = _number(draw)
    head = "A passkey is hidden in the following text. Remember it.\n\n"
    tail = "\n\nQuestion: What is the secret passkey?\nAnswer: The secret passkey is"
    hidden = f"The secret passkey is {number}. Remember it. "
    room -= sum(len(encode(part)) for part in (head, tail, hidden))
    return head + _hide(_filled(encode, draw, room, sentence), [hidden], depth, draw), tail, [number]


def lines(encode: Encode, draw: random.Random, room: int, depth: int) -> tuple[str, str, list[str]]:
    """Nothing but numbered lines, one of which is asked for."""

    def label(draw: random.Random) -> str:
        return f"{draw.choice(_NAMES)}-{draw.choice(_NAMES)}-{draw.randint(10, 99)}"

    wanted, number = label(draw), _number(draw)
    head = "Below is a record of lines. Remember what each one holds.\n\n"
    tail = f"\nQuestion: What does line {wanted} hold?\nAnswer: line {wanted}: holds"
    hidden = f"line {wanted}: holds {number}\n"
    room -= sum(len(encode(part)) for part in (head, tail, hidden))
    others = _filled(encode, draw, room, lambda draw: f"line {label(draw)}: holds {_number(draw)}\n")
    return head + _hide([one for one in others if wanted not in one], [hidden], depth, draw), tail, [number]


def pairs(encode: Encode, draw: random.Random, room: int, depth: int) -> tuple[str, str, list[str]]:
    """A JSON object of random keys and values, one of which is asked for."""

    def word(draw: random.Random) -> str:
        return "".join(draw.choice("bcdfghklmnprstvz") + draw.choice("aeiou") for _ in range(3))

    wanted, value = word(draw), _number(draw)
    head = "Extract the value of a key from this JSON object.\n\n{\n"
    tail = f'}}\n\nQuestion: What is the value of the key "{wanted}"?\nAnswer: "{wanted}": "'
    hidden = f'"{wanted}": "{value}",\n'
    room -= sum(len(encode(part)) for part in (head, tail, hidden))
    others = _filled(encode, draw, room, lambda draw: f'"{word(draw)}": "{_number(draw)}",\n')
    return head + _hide([one for one in others if f'"{wanted}"' not in one], [hidden], depth, draw), tail, [value]


def tracking(encode: Encode, draw: random.Random, room: int, depth: int) -> tuple[str, str, list[str]]:
    """A variable gets a number and is copied along a chain of three, among filler; all their names are asked for."""
    names = [name.upper() for name in draw.sample(_NAMES, 3)]
    number = _number(draw)
    hidden = [f"VAR {names[0]} = {number}. ", *(f"VAR {b} = VAR {a}. " for a, b in pairwise(names))]
    head = "Memorize and track the chain of variable assignments hidden in the following text.\n\n"
    tail = f"\n\nQuestion: Which variables have the value {number}?\nAnswer: The variables with the value {number} are"
    room -= sum(len(encode(part)) for part in (head, tail, *hidden))
    filler = _filled(encode, draw, room, sentence)
    places = sorted([round(len(filler) * depth / 100), *(draw.randint(0, len(filler)) for _ in hidden[1:])])
    for place, one in reversed(list(zip(places, hidden, strict=True))):
        filler.insert(place, one)
    return head + "".join(filler), tail, names


TASKS: dict[str, Callable[[Encode, random.Random, int, int], tuple[str, str, list[str]]]] = {
    "needle": needle,
    "passkey": passkey,
    "multikey": multikey,
    "lines": lines,
    "pairs": pairs,
    "tracking": tracking,
}
MAX_TOKENS = {"tracking": 30}
"""Tokens of an answer, where it is not 10."""


def case(cell: Cell, encode: Encode, *, seed: int, bos: Sequence[int]) -> Case:
    """Return the question of a cell: its text, question and answer together have at most `cell.length` tokens."""
    draw = random.Random(f"{seed} {cell.task} {cell.length} {cell.depth} {cell.sample}")
    most = MAX_TOKENS.get(cell.task, 10)
    # Tokens may join differently at the seams: a few are left over.
    text, tail, answers = TASKS[cell.task](encode, draw, cell.length - most - len(bos) - 8, cell.depth)
    ids = (*bos, *encode(text), *encode(tail))
    if len(ids) + most > cell.length:
        raise ConfigError(
            f"length {cell.length}: too short for a {cell.task} question; give at least {len(ids) + most}"
        )
    return Case(cell=cell, ids=ids, answers=tuple(answers), max_tokens=most)


def score(asked: Case, output: str) -> float:
    """Return the percentage of the answers that the output holds."""
    return 100 * sum(answer.lower() in output.lower() for answer in asked.answers) / len(asked.answers)


class Results:
    """Scores of cells by run, on disk line by line, so that a killed evaluation goes on where it was.

    The first line says what was measured; a file of something else is refused.
    """

    def __init__(self, path: Path, about: Mapping[str, object]) -> None:
        self.scores: dict[str, dict[Cell, float]] = {}
        self._path = path
        header = json.dumps(about, sort_keys=True)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(header + "\n")
            return
        first, *rest = path.read_text().split("\n")
        if first != header:
            raise ConfigError(f"{path}: holds results of other settings ({first[:200]}); give another -o")
        whole = rest[:-1]  # what follows the last line end was cut off by a kill
        for line in whole:
            entry = json.loads(line)
            cell = Cell(**{name: entry[name] for name in ("task", "length", "depth", "sample")})
            self.scores.setdefault(entry["run"], {})[cell] = entry["score"]
        path.write_text("\n".join([first, *whole, ""]))

    def add(self, run: str, cell: Cell, value: float, output: str) -> None:
        """Note the score of a cell."""
        self.scores.setdefault(run, {})[cell] = value
        with self._path.open("a") as file:
            file.write(json.dumps({"run": run, **asdict(cell), "score": value, "output": output}) + "\n")


def questions(llm: "LLM", seed: int) -> Callable[[Cell], Case]:
    """Return what makes a model's questions of cells."""
    bos = llm.tokenizer.encode("")
    return lambda cell: case(cell, lambda text: llm.tokenizer.encode(text, special=False), seed=seed, bos=bos)


def measure(
    llm: "LLM",
    run: str,
    cells: Iterable[Cell],
    results: Results,
    *,
    make: Callable[[Cell], Case],
    rate: Callable[[Case, str], float],
    on_progress: Callable[[int, int], None],
) -> None:
    """Ask a model the questions of the cells that are not in the results yet. Raises OmniserveError.

    make, rate  a cell's question, made when it is asked; the score of an output in percent
    """
    todo = [cell for cell in cells if cell not in results.scores.get(run, {})]

    def asked() -> Iterator[tuple[Case, list[int], SamplingParams]]:
        for cell in todo:
            one = make(cell)
            yield one, list(one.ids), SamplingParams(temperature=0.0, max_tokens=one.max_tokens)

    for done, (one, result) in enumerate(llm.run(asked(), ahead=llm.config.limits.max_seqs), 1):
        if isinstance(result, OmniserveError):
            raise result
        output = result.outputs[0].text
        results.add(run, one.cell, rate(one, output), output)
        on_progress(done, len(todo))


def mean(scores: Mapping[Cell, float], **where: object) -> float | None:
    """Return the mean score of the cells with these values; None if there are none."""
    found = [value for cell, value in scores.items() if all(getattr(cell, n) == v for n, v in where.items())]
    return sum(found) / len(found) if found else None


def counted(dense: Mapping[Cell, float]) -> list[tuple[str, int, int]]:
    """Return the (task, length, depth) at which the dense model's mean is good enough to compare with."""
    groups = dict.fromkeys((cell.task, cell.length, cell.depth) for cell in dense)
    found = []
    for task, length, depth in groups:
        value = mean(dense, task=task, length=length, depth=depth)
        if value is not None and value >= COUNTED:
            found.append((task, length, depth))
    return found
