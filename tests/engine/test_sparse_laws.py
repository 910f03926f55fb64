"""Sparsity under the laws, in float64, token for token: chunks, batch mates, preemption and prefix hits are invisible.

The windows, budgets and intervals are small, so that prompts of 200 tokens leave them far behind.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from omniserve.base.config import TILE, Sparsity
from omniserve.base.types import Kind
from omniserve.engine import assemble
from omniserve.formats.kv import LayerPages
from tests.engine.harness import Ask, Loaded, Shape, alone, load, request, serve, tokens
from tests.engine.test_laws import asks, token_lists

STATIC = Sparsity(streaming=0.5, sink=20, local=33, prefill_local=50)
DYNAMIC = Sparsity(budget=192, interval=3, scores="bounds")
LSERVE = Sparsity(streaming=0.5, sink=70, local=40, prefill_local=30, budget=192, interval=4)
TILED = Sparsity(
    streaming=0.5, sink=5, local=64, prefill_local=100, budget=192, interval=2, prefill_budget=256, prefill_from=0
)
WHOLE_LAYERS = ((0.9, 0.8, 0.7), (0.1, 0.2, 0.05))
"""A layer without streaming heads and one without retrieval heads."""
MODELS = {
    "static-w16a16kv16": ("w16a16kv16", STATIC, {}),
    "static-w8a8kv8-scales": ("w8a8kv8", STATIC, {"static": True}),
    "static-w4a8kv4": ("w4a8kv4", STATIC, {"key_mean": True}),
    "dynamic-w8a8kv8": ("w8a8kv8", DYNAMIC, {}),
    "dynamic-w16a16kv32": ("w16a16kv32", DYNAMIC, {}),
    "lserve-w4a8kv4-means": ("w4a8kv4", LSERVE, {"key_mean": True}),
    "lserve-w8a8kv8-scales": ("w8a8kv8", LSERVE, {"static": True}),
    "lserve-w16a16kv16": ("w16a16kv16", LSERVE, {}),
    "streaming-only-w8a8kv4": ("w8a8kv4", replace(STATIC, streaming=1.0), {}),
    "lserve-qwen3": ("w16a16kv8", LSERVE, {"model": "qwen3"}),
    "lserve-qwen2": ("w4a8kv8", LSERVE, {"model": "qwen2"}),
    "whole-layers-w8a8kv8": ("w8a8kv8", LSERVE, {"order": WHOLE_LAYERS}),
    "tiles-w8a8kv8": ("w8a8kv8", TILED, {}),
    "tiles-w16a16kv4": ("w16a16kv4", replace(TILED, prefill_from=128), {}),
}
EXAMPLES = settings(
    max_examples=6,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # an engine is slow to shrink with
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)


def model_of(name: str) -> Loaded:
    word, sparsity, more = MODELS[name]
    return load(word, sparsity=sparsity, **more)


def least(model: Loaded, step: int, seqs: int = 8) -> int:
    """A step that has room for a tile, where the model computes prompts by tiles."""
    return step if model.policy.tiles_from is None else max(step, seqs + TILE)


models = st.sampled_from(sorted(MODELS)).map(model_of)


long_asks = asks.map(lambda ask: replace(ask, tokens=ask.tokens * 3, temperature=1.0))


@EXAMPLES
@given(model=models, ask=long_asks, step=st.integers(1, 150), other=st.integers(1, 150))
def test_chunked_equals_whole(model: Loaded, ask: Ask, step: int, other: int) -> None:
    whole = alone(model, [ask])
    for size in (step, other):
        assert tokens(model, Shape(step=least(model, size, 1), seqs=1, prefix=False), [ask]) == whole


@EXAMPLES
@given(model=models, batch=st.lists(long_asks, min_size=2, max_size=6), step=st.integers(8, 300), overlap=st.booleans())
def test_alone_equals_in_any_batch(model: Loaded, batch: list[Ask], step: int, overlap: bool) -> None:
    assert tokens(model, Shape(step=least(model, step), prefix=False, overlap=overlap), batch) == alone(model, batch)


@EXAMPLES
@given(model=models, batch=st.lists(long_asks, min_size=3, max_size=7), pages=st.integers(5, 9), prefix=st.booleans())
def test_preempted_equals_undisturbed(model: Loaded, batch: list[Ask], pages: int, prefix: bool) -> None:
    shape = Shape(pages=pages, prefix=prefix, step=136)
    engine, _ = model.engine(shape)
    assert serve(engine, batch) == alone(model, batch)
    engine.scheduler.check()


@EXAMPLES
@given(
    model=models,
    shared=token_lists(64, 200),
    tails=st.lists(token_lists(1, 40), min_size=2, max_size=4),
    step=st.integers(8, 300),
)
def test_prefix_hit_equals_miss(
    model: Loaded, shared: tuple[int, ...], tails: list[tuple[int, ...]], step: int
) -> None:
    batch = [Ask(prompt=shared + tail, tokens=20, temperature=1.0) for tail in tails]
    engine, _ = model.engine(Shape(step=least(model, step), prefix=True))
    first = [serve(engine, [ask])[0] for ask in batch]
    again = serve(engine, batch)
    if len(shared) >= 128 or model.policy.tiles_from is None:
        assert engine.scheduler.stats.prefix_hits > 0
    assert first == again == alone(model, batch)


@EXAMPLES
@given(model=models, prompt=token_lists(60, 140), reply=st.integers(10, 60), tail=token_lists(1, 30))
def test_two_turns_hit_equals_miss(model: Loaded, prompt: tuple[int, ...], reply: int, tail: tuple[int, ...]) -> None:
    """What was produced is prompt in the next turn: its pages were computed by another rule, and are not found."""
    engine, _ = model.engine(Shape())
    (produced,) = serve(engine, [Ask(prompt, tokens=reply, temperature=1.0)])
    turn = Ask(prompt + produced + tail, tokens=20, temperature=1.0)
    assert serve(engine, [turn]) == alone(model, [turn])
    hits, whole = engine.scheduler.stats.prefix_hits, len(prompt) // 64 * 64
    assert hits == whole or (model.policy.tiles_from is not None and hits <= whole)


@EXAMPLES
@given(model=models, batch=st.lists(long_asks, min_size=1, max_size=4), step=st.integers(8, 300))
def test_steps_that_keep_their_choice_change_no_token(model: Loaded, batch: list[Ask], step: int) -> None:
    """Steps without a choice are told from others by the host, and take lists that are made once for all layers."""
    shape = Shape(step=least(model, step), prefix=False)
    usual = tokens(model, shape, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "KEEPING", 0)
        assert tokens(model, shape, batch) == usual


@pytest.mark.parametrize("name", ["static-w8a8kv8-scales", "lserve-w4a8kv4-means"])
def test_preemption_happens_in_these_sizes(name: str) -> None:
    """The law above would be empty if nobody were preempted, and replayed over several steps."""
    model = model_of(name)
    generator = torch.Generator().manual_seed(0)
    batch = [
        Ask(tuple(torch.randint(3, 211, (60,), generator=generator).tolist()), tokens=90, temperature=1.0)
        for _ in range(4)
    ]
    engine, _ = model.engine(Shape(pages=6, step=16, seqs=4, overlap=True))
    assert serve(engine, batch) == alone(model, batch)
    assert engine.scheduler.stats.preemptions > 0


DENSE_LIKE = {
    "budget": Sparsity(budget=320, interval=4),
    "local": Sparsity(streaming=0.5, sink=0, local=320, prefill_local=320),
    "both": Sparsity(streaming=0.34, sink=64, local=256, prefill_local=300, budget=320, interval=64),
    "tiles": Sparsity(budget=320, prefill_budget=320, prefill_from=128),
}


PRECISIONS = (
    ("w16a16kv32", False, "llama"),
    ("w16a16kv16", False, "qwen3"),
    ("w8a8kv8", True, "llama"),
    ("w8a8kv8", False, "qwen2"),
    ("w4a8kv4", False, "llama"),
)


@pytest.mark.parametrize("name", sorted(DENSE_LIKE))
@settings(EXAMPLES, max_examples=6)
@given(precision=st.sampled_from(PRECISIONS), batch=st.lists(long_asks, min_size=1, max_size=3))
def test_enough_is_dense(name: str, precision: tuple[str, bool, str], batch: list[Ask]) -> None:
    """Budgets and windows of the context, heads sorted or not: the tokens of dense attention.

    Columns of the output projection are not moved: attention puts each head back (the head map)."""
    word, static, kind = precision
    model = load(word, static=static, model=kind, sparsity=DENSE_LIKE[name], key_mean=word == "w4a8kv4")
    dense = load(word, static=static, model=kind, key_mean=word == "w4a8kv4")
    assert tokens(model, Shape(step=256), batch) == tokens(dense, Shape(step=256), batch)


def test_tiles_of_one_step_choose_as_alone() -> None:
    """The second tile's budget is all that it may see: nothing behind it, which the third one has, takes a place."""
    model = load("w16a16kv16", sparsity=TILED)
    generator = torch.Generator().manual_seed(7)
    ask = [Ask(tuple(torch.randint(3, 211, (300,), generator=generator).tolist()), tokens=16, temperature=1.0)]
    found = {step: tokens(model, Shape(step=step, prefix=False), ask)[0] for step in (136, 264, 512)}
    assert len(set(found.values())) == 1, found


def test_sparsity_changes_something() -> None:
    """The laws would be empty if nothing were left out."""
    ask = Ask(tuple(range(3, 203)), tokens=60, temperature=1.0)
    dense = tokens(load("w16a16kv32"), Shape(), [ask])
    for sparsity in (STATIC, DYNAMIC, LSERVE, TILED):
        assert tokens(load("w16a16kv32", sparsity=sparsity), Shape(), [ask]) != dense, sparsity


@pytest.mark.parametrize("name", ["lserve-w16a16kv16", "whole-layers-w8a8kv8", "static-w8a8kv8-scales"])
def test_freed_pages_are_never_read(name: str) -> None:
    """After every step all pages that no table lists are filled with NaN, statistics too, and codes with 255."""
    model = model_of(name)
    generator = torch.Generator().manual_seed(5)
    sizes = (150, 30, 200)
    batch = [Ask(tuple(torch.randint(3, 211, (n,), generator=generator).tolist()), 50, 1.0) for n in sizes]
    wanted = alone(model, batch)
    engine, runner = model.engine(Shape(step=40, prefix=False))
    for number, ask in enumerate(batch):
        engine.add(request(str(number), ask))
    found: dict[str, list[int]] = {str(number): [] for number in range(len(batch))}
    poisoned = 0
    while engine.has_work:
        for output in engine.step():
            found[output.request] += output.new_tokens
        for kind, pool in enumerate(engine.scheduler.cache._pools):
            listed = {int(page) for page in runner.assembler.tables[kind].unique() if page >= 0}
            free = [page for page in range(pool.total) if page not in listed and pool.references(page) == 0]
            poisoned += len(free)
            for layer in runner.stores:
                store = layer[kind]
                assert isinstance(store, LayerPages)
                store.pages[free] = 255  # as fp16: NaN
                if store.statistics is not None:
                    store.statistics[free] = float("nan")
    assert poisoned
    assert [tuple(tokens) for tokens in found.values()] == wanted


def test_nobody_is_preempted_for_windows() -> None:
    """The streaming pool is as large as the plan says and full of windows: the reference preempts here."""
    model = load("w8a8kv8", sparsity=STATIC)
    generator = torch.Generator().manual_seed(6)
    batch = [Ask(tuple(torch.randint(3, 211, (200,), generator=generator).tolist()), 100, 1.0) for _ in range(6)]
    for overlap in (False, True):
        engine, _ = model.engine(Shape(seqs=6, step=64, overlap=overlap, prefix=False))
        pool = engine.scheduler.cache.pools[Kind.STREAMING]
        for number, ask in enumerate(batch):
            engine.add(request(str(number), ask))
        most = running = 0
        while engine.has_work:
            engine.step()
            engine.scheduler.check()
            assert pool.free + pool.held + pool.cached == pool.total
            most, running = max(most, pool.held), max(running, engine.scheduler.running)
        assert engine.scheduler.stats.preemptions == 0
        assert running == 6
        assert most > pool.total // 2


@pytest.mark.parametrize("prompt", [64 * pages + extra for pages in (1, 2, 3) for extra in (-1, 0, 1)])
def test_streaming_pages_held_do_not_grow(prompt: int) -> None:
    """Decoding far past the window holds the sink and the window, whatever the prompt."""
    model = load("w8a8kv8", sparsity=replace(STATIC, streaming=1.0, sink=64, local=100, prefill_local=80))
    engine, _ = model.engine(Shape(seqs=1, step=50))
    pool = engine.scheduler.cache.pools[Kind.STREAMING]
    engine.add(request("0", Ask(tuple(range(3, 3 + prompt)), 320 - prompt, 1.0)))
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        assert pool.held <= 5
