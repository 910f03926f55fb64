"""How an implementation is compared with its reference, for every operation.

Integers must be equal. Floats: the truth is the reference in float64 on the same inputs; the root mean square error may
be three times that of the reference in its own precision, the largest six times (+ 1 ulp): on this rule's worst case,
K = 1536 in fp32, a sum in one chain (oneDNN) has 2.04 and 3.8 times the error of MKL's blocked one.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from omniserve.formats.kv import LayerPages
from omniserve.ops.dispatch import Operation, force_reference

Args = tuple[Any, ...]

WRITES = {"attend", "rope_write", "select_pages"}
"""Operations that write into their arguments: every run gets copies."""


def cut_off(operation: Operation[..., Any], args: Args) -> float:
    """Return what tensor cores may lose of 16-bit products summed in fp32, as a share of the largest result.

    They do not round: each step of 16 columns cuts what it adds off at the last bit of the largest summand, always in
    the same direction, so that the losses of K / 16 steps add up. A summand is taken to be no larger than the largest
    result. Products of fp32 numbers do not run there.
    """
    if operation.name != "gemm_w16a16" or not args[0].is_cuda or args[0].dtype == torch.float32:
        return 0.0
    return -(-args[0].shape[1] // 16) * torch.finfo(torch.float32).eps


EXACT = {"changed"}
"""Operations whose numbers are compared bit by bit."""
ROUNDED = {"add_norm", "swiglu"}
"""Operations whose codes come from values that another order of sums moves, across a tie if one is near."""


def rebuilt(value: Any, change: Callable[[Tensor], Tensor], dtype: Callable[[torch.dtype], torch.dtype]) -> Any:
    """Return `value` with all its tensors and dtypes changed, through tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, torch.dtype):
        return dtype(value)
    if isinstance(value, tuple | list):
        return type(value)(rebuilt(one, change, dtype) for one in value)
    if isinstance(value, LayerPages):
        given = {name: getattr(value, name) for name in ("pages", "scale", "key_mean")}
        changed = {name: change(t) for name, t in given.items() if t is not None}
        if value.statistics is not None:  # fp16 is their format, whatever the numbers' precision
            changed["statistics"] = change(value.statistics).half()
        return dataclasses.replace(value, **changed)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: rebuilt(getattr(value, f.name), change, dtype) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def copies(args: Args) -> Args:
    """Return the arguments with tensors of their own, rows as far apart as they were."""

    def copy(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)

    return tuple(rebuilt(arg, copy, lambda d: d) for arg in args)


def widened(args: Args) -> Args:
    """Return the arguments in float64."""

    def wide(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.clone()
        return (x.to_dense() if x.is_mkldnn else x).double()

    return tuple(rebuilt(arg, wide, lambda d: torch.float64 if d.is_floating_point else d) for arg in args)


def tensors(value: Any, name: str = "result") -> dict[str, Tensor]:
    """Return the tensors of a result by name."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, tuple | list):
        return {k: t for number, one in enumerate(value) for k, t in tensors(one, f"{name}.{number}").items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {k: t for field, one in fields for k, t in tensors(one, f"{name}.{field}").items()}
    return {}


def run(function: Callable[..., Any], operation: Operation[..., Any], args: Args) -> dict[str, Tensor]:
    """Return what a call gives and what it leaves in its arguments."""
    with force_reference() if function is operation.reference else nullcontext():
        result = function(*args[:-1], scale=args[-1]) if operation.name == "attend" else function(*args)
    seen = tensors(result)
    if operation.name in EXACT:
        seen = {name: t.view(torch.int32 if t.dtype == torch.float32 else torch.int64) for name, t in seen.items()}
    if operation.name == "attend":
        seen["out"] = args[3]
    if operation.name == "rope_write":
        seen |= {f"pages.{number}": store.pages for number, store in enumerate(args[3])}
        kept = {f"statistics.{number}": store.statistics for number, store in enumerate(args[3])}
        seen |= {name: t.view(torch.int16) for name, t in kept.items() if t is not None}
    if operation.name == "select_pages":
        seen["memo"] = args[6]
    return seen


def problems(function: Callable[..., Any], operation: Operation[..., Any], args: Args) -> list[str]:
    """Return a sentence for each way in which an implementation's result differs too much from the reference's."""
    fresh = copies if operation.name in WRITES else lambda given: given
    got, reference = run(function, operation, fresh(args)), run(operation.reference, operation, fresh(args))
    if got.keys() != reference.keys():
        return [f"returns {sorted(got)}; expected {sorted(reference)}"]
    truth = run(operation.reference, operation, widened(args))
    found = []
    for name, expected in reference.items():
        have = got[name]
        if (have.shape, have.dtype) != (expected.shape, expected.dtype):
            found.append(f"{name} is {have.dtype} {list(have.shape)}; expected {expected.dtype} {list(expected.shape)}")
        elif name.endswith((".codes", ".sum")) and operation.name in ROUNDED:
            found += _near(name, have, expected, got)
        elif not expected.is_floating_point():
            different = int((have != expected).sum())
            found += [f"{name} differs in {different} of {expected.numel()} places"] if different else []
        elif expected.numel():
            found += _close(name, have, expected, truth[name], cut_off(operation, args))
    return found


def _near(name: str, have: Tensor, expected: Tensor, got: dict[str, Tensor]) -> list[str]:
    """Codes may differ by one in 1 of 500 places (at least one); sums are those of the codes that are there."""
    if name.endswith(".sum"):
        codes = got[name.removesuffix(".sum") + ".codes"]
        return [] if torch.equal(have, codes.sum(-1, keepdim=True, dtype=torch.int32)) else [f"{name} is no sum"]
    apart = (have.int() - expected.int()).abs()
    many, far = int((apart > 0).sum()), int(apart.max()) if apart.numel() else 0
    allowed = max(1, expected.numel() // 500)
    return [f"{name}: {many} codes differ, by up to {far}"] if far > 1 or many > allowed else []


def _close(name: str, have: Tensor, expected: Tensor, truth: Tensor, cut: float) -> list[str]:
    ulp = max(torch.finfo(have.dtype).eps, cut) * truth.abs().max()
    found = []
    for kind, size in (("largest", lambda e: e.abs().max() / 2), ("mean", lambda e: e.pow(2).mean().sqrt())):
        error, allowed = size(have.double() - truth), 3 * size(expected.double() - truth) + ulp
        if not error <= allowed:
            found.append(f"{name}: {kind} error {float(error):.3g}; allowed {float(allowed):.3g}")
    return found
