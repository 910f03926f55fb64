"""The engine in its own process, for asyncio: outputs, aborts, refusals, its death. No server, no model."""

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from omniserve.base.config import Options
from omniserve.base.errors import OmniserveError, RequestError
from omniserve.base.types import Output, SamplingParams, TokenLogprobs, Usage
from omniserve.client import (
    AsyncEngine,
    EngineDeadError,
    LoadError,
    LogitsError,
    StepError,
    _Outputs,
    _Wire,
    apart,
    joined,
    listen,
)
from omniserve.engine.process import Add, Frames, Landed, Null, Stats, frame
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.server.answers import Choice, Prompt, Reply
from omniserve.text import Tokenizer
from tests.server.engines import command

GREEDY = SamplingParams(temperature=0.0, max_tokens=50)


def engine(seconds: float = 0.002, **more: Any) -> AsyncEngine:
    return AsyncEngine(None, Options(max_num_seqs=4), null=Null(step_seconds=seconds), **more)


def running(test: Callable[[AsyncEngine], Awaitable[None]], made: AsyncEngine) -> None:
    """Start an engine, run a test with it, end it."""

    async def main() -> None:
        await made.start()
        try:
            await asyncio.wait_for(test(made), 30)
        finally:
            await made.close()
        assert made.process is not None
        assert not Path(f"/proc/{made.process}").exists()

    asyncio.run(main())


def test_generate() -> None:
    async def test(made: AsyncEngine) -> None:
        ready = made.ready
        assert ready is not None
        assert (ready.vocab, ready.config.limits.max_seqs) == (256, 4)
        outputs = [output async for output in made.generate([1, 2, 3], GREEDY)]
        assert [len(output.new_tokens) for output in apart_all(outputs)] == [1] * 50
        assert outputs[-1].finish == "length"
        assert outputs[-1].usage == Usage(prompt_tokens=3, completion_tokens=50)
        many = await asyncio.gather(*(collect(made, n) for n in range(9)))
        assert many == [50] * 9
        assert made.open == 0

    async def collect(made: AsyncEngine, number: int) -> int:
        return sum([len(output.new_tokens) async for output in made.generate([number + 1], GREEDY)])

    running(test, engine())


def apart_all(outputs: list[Output]) -> list[Output]:
    """A machine that is busy brings several tokens at once."""
    return [one for output in outputs for one in apart(output)]


def test_closing_or_cancelling_aborts() -> None:
    landed: list[Landed] = []

    async def test(made: AsyncEngine) -> None:
        stream = made.generate([1, 2], SamplingParams(max_tokens=5000))
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(read(made))
        while made.open == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert made.open == 0
        while landed[-1].stats.running:
            await asyncio.sleep(0.01)
        assert sum(landed[-1].stats.held.values()) == 0

    async def read(made: AsyncEngine) -> None:
        async for _ in made.generate([3, 4], SamplingParams(max_tokens=5000)):
            pass

    running(test, engine(on_landed=landed.append))


def test_refusals() -> None:
    async def test(made: AsyncEngine) -> None:
        with pytest.raises(RequestError, match="max_model_len is 8192"):
            await anext(made.generate([1] * 9000, GREEDY))
        (output,) = [output async for output in made.generate([1], SamplingParams(max_tokens=1))]
        assert output.finish == "length"

    running(test, engine())


def test_a_failed_step() -> None:
    async def test(made: AsyncEngine) -> None:
        with pytest.raises(StepError):
            async for _ in made.generate([1], GREEDY):
                pass
        assert len([output async for output in made.generate([1], GREEDY)]) == 50

    running(test, engine(command=command("raise 9")))


def test_death() -> None:
    async def test(made: AsyncEngine) -> None:
        with pytest.raises(EngineDeadError):
            async for _ in made.generate([1], GREEDY):
                pass
        assert made.dead is not None
        assert made.dead == await made.died()
        with pytest.raises(EngineDeadError):
            await anext(made.generate([1], GREEDY))

    running(test, engine(command=command("kill 9")))


def test_drain() -> None:
    async def test(made: AsyncEngine) -> None:
        assert await made.drain(0)
        task = asyncio.create_task(anext(made.generate([1], SamplingParams(max_tokens=8000))))
        await task
        assert not await made.drain(0.05)

    running(test, engine())


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    async def main(made: AsyncEngine, kind: type[Exception], words: str) -> None:
        with pytest.raises(kind, match=words):
            await made.start()
        assert made.dead is not None

    asyncio.run(main(AsyncEngine(tmp_path / "none", Options()), OmniserveError, "none"))
    asyncio.run(main(engine(command=["/bin/false"]), LoadError, "ended at once"))


def test_a_slow_reader_gets_several_outputs_as_one() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=0)
    entry = TokenLogprobs(token=1, logprob=-1.0, rank=1)

    def output(number: int, finish: Any = None) -> Output:
        return Output(request="a", new_tokens=(number,), finish=finish, usage=usage, logprobs=(entry,))

    async def main() -> None:
        outputs = _Outputs()
        for number in range(1000):
            outputs.put(output(number))
        outputs.put(output(1000, "length"))
        got = []
        while not got or got[-1].finish is None:
            got.append(await outputs.get())
        assert len(got) == 256
        assert [token for one in got for token in one.new_tokens] == list(range(1001))
        assert sum(len(one.logprobs) for one in got) == 1001

    asyncio.run(main())
    first = Output(request="a", new_tokens=(), finish=None, usage=usage, prompt_logprobs=(entry,))
    assert joined(first, output(1)).prompt_logprobs == (entry,)


@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 3, 4, 5]])
def test_a_stop_string_ends_an_answer_however_its_tokens_come(cuts: list[int]) -> None:
    """Tokens behind it are neither counted nor listed, and none of the first min_tokens is looked at."""
    tokenizer = Tokenizer.load(DummySource("tiny", CONFIGS["tiny"], {}))
    ids = tokenizer.encode("ABABCD", special=False)
    assert len(ids) == 6
    params = SamplingParams(stop=("B",), min_tokens=3, logprobs=0)
    reply = Reply(
        prefix="a", model="m", stream=True, n=1, logprobs=0,
        on_first=lambda choice: None, on_gap=lambda gap, tokens: None, on_end=lambda choice: None,
        abort=lambda ids: None,
    )  # fmt: skip
    choice = Choice(reply, 0, Prompt(text=None, ids=[1]), Add(id="a", tokens=[1], sampling=params, limit=9), tokenizer)
    reply.add(choice)
    for begin, end in itertools.pairwise([0, *cuts, 6]):
        outputs = [produced("a", ids[place], "length" if place == 5 else None) for place in range(begin, end)]
        choice.take(functools.reduce(joined, outputs))
    assert (choice.finish, choice.tokens) == ("stop", 4)
    assert "".join(piece.text for piece in choice.pieces) == "ABA"
    assert [entry.token for piece in choice.pieces for entry in piece.logprobs] == ids[:4]


NOTHING = Stats(0, 0, 0, 0, 0, {}, {})


def landed(*outputs: Output) -> bytes:
    return bytes(frame(Landed(outputs=list(outputs), tokens=1, admitted=[], stats=NOTHING)))


def produced(name: str, token: int, finish: Any = None, fault: Any = None) -> Output:
    usage = Usage(prompt_tokens=1, completion_tokens=token)
    entry = TokenLogprobs(token=token, logprob=-1.0, rank=1)
    return Output(request=name, new_tokens=(token,), finish=finish, usage=usage, logprobs=(entry,), fault=fault)


def test_steps_that_come_together_are_handed_out_as_one() -> None:
    """A server that is behind must not pay for every token; an answer that fails keeps what came before."""
    steps: list[Landed] = []
    made = AsyncEngine(None, Options(), null=Null(step_seconds=1.0), on_landed=steps.append)
    got: dict[str, list[Any]] = {name: [] for name in "abc"}
    made._sinks = {name: found.append for name, found in got.items()}
    data = landed(*(produced(name, 1) for name in "abc"))
    data += landed(produced("a", 2), produced("b", 2, "length"), produced("c", 2))
    data += landed(produced("a", 3), produced("c", 3, "error", "logits"))
    _Wire(made).data_received(data)
    assert len(steps) == 3
    assert [one.new_tokens for one in got["a"]] == [(1, 2, 3)]
    assert [entry.token for entry in got["a"][0].logprobs] == [1, 2, 3]
    assert got["a"][0].usage.completion_tokens == 3
    assert [(one.new_tokens, one.finish) for one in got["b"]] == [((1, 2), "length")]
    assert got["c"][0].new_tokens == (1, 2)
    assert isinstance(got["c"][1], LogitsError)
    assert list(made._sinks) == ["a"]
    singles = list(apart(got["b"][0]))
    assert [(one.new_tokens, one.finish, len(one.logprobs)) for one in singles] == [
        ((1,), None, 1),
        ((2,), "length", 1),
    ]


def test_frames_however_they_are_cut() -> None:
    messages = [
        Add(id=str(n), tokens=list(range(n * 50)), sampling=SamplingParams(logit_bias={1: 2.0}, seed=-(2**63)), limit=1)
        for n in range(5)
    ]
    messages.append(Landed(outputs=[], tokens=1, admitted=[], stats=Stats(0, 0, 0, 0, 0, {}, {})))  # type: ignore[arg-type]
    data = b"".join(bytes(frame(message)) for message in messages)
    whole = list(Frames().feed(data))
    assert len(whole) == len(messages)
    for size in (1, 3, 7, 1000):
        frames = Frames()
        assert [one for k in range(0, len(data), size) for one in frames.feed(data[k : k + size])] == whole
    with pytest.raises(ConnectionError):
        list(Frames().feed(b"\xff\xff\xff\xff"))


def test_the_socket_is_private(tmp_path: Path) -> None:
    """Row 2: mode 0600, in a folder of this user alone, and gone once the engine is there."""
    with listen(tmp_path / "s"):
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 2."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    modes = []
    monkeypatch.setattr(
        "omniserve.client.listen", lambda path: modes.append(path.parent.stat().st_mode & 0o777) or listen(path)
    )

    async def test(made: AsyncEngine) -> None:
        assert list(tmp_path.iterdir()) == []

    running(test, engine())
    assert modes == [0o700]
