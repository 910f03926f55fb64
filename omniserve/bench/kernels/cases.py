"""What is measured: every operation of a decoder's step that has a kernel, at the sizes of a model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from omniserve.base.spec import ModelSpec
from omniserve.bench.kernels import limits
from omniserve.bench.kernels.limits import InTurn, Work
from omniserve.bench.kernels.timing import COLD
from omniserve.formats.table import FORMATS, HEADS
from omniserve.formats.weight import HeadFormat, Weight
from omniserve.ops.act import Act, ActFormat, Both, Int8, Plain, quantize
from omniserve.ops.dispatch import force_reference
from omniserve.ops.glu import swiglu
from omniserve.ops.norm import add_norm
from omniserve.ops.sample import SampleRows, sample

Calls = list[Callable[[], Any]]

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
"""Tokens of a step."""

CHECKED_ROWS = 256
"""Rows of a product that are compared with its reference."""

FORMS = ("w4a8-g128", "w4a8-row", "w8a8", "w16a16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A case with its inputs on the device.

    calls  the operation on several sets of inputs, alike in shape
    check  relative error of the first call against the reference
    peers  torch's own kernels at the same sizes, by name
    """

    calls: Calls
    check: Callable[[], float]
    peers: Mapping[str, Callable[[], Calls]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One line of the report.

    kind, name, size  what is measured: for instance gemm, `w4a8-g128 qkv`, 16
    build(copies)     makes inputs so many times, for a cold cache; None: as many as that needs
    alike             cases with the same word, kind and size have the same peers, which are measured once
    """

    kind: str
    name: str
    size: str
    work: Work | InTurn
    build: Callable[[int | None], Built]
    alike: str = ""

    @property
    def title(self) -> str:
        """Return all three in one line."""
        return f"{self.kind} {self.name} {self.size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the cases are made for.

    decode   (rows, context) pairs; prompts: (tokens, context, local window or None)
    wholes   tokens of whole prompts
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    tokens: Sequence[int]
    decode: Sequence[tuple[int, int]]
    prompts: Sequence[tuple[int, int, int | None]]
    wholes: Sequence[int] = ()


def cold(nbytes: float, copies: int | None, *, most: int = 192) -> int:
    """Return how many sets of inputs of so many bytes are needed for a cold cache."""
    return copies or max(1, min(most, math.ceil(COLD / max(nbytes, 1))))


def error(found: Any, expected: Any) -> float:
    """Return |found - expected| / |expected| of results, which may be activations or tuples; NaN counts as 1e9."""
    mine, theirs = _values(found), _values(expected)
    away = float(torch.linalg.vector_norm(mine - theirs) / torch.linalg.vector_norm(theirs).clamp(min=1e-30))
    return away if math.isfinite(away) else 1e9


def _values(result: Any) -> Tensor:
    match result:
        case Tensor():
            return result.flatten().float()
        case Plain():
            return result.x.flatten().float()
        case Int8():
            return (result.codes.float() * result.scale).flatten()
        case Both():
            return torch.cat((_values(result.plain), _values(result.int8)))
        case _:
            return torch.cat([_values(one) for one in result])


def against(call: Callable[[], Any]) -> Callable[[], float]:
    """Return a check of a call against itself within `force_reference`."""

    def check() -> float:
        found = call()
        with force_reference():
            return error(found, call())

    return check


def shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return N and K of a layer's products by name."""
    wide = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return {
        "qkv": (wide, spec.hidden),
        "out": (spec.hidden, spec.heads * spec.head_dim),
        "gate_up": (2 * spec.ffn, spec.hidden),
        "down": (spec.hidden, spec.ffn),
    }


def linears(sizes: Sizes) -> Iterator[Case]:
    """Yield the products of a layer in every format, the gated one with its activation, and the head's."""
    spec = sizes.spec
    for form in FORMS:
        for name, (n, k) in shapes(spec).items():
            weights = _Weights(form, n, k, sizes)
            for tokens in sizes.tokens:
                work = limits.product(form, tokens, n, k)
                title, build = f"{form} {name}", _product(weights, tokens)
                yield Case(kind="gemm", name=title, size=str(tokens), work=work, build=build, alike=name)
            if name == "gate_up":
                for tokens in sizes.tokens:
                    work = limits.product(form, tokens, n, k, out=0.5 if form != "w16a16" else 1.0)
                    build = _product(weights, tokens, gated=True)
                    yield Case(kind="gate_up_silu", name=form, size=str(tokens), work=work, build=build)
    for name, head in HEADS.items():
        form = {"w16": "w16a16", "w8": "w8a8"}[name]
        for tokens in (one for one in sizes.tokens if one <= 1024):
            work = limits.product(form, tokens, spec.vocab, spec.hidden, out=4.0)
            yield Case(kind="head", name=name, size=str(tokens), work=work, build=_head(head, tokens, sizes))


def _head(form: HeadFormat, tokens: int, sizes: Sizes) -> Callable[[int | None], Built]:
    def build(copies: int | None) -> Built:
        spec = sizes.spec
        weights = _Weights("w16a16", spec.vocab, spec.hidden, sizes)
        x = torch.randn(tokens, spec.hidden, device=sizes.device, dtype=sizes.dtype)
        act = quantize(x, form.wants)
        made = [form.bind(form.from_dense(w), bias=None, dtype=sizes.dtype) for w in weights.dense(2)[:copies]]
        calls: Calls = [lambda head=head: head.logits(act) for head in made]  # type: ignore[misc]  # a lambda's default
        check = against_rows(made[0].logits, act)
        return Built(calls=calls, check=check, peers=_product_peers(weights, x))

    return build


def against_rows(product: Callable[[Act], Any], act: Act) -> Callable[[], float]:
    """Return a check of a product against its reference at 256 of the rows at most, from the first to the last."""

    def check() -> float:
        rows = len(values_of(act))
        some = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=values_of(act).device).round().long()
        found = taken(product(act), some)
        with force_reference():
            return error(found, product(taken(act, some)))

    return check


def values_of(act: Act) -> Tensor:
    """Return the matrix of activations, or of their codes."""
    return act.x if isinstance(act, Plain) else values_of(act.plain) if isinstance(act, Both) else act.codes


def taken(result: Any, rows: Tensor) -> Any:
    """Return some rows of a product's result or of activations."""
    match result:
        case Tensor():
            return result[rows]
        case Plain():
            return Plain(result.x[rows])
        case Int8():
            total = None if result.sum is None else result.sum[rows]
            return Int8(result.codes[rows], result.scale[rows], total, result.dtype)
        case _:
            raise TypeError(f"rows of {type(result).__name__}")


class _Weights:
    """Bound weights of one shape and format, and torch's of the same shape; numbers of tokens share them."""

    def __init__(self, form: str, n: int, k: int, sizes: Sizes) -> None:
        self.form, self.n, self.k, self.sizes = FORMATS[form], n, k, sizes
        self._made: list[Weight] = []
        self._dense: list[Tensor] = []

    def copies(self, count: int | None) -> list[Weight]:
        """Return weights with numbers of their own."""
        wanted = cold(self.n * self.k * limits.WEIGHT_BYTES[self.form.name], count, most=24)
        while len(self._made) < wanted:
            stored = self.form.from_dense(self._random())
            self._made.append(self.form.bind(stored, bias=None, dtype=self.sizes.dtype))
        return self._made[:wanted]

    def dense(self, size: int, count: int | None = None) -> list[Tensor]:
        """Return matrices of 16 bits, `count` or as many as are needed when each takes `size` bytes a number."""
        wanted = cold(self.n * self.k * size, count, most=24)
        while len(self._dense) < wanted:
            self._dense.append(self._random())
        return self._dense[:wanted]

    def _random(self) -> Tensor:
        made = torch.randn(self.n, self.k, device=self.sizes.device, dtype=self.sizes.dtype)
        return made.mul_(self.k**-0.5)


def _product(weights: _Weights, tokens: int, *, gated: bool = False) -> Callable[[int | None], Built]:
    def build(copies: int | None) -> Built:
        sizes = weights.sizes
        x = torch.randn(tokens, weights.k, device=sizes.device, dtype=sizes.dtype)
        act = quantize(x, weights.form.wants)
        made = weights.copies(copies)
        calls: Calls = [lambda one=one: _of(one, gated)(act) for one in made]  # type: ignore[misc]  # a lambda's default
        check = against_rows(_of(made[0], gated), act)
        return Built(calls=calls, check=check, peers={} if gated else _product_peers(weights, x))

    return build


def _of(weight: Weight, gated: bool) -> Callable[[Act], Any]:
    return (lambda act: weight.gate_up_silu(act, weight.wants)) if gated else weight.gemm


def products(sizes: Sizes) -> Iterator[Case]:
    """Yield the four products of a layer one after the other, layer after layer with weights of their own.

    They do not read each other's results, so that each may be checked alone: what would make activations of them in a
    step is left out. A kernel begins before the one before it has ended, as in a step.
    """
    for form in FORMS:
        four = [_Weights(form, n, k, sizes) for n, k in shapes(sizes.spec).values()]
        for tokens in sizes.tokens:
            work = [limits.product(form, tokens, one.n, one.k) for one in four]
            build = _four(four, tokens)
            yield Case(kind="four products", name=form, size=str(tokens), work=InTurn(tuple(work)), build=build)


def _four(four: Sequence[_Weights], tokens: int) -> Callable[[int | None], Built]:
    def build(copies: int | None) -> Built:
        sizes, form = four[0].sizes, four[0].form
        xs = [torch.randn(tokens, one.k, device=sizes.device, dtype=sizes.dtype) for one in four]
        acts = [quantize(x, form.wants) for x in xs]
        size = sum(one.n * one.k for one in four)
        layers = list(
            zip(*(one.copies(cold(size * limits.WEIGHT_BYTES[form.name], copies)) for one in four), strict=True)
        )
        calls = [_in_turn([lambda w=w, a=a: w.gemm(a) for w, a in zip(layer, acts, strict=True)]) for layer in layers]  # type: ignore[misc]  # a lambda's default
        checks = [against_rows(w.gemm, a) for w, a in zip(layers[0], acts, strict=True)]
        peers = [_product_peers(one, x, cold(size, copies)) for one, x in zip(four, xs, strict=True)]
        return Built(
            calls=calls,
            check=lambda: max(check() for check in checks),
            peers={name: lambda name=name: _layers([one[name]() for one in peers]) for name in peers[0]},  # type: ignore[misc]  # a lambda's default
        )

    return build


def _layers(linears: Sequence[Calls]) -> Calls:
    """Return a call for each layer from the calls of its products."""
    return [_in_turn(layer) for layer in zip(*linears, strict=True)]


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _product_peers(weights: _Weights, x: Tensor, copies: int | None = None) -> dict[str, Callable[[], Calls]]:
    """Return torch's products of the same shape: 16 bit, fp8 with one scale, int8 without scales.

    copies  weights of their own for so many calls; None: as many as a cold cache needs
    """

    def half() -> Calls:
        return [lambda w=w: torch.nn.functional.linear(x, w) for w in weights.dense(2, copies)]  # type: ignore[misc]  # a lambda's default

    def fp8() -> Calls:
        one = torch.ones((), device=x.device)
        rows = x if len(x) >= 16 else x[:1].expand(16, -1)
        a = rows.to(torch.float8_e4m3fn).contiguous()
        ws = [w.to(torch.float8_e4m3fn) for w in weights.dense(1, copies)]

        def call(w: Tensor) -> Tensor:
            y: Tensor = torch._scaled_mm(a, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
            return y

        return [lambda w=w: call(w) for w in ws]  # type: ignore[misc]  # a lambda's default

    def int8() -> Calls:
        rows = x if len(x) > 16 else x[:1].expand(32, -1)
        a = (rows * 30).to(torch.int8).contiguous()
        ws = [(w * 1000).to(torch.int8) for w in weights.dense(1, copies)]
        return [lambda w=w: torch._int_mm(a, w.t()) for w in ws]  # type: ignore[misc]  # a lambda's default

    return {"16 bit": half, "fp8": fp8, "int8": int8}


def rowwise(sizes: Sizes) -> Iterator[Case]:
    """Yield norm, quantization, gate and sampling."""
    spec, wants = sizes.spec, ActFormat.INT8_SUM

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=sizes.device, dtype=sizes.dtype)

    def norm(tokens: int) -> Callable[[], Any]:
        x, delta = (random(tokens, spec.hidden) for _ in range(2))
        weight = random(spec.hidden)
        return lambda: add_norm(x, delta, weight, spec.norm_eps, wants)

    def codes(tokens: int) -> Callable[[], Any]:
        x = random(tokens, spec.heads * spec.head_dim)
        return lambda: quantize(x, wants)

    def gate(tokens: int) -> Callable[[], Any]:
        x = random(tokens, 2 * spec.ffn)
        return lambda: swiglu(x, wants, sizes.dtype)

    def greedy(tokens: int) -> Callable[[], Any]:
        logits = torch.randn(tokens, spec.vocab, device=sizes.device)
        return lambda: sample(logits, SampleRows())

    kinds: dict[str, tuple[Callable[[int], Callable[[], Any]], int]] = {
        "add_norm": (norm, 7 * spec.hidden),
        "quantize": (codes, 3 * spec.heads * spec.head_dim),
        "swiglu": (gate, 5 * spec.ffn),
        "sample": (greedy, 4 * spec.vocab),
    }
    for kind, (make, each) in kinds.items():
        for tokens in sizes.tokens:
            if kind == "sample" and tokens > 1024:
                continue

            def build(copies: int | None, make: Any = make, tokens: int = tokens, each: int = each) -> Built:
                calls = [make(tokens) for _ in range(cold(tokens * each, copies, most=16))]
                return Built(calls=calls, check=against(calls[0]))

            name = "greedy" if kind == "sample" else wants.value
            yield Case(kind=kind, name=name, size=str(tokens), work=Work(bytes=tokens * each), build=build)
