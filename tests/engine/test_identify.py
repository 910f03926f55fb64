"""Which heads need the whole context: what a probe notes while a model reads."""

import random
from pathlib import Path

import pytest
import torch

from omniserve.base.config import Options
from omniserve.base.types import Request, SamplingParams
from omniserve.engine.build import build
from omniserve.engine.identify import identify
from omniserve.sparsity.identify import LOCAL, SINK, Probe, Prose, Sample, merged
from omniserve.sparsity.patterns import write_pattern
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, context=1024)
    return folder


def probe(model: Path, *samples: Sample | Prose, step: int = 512) -> Probe:
    options = Options(precision="w16a16kv16", device="cpu", max_num_batched_tokens=step, kv_cache_memory_bytes=1 << 24)
    found, built = identify(model, options, lambda _: samples)
    built.engine.close()
    return found


def tokens(count: int) -> list[int]:
    return random.Random(3).choices(range(3, 60), k=count)


def test_a_window_that_shows_all_changes_nothing(model: Path) -> None:
    short = probe(model, Prose(ids=tokens(SINK + LOCAL), start=SINK)).prose()
    assert all(value == 0 for line in short for value in line)
    long = probe(model, Prose(ids=tokens(900), start=SINK + LOCAL + 100)).prose()
    assert all(0 < value < 1 for line in long for value in line)


def test_chunks_change_no_measure(model: Path) -> None:
    samples = (Prose(ids=tokens(900), start=500), Sample(ids=tokens(700), span=range(300, 310), asking=range(690, 700)))
    whole, cut = (probe(model, *samples, step=step) for step in (1024, 33))
    for one, other in ((whole.prose(), cut.prose()), (whole.passkeys(), cut.passkeys())):
        for line, again in zip(one, other, strict=True):
            assert line == pytest.approx(again, rel=1e-3)
            assert min(line) > 0


def test_each_measure_names_as_many_heads() -> None:
    of_one = ((0.9, 0.8), (0.1, 0.0))
    of_other = ((0.0, 0.1), (0.7, 0.6))
    values = merged(of_one, of_other)
    ranked = sorted(((value, layer, head) for layer, line in enumerate(values) for head, value in enumerate(line)))
    assert {(layer, head) for _, layer, head in ranked[2:]} == {(0, 0), (1, 0)}, "the first of each"
    assert all(0 < value <= 1 for line in values for value in line)
    assert merged(of_one)[0][0] > merged(of_one)[0][1] > merged(of_one)[1][0] > merged(of_one)[1][1]


@pytest.mark.parametrize(("given", "expected"), [(None, 96), (64, 64)])
def test_streaming_heads_see_the_window_that_their_pattern_names(
    model: Path, tmp_path: Path, given: int | None, expected: int
) -> None:
    write_pattern(tmp_path, ((1.0, 0.0),) * 2, {"local": 96})
    options = Options(
        precision="w16a16kv16", device="cpu", max_num_seqs=1, kv_cache_memory_bytes=1 << 24, sparsity="static",
        attn_pattern=str(tmp_path), local=given,
    )  # fmt: skip
    built = build(model, options)
    built.engine.close()
    assert built.config.sparsity.local == expected


def test_before_the_first_sample_no_position_is_looked_at(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU captures its decode steps then, and a capture fails at whatever waits for the device."""
    options = Options(precision="w16a16kv16", device="cpu", max_num_seqs=1, kv_cache_memory_bytes=1 << 24)
    built = build(model, options, make_policy=lambda spec, device: Probe(spec))

    def waits(tensor: torch.Tensor) -> None:
        raise AssertionError("the host has looked at the device")

    monkeypatch.setattr(torch.Tensor, "nonzero", waits)
    ask = Request(id="a", tokens=[5, 6, 7], prompt=3, sampling=SamplingParams(temperature=0.0, seed=0), limit=2)
    built.engine.add(ask)
    built.engine.drain()
    built.engine.close()
    assert len(ask.tokens) == 5
