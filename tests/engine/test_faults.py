"""A request whose logits are no numbers fails alone; priorities change the order and no token. In float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniserve.base.errors import DeviceMemoryError
from omniserve.base.types import Request, SamplingParams
from omniserve.models.decoder import LayerStores
from omniserve.ops.batch import Batch
from tests.engine.harness import CONTEXT, Ask, Loaded, Shape, alone, load, outputs, request, serve

POISON = 5
"""A token whose embedding is not a number."""


@contextmanager
def poisoned(model: Loaded, value: float = float("nan")) -> Iterator[Loaded]:
    row = model.decoder.embedding[POISON]
    before = row.clone()
    row.fill_(value)
    try:
        yield model
    finally:
        row.copy_(before)


@pytest.fixture(params=["w16a16kv16", "w8a8kv8", "w8a8kv4", "w4a8kv4"], scope="module")
def model(request: pytest.FixtureRequest) -> Loaded:
    return load(request.param)


def prompt(seed: int, size: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(6, 211, (size,), generator=generator).tolist())


SOUND = [
    Ask(prompt=prompt(1, 70), tokens=9),
    Ask(prompt=prompt(2, 5), tokens=14, temperature=1.0, seed=3),
    Ask(prompt=prompt(3, 130), tokens=6, more={"repetition_penalty": 1.3, "logprobs": 2}),
    Ask(prompt=prompt(4, 20), tokens=12, temperature=0.8, seed=4, more={"top_k": 5, "bad_words": ()}),
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", [{}, {"top_p": 0.5}, {"top_k": 4}, {"presence_penalty": 1.0, "logprobs": 3}])
def test_a_poisoned_request_fails_alone(model: Loaded, overlap: bool, kind: dict[str, float]) -> None:
    with poisoned(model):
        expected = alone(model, SOUND)
        assert all(len(found) == ask.tokens for found, ask in zip(expected, SOUND, strict=True))
        bad = Ask(prompt=(*prompt(9, 80), POISON, 7), tokens=9, temperature=1.0, seed=2, more=kind)
        engine, _ = model.engine(Shape(overlap=overlap, step=64))
        found = outputs(engine, [SOUND[0], bad, *SOUND[1:], bad])
        engine.scheduler.check()
        for number in (1, 5):
            (output,) = found[number]
            assert (output.finish, output.fault, output.new_tokens) == ("error", "logits", ())
        sound = [found[0], *found[2:5]]
        assert [tuple(t for one in each for t in one.new_tokens) for each in sound] == expected
        assert engine.scheduler.stats.corrupted == 2
        assert serve(engine, SOUND) == expected  # in the same pages and slots


def test_a_request_that_breaks_midway_keeps_what_it_had(model: Loaded) -> None:
    ask = Ask(prompt=prompt(1, 30), tokens=9, more={"logit_bias": {}})
    free = alone(model, [ask])[0]
    engine, runner = model.engine(Shape())
    assert serve(engine, [ask]) == [free]
    one = request("a", ask)
    engine.add(one)
    got: list[int] = []
    while one.produced < 4:
        got += [token for output in engine.step() for token in output.new_tokens]
    runner.assembler.last_token[one.slot] = POISON
    with poisoned(model, float("inf")):
        (output,) = engine.step()
    assert (output.finish, output.fault) == ("error", "logits")
    assert tuple(got) == free[:4]
    assert not engine.has_work
    assert serve(engine, [ask]) == [free]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_that_is_too_large_is_cut(model: Loaded, overlap: bool) -> None:
    """Any step of more than 70 tokens runs out of memory: everything is answered as ever, in smaller ones."""
    expected = alone(model, SOUND)
    engine, runner = model.engine(Shape(overlap=overlap, step=256))
    real, sizes = runner.model, list[int]()

    class Small:
        embedding, logits, produce, spec = real.embedding, real.logits, real.produce, real.spec

        @staticmethod
        def hidden(batch: Batch, stores: LayerStores) -> torch.Tensor:
            sizes.append(batch.tokens.shape[0])
            if sizes[-1] > 70:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return real.hidden(batch, stores)

    runner.model = Small()  # type: ignore[assignment]  # all that a runner asks of a model
    assert serve(engine, SOUND) == expected
    engine.scheduler.check()
    assert max(sizes) > 70 >= engine.scheduler.step_tokens == 64
    assert engine.scheduler.stats.preemptions >= 1


def test_a_step_that_cannot_be_smaller_fails(model: Loaded) -> None:
    engine, runner = model.engine(Shape())

    class Full:
        embedding, logits, spec = runner.model.embedding, runner.model.logits, runner.model.spec

        @staticmethod
        def hidden(batch: Batch, stores: LayerStores) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    real = runner.model
    runner.model = Full()  # type: ignore[assignment]  # all that a runner asks of a model
    engine.add(request("a", Ask(prompt=prompt(1, 200))))
    with pytest.raises(DeviceMemoryError, match=r"a step of \d+ tokens: CUDA out of memory"):
        engine.drain()
    assert [output.finish for output in engine.drain()] == ["abort"]
    engine.scheduler.check()
    runner.model = real
    assert serve(engine, SOUND) == alone(model, SOUND)


def test_preparing_runs_all_kinds_of_prompts_and_leaves_no_trace(model: Loaded) -> None:
    """What a GPU's kernels are compiled with: no position beyond the longest sequence, nothing of it is seen later."""
    engine, runner = model.engine(Shape(step=256))
    before = {kind: table.clone() for kind, table in enumerate(runner.assembler.tables)}
    shapes: list[tuple[int, int]] = []
    real = runner.model

    class Watched:
        embedding, logits, produce, spec = real.embedding, real.logits, real.produce, real.spec

        @staticmethod
        def hidden(batch: Batch, stores: LayerStores) -> torch.Tensor:
            shapes.append((batch.tokens.shape[0], batch.rows.count))
            assert int(batch.positions.max()) < CONTEXT
            assert all(int(slots.max()) < 0 for slots in batch.write_slots)
            return real.hidden(batch, stores)

    runner.model = Watched()  # type: ignore[assignment]  # all that a runner asks of a model
    heard: list[tuple[str, int, int]] = []
    runner.prepare(graphs=False, on_done=lambda *progress: heard.append(progress))
    runner.model = real
    assert heard == [("kernels", done, len(shapes)) for done in range(1, len(shapes) + 1)]
    assert {(1, 1), (2, 1), (17, 1), (256, 1), (80, 2), (120, 3), (160, 4), (41, 41)} <= set(shapes)
    assert max(tokens for tokens, _ in shapes) == 256
    assert all(torch.equal(table, before[kind]) for kind, table in enumerate(runner.assembler.tables))
    assert serve(engine, SOUND) == alone(model, SOUND)


def test_scored_prompts_are_looked_at_too(model: Loaded) -> None:
    engine, _ = model.engine(Shape())
    good = prompt(1, 90)
    with poisoned(model):
        for number, tokens in enumerate([(*good[:40], POISON, *good[41:]), good]):
            params = SamplingParams(temperature=0.0, seed=1, prompt_logprobs=0)
            engine.add(
                Request(
                    id=str(number),
                    tokens=list(tokens),
                    prompt=len(tokens),
                    sampling=params,
                    limit=1,
                    reduce="logprobs",
                )
            )
        ends = {output.request: output for output in engine.drain() if output.finish}
    assert ends["0"].fault == "logits"
    assert ends["1"].finish == "length"
    assert len(ends["1"].prompt_logprobs or ()) == len(good) - 1


asks = st.builds(
    Ask,
    prompt=st.builds(prompt, st.integers(0, 9), st.integers(1, 150)),
    tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 100),
)


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(load_=st.lists(st.tuples(asks, st.integers(-2, 2)), min_size=2, max_size=6), overlap=st.booleans())
def test_priorities_change_no_token(load_: list[tuple[Ask, int]], overlap: bool) -> None:
    model = load("w8a8kv8")
    shape = Shape(pages=6, seqs=3, step=48, overlap=overlap)
    engine, _ = model.engine(replace(shape, priorities=True))
    found: dict[str, list[int]] = {}
    for number, (ask, priority) in enumerate(load_):
        one = request(str(number), ask)
        one.priority = priority
        engine.add(one)
        found[one.id] = []
    while engine.has_work:
        for output in engine.step():
            found[output.request] += output.new_tokens
        engine.scheduler.check()
    assert [tuple(each) for each in found.values()] == alone(model, [ask for ask, _ in load_])
