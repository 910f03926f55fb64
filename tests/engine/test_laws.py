"""The laws, in float64, token for token: how requests are cut, mixed, resumed or cached never changes a token."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniserve.base.types import Request, SamplingParams
from omniserve.ops.dispatch import TABLE
from tests.engine.harness import Ask, Loaded, Shape, alone, load, serve, tokens

MODELS = {
    **{word: (word, 128, False) for word in ("w8a8kv4", "w8a8kv8", "w16a16kv16", "w16a16kv8", "w16a16kv4")},
    **{f"{word}-g128": (word, 128, False) for word in ("w4a8kv4", "w4a8kv8", "w4a8kv16")},
    **{f"{word}-row": (word, -1, False) for word in ("w4a8kv4", "w4a8kv8")},
    "w8a8kv8-static": ("w8a8kv8", 128, True),
    "w16a16kv32": ("w16a16kv32", 128, False),
}
EXAMPLES = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])


@pytest.fixture(params=sorted(MODELS), scope="module")
def model(request: pytest.FixtureRequest) -> Loaded:
    word, group, static = MODELS[request.param]
    return load(word, group, static=static)


def token_lists(shortest: int = 1, longest: int = 200) -> st.SearchStrategy[tuple[int, ...]]:
    """Random prompts; drawn by seed, so that shrinking changes lengths and not single tokens."""

    def build(size: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(3, 211, (size,), generator=generator).tolist())

    return st.builds(build, st.integers(shortest, longest), st.integers(0, 50))


ids = st.integers(0, 210)


def optional(**choices: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these parameters, each often left out."""
    return st.fixed_dictionaries({}, optional=choices)


everything = optional(
    top_p=st.sampled_from([0.3, 0.9]),
    top_k=st.sampled_from([2, 40]),
    min_p=st.sampled_from([0.01, 0.2]),
    repetition_penalty=st.sampled_from([0.5, 1.3, 2.0]),
    presence_penalty=st.sampled_from([-2.0, 1.5]),
    frequency_penalty=st.sampled_from([-1.0, 0.7]),
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, 2.0, 20.0]), max_size=5),
    allowed_token_ids=st.lists(ids, min_size=2, max_size=12).map(tuple),
    min_tokens=st.just(1),
)
"""Sampling parameters that change which token is drawn; their own tests are in test_sampling.py."""
asks = st.builds(
    Ask,
    prompt=token_lists(),
    tokens=st.integers(1, 14),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 1000),
    stop=st.lists(ids, max_size=2).map(tuple),
    bad=st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    more=st.one_of(st.just({}), everything),
)


@EXAMPLES
@given(ask=asks, step=st.integers(1, 96), other=st.integers(1, 96))
def test_chunked_equals_whole(model: Loaded, ask: Ask, step: int, other: int) -> None:
    whole = alone(model, [ask])
    assert tokens(model, Shape(step=step, seqs=1, prefix=False), [ask]) == whole
    assert tokens(model, Shape(step=other, seqs=1, prefix=False), [ask]) == whole


@EXAMPLES
@given(batch=st.lists(asks, min_size=2, max_size=6), step=st.integers(8, 300))
def test_alone_equals_in_any_batch(model: Loaded, batch: list[Ask], step: int) -> None:
    assert tokens(model, Shape(step=step, prefix=False), batch) == alone(model, batch)


@EXAMPLES
@given(
    shared=token_lists(64, 200), tails=st.lists(token_lists(1, 40), min_size=2, max_size=4), step=st.integers(8, 300)
)
def test_prefix_hit_equals_miss(
    model: Loaded, shared: tuple[int, ...], tails: list[tuple[int, ...]], step: int
) -> None:
    batch = [Ask(prompt=shared + tail) for tail in tails]
    engine, _ = model.engine(Shape(step=step, prefix=True))
    first = [serve(engine, [ask])[0] for ask in batch]
    again = serve(engine, batch)
    assert engine.scheduler.stats.prefix_hits > 0
    assert first == again == alone(model, batch)


@EXAMPLES
@given(batch=st.lists(asks, min_size=3, max_size=7), pages=st.integers(4, 9), prefix=st.booleans())
def test_preempted_equals_undisturbed(model: Loaded, batch: list[Ask], pages: int, prefix: bool) -> None:
    """A pool that holds little more than the longest request; wider and narrower pools give the same tokens."""
    shape = Shape(pages=pages, prefix=prefix, step=128)
    assert tokens(model, shape, batch) == alone(model, batch)


@EXAMPLES
@given(batch=st.lists(asks, min_size=1, max_size=6), pages=st.integers(4, 64), data=st.data())
def test_overlap_on_equals_off(model: Loaded, batch: list[Ask], pages: int, data: st.DataObject) -> None:
    stop = tuple(data.draw(st.lists(st.integers(0, 210), max_size=20)))
    batch = [replace(ask, stop=stop) for ask in batch]
    off = tokens(model, Shape(pages=pages, overlap=False), batch)
    assert tokens(model, Shape(pages=pages, overlap=True), batch) == off == alone(model, batch)


def test_preemption_happens_in_these_sizes() -> None:
    """The law above would be empty if nobody were preempted."""
    model = load("w8a8kv4")
    generator = torch.Generator().manual_seed(0)
    batch = [Ask(tuple(torch.randint(3, 211, (60,), generator=generator).tolist()), tokens=40) for _ in range(5)]
    engine, _ = model.engine(Shape(pages=5, overlap=True))
    assert serve(engine, batch) == alone(model, batch)
    assert engine.scheduler.stats.preemptions > 0


@pytest.mark.parametrize("word", ["w16a16kv16", "w8a8kv8", "w4a8kv4"])
def test_64_requests_against_a_pool_that_holds_4(word: str) -> None:
    model = load(word)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(40, 64, (64,), generator=generator).tolist()
    batch = [Ask(tuple(torch.randint(3, 211, (n,), generator=generator).tolist()), tokens=24) for n in sizes]
    engine, _ = model.engine(Shape(pages=8, seqs=16, overlap=True))
    loaded = serve(engine, batch)
    assert engine.scheduler.stats.preemptions > 0
    assert loaded == alone(model, batch)
    engine.scheduler.check()


def logits_of(model: Loaded, prompt: tuple[int, ...], shape: Shape) -> torch.Tensor:
    engine, _ = model.engine(shape)
    parts: list[torch.Tensor] = []
    engine.add(
        Request(
            id="score",
            tokens=list(prompt),
            prompt=len(prompt),
            sampling=SamplingParams(temperature=0),
            limit=0,
            reduce=lambda positions, logits: parts.append(logits.clone()),
        )
    )
    while engine.has_work:
        engine.step()
    return torch.cat(parts)


@EXAMPLES
@given(prompt=token_lists(2, 300), step=st.integers(1, 200))
def test_scores_do_not_depend_on_the_cut(model: Loaded, prompt: tuple[int, ...], step: int) -> None:
    whole = logits_of(model, prompt, Shape(step=512, seqs=1))
    cut = logits_of(model, prompt, Shape(step=step, seqs=1))
    assert whole.shape == (len(prompt), 211)
    assert (whole - cut).abs().max() < 1e-6


def test_greedy_tokens_are_the_argmax_of_the_scores() -> None:
    model = load("w8a8kv8")
    prompt = tuple(range(3, 90))
    produced = tokens(model, Shape(), [Ask(prompt, tokens=10)])[0]
    scores = logits_of(model, prompt + produced, Shape())
    assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == list(produced)


def test_backend_reference_runs_references_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the tokens of the implementations it replaces."""
    model = load("w8a8kv8")
    wanted = tokens(model, Shape(), [Ask((5, 6, 7), tokens=4)])

    def forbidden(*args: object) -> None:
        raise AssertionError("an implementation ran under --backend reference")

    for op in TABLE.values():
        monkeypatch.setattr(op, "_chosen", {"cpu": forbidden})
    with pytest.raises(AssertionError, match="an implementation ran"):
        tokens(model, Shape(), [Ask((5, 6, 7), tokens=4)])
    assert tokens(model, Shape(backend="reference"), [Ask((5, 6, 7), tokens=4)]) == wanted
