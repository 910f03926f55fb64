"""From a model's path and a user's options to an engine that is ready to step."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from omniserve.base import log
from omniserve.base.config import (
    DtypeName,
    EngineConfig,
    Options,
    Precision,
    Sparsity,
    check_model,
    choose_head,
    choose_precision,
    choose_sparsity,
    resolve,
)
from omniserve.base.errors import ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE, Kind
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.cache.store import KVStore
from omniserve.engine.device import check_dtype, check_room, find_device, taken_bytes, working_bytes
from omniserve.engine.engine import Engine
from omniserve.engine.executor import LocalExecutor
from omniserve.engine.runner import Runner
from omniserve.engine.scheduler import Scheduler
from omniserve.formats.artifact import Scheme, key_means, scheme_of
from omniserve.formats.checkpoint import Source, kv_scales, open_checkpoint
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.formats.hub import fetch, hub_name
from omniserve.formats.imports import translated
from omniserve.formats.kv import LOGICAL, KVFormat, kv_format
from omniserve.formats.table import head_format, weight_format
from omniserve.formats.translated import Translated
from omniserve.models.decoder import Decoder
from omniserve.models.families import check_tensors, expected, family
from omniserve.models.load import load_decoder
from omniserve.ops.dispatch import choices
from omniserve.ops.rope import make_rope
from omniserve.sparsity.heads import split
from omniserve.sparsity.patterns import read_pattern, window_of
from omniserve.sparsity.policy import Dense, Policy, Sparse

LoadProgress = Callable[[str, int, int], None]
"""Called as on_load(phase, done, total)."""

_LOG = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the engine takes, in bytes, and how long it took to get there, in seconds by phase.

    working_bytes  what steps take of a GPU beside weights and pages, with CUDA itself; measured after the largest
              step and all captures, so that requests find it taken; 0 on a CPU
    kv_bytes, kv_tokens, kv_token_bytes
              of all kinds of heads, statistics included; tokens that fit of the first kind; of a token while all see it
    pages     by kind of heads; statistics_bytes: what bounds of keys take of kv_bytes
    rounding  how the weights got their precision, for people; empty for those that have the checkpoint's own 16 bit
    """

    model: str
    weight_bytes: int
    working_bytes: int = 0
    kv_bytes: int
    kv_tokens: int
    kv_token_bytes: int
    pages: dict[str, int] = field(default_factory=dict)
    statistics_bytes: int = 0
    rounding: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """All that the engine takes."""
        return self.weight_bytes + self.kv_bytes + self.working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine and what was decided on the way; heads: per layer, the first letter of each key head's kind."""

    engine: Engine
    runner: Runner
    source: Source
    spec: ModelSpec
    config: EngineConfig
    plan: MemoryPlan
    heads: tuple[str, ...]
    warnings: tuple[str, ...]


def build(
    model: str | Path | None,
    options: Options,
    *,
    dtype: DtypeName | None = None,
    on_load: LoadProgress | None = None,
    make_policy: Callable[[ModelSpec, torch.device], Policy] | None = None,
) -> Built:
    """Load a model and return its engine.

    model  a .gguf file, a folder or a name on huggingface.co; None if `options.shape` stands for one
    dtype  overrides `options.dtype`; float64 is for tests, in which laws hold token for token
    make_policy  makes another policy than that of `options.sparsity`, for measurements
    Raises OmniserveError.
    """
    started = time.perf_counter()
    if options.attn_pattern is not None and options.local is None:
        options = replace(options, local=window_of(options.attn_pattern))
    device = find_device(options)
    taken = taken_bytes() if device.kind == "cuda" else None
    source = open_source(model, options, on_load, device=device.kind)
    spec = family(source.config).spec(source.config)
    source = translated(source, spec)
    check_tensors(source, spec)
    scheme = scheme_of(source)
    stored = None if scheme is None else scheme.precision
    precision = choose_precision(options, stored)
    scales = kv_scales(source, spec.layers) if precision.kv == "kv8" and (not scheme or scheme.kv.static) else None
    where = torch.device(device.kind)
    policy = (make_policy or partial(policy_of, choose_sparsity(options)))(spec, where)
    chosen = dtype or _dtype(options, source, device)
    check_dtype(options, device, chosen)
    kv = kv_format(precision.kv, dtype=TORCH[chosen], static=scales is not None)
    gpu = device.kind == "cuda"
    config = resolve(
        options,
        spec,
        device,
        stored=stored,
        dtype=chosen,
        token_bytes=_token_bytes(kv, policy, Kind.RETRIEVAL, spec),
        free_bytes=check_room(device, spec, precision, chosen, choose_head(options, precision, device))
        if gpu
        else device.memory_bytes,
        streaming_token_bytes=_token_bytes(kv, policy, Kind.STREAMING, spec),
        working_bytes=working_bytes(spec, chosen, options.max_model_len or spec.context) if gpu else None,
    )
    opened = time.perf_counter()
    decoder = load_decoder(
        source,
        spec,
        weights=weight_format(precision.weight, precision.group),
        head=head_format(config.lm_head),
        dtype=TORCH[chosen],
        device=where,
        policy=policy,
        rope=make_rope(spec.rope, head_dim=spec.head_dim, context=config.limits.max_model_len, device=where),
        progress=None if on_load is None else lambda done, total: on_load("load", done, total),
    )
    loaded = time.perf_counter()
    engine, runner, stores = make_engine(decoder, kv, config, policy, scales, key_means(source, spec))
    if gpu and config.backend == "auto":
        _LOG.info("preparing: the first start on a machine compiles kernels, for up to a minute, and keeps them")
        runner.prepare(graphs=spec.experts is None, on_done=on_load)  # experts are chosen on the host
    gc.collect()
    gc.freeze()  # what is there now stays: with 1,024 requests the collector took 2.5 ms of every step to look at it
    prepared = time.perf_counter()
    kv_bytes = sum(store.nbytes for store in stores.values())
    plan = MemoryPlan(
        model=Path(source.path if model is None else model).name,
        weight_bytes=decoder.weight_bytes,
        working_bytes=0 if taken is None else taken() - decoder.weight_bytes - kv_bytes,
        kv_bytes=kv_bytes,
        kv_tokens=next(iter(stores.values())).pages * PAGE,
        kv_token_bytes=sum(_token_bytes(kv, policy, kind, spec) for kind in Kind),
        pages={kind.value: store.pages for kind, store in stores.items()},
        statistics_bytes=sum(store.statistics.nbytes for store in stores.values()),
        rounding=_rounding(scheme, precision),
        seconds={"open": opened - started, "load": loaded - opened, "prepare": prepared - loaded},
    )
    _LOG.info("plan %s", log.fields(**_described(plan, config)))
    _LOG.info("operations %s", log.fields(**choices(device.kind, reference=config.backend == "reference")))
    return Built(
        engine=engine,
        runner=runner,
        source=source,
        spec=spec,
        config=config,
        plan=plan,
        heads=tuple(_letters(policy, layer, spec) for layer in range(spec.layers)),
        warnings=(*_labels(source), *_warnings(precision, scheme)),
    )


def open_source(
    model: str | Path | None, options: Options, on_load: LoadProgress | None = None, *, device: str = "cpu"
) -> Source:
    """Return the checkpoint that `model` names, here or on huggingface.co, or dummy weights. Raises OmniserveError.

    device  where dummy weights are made; those of a file come from it
    """
    check_model(model, options)
    if options.shape is not None:
        config = CONFIGS[options.shape]
        return DummySource(options.shape, config, expected(family(config).spec(config)), device)
    assert model is not None, "check_model"
    name = hub_name(model)
    if name is None or Path(model).exists():
        if options.revision is not None:
            raise ConfigError(f"revision={options.revision}: only a name on huggingface.co has revisions, not {model}")
        return open_checkpoint(model, options.load_format)
    place = fetch(
        name,
        revision=options.revision,
        download_dir=options.download_dir,
        offline=options.offline,
        progress=None if on_load is None else lambda done, total: on_load("download", done, total),
    )
    return open_checkpoint(place, options.load_format)


def _labels(source: Source) -> tuple[str, ...]:
    """Return the warnings that go with weights which are not a model's, or were read from a foreign layout."""
    if isinstance(source, Translated):
        return source.notes
    if not isinstance(source, DummySource):
        return ()
    return (f"{source.label}: speed and memory are real, text and quality are noise",)


def make_engine(
    decoder: Decoder,
    kv: KVFormat,
    config: EngineConfig,
    policy: Policy,
    scales: list[torch.Tensor] | None,
    key_means: list[torch.Tensor] | None = None,
) -> tuple[Engine, Runner, dict[Kind, KVStore]]:
    """Return an engine around a loaded model: pages as its memory allows, page tables, scheduler.

    scales, key_means  of each layer, if the checkpoint has them: static KV8 scales, means of the rotated keys
    """
    limits = config.limits
    stores = make_stores(decoder, kv, config, policy, scales, key_means)
    runner = Runner(
        decoder,
        list(zip(*(store.layers for store in stores.values()), strict=True)),
        policy,
        slots=limits.max_seqs,
        max_len=limits.max_model_len,
        max_step_tokens=limits.max_step_tokens,
    )
    cache = CacheManager(
        {kind: PagePool(store.pages) for kind, store in stores.items()},
        prefix_caching=config.cache.prefix_caching,
        keeps=policy.keeps,
        unlanded=config.unlanded,
        by_position=policy.by_position,
        tiles_from=policy.tiles_from,
    )
    scheduler = Scheduler(limits, cache, seed=config.seed, priorities=config.policy == "priority")
    executor = LocalExecutor(runner, reference=config.backend == "reference")
    return Engine(scheduler, executor, overlap=config.overlap), runner, stores


def make_stores(
    decoder: Decoder,
    kv: KVFormat,
    config: EngineConfig,
    policy: Policy,
    scales: list[torch.Tensor] | None,
    key_means: list[torch.Tensor] | None,
) -> dict[Kind, KVStore]:
    """Return the pages of each kind of heads, with what the checkpoint knows of these heads' keys and values."""
    spec = decoder.spec
    page_bytes = {kind: PAGE * _token_bytes(kv, policy, kind, spec) for kind in policy.heads}
    windows = config.cache.streaming_pages
    pages = {Kind.STREAMING: windows}
    if Kind.RETRIEVAL in policy.heads:
        free = config.cache.memory_bytes - windows * page_bytes.get(Kind.STREAMING, 0)
        pages[Kind.RETRIEVAL] = free // page_bytes[Kind.RETRIEVAL]
    stores = {}
    for kind, heads in policy.heads.items():
        ours = [_heads_of(policy, layer, kind) for layer in range(spec.layers)]
        stores[kind] = KVStore(
            kv,
            heads,
            spec.head_dim,
            pages=pages[kind],
            statistics=kind in policy.statistics,
            scales=None if scales is None else [s[:, of] for s, of in zip(scales, ours, strict=True)],
            device=decoder.embedding.device,
            key_means=None if key_means is None else [m[of] for m, of in zip(key_means, ours, strict=True)],
        )
    return stores


def _heads_of(policy: Policy, layer: int, kind: Kind) -> slice | list[int]:
    """Return a layer's key heads of one kind, by their numbers in the checkpoint."""
    if policy.split is None:
        return slice(None)
    order, count = policy.split.order[layer], policy.split.retrieval[layer]
    return list(order[:count] if kind is Kind.RETRIEVAL else order[count:])


def _letters(policy: Policy, layer: int, spec: ModelSpec) -> str:
    """Return the first letter of the kind of each of a layer's key heads, by their numbers in the checkpoint."""
    letters = [Kind.RETRIEVAL.value[0]] * spec.kv_heads
    if policy.split is not None:
        for head in policy.split.order[layer][policy.split.retrieval[layer] :]:
            letters[head] = Kind.STREAMING.value[0]
    return "".join(letters)


def policy_of(sparsity: Sparsity, spec: ModelSpec, device: torch.device) -> Policy:
    """Return what sparsity means for a model. Raises ConfigError."""
    if sparsity.off:
        return Dense(spec)
    if any(window is not None for window in spec.windows):
        raise ConfigError("sparsity: this model has a sliding window of its own; serve it with sparsity=off")
    values = ((1.0,) * spec.kv_heads,) * spec.layers
    if sparsity.pattern is not None:
        pattern = read_pattern(sparsity.pattern, layers=spec.layers, heads=spec.kv_heads)
        values = pattern.values
        _LOG.info("pattern %s", log.fields(sha256=pattern.digest))
    heads = split(values, sparsity.streaming)
    counts = {"retrieval": sum(heads.retrieval), "streaming": sum(heads.streaming)}
    _LOG.info("heads %s", log.fields(**counts, local=sparsity.local, interval=sparsity.interval))
    return Sparse(spec, sparsity, heads, device=device)


def _token_bytes(kv: KVFormat, policy: Policy, kind: Kind, spec: ModelSpec) -> int:
    """Return what a token takes in all heads of one kind, with its share of their statistics."""
    heads = sum(policy.heads.get(kind, ()))
    bounds = 2 * 2 * spec.head_dim // LOGICAL if kind in policy.statistics else 0
    return heads * (kv.page_bytes(spec.head_dim) // PAGE + bounds)


TORCH: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def _dtype(options: Options, source: Source, device: Device) -> DtypeName:
    """The user's dtype, else fp32 on the CPU and the checkpoint's on a GPU."""
    if options.dtype != "auto":
        return options.dtype  # type: ignore[return-value]  # Options allows these words only
    stored = str(source.config.get("torch_dtype") or source.config.get("dtype") or "bfloat16")
    return "float32" if device.kind == "cpu" else "float16" if stored == "float16" else "bfloat16"


def _described(plan: MemoryPlan, config: EngineConfig) -> dict[str, object]:
    return {
        "model": plan.model,
        "precision": config.precision.label.replace(" ", "-"),
        "dtype": config.dtype,
        "lm_head": config.lm_head,
        "rounding": plan.rounding.replace(" ", "-") or "none",
        "weights": human_bytes(plan.weight_bytes).replace(" ", ""),
        "kv": human_bytes(plan.kv_bytes).replace(" ", ""),
        "working": human_bytes(plan.working_bytes).replace(" ", ""),
        "kv_tokens": plan.kv_tokens,
        **{f"{kind}_pages": count for kind, count in plan.pages.items()},
        "statistics": human_bytes(plan.statistics_bytes).replace(" ", ""),
        "max_model_len": config.limits.max_model_len,
        "overlap": config.overlap,
    }


def _rounding(scheme: Scheme | None, precision: Precision) -> str:
    """Return how the weights got their precision."""
    if precision.weight == "w16a16":
        return ""
    if scheme is None:
        return "to nearest at load"
    return "calibrated" if scheme.calibrated else "to nearest, stored"


def _warnings(precision: Precision, scheme: Scheme | None) -> tuple[str, ...]:
    """Return the sentences about a precision that was not calibrated for this model."""
    found = []
    if precision.weight == "w4a8" and not (scheme and scheme.calibrated):
        measured = "3.7 times" if precision.group == -1 else "1.9 times"
        found.append(
            f"4-bit weights ({precision.label}) were rounded to nearest without calibration: perplexity of "
            f"SmolLM2-135M is {measured} its 16-bit value, answers may be nonsense; use --precision w8a8kv8"
            if scheme is None
            else f"the checkpoint's 4-bit weights ({precision.label}) were rounded to nearest without calibration: "
            "answers may be nonsense; check with `omniserve eval fidelity`"
        )
    elif precision.kv == "kv4" and (scheme is None or not (scheme.kv.bits == 4 or scheme.kv.key_mean)):
        found.append("4-bit KV without calibration ruins some models; check with `omniserve eval perplexity`")
    return tuple(found)
