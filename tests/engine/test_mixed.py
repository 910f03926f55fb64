"""Mixed steps padded to a few sizes, as a GPU replays them: here each replay runs the padded step anew."""

from typing import Any

import pytest
import torch

from omniserve.base.config import Sparsity
from omniserve.base.types import Step, Work
from omniserve.engine.assemble import Assembled
from omniserve.engine.graphs import MixedGraphs, Replay, mixtures
from omniserve.engine.mixture import Mixture
from omniserve.engine.runner import Runner
from omniserve.ops.batch import Workspace
from tests.engine.harness import CONTEXT, CPU, Ask, Shape, listed, load, outputs, serve

SIZES = (1, 70, 33, 150, 5, 64, 200, 2, 90)
ASKS = [Ask(tuple((7 * n + 3 * p) % 200 for p in range(size)), tokens=4 + 3 * n) for n, size in enumerate(SIZES)]
SPARSITY = {
    "dense": Sparsity(),
    "streaming": Sparsity(streaming=0.5, sink=20, local=33, prefill_local=50),
    "budget": Sparsity(streaming=0.5, sink=70, local=40, prefill_local=30, budget=192, interval=4),
    "tiles": Sparsity(budget=192, prefill_budget=192, prefill_from=128),
}


def padded(runner: Runner, *, seqs: int, tokens: int) -> list[int]:
    """Let a runner take padded steps; return a list that grows by each one's number of tokens."""
    taken: list[int] = []

    def again(step: Replay, pool: Any) -> Replay:
        step()

        def replay() -> torch.Tensor:
            hidden = step()
            taken.append(hidden.shape[0])
            return hidden

        return replay

    idle = runner.assembler.idle
    runner._mixed = MixedGraphs(runner._mixture, idle, seqs=seqs, tokens=tokens, device=CPU, pool=None, hold=again)
    return taken


@pytest.mark.parametrize("name", SPARSITY)
@pytest.mark.parametrize("word", ["w16a16kv16", "w8a8kv8", "w4a8kv4"])
def test_padded_steps_bring_the_same_tokens(word: str, name: str) -> None:
    model = load(word, sparsity=SPARSITY[name])
    shape = Shape(step=256, seqs=4, pages=96)
    plain, _ = model.engine(shape)
    engine, runner = model.engine(shape)
    taken = padded(runner, seqs=4, tokens=256)
    assert serve(engine, ASKS) == serve(plain, ASKS)
    assert 68 in taken, taken
    assert len(taken) > 3, taken


def test_steps_that_fill_their_budget_are_padded_beyond_it() -> None:
    """Produced tokens and a chunk take all of 64 tokens: no size of 64 holds both, one of 4 + 64 does."""
    model = load("w4a8kv4")
    shape = Shape(step=64, seqs=4, pages=96)
    plain, _ = model.engine(shape)
    engine, runner = model.engine(shape)
    room = runner._work.out.shape[0]
    assert room == 68
    taken = padded(runner, seqs=4, tokens=room)
    left: list[Step] = []
    assemble = runner.assembler.assemble
    runner.assembler.assemble = lambda step, work: left.append(step) or assemble(step, work)  # type: ignore[method-assign,func-returns-value]
    assert serve(engine, ASKS) == serve(plain, ASKS)
    assert 68 in taken
    assert left == []


def test_scored_prompts_are_read_where_they_are_padded_to() -> None:
    model = load("w8a8kv8")
    asks = [Ask(ask.prompt, tokens=ask.tokens, more={"prompt_logprobs": 1, "logprobs": 1}) for ask in ASKS]
    plain, _ = model.engine(Shape(step=256, seqs=4))
    engine, runner = model.engine(Shape(step=256, seqs=4))
    taken = padded(runner, seqs=4, tokens=256)
    expected, found = ([listed(each) for each in outputs(of, asks)] for of in (plain, engine))
    assert taken
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.token for one in ours[0]] == [one.token for one in theirs[0]]
        assert ours[1] is not None
        assert theirs[1] is not None
        close = pytest.approx([one.logprob for one in theirs[1]], abs=1e-9)
        assert [one.logprob for one in ours[1]] == close


def test_the_warm_up_runs_a_step_full_of_tiles() -> None:
    """The most pages that prompts choose from: what it takes is planned, and its kernels are there."""
    _, runner = load("w8a8kv8", sparsity=SPARSITY["tiles"]).engine(Shape(step=256, seqs=4))
    taken: list[tuple[tuple[int, ...], int]] = []
    assemble = runner.assembler.assemble

    def watched(step: Step, work: Workspace) -> Assembled:
        made = assemble(step, work)
        taken.append((made.batch.rows.tiled, made.batch.rows.longest))
        return made

    runner.assembler.assemble = watched  # type: ignore[method-assign]
    runner.prepare(graphs=False)
    assert taken[0] == ((2,), CONTEXT)


def work(start: int, count: int, prompt: int, *, known: bool = True) -> Work:
    tokens = (1,) * count if known else ()
    return Work(
        request="r", slot=0, start=start, count=count, prompt=prompt, new_tokens=tokens, logits="last", draws=True
    )


def test_what_a_mixture_is() -> None:
    chunk, row = work(0, 5, 9), work(9, 1, 9, known=False)
    found = Mixture.of((chunk, row, chunk), None)
    assert found == Mixture(works=(chunk, row, chunk), produced=(row,), chunks=(chunk, chunk))
    assert (found.tokens, found.pages) == (10, 2)
    assert found.spans(4) == (slice(4, 9), slice(0, 1), slice(9, 14))
    assert Mixture.of((row,), None) is None  # a decode step
    assert Mixture.of((chunk, work(4, 8, 9)), None) is None  # positions are read again that were produced
    assert Mixture.of((chunk,), 5) is not None
    assert Mixture.of((chunk,), 4) is None  # tiles that choose their pages


@pytest.mark.parametrize(
    "works",
    [
        (work(0, 129, 129),),
        (work(0, 128, 128), *[work(9, 1, 9, known=False)] * 5),
        tuple([work(0, 1, 1)] * 33),
        (work(64 * 480 - 1, 2, 64 * 481),),
    ],
    ids=["tokens", "rows", "chunks", "pages"],
)
def test_steps_that_no_size_holds_are_left(works: tuple[Work, ...]) -> None:
    _, runner = load("w8a8kv8").engine(Shape(step=256, seqs=4))
    padded(runner, seqs=4, tokens=132)
    mixture = Mixture.of(works, None)
    assert mixture is not None
    assert runner._mixed is not None
    assert runner._mixed.run(mixture) is None


def test_sizes_of_mixed_steps() -> None:
    assert mixtures(4, 200) == ((0, 64), (4, 64), (0, 128), (4, 128))
    many = mixtures(1024, 8192)
    assert len(many) == 30
    assert (many[0], many[-1]) == ((0, 64), (256, 2048))
    assert mixtures(8, 30) == ()
