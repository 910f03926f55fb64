"""Settings: what a user may say, and the resolved configuration that constructors receive.

`Options` holds the public flags (names of serving.md section 5, dashes as underscores): the command line,
`OMNISERVE_<FLAG>`, YAML files and `LLM(...)` keywords all fill this one dataclass. `resolve` turns it into an
`EngineConfig` in which nothing is "auto".
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args, get_origin

from omniserve.base.errors import CapacityError, ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE, Kind

WeightName = Literal["w4a8", "w8a8", "w16a16"]
KVName = Literal["kv4", "kv8", "kv16", "kv32"]
HeadName = Literal["w8", "w16"]
DtypeName = Literal["float32", "float16", "bfloat16", "float64"]
PageScores = Literal["keys", "bounds"]

PRECISIONS = (
    "w4a8kv4", "w4a8kv8", "w4a8", "w8a8kv4", "w8a8kv8", "w8a8", "w16a16kv16", "w16a16kv8", "w16a16kv4",
)  # fmt: skip
"""QServe's words, as `--precision` takes them; `w4a8` and `w8a8` alone mean kv8."""

SHAPES = (
    "tiny", "llama-3-8b", "llama-3-8b-1048k", "llama-2-7b", "llama-2-13b", "llama-30b", "llama-2-70b", "mistral-7b",
    "yi-34b", "qwen1.5-72b",
)  # fmt: skip
"""Models that `--shape` names, for benchmarks with dummy weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How weights, activations and the KV cache are stored.

    group   columns that share a second-level scale of 4-bit weights: 128, or -1 for one scale per row;
            meaningless (and 128) for the other weights
    """

    weight: WeightName
    kv: KVName
    group: Literal[-1, 128] = 128

    @property
    def name(self) -> str:
        """The canonical word, for instance `w4a8kv4`."""
        return f"{self.weight}{self.kv}"

    @property
    def label(self) -> str:
        """The word with the group size of 4-bit weights, for people: `w4a8kv4 g128`."""
        group = "per channel" if self.group == -1 else f"g{self.group}"
        return f"{self.name} {group}" if self.weight == "w4a8" else self.name

    @staticmethod
    def parse(word: str, group: int = 128) -> "Precision":
        """Return the precision that a word of `PRECISIONS` names (w16a16 and w4a8kv16 ... too).

        Raises ConfigError, naming the nearest word, if there is no such precision.
        """
        lower = word.lower()
        for weight in get_args(WeightName):
            if lower.startswith(weight):
                rest = lower[len(weight) :] or ("kv16" if weight == "w16a16" else "kv8")
                if rest in get_args(KVName):
                    if group not in (-1, 128):
                        raise ConfigError(f"group_size={group}: must be -1 (per channel) or 128")
                    return Precision(weight=weight, kv=cast(KVName, rest), group=cast(Literal[-1, 128], group))
        raise ConfigError(f"precision={word!r}: must be one of {', '.join(PRECISIONS)}{nearest(word, PRECISIONS)}")


TILE = 128
"""Prompt positions that choose their pages together, from absolute multiples on."""

FEW = 2048
"""Token budgets below it choose their pages twice as often: of few, more are missed (docs/accuracy.md)."""

GROUP = 128
"""Group size of 4-bit weights that are quantized at load, unless the user says otherwise."""


def option(default: Any, help: str, *, choices: tuple[Any, ...] = ()) -> Any:
    """Return a dataclass field that carries its help text and allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything a user may say about an engine; unset means "auto"."""

    precision: str = option(
        "auto", f"auto, or one of {', '.join(PRECISIONS)}; auto is the checkpoint's own, w8a8kv8 if it is 16 bit"
    )
    group_size: int | None = option(
        None,
        "columns per scale of 4-bit weights: 128, or -1 per channel; default: the checkpoint's, 128 at load",
        choices=(-1, 128, None),
    )
    lm_head: str = option(
        "auto",
        "the projection to logits: w8 (8 bits, one scale per row), w16, or auto: w8 on a GPU with quantized weights, "
        "else w16",
        choices=("auto", "w8", "w16"),
    )
    dtype: str = option("auto", "type of what is not quantized", choices=("auto", "float32", "float16", "bfloat16"))
    load_format: str = option(
        "auto",
        "format of the weights; dummy (or --dummy-weights): random ones, for benchmarks, with --shape instead of MODEL",
        choices=("auto", "safetensors", "gguf", "dummy"),
    )
    shape: str | None = option(None, "with dummy weights: the model to imitate", choices=SHAPES)
    revision: str | None = option(None, "branch, tag or commit of a model of huggingface.co; default: main")
    download_dir: str | None = option(None, "where downloaded models are kept; default: huggingface_hub's cache")
    offline: bool = option(False, "never open an outgoing connection: downloaded models only")
    chat_template: str | None = option(None, "file with a Jinja chat template, instead of the model's")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    backend: str = option(
        "auto", "auto, or reference: torch references instead of kernels", choices=("auto", "reference")
    )
    max_model_len: int | None = option(None, "longest sequence in tokens; default: the model's context")
    max_num_seqs: int | None = option(None, "requests running at once; default 16 on the CPU, 256 on a GPU")
    max_num_batched_tokens: int | None = option(None, "tokens per step; default 512 on the CPU, 8192 on a GPU")
    gpu_memory_utilization: float | None = option(
        None, "share of a GPU's memory that the engine takes, others' use counted in; default 0.9"
    )
    kv_cache_memory_bytes: int | None = option(None, "memory of the KV pages in bytes; default: what is free")
    enable_prefix_caching: bool = option(True, "reuse the pages of equal prefixes")
    async_scheduling: bool | None = option(None, "plan the next step while the last one runs; default: on a GPU only")
    scheduling_policy: str = option(
        "fcfs",
        "order in which requests are served: of arrival, or of the field priority (the smaller first), then of arrival",
        choices=("fcfs", "priority"),
    )
    sparsity: str = option(
        "off",
        "static: streaming heads; dynamic: retrieval heads choose pages; lserve: both",
        choices=("off", "static", "dynamic", "lserve"),
    )
    static_sparsity: float | None = option(None, "share of key heads that stream, 0 to 1; default 0.5")
    attn_pattern: str | None = option(
        None, "folder of full_attention_heads.tsv; `omniserve sparsity identify` makes one"
    )
    sink: int | None = option(None, "first tokens that streaming heads always see; default 128")
    local: int | None = option(
        None, "latest tokens that streaming heads see at produced positions; default: what the pattern says, else 256"
    )
    prefill_local: int | None = option(None, "the same at prompt positions; default 8192")
    max_prefills: int | None = option(
        None, "requests whose prompts may hold more than the decode window at once; default 2"
    )
    token_budget: int | None = option(None, "tokens that a retrieval head reads at produced positions; default 4096")
    reuse_interval: int | None = option(
        None, f"produced tokens from one choice of pages to the next; default 4, 2 for budgets below {FEW}"
    )
    page_scores: str | None = option(
        None,
        "what pages are chosen by: their keys, or bounds of 16 keys each, which are faster and miss more; default keys",
        choices=("keys", "bounds"),
    )
    prefill_budget: int | None = option(
        None, f"tokens that retrieval heads read for {TILE} queries of a prompt beyond 32K; default: all"
    )
    seed: int = option(0, "seeds requests that bring no seed of their own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may put into a step, and how long a sequence may grow.

    tiles_from  first prompt position that is computed by whole tiles; None if there is none
    """

    max_model_len: int
    max_seqs: int
    max_step_tokens: int
    tiles_from: int | None = None

    def cut(self, start: int, end: int, prompt: int) -> int:
        """Return where a chunk from `start` that may reach to `end` ends: at a tile, or with the prompt."""
        if self.tiles_from is None or end >= prompt or end <= self.tiles_from:
            return end
        return max(start, self.tiles_from, end // TILE * TILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLimits:
    """Memory of the KV pages of all kinds, and whether equal prefixes share them.

    streaming_pages  how many of them streaming heads have, each of 64 tokens
    """

    memory_bytes: int
    prefix_caching: bool
    streaming_pages: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Which keys are kept and read; counts are tokens.

    streaming      share of key heads that stream; 0: none
    pattern        folder that says which heads stream first
    sink, local    streaming heads see key j from query i if j < sink or j > i - local
    prefill_local  the same at prompt positions
    prefills       requests that may hold more than the decode window at once, at full slots
    budget         what a retrieval head reads at a produced position; None: everything
    interval       produced positions from one choice of pages to the next
    scores         what pages are chosen by at produced positions: all their keys, or bounds of 16 keys each
    prefill_budget what retrieval heads read for a tile of prompt positions; None: everything
    prefill_from   first prompt position that `prefill_budget` applies to
    """

    streaming: float = 0.0
    pattern: str | None = None
    sink: int = 128
    local: int = 256
    prefill_local: int = 8192
    prefills: int = 2
    budget: int | None = None
    interval: int = 4
    scores: PageScores = "keys"
    prefill_budget: int | None = None
    prefill_from: int = 32768

    @property
    def off(self) -> bool:
        """True if every head sees everything."""
        return not self.streaming and self.budget is None and self.prefill_budget is None

    @property
    def name(self) -> str:
        """The word of `--sparsity`."""
        selects = self.budget is not None
        return ("lserve" if selects else "static") if self.streaming else "dynamic" if selects else "off"

    def pages_read(self, kind: Kind, held: int) -> int:
        """Return how many of the pages that a request holds for a kind of heads a produced token reads, at most."""
        if kind is Kind.STREAMING:
            return min(held, -(-self.sink // PAGE) + -(-self.local // PAGE) + 1)
        return held if self.budget is None else min(held, self.budget // PAGE)

    @property
    def tiles_from(self) -> int | None:
        """First prompt position whose keys are chosen; None if there is none."""
        return None if self.prefill_budget is None else self.prefill_from

    def streaming_pages(self, *, seqs: int, unlanded: int, longest: int) -> int:
        """Return the pages that hold the windows of `seqs` requests and, of `prefills` of them, of their prompts."""
        decode = -(-self.sink // PAGE) + -(-self.local // PAGE) + 2
        prompt = -(-(self.prefill_local + unlanded) // PAGE) + 1
        return min(seqs * decode + min(self.prefills, seqs) * prompt, seqs * -(-longest // PAGE))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A resolved configuration: no field is "auto"."""

    precision: Precision
    dtype: DtypeName
    device: Device
    backend: Literal["auto", "reference"]
    limits: Limits
    cache: CacheLimits
    overlap: bool
    seed: int
    policy: Literal["fcfs", "priority"] = "fcfs"
    sparsity: Sparsity = Sparsity()
    lm_head: HeadName = "w16"

    @property
    def unlanded(self) -> int:
        """Tokens that may be issued before the first of them lands."""
        return self.limits.max_step_tokens * (2 if self.overlap else 1)


def resolve(
    options: Options,
    spec: ModelSpec,
    device: Device,
    *,
    stored: Precision | None,
    dtype: DtypeName,
    token_bytes: int,
    free_bytes: int,
    streaming_token_bytes: int = 0,
    working_bytes: Callable[[int, int], int] | None = None,
) -> EngineConfig:
    """Return the configuration with every "auto" replaced.

    stored       precision of a quantized checkpoint, None for a 16-bit one
    dtype        what "auto" means for this checkpoint on this device
    token_bytes  KV bytes per token of the chosen precision, all layers; of retrieval heads, with their statistics
    streaming_token_bytes  the same of streaming heads
    free_bytes   memory that pages may take when the user does not say, with what a step needs
    working_bytes  what a step of so many tokens and sequences needs of it
    Raises ConfigError or CapacityError.
    """
    cpu = device.kind == "cpu"
    length = _positive("max_model_len", options.max_model_len, spec.context)
    if length > spec.context:
        raise ConfigError(f"max_model_len={length}: this model's context is {spec.context} tokens")
    seqs = _positive("max_num_seqs", options.max_num_seqs, 16 if cpu else 256)
    step = _positive("max_num_batched_tokens", options.max_num_batched_tokens, 512 if cpu else 8192)
    if step < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={step}: must be at least max_num_seqs={seqs}, one token for each request"
        )
    sparsity = choose_sparsity(options)
    if sparsity.prefill_budget is not None and step < seqs + TILE:
        raise ConfigError(
            f"max_num_batched_tokens={step}: with prefill_budget it must be at least max_num_seqs={seqs} + {TILE}, "
            "one token for each request and a tile of a prompt"
        )
    overlap = not cpu if options.async_scheduling is None else options.async_scheduling
    if working_bytes is not None:
        free_bytes = max(free_bytes - working_bytes(step, seqs), 0)
    streaming_pages = 0
    if streaming_token_bytes:
        unlanded = step * (2 if overlap else 1)
        streaming_pages = sparsity.streaming_pages(seqs=seqs, unlanded=unlanded, longest=length)
    memory = _kv_memory(
        _positive("kv_cache_memory_bytes", options.kv_cache_memory_bytes, 0, allow_zero=True),
        free_bytes=free_bytes,
        seqs=seqs,
        length=length,
        page_bytes=token_bytes * PAGE,
        windows_bytes=streaming_pages * streaming_token_bytes * PAGE,
    )
    precision = choose_precision(options, stored)
    return EngineConfig(
        precision=precision,
        dtype=dtype,
        device=device,
        backend="reference" if options.backend == "reference" else "auto",
        limits=Limits(max_model_len=length, max_seqs=seqs, max_step_tokens=step, tiles_from=sparsity.tiles_from),
        cache=CacheLimits(
            memory_bytes=memory, prefix_caching=options.enable_prefix_caching, streaming_pages=streaming_pages
        ),
        overlap=overlap,
        seed=options.seed,
        policy="priority" if options.scheduling_policy == "priority" else "fcfs",
        sparsity=sparsity,
        lm_head=choose_head(options, precision, device),
    )


def choose_head(options: Options, precision: Precision, device: Device) -> HeadName:
    """Return the format of the projection to logits: the user's, else 8 bits where they save a GPU's time."""
    if options.lm_head != "auto":
        return cast(HeadName, options.lm_head)
    return "w8" if device.kind == "cuda" and precision.weight != "w16a16" else "w16"


def _kv_memory(given: int, *, free_bytes: int, seqs: int, length: int, page_bytes: int, windows_bytes: int) -> int:
    """Return the bytes of all pages. Raises CapacityError unless the windows and one longest request fit."""
    longest = -(-length // PAGE) * page_bytes
    memory = given or min(free_bytes, windows_bytes + seqs * longest)
    if memory >= windows_bytes + longest:
        return memory
    if memory <= windows_bytes:
        raise CapacityError(
            f"the KV cache of {human_bytes(memory)} does not hold the windows of the streaming heads of {seqs} "
            f"requests ({human_bytes(windows_bytes)}): give --kv-cache-memory-bytes {windows_bytes + longest}, or "
            "lower --max-num-seqs, --local, --max-prefills or --prefill-local"
        )
    fits = (memory - windows_bytes) // page_bytes * PAGE
    beside = f" beside {human_bytes(windows_bytes)} of streaming windows" if windows_bytes else ""
    raise CapacityError(
        f"the KV cache of {human_bytes(memory)} holds {fits} tokens{beside} but one request may need {length}: "
        f"give --kv-cache-memory-bytes {windows_bytes + longest} or --max-model-len {max(fits, 1)}"
    )


_STATIC = ("static_sparsity", "attn_pattern", "sink", "local", "prefill_local", "max_prefills")
_DYNAMIC = ("token_budget", "reuse_interval", "page_scores", "prefill_budget")


def choose_sparsity(options: Options) -> Sparsity:
    """Return what a user says about sparsity, with its defaults. Raises ConfigError."""
    mode = options.sparsity
    for names, modes in ((_STATIC, ("static", "lserve")), (_DYNAMIC, ("dynamic", "lserve"))):
        for name in names:
            value = getattr(options, name)
            if value is not None and mode not in modes:
                raise ConfigError(f"{name}={value}: goes with sparsity={' or '.join(modes)}, not with {mode}")
    default = Sparsity()
    streaming = 0.0
    if mode in ("static", "lserve"):
        streaming = 0.5 if options.static_sparsity is None else float(options.static_sparsity)
        if not 0 <= streaming <= 1:
            raise ConfigError(f"static_sparsity={streaming:g}: must be 0 to 1, the share of key heads that stream")
        if streaming and options.attn_pattern is None:
            raise ConfigError(
                f"sparsity={mode}: give attn_pattern, the folder that says which heads stream; "
                "`omniserve sparsity identify MODEL -o DIR` makes one"
            )
    budget = prefill_budget = None
    if mode in ("dynamic", "lserve"):
        budget = _budget("token_budget", options.token_budget, 4096, 2, "the page of the sink and the newest one")
        if options.prefill_budget is not None:
            what = "the page of the sink, those of the tile and one more"
            prefill_budget = _budget("prefill_budget", options.prefill_budget, 0, 2 + TILE // PAGE, what)
    usual = default.interval if budget is None or budget >= FEW else 2
    interval = _positive("reuse_interval", options.reuse_interval, usual)
    if interval > PAGE:
        raise ConfigError(f"reuse_interval={interval}: must be 1 to {PAGE}, at most one page may fill between choices")
    return Sparsity(
        streaming=streaming,
        pattern=options.attn_pattern if streaming else None,
        sink=_positive("sink", options.sink, default.sink, allow_zero=True),
        local=_positive("local", options.local, default.local),
        prefill_local=_positive("prefill_local", options.prefill_local, default.prefill_local),
        prefills=_positive("max_prefills", options.max_prefills, default.prefills),
        budget=budget,
        interval=interval,
        scores=cast(PageScores, options.page_scores or default.scores),
        prefill_budget=prefill_budget,
    )


def _budget(name: str, value: int | None, default: int, least: int, what: str) -> int:
    tokens = default if value is None else value
    if tokens < least * PAGE or tokens % PAGE:
        raise ConfigError(
            f"{name}={tokens}: must be a multiple of {PAGE}, the tokens of a page, and at least {least * PAGE}, "
            f"for {what}"
        )
    return tokens


def choose_precision(options: Options, stored: Precision | None) -> Precision:
    """Return the precision to serve: the user's, else the checkpoint's, else w8a8kv8.

    Raises ConfigError if the user asks a quantized checkpoint for other weights than it holds.
    """
    if options.precision == "auto":
        if stored is not None and stored.weight == "w4a8" and options.group_size not in (None, stored.group):
            raise ConfigError(f"group_size={options.group_size}: the checkpoint holds {stored.label} weights")
        return stored or Precision.parse("w8a8kv8")
    group = options.group_size or (stored.group if stored is not None else GROUP)
    chosen = Precision.parse(options.precision, group)
    if stored is not None and (chosen.weight, chosen.group) != (stored.weight, stored.group):
        raise ConfigError(
            f"precision={options.precision}: the checkpoint holds {stored.label} weights, "
            f"which cannot be served as {chosen.label}"
        )
    return chosen


def check_model(model: object, options: Options) -> None:
    """Raise ConfigError unless there is a model, or else a shape with dummy weights."""
    dummy = options.load_format == "dummy"
    if options.shape is not None and not dummy:
        raise ConfigError(f"shape={options.shape}: goes with load_format=dummy only, a model has a shape of its own")
    if dummy and options.shape is None:
        raise ConfigError(f"load_format=dummy: give the shape as well, one of {', '.join(SHAPES)}")
    if dummy and model is not None:
        raise ConfigError(f"load_format=dummy: takes shape={options.shape} instead of the model {str(model)!r}")
    if not dummy and model is None:
        raise ConfigError("MODEL is missing: give a .gguf file, a model folder or a name on huggingface.co (ORG/NAME)")


def _positive(name: str, value: int | None, default: int, allow_zero: bool = False) -> int:
    if value is None:
        return default
    if value < 1 and not (allow_zero and value == 0):
        raise ConfigError(f"{name}={value}: must be 1 or more")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for a misspelt word, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]}?)" if match else ""


def options_from(values: Mapping[str, Any], *, origin: str, base: Options | None = None) -> Options:
    """Return `base` with the named values replaced.

    origin  what the user would recognise: "keyword", a file's path
    Raises ConfigError for an unknown name (with the nearest one), a wrong type or a value that is not allowed.
    """
    known = {f.name: f for f in fields(Options)}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{origin}: unknown option {name!r}{nearest(name, known)}")
        _check(origin, known[name].name, known[name].type, known[name].metadata["choices"], value)
    return replace(base or Options(), **values)


def _accepts(annotation: Any) -> tuple[type, ...]:
    return get_args(annotation) if get_origin(annotation) is not None or get_args(annotation) else (annotation,)


def _check(origin: str, name: str, annotation: Any, choices: tuple[Any, ...], value: Any) -> None:
    types = _accepts(annotation)
    fits = isinstance(value, types) or (float in types and isinstance(value, int))
    if not fits or (isinstance(value, bool) and bool not in types):
        allowed = " or ".join("nothing" if t is type(None) else t.__name__ for t in types)
        raise ConfigError(f"{origin}: {name}={value!r}: must be {allowed}")
    if choices and value is not None and value not in choices:
        words = ", ".join(str(choice) for choice in choices)
        hint = nearest(value, choices) if isinstance(value, str) else ""
        raise ConfigError(f"{origin}: {name}={value!r}: must be one of {words}{hint}")
