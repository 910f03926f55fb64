"""From a model's path and a user's options to an engine that is ready to step."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from omniserve.base import log
from omniserve.base.config import (
    DtypeName,
    EngineConfig,
    Options,
    Precision,
    check_model,
    choose_precision,
    resolve,
)
from omniserve.base.errors import ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE
from omniserve.cache.manager import CacheManager
from omniserve.cache.pool import PagePool
from omniserve.cache.store import KVStore
from omniserve.engine.engine import Engine
from omniserve.engine.executor import LocalExecutor
from omniserve.engine.runner import Runner
from omniserve.engine.scheduler import Scheduler
from omniserve.formats.artifact import Scheme, key_means, scheme_of
from omniserve.formats.checkpoint import Source, kv_scales, open_checkpoint
from omniserve.formats.dummy import CONFIGS, DummySource
from omniserve.formats.hub import fetch, hub_name
from omniserve.formats.imports import translated
from omniserve.formats.kv import KVFormat, kv_format
from omniserve.formats.table import weight_format
from omniserve.formats.translated import Translated
from omniserve.models.decoder import Decoder
from omniserve.models.families import check_tensors, expected, family
from omniserve.models.load import load_decoder
from omniserve.ops.dispatch import choices
from omniserve.ops.rope import make_rope
from omniserve.sparsity.policy import Dense, Policy

LoadProgress = Callable[[str, int, int], None]
"""Called as on_load(phase, done, total)."""

_LOG = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the engine takes, in bytes, and how long it took to get there, in seconds by phase.

    rounding  how the weights got their precision, for people; empty for those that have the checkpoint's own 16 bit
    """

    model: str
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    kv_token_bytes: int
    rounding: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An engine and what was decided on the way."""

    engine: Engine
    runner: Runner
    source: Source
    spec: ModelSpec
    config: EngineConfig
    plan: MemoryPlan
    warnings: tuple[str, ...]


def build(
    model: str | Path | None,
    options: Options,
    *,
    dtype: DtypeName | None = None,
    on_load: LoadProgress | None = None,
) -> Built:
    """Load a model and return its engine.

    model  a .gguf file, a folder or a name on huggingface.co; None if `options.shape` stands for one
    dtype  overrides `options.dtype`; float64 is for tests, in which laws hold token for token
    Raises OmniserveError.
    """
    started = time.perf_counter()
    device = find_device(options)
    source = open_source(model, options, on_load)
    spec = family(source.config).spec(source.config)
    source = translated(source, spec)
    check_tensors(source, spec)
    scheme = scheme_of(source)
    stored = None if scheme is None else scheme.precision
    precision = choose_precision(options, stored)
    scales = kv_scales(source, spec.layers) if precision.kv == "kv8" and (not scheme or scheme.kv.static) else None
    chosen = dtype or _dtype(options, source, device)
    kv = kv_format(precision.kv, dtype=TORCH[chosen], static=scales is not None)
    config = resolve(
        options,
        spec,
        device,
        stored=stored,
        dtype=chosen,
        token_bytes=kv.token_bytes(spec.kv_heads, spec.head_dim, spec.layers),
        free_bytes=device.memory_bytes // 2,
    )
    where = torch.device(device.kind)
    policy = Dense(spec)
    opened = time.perf_counter()
    decoder = load_decoder(
        source,
        spec,
        weights=weight_format(precision.weight, precision.group),
        dtype=TORCH[chosen],
        device=where,
        policy=policy,
        rope=make_rope(spec.rope, head_dim=spec.head_dim, context=config.limits.max_model_len, device=where),
        progress=None if on_load is None else lambda done, total: on_load("load", done, total),
    )
    loaded = time.perf_counter()
    engine, runner, store = make_engine(decoder, kv, config, policy, scales, key_means(source, spec))
    plan = MemoryPlan(
        model=Path(source.path if model is None else model).name,
        weight_bytes=decoder.weight_bytes,
        kv_bytes=store.nbytes,
        kv_tokens=store.pages * PAGE,
        kv_token_bytes=kv.token_bytes(spec.kv_heads, spec.head_dim, spec.layers),
        rounding=_rounding(scheme, precision),
        seconds={"open": opened - started, "load": loaded - opened},
    )
    _LOG.info("plan %s", log.fields(**_described(plan, config)))
    _LOG.info("operations %s", log.fields(**choices(device.kind)))
    return Built(
        engine=engine,
        runner=runner,
        source=source,
        spec=spec,
        config=config,
        plan=plan,
        warnings=(*_labels(source), *_warnings(precision, scheme)),
    )


def open_source(model: str | Path | None, options: Options, on_load: LoadProgress | None = None) -> Source:
    """Return the checkpoint that `model` names, here or on huggingface.co, or dummy weights. Raises OmniserveError."""
    check_model(model, options)
    if options.shape is not None:
        config = CONFIGS[options.shape]
        return DummySource(options.shape, config, expected(family(config).spec(config)))
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
) -> tuple[Engine, Runner, KVStore]:
    """Return an engine around a loaded model: pages as its memory allows, page tables, scheduler.

    scales, key_means  of each layer, if the checkpoint has them: static KV8 scales, means of the rotated keys
    """
    limits = config.limits
    store = KVStore(
        kv,
        decoder.spec,
        memory_bytes=config.cache.memory_bytes,
        scales=scales,
        device=decoder.embedding.device,
        key_means=key_means,
    )
    runner = Runner(
        decoder,
        [(layer,) for layer in store.layers],
        slots=limits.max_seqs,
        max_len=limits.max_model_len,
        max_step_tokens=limits.max_step_tokens,
        kinds=len(policy.kinds),
    )
    cache = CacheManager(
        {kind: PagePool(store.pages) for kind in policy.kinds}, prefix_caching=config.cache.prefix_caching
    )
    scheduler = Scheduler(limits, cache, seed=config.seed, priorities=config.policy == "priority")
    executor = LocalExecutor(runner, reference=config.backend == "reference")
    return Engine(scheduler, executor, overlap=config.overlap), runner, store


TORCH: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def find_device(options: Options) -> Device:
    """Return the device to run on. Raises ConfigError if the asked one is not there or not supported yet."""
    if options.device == "cuda":
        raise ConfigError("device=cuda: this version has no GPU kernels yet; use --device cpu")
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Device(kind="cpu", memory_bytes=pages * size)


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
        "rounding": plan.rounding.replace(" ", "-") or "none",
        "weights": human_bytes(plan.weight_bytes).replace(" ", ""),
        "kv": human_bytes(plan.kv_bytes).replace(" ", ""),
        "kv_tokens": plan.kv_tokens,
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
