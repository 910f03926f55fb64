"""Runs requests through engines of different shapes around one loaded model."""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from omniserve.base.config import CacheLimits, DtypeName, EngineConfig, Limits, Precision
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE, Output, Request, SamplingParams, TokenLogprobs
from omniserve.engine.build import TORCH, make_engine
from omniserve.engine.engine import Engine
from omniserve.engine.runner import Runner
from omniserve.formats.checkpoint import kv_scales, open_checkpoint
from omniserve.formats.kv import KVFormat, kv_format
from omniserve.formats.table import weight_format
from omniserve.models.decoder import Decoder
from omniserve.models.families import family
from omniserve.models.load import load_decoder
from omniserve.ops.rope import make_rope
from omniserve.sparsity.policy import Dense
from tests.tiny import tiny_model

CPU = torch.device("cpu")
CONTEXT = 320


@dataclass(frozen=True)
class Shape:
    """How an engine is cut; no field may change a token."""

    pages: int = 64
    seqs: int = 8
    step: int = 512
    prefix: bool = True
    overlap: bool = False
    backend: Literal["auto", "reference"] = "auto"
    priorities: bool = False


@dataclass(frozen=True)
class Ask:
    """One request; `more` are further sampling parameters, `bad` what bad words are in tokens."""

    prompt: tuple[int, ...]
    tokens: int = 12
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[int, ...] = ()
    bad: tuple[tuple[int, ...], ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Loaded:
    """A model in one precision and dtype, from which engines of any shape are made."""

    spec: ModelSpec
    decoder: Decoder
    kv: KVFormat
    scales: list[torch.Tensor] | None
    precision: Precision
    dtype: DtypeName

    def engine(self, shape: Shape) -> tuple[Engine, Runner]:
        per_page = self.kv.token_bytes(self.spec.kv_heads, self.spec.head_dim, self.spec.layers) * PAGE
        config = EngineConfig(
            precision=self.precision,
            dtype=self.dtype,
            device=Device(kind="cpu", memory_bytes=0),
            backend=shape.backend,
            limits=Limits(max_model_len=CONTEXT, max_seqs=shape.seqs, max_step_tokens=shape.step),
            cache=CacheLimits(memory_bytes=shape.pages * per_page, prefix_caching=shape.prefix),
            overlap=shape.overlap,
            seed=0,
            policy="priority" if shape.priorities else "fcfs",
        )
        engine, runner, store = make_engine(self.decoder, self.kv, config, Dense(self.spec), self.scales)
        assert store.pages == shape.pages
        return engine, runner


@functools.cache
def load(word: str, group: int = 128, *, static: bool = False, dtype: DtypeName = "float64") -> Loaded:
    """A random two-layer model whose sizes are no multiples of 128; loaded once for each precision and process."""
    precision = Precision.parse(word, group)
    extra = None
    if static:
        extra = {
            f"model.layers.{layer}.self_attn.kv_scale": torch.tensor([[0.05, 0.06], [0.02, 0.03]]) for layer in (0, 1)
        }
    with tempfile.TemporaryDirectory() as name:
        source = open_checkpoint(tiny_model(Path(name), ffn=200, vocab=211, context=CONTEXT, extra=extra))
        spec = family(source.config).spec(source.config)
        scales = kv_scales(source, spec.layers)
        decoder = load_decoder(
            source,
            spec,
            weights=weight_format(precision.weight, precision.group),
            dtype=TORCH[dtype],
            device=CPU,
            policy=Dense(spec),
            rope=make_rope(spec.rope, head_dim=spec.head_dim, context=CONTEXT, device=CPU),
        )
    kv = kv_format(precision.kv, dtype=TORCH[dtype], static=static)
    return Loaded(spec, decoder, kv, scales, precision, dtype)


def request(name: str, ask: Ask) -> Request:
    sampling = SamplingParams(temperature=ask.temperature, seed=ask.seed, max_tokens=ask.tokens, **ask.more)
    return Request(
        id=name,
        tokens=list(ask.prompt),
        prompt=len(ask.prompt),
        sampling=sampling,
        stop_ids=frozenset(ask.stop),
        bad_words=ask.bad,
        limit=ask.tokens,
        reduce=None if sampling.prompt_logprobs is None else "logprobs",
    )


def outputs(engine: Engine, asks: Sequence[Ask]) -> list[list[Output]]:
    """Submit all at once and return what came for each request."""
    found: dict[str, list[Output]] = {str(n): [] for n in range(len(asks))}
    for number, ask in enumerate(asks):
        engine.add(request(str(number), ask))
    steps = 0
    while engine.has_work:
        for output in engine.step():
            found[output.request].append(output)
        steps += 1
        assert steps < 10_000, "the engine makes no progress"
    return list(found.values())


def serve(engine: Engine, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
    """Submit all at once and return what each request produced."""
    return [tuple(token for one in each for token in one.new_tokens) for each in outputs(engine, asks)]


def listed(each: Sequence[Output]) -> tuple[list[TokenLogprobs], list[TokenLogprobs] | None]:
    """The log-probabilities of a request's tokens, and of its prompt's."""
    prompts = [one.prompt_logprobs for one in each if one.prompt_logprobs is not None]
    assert len(prompts) <= 1
    return [entry for one in each for entry in one.logprobs], list(prompts[0]) if prompts else None


def tokens(model: Loaded, shape: Shape, asks: Sequence[Ask]) -> list[tuple[int, ...]]:
    """What the requests produce on a fresh engine of this shape."""
    engine, _ = model.engine(shape)
    return serve(engine, asks)


def alone(model: Loaded, asks: Sequence[Ask], shape: Shape | None = None) -> list[tuple[int, ...]]:
    """What each request produces on an engine of its own, with room for everything."""
    roomy = replace(shape or Shape(), prefix=False)
    return [tokens(model, roomy, [ask])[0] for ask in asks]
