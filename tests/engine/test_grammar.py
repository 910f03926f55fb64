"""A grammar decides what its own request may draw, wherever that request is, and nothing else. In float64."""

import json
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniserve.base.errors import RequestError
from omniserve.base.structured import Grammar, StructuredOutputs
from omniserve.base.types import Output
from omniserve.engine.engine import Engine
from omniserve.engine.grammar import KEPT, Grammars
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.text import Tokenizer
from tests.engine.harness import Ask, Loaded, Shape, load, outputs, request

VOCAB = 211


@dataclass
class Ladder:
    """Tokens rise by 1 to `rise` each and stay below `top`; breaks after `breaks` tokens."""

    rise: int
    top: int
    breaks: int = 1000
    last: int = 2
    count: int = 0
    done: bool = False
    failed: bool = False

    def mask(self) -> bytes:
        self.failed |= self.count >= self.breaks
        allowed = range(self.last + 1, min(self.last + self.rise, self.top) + 1)
        return sum(1 << token for token in allowed).to_bytes(-(-VOCAB // 32) * 4, "little")

    def take(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            assert self.last < token <= self.last + self.rise, (self, token)
            self.last, self.count = token, self.count + 1
            self.done = token == self.top


@dataclass(frozen=True)
class Rising:
    """A grammar that needs no library."""

    rise: int
    top: int
    breaks: int = 1000

    def matcher(self, produced: Sequence[int]) -> Ladder:
        made = Ladder(self.rise, self.top, self.breaks)
        made.take(produced)
        return made


@dataclass(frozen=True)
class Formed:
    """A request and its grammar."""

    ask: Ask
    grammar: Grammar | None = field(default=None, hash=False)


def run(engine: Engine, asks: Sequence[Formed]) -> list[tuple[tuple[int, ...], str | None, str | None]]:
    found: dict[str, list[int]] = {}
    ends: dict[str, tuple[str | None, str | None]] = {}
    for number, formed in enumerate(asks):
        one = request(str(number), formed.ask)
        one.grammar = formed.grammar
        engine.add(one)
        found[one.id] = []
    while engine.has_work:
        for output in engine.step():
            found[output.request] += output.new_tokens
            if output.finish is not None:
                ends[output.request] = (output.finish, output.fault)
        engine.scheduler.check()
    return [(tuple(tokens), *ends[name]) for name, tokens in found.items()]


def alone(model: Loaded, asks: Sequence[Formed]) -> list[tuple[tuple[int, ...], str | None, str | None]]:
    return [run(model.engine(Shape(prefix=False))[0], [ask])[0] for ask in asks]


def prompt(seed: int, size: int) -> tuple[int, ...]:
    return tuple((seed * 31 + 7 * place * place + place) % (VOCAB - 3) + 3 for place in range(size))


asks = st.builds(
    Formed,
    ask=st.builds(
        Ask,
        prompt=st.builds(prompt, st.integers(0, 9), st.integers(1, 150)),
        tokens=st.integers(1, 16),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 100),
        stop=st.sampled_from([(), (9, 40, 100)]),
        bad=st.sampled_from([(), ((5,), (30, 31))]),
        more=st.sampled_from([{}, {"top_k": 5}, {"top_p": 0.7, "presence_penalty": 1.0}, {"logit_bias": {12: 9.0}}]),
    ),
    grammar=st.one_of(st.none(), st.builds(Rising, rise=st.integers(1, 60), top=st.integers(3, VOCAB - 1))),
)


shapes = st.sampled_from(
    [
        Shape(),
        Shape(overlap=True, step=96),
        Shape(pages=6, seqs=3, step=48),
        Shape(pages=6, seqs=3, step=48, overlap=True),
    ]
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(load_=st.lists(asks, min_size=1, max_size=6), shape=shapes)
def test_neither_batch_nor_preemption_changes_a_token(load_: list[Formed], shape: Shape) -> None:
    model = load("w8a8kv8")
    found = run(model.engine(shape)[0], load_)
    assert found == alone(model, load_)
    for (tokens, finish, fault), formed in zip(found, load_, strict=True):
        assert fault is None
        if isinstance(formed.grammar, Rising):
            ladder = formed.grammar.matcher(tokens)
            ended = ladder.done or tokens[-1] in formed.ask.stop
            assert finish == ("stop" if ended else "length")


@pytest.mark.parametrize("overlap", [False, True])
def test_replay_after_preemption_goes_on_in_the_grammar(overlap: bool) -> None:
    model = load("w16a16kv16")
    load_ = [
        Formed(Ask(prompt=prompt(n, 60), tokens=40, temperature=1.0, seed=n), Rising(8, VOCAB - 1)) for n in range(5)
    ]
    engine, _ = model.engine(Shape(pages=5, seqs=5, overlap=overlap))
    assert run(engine, load_) == alone(model, load_)
    assert engine.scheduler.stats.preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_that_breaks_takes_its_request_only(overlap: bool) -> None:
    model = load("w8a8kv8")
    sound = [Formed(Ask(prompt=prompt(1, 20), tokens=9)), Formed(Ask(prompt=prompt(2, 30), tokens=9), Rising(20, 200))]
    broken = Formed(Ask(prompt=prompt(3, 20), tokens=9), Rising(3, 200, breaks=4))
    engine, _ = model.engine(Shape(overlap=overlap))
    first, bad, second = run(engine, [sound[0], broken, sound[1]])
    assert [first, second] == alone(model, sound)
    assert (len(bad[0]), bad[1:]) == (4, ("error", "grammar"))
    assert engine.scheduler.stats.corrupted == 0


def test_what_bans_and_a_grammar_leave_together() -> None:
    model = load("w8a8kv8")
    ask = Ask(prompt=prompt(1, 20), tokens=9, more={"allowed_token_ids": (9, 100)})
    engine, _ = model.engine(Shape())
    ((tokens, finish, fault),) = run(engine, [Formed(ask, Rising(7, 200))])
    assert (tokens, finish, fault) == ((9,), "error", "nothing")
    (found,) = run(engine, [Formed(replace(ask, more={}, bad=((3,),)), Rising(1, 200))])
    assert found[0] == tuple(range(3, 12))  # a bad word that would leave nothing forbids nothing


# llguidance, with the tokenizer of dummy weights: a token for each byte, none that ends


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DummySource("tiny", CONFIGS["tiny"], {}))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer.as_json, [], 256)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}, "c": {"type": "boolean"}},
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_texts_are_of_their_form(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    for form, right in (
        (StructuredOutputs(json=SCHEMA), lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        (StructuredOutputs(regex="[ab]{2,5}(é|Z)"), lambda text: re.fullmatch("[ab]{2,5}(é|Z)", text)),
        (StructuredOutputs(choice=("yes", 'n"o', "ja")), lambda text: text in ("yes", 'n"o', "ja")),
        (StructuredOutputs(grammar='start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
    ):
        matcher = grammars.compile(form).matcher([])
        ids: list[int] = []
        while not matcher.done and len(ids) < 2000:
            bits = int.from_bytes(matcher.mask(), "little")
            assert not matcher.failed
            ids.append(chance.choice([token for token in range(256) if bits >> token & 1]))
            matcher.take(ids[-1:])
        assert matcher.done, form
        assert right(tokenizer.decode(ids)), tokenizer.decode(ids)


def test_a_matcher_that_has_taken_tokens_is_where_it_was(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = grammars.compile(StructuredOutputs(regex="abc|abd"))
    first, second = grammar.matcher([]), grammar.matcher(tokenizer.encode("ab"))
    assert first.mask() != second.mask()
    first.take(tokenizer.encode("ab"))
    assert first.mask() == second.mask()
    first.take(tokenizer.encode("c"))
    assert first.done
    assert not second.done


NEST: dict[str, Any] = {}
for _ in range(300):
    NEST = {"type": "object", "properties": {"a": NEST}, "required": ["a"]}
BOMBS = {
    "deep": StructuredOutputs(json=NEST),
    "wide": StructuredOutputs(json={"type": "object", "properties": {f"p{n}": {"type": "null"} for n in range(2400)}}),
    "long": StructuredOutputs(json={"type": "string", "minLength": 100_000}),
    "stars": StructuredOutputs(regex="(a+)+$"),
    "dots": StructuredOutputs(regex=".*".join("abcdefghijklmnopqrst") + "{1,1000}"),
    "many": StructuredOutputs(regex="a{1000000}"),
    "bad regex": StructuredOutputs(regex="(a"),
    "cycle": StructuredOutputs(json={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "far away": StructuredOutputs(json={"$ref": "http://127.0.0.1:9/schema.json"}),
    "nothing": StructuredOutputs(json={"not": {}}),
    "own tail": StructuredOutputs(grammar="start: start"),
    "branches": StructuredOutputs(grammar='start: s\ns: s s | s s s | "a" |'),
    "no lark": StructuredOutputs(grammar="}{"),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bombs_are_refused_or_bounded(grammars: Grammars, name: str) -> None:
    """Refused in one sentence or compiled, in bounded time, while other threads of Python go on."""
    gaps: list[float] = []
    over = threading.Event()

    def beat() -> None:
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.002)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()

    heart = threading.Thread(target=beat)
    heart.start()
    began = time.thread_time()
    try:
        matcher = grammars.compile(BOMBS[name]).matcher([])
        for _ in range(20):
            bits = int.from_bytes(matcher.mask(), "little")
            if matcher.failed or matcher.done or not bits:
                break
            matcher.take([bits.bit_length() - 1])
        refused = ""
    except RequestError as error:
        refused = str(error)
    finally:
        over.set()
        heart.join()
    assert time.thread_time() - began < 2
    assert gaps, "the other thread never ran"
    assert bool(refused) == (name in ("deep", "bad regex", "cycle", "far away", "nothing", "own tail", "no lark"))
    if refused:
        assert refused.startswith("structured_outputs.")
        assert len(refused) < 300
        assert "\n" not in refused


def test_the_latest_grammars_are_kept(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer.as_json, [], 256)
    forms = [StructuredOutputs(regex=f"a{{{n}}}") for n in range(1, KEPT + 2)]
    made = [grammars.compile(form) for form in forms[:KEPT]]
    assert grammars.compile(StructuredOutputs(regex="a{1}")) is made[0]
    grammars.compile(forms[KEPT])  # the second one goes
    assert grammars.compile(forms[0]) is made[0]
    assert grammars.compile(forms[1]) is not made[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "none is given"),
        ({"regex": "a", "choice": ("b",)}, "regex and choice are given"),
        ({"json": 3}, "json: must be a text or an object"),
        ({"regex": 3}, "regex: must be a text"),
        ({"regex": ""}, "empty"),
        ({"choice": "abc"}, "choice: must be a list"),
        ({"choice": ()}, "choice: must be a list"),
        ({"choice": ("a", "")}, "choice: must be a list"),
        ({"json_object": 1}, "json_object: must be true"),
        ({"json": {"a": float("nan")}}, "JSON's types"),
        ({"json": {"a": object()}}, "JSON's types"),
        ({"grammar": "x" * (64 << 10) + "x"}, "65537 bytes, at most 65536"),
        ({"regex": "é" * (32 << 10) + "x"}, "65537 bytes"),
        ({"regex": "\ud800"}, "Unicode"),
    ],
)
def test_forms_that_are_none(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match="structured_outputs") as caught:
        StructuredOutputs(**values)
    assert words in str(caught.value)


def test_forms() -> None:
    assert StructuredOutputs(json={"type": "null"}).form == ("json", '{"type": "null"}')
    assert StructuredOutputs(choice=["a", "b"]).form == StructuredOutputs(choice=("a", "b")).form  # type: ignore[arg-type]
    assert StructuredOutputs(json_object=True, regex=None).form == ("json_object", "{}")
    assert StructuredOutputs.of({"regex": "a", "json_object": False}).form == ("regex", "a")
    with pytest.raises(RequestError, match="'regx' is none of json"):
        StructuredOutputs.of({"regx": "a"})
    assert StructuredOutputs(grammar="x" * (64 << 10)).form[0] == "grammar"


def test_engines_without_grammars_are_as_before() -> None:
    model = load("w8a8kv8")
    ask = Ask(prompt=prompt(1, 40), tokens=6, more={"logprobs": 1})
    plain = outputs(model.engine(Shape())[0], [ask])[0]
    beside = model.engine(Shape())[0]
    one, other = request("0", ask), request("1", ask)
    other.grammar = Rising(4, 200)
    beside.add(one)
    beside.add(other)
    found = [output for output in beside.drain() if output.request == "0"]
    assert [o.new_tokens for o in found] == [o.new_tokens for o in plain]
    assert likelihoods(found) == pytest.approx(likelihoods(plain), abs=1e-9)


def likelihoods(steps: Sequence[Output]) -> list[float]:
    return [one.logprob for step in steps for one in step.logprobs or ()]
