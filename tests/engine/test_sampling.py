"""Sampling parameters in the engine, in float64: what a request counts and remembers outlives what happens to it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniserve.base.types import Output, TokenLogprobs
from tests.engine.harness import Ask, Loaded, Shape, alone, listed, load, outputs, request, tokens
from tests.engine.test_laws import logits_of, optional, token_lists

FEW = tuple(range(20, 26))
"""Ids that most requests here draw from, so that counts, bad words and ends matter within a few tokens."""
few = st.sampled_from(FEW)
asks = st.builds(
    Ask,
    prompt=token_lists(1, 130),
    tokens=st.integers(2, 24),
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    seed=st.integers(0, 1000),
    stop=st.lists(few, max_size=1).map(tuple),
    bad=st.lists(st.lists(few, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
    more=optional(
        allowed_token_ids=st.just(FEW),
        top_p=st.sampled_from([0.3, 0.9]),
        top_k=st.sampled_from([2, 40]),
        min_p=st.sampled_from([0.01, 0.2]),
        repetition_penalty=st.sampled_from([0.5, 1.3, 2.0]),
        presence_penalty=st.sampled_from([-2.0, 1.5]),
        frequency_penalty=st.sampled_from([-1.0, 0.7]),
        logit_bias=st.dictionaries(few, st.sampled_from([-100.0, 2.0]), max_size=3),
        min_tokens=st.integers(1, 2),
        logprobs=st.integers(0, 4),
        prompt_logprobs=st.integers(0, 2),
    ),
)


def equal(found: Sequence[Output], expected: Sequence[Output]) -> None:
    """The same tokens and ends, and the same log-probabilities but for the last bits."""
    for one, other in zip(listed(found), listed(expected), strict=True):
        assert (one is None) == (other is None)
        for a, b in zip(one or (), other or (), strict=True):
            assert (a.token, a.rank, [token for token, _ in a.top]) == (b.token, b.rank, [token for token, _ in b.top])
            values = [x for entry in (a, b) for x in (entry.logprob, *(value for _, value in entry.top))]
            half = len(values) // 2
            assert values[:half] == pytest.approx(values[half:], abs=1e-6)
    assert [one.new_tokens for one in found if one.new_tokens] == [one.new_tokens for one in expected if one.new_tokens]
    assert found[-1].finish == expected[-1].finish


def run(model: Loaded, shape: Shape, batch: Sequence[Ask]) -> tuple[list[list[Output]], int]:
    """What came for each request, and how often one was preempted."""
    engine, _ = model.engine(shape)
    found = outputs(engine, batch)
    engine.scheduler.check()
    return found, engine.scheduler.stats.preemptions


@pytest.mark.parametrize("word", ["w16a16kv32", "w4a8kv4"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(
    batch=st.lists(asks, min_size=2, max_size=6),
    pages=st.integers(4, 9),
    step=st.integers(1, 200),
    seqs=st.integers(1, 4),
)
def test_any_parameters_in_any_batch(word: str, batch: list[Ask], pages: int, step: int, seqs: int) -> None:
    """Alone = in a batch = chunked = in a slot that was used before = preempted, overlap on and off."""
    model = load(word)
    expected = [run(model, Shape(prefix=False), [ask])[0][0] for ask in batch]
    for shape in (
        Shape(prefix=False, overlap=True),
        Shape(step=max(step, 4), seqs=seqs, overlap=True),
        Shape(pages=pages, overlap=True),
        Shape(pages=pages, step=128, overlap=False),
    ):
        for found, wanted in zip(run(model, shape, batch)[0], expected, strict=True):
            equal(found, wanted)


def long_asks() -> list[Ask]:
    generator = torch.Generator().manual_seed(5)
    common: dict[str, Any] = {"allowed_token_ids": FEW, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    common |= {"logprobs": 2, "prompt_logprobs": 1}
    return [
        Ask(
            tuple(torch.randint(3, 211, (60,), generator=generator).tolist()),
            tokens=40,
            temperature=temperature,
            seed=number,
            bad=((20, 21), (22, 22, 23), (24,)),
            stop=(25,),
            more={**common, "min_tokens": 30},
        )
        for number, temperature in enumerate([0.0, 1.0, 1.0, 2.0, 0.0])
    ]


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_remember_their_tokens(overlap: bool) -> None:
    """The law above would say little if nobody were preempted."""
    model, batch = load("w8a8kv4"), long_asks()
    found, preemptions = run(model, Shape(pages=5, overlap=overlap), batch)
    assert preemptions > 0
    for ask, each in zip(batch, found, strict=True):
        equal(each, run(model, Shape(), [ask])[0][0])
        produced = [token for one in each for token in one.new_tokens]
        assert set(produced) <= set(FEW) - {24}
        assert 25 not in produced[:30]
        assert not any(places(word, tuple(produced)) for word in ask.bad)


def places(word: tuple[int, ...], produced: tuple[int, ...]) -> list[int]:
    return [n for n in range(len(produced)) if produced[n : n + len(word)] == word]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_bad_words_are_met_and_avoided(size: int) -> None:
    """Until all but its last token are there nothing changes; without the ban the sequence would have come."""
    model = load("w16a16kv32")
    more = {"allowed_token_ids": FEW, "frequency_penalty": 1.0}
    ask = Ask(tuple(range(30, 60)), tokens=24, temperature=2.0, seed=3, more=more)
    free = tokens(model, Shape(), [ask])[0]
    word = free[8 : 8 + size]
    border = places(word[:-1], free)[0] + size - 1
    found = tokens(model, Shape(overlap=True), [replace(ask, bad=(word,))])[0]
    assert found[:border] == free[:border]
    assert found != free
    assert not places(word, found)


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7, "presence_penalty": 0.8},
        {"frequency_penalty": 2.0, "logit_bias": {5: 3.0, 17: 6.0}},
        {"allowed_token_ids": FEW, "presence_penalty": 2.0, "min_tokens": 8},
    ],
    ids=str,
)
def test_greedy_tokens_are_the_argmax_of_the_changed_scores(more: dict[str, Any]) -> None:
    """Teacher-forced: the logits of prompt and produced tokens, changed by loops over what was there before."""
    model, prompt = load("w8a8kv8"), tuple(range(3, 90))
    produced = tokens(model, Shape(overlap=True), [Ask(prompt, tokens=16, more=more)])[0]
    scores = logits_of(model, prompt + produced, Shape())[len(prompt) - 1 : -1]
    for number, (token, row) in enumerate(zip(produced, scores, strict=True)):
        before = produced[:number]
        x = row.clone()
        for one, value in more.get("logit_bias", {}).items():
            x[one] += value
        for one in range(len(x)):
            if one not in more.get("allowed_token_ids", range(len(x))):
                x[one] = -math.inf
            if one in prompt + before:
                penalty = more.get("repetition_penalty", 1.0)
                x[one] = x[one] / penalty if x[one] > 0 else x[one] * penalty
            x[one] -= more.get("presence_penalty", 0.0) * (one in before)
            x[one] -= more.get("frequency_penalty", 0.0) * before.count(one)
        assert x.argmax() == token, number


@pytest.mark.parametrize("shape", [Shape(), Shape(step=7), Shape(pages=5, overlap=True)], ids=str)
def test_logprobs_are_the_log_softmax_of_the_scores(shape: Shape) -> None:
    """Of the model's own logits: neither penalties nor temperature show, before and after a preemption."""
    model, batch = load("w8a8kv4"), long_asks()
    found, _ = run(model, shape, batch)
    for ask, each in zip(batch, found, strict=True):
        produced = tuple(token for one in each for token in one.new_tokens)
        everything = ask.prompt + produced
        scores = torch.log_softmax(logits_of(model, everything, Shape()), -1)
        entries, prompts = listed(each)
        assert prompts is not None
        assert each[0].prompt_logprobs is not None
        assert len(prompts) == len(ask.prompt) - 1
        assert len(entries) == len(produced)
        for position, entry in enumerate([*prompts, *entries], 1):
            count = 1 if position < len(ask.prompt) else 2
            check(entry, everything[position], scores[position - 1], count)


def check(entry: TokenLogprobs, token: int, scores: torch.Tensor, count: int) -> None:
    order = scores.argsort(descending=True)
    assert entry.token == token
    assert entry.rank == order.tolist().index(token) + 1
    assert entry.logprob == pytest.approx(scores[token].item(), abs=1e-6)
    assert [one for one, _ in entry.top] == order[:count].tolist()
    assert [value for _, value in entry.top] == pytest.approx(scores[order[:count]].tolist(), abs=1e-6)


def test_prompt_logprobs_skip_prefix_hits() -> None:
    model = load("w16a16kv32")
    engine, _ = model.engine(Shape(step=50))
    plain = Ask(tuple(range(3, 200)), tokens=2)
    asking = replace(plain, more={"prompt_logprobs": 0})
    first, again, cached = (outputs(engine, [ask])[0] for ask in (asking, asking, plain))
    assert [each[-1].usage.cached_tokens for each in (first, again, cached)] == [0, 0, 192]
    equal(first, again)
    one = outputs(engine, [replace(asking, prompt=(5,))])[0]
    assert one[0].prompt_logprobs == ()


def test_a_greedy_engine_keeps_no_tables() -> None:
    engine, runner = load("w16a16kv32").engine(Shape())
    outputs(engine, [Ask((3, 4, 5)), Ask((3, 4), temperature=1.0)])
    assert runner._sampling._counts is None
    assert runner._sampling._bias is None
    assert runner._sampling._words.numel() == runner._sampling._words.shape[0] * 0
    outputs(engine, [Ask((3, 4, 5), more={"presence_penalty": 1.0})])
    assert runner._sampling._counts is not None


# Requests that share a prompt


@pytest.mark.parametrize("overlap", [False, True])
def test_followers_find_their_leaders_pages(overlap: bool) -> None:
    model = load("w16a16kv8")
    prompt = tuple(range(3, 173))
    batch = [Ask(prompt, tokens=6, temperature=1.0, seed=seed) for seed in range(4)]
    engine, _ = model.engine(Shape(step=100, overlap=overlap))
    requests = [request(str(number), ask) for number, ask in enumerate(batch)]
    for follower in requests[1:]:
        follower.leader = requests[0]
    for one in requests:
        engine.add(one)
    engine.drain()
    assert [one.cached for one in requests] == [0, 128, 128, 128]
    assert [tuple(one.tokens[170:]) for one in requests] == alone(model, batch)


def test_followers_do_not_wait_without_reason() -> None:
    """Where nothing can be shared, or the leader has gone."""
    model = load("w16a16kv8")
    for size, prefix, gone, works in [
        (60, True, False, 2),
        (130, False, False, 2),
        (130, True, False, 1),
        (130, True, True, 1),
    ]:
        engine, _ = model.engine(Shape(prefix=prefix))
        leader, follower = (request(name, Ask(tuple(range(3, 3 + size)))) for name in "ab")
        follower.leader = leader
        engine.add(leader)
        engine.add(follower)
        if gone:
            engine.abort("a")
        assert len(engine.scheduler.plan().works) == works, (size, prefix, gone)
