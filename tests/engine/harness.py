"""Runs requests through engines of different shapes around one loaded model."""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from omniserve.base.config import CacheLimits, DtypeName, EngineConfig, Limits, Precision, Sparsity
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE, Kind, Output, Request, SamplingParams, TokenLogprobs
from omniserve.engine.build import TORCH, _token_bytes, make_engine
from omniserve.engine.engine import Engine
from omniserve.engine.runner import Runner
from omniserve.formats.checkpoint import open_checkpoint
from omniserve.formats.kv import KVFormat, kv_format
from omniserve.formats.table import head_format, weight_format
from omniserve.models.decoder import Decoder
from omniserve.models.families import family
from omniserve.models.load import load_decoder
from omniserve.ops.rope import make_rope
from omniserve.sparsity.heads import split
from omniserve.sparsity.policy import Dense, Policy, Sparse
from tests.tiny import tiny_model

CPU = torch.device("cpu")
CONTEXT = 320


@dataclass(frozen=True)
class Shape:
    """How an engine is cut; no field may change a token. windows: pages of streaming heads, 0 for what is planned."""

    pages: int = 64
    windows: int = 0
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
    policy: Policy
    sparsity: Sparsity
    key_means: list[torch.Tensor] | None

    def engine(self, shape: Shape) -> tuple[Engine, Runner]:
        page = {kind: _token_bytes(self.kv, self.policy, kind, self.spec) * PAGE for kind in Kind}
        limits = Limits(
            max_model_len=CONTEXT,
            max_seqs=shape.seqs,
            max_step_tokens=shape.step,
            tiles_from=self.sparsity.tiles_from,
        )
        windows = 0
        if page[Kind.STREAMING]:
            unlanded = shape.step * (2 if shape.overlap else 1)
            windows = self.sparsity.streaming_pages(seqs=shape.seqs, unlanded=unlanded, longest=CONTEXT)
            windows = shape.windows or windows
        memory = shape.pages * page[Kind.RETRIEVAL] + windows * page[Kind.STREAMING]
        config = EngineConfig(
            precision=self.precision,
            dtype=self.dtype,
            device=Device(kind="cpu", memory_bytes=0),
            backend=shape.backend,
            limits=limits,
            cache=CacheLimits(memory_bytes=memory, prefix_caching=shape.prefix, streaming_pages=windows),
            overlap=shape.overlap,
            seed=0,
            policy="priority" if shape.priorities else "fcfs",
            sparsity=self.sparsity,
        )
        engine, runner, stores = make_engine(self.decoder, self.kv, config, self.policy, self.scales, self.key_means)
        if Kind.RETRIEVAL in stores:
            assert stores[Kind.RETRIEVAL].pages == shape.pages
        return engine, runner


@functools.cache
def load(
    word: str,
    group: int = 128,
    *,
    static: bool = False,
    key_mean: bool = False,
    dtype: DtypeName = "float64",
    sparsity: Sparsity = Sparsity(),  # noqa: B008  # frozen
    order: tuple[tuple[float, ...], ...] = ((0.2, 0.8, 0.5), (0.9, 0.1, 0.3)),
    model: str = "llama",
) -> Loaded:
    """A random two-layer model whose sizes are no multiples of 128; loaded once for each precision and process.

    Its head is a matrix of its own: with tied embeddings a random model repeats one token, whatever it reads, and no
    law about tokens could fail.

    order  how much each of its three key heads retrieves; static, key_mean: KV scales and key means of its own
    """
    precision = Precision.parse(word, group)
    generator = torch.Generator().manual_seed(3)
    scales = [0.02 + 0.05 * torch.rand(2, 3, generator=generator) for _ in range(2)]
    means = [torch.randn(3, 16, generator=generator) for _ in range(2)]
    with tempfile.TemporaryDirectory() as name:
        source = open_checkpoint(
            tiny_model(
                Path(name), model, heads=6, kv_heads=3, ffn=200, vocab=211, context=CONTEXT, layers=2, tied=False
            )
        )
        spec = family(source.config).spec(source.config)
        policy: Policy = Dense(spec)
        if not sparsity.off:
            policy = Sparse(spec, sparsity, split(order, sparsity.streaming), device=CPU)
        decoder = load_decoder(
            source,
            spec,
            weights=weight_format(precision.weight, precision.group),
            head=head_format("w16"),
            dtype=TORCH[dtype],
            device=CPU,
            policy=policy,
            rope=make_rope(spec.rope, head_dim=spec.head_dim, context=CONTEXT, device=CPU),
        )
    kv = kv_format(precision.kv, dtype=TORCH[dtype], static=static)
    return Loaded(
        spec,
        decoder,
        kv,
        scales if static else None,
        precision,
        dtype,
        policy,
        sparsity,
        means if key_mean else None,
    )


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
