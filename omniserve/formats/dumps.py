"""DeepCompressor dumps: weights already rounded to the grid, stored as fp16, with their scales beside them.

Codes are not in the files: they are recovered by rounding at every division and checked (formats.md section 7).
Two generations: lmquant 0.0 stores zeros that are subtracted before the scale (`zero`), deepcompressor 0.1 scaled
zeros (`scaled_zero`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import KVScheme
from omniserve.formats.checkpoint import listed
from omniserve.formats.pickles import PickleSource, load
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Linear, Part, Translated, kept, passed, scheme_from
from omniserve.formats.w4a8 import GROUP, pack_columns

SLACK = 0.1
"""How far a weight may lie from its grid, in steps of the first level: fp16 round-off of 127 codes is 0.06."""

_KEY = re.compile(r"(.+\.weight)\.(scale\.0|scale\.1|zero|scaled_zero)")


def is_dump(folder: Path) -> bool:
    """True if the folder is the output of `--save-model true`."""
    return (folder / "model.pt").is_file() and (folder / "scale.pt").is_file()


def translate(folder: Path, config: Mapping[str, object], spec: ModelSpec) -> Translated:
    """Return a dump as one of our checkpoints.

    config  of the model that was quantized: the dump holds none
    Raises CheckpointError naming a tensor that is missing, of a wrong shape, or not on the grid that its scales say.
    """
    source = PickleSource(folder, config, [folder / "model.pt"])
    scales = _scales(folder / "scale.pt", source)
    linears = {module: _linear(source, module, found) for module, found in sorted(scales.items())}
    if not linears:
        raise CheckpointError(f"{folder / 'scale.pt'}: holds no scales (keys such as ...q_proj.weight.scale.0)")
    generations = {found.generation for found in scales.values() if found.generation}
    if len(generations) > 1:
        raise CheckpointError(f"{folder / 'scale.pt'}: holds zeros of both generations, `zero` and `scaled_zero`")
    used = {f"{module}.weight" for module in linears}
    parts = {name: passed(source, name) for name in source.names() - used if not name.endswith("rotary_emb.inv_freq")}
    ranges = _kv_scales(folder / "acts.pt", spec) if (folder / "acts.pt").is_file() else None
    for layer, scale in enumerate(ranges or []):
        name = f"model.layers.{layer}.self_attn.kv_scale"
        parts[name] = Part(shape=(2, spec.kv_heads), dtype=torch.float32, make=partial(_itself, scale))
    four = any(linear.form.name != "w8a8" for linear in linears.values())
    kv = KVScheme(bits=8, static=True) if ranges is not None else KVScheme(bits=4 if four else 8)
    scheme = scheme_from(linears, keep=kept(parts), kv=kv, made_by={"calibration": {"by": "DeepCompressor"}})
    generation = next(iter(generations), "8 bit")
    return Translated(source, origin=f"DeepCompressor dump, {generation}", scheme=scheme, linears=linears, parts=parts)


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(slots=True)
class _Found:
    """What scale.pt holds of one linear: fp32 row [N] (stored as `dtype`), group [N, G], zero [N, 1] or [N, G]."""

    row: Tensor | None = None
    dtype: torch.dtype = torch.float32
    group: Tensor | None = None
    zero: Tensor | None = None
    generation: str = ""


def _scales(path: Path, source: PickleSource) -> dict[str, _Found]:
    """Return the scales of each linear."""
    found: dict[str, _Found] = {}
    for key, value in load(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{path}: {key!r} is no tensor of finite numbers")
        n = source.shape(match[1])[0]
        if value.numel() % n or value.dim() not in (1, 2, 4) or value.shape[0] != n:
            raise CheckpointError(f"{path}: {key!r} has shape {list(value.shape)}, {match[1]!r} has {n} rows")
        linear = found.setdefault(match[1].removesuffix(".weight"), _Found())
        wide = value.float().reshape(n, -1)
        match match[2]:
            case "scale.0":
                if wide.shape[1] != 1 or not bool((wide > 0).all()):
                    raise CheckpointError(f"{path}: {key!r} must be one positive number for each of {n} rows")
                linear.row = wide[:, 0]
                linear.dtype = torch.float16 if value.dtype == torch.float16 else torch.float32
            case "scale.1":
                linear.group = wide
            case name:
                if linear.zero is not None:
                    raise CheckpointError(f"{path}: {match[1]!r} has zeros of both generations")
                linear.zero, linear.generation = wide, "v0.0" if name == "zero" else "v0.1"
    return found


def _linear(source: PickleSource, module: str, found: _Found) -> Linear:
    weight = f"{module}.weight"
    shape, dtype = source.shape(weight), source.dtype(weight)
    if found.row is None:
        raise CheckpointError(f"{source.path / 'scale.pt'}: {weight}.scale.0 is missing")
    if len(shape) != 2 or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"{source.path}: tensor {weight!r} is {dtype} {list(shape)}, not a matrix of floats")
    n, k = shape
    if found.zero is None:
        if found.group is not None:
            raise CheckpointError(f"{source.path / 'scale.pt'}: {weight}.scale.1 is there, but no zero")
        make = partial(_int8, source, weight, found.row)
        return Linear(form=FORMATS["w8a8"], shape=(n, k), make=make, dtypes={"scale": found.dtype})
    if found.group is None:
        _need_columns(source, weight, "zero", found.zero, 1)
        make = partial(_row, source, weight, found.row, found.zero[:, 0], found.generation)
        dtypes = {"scale": found.dtype, "zero": torch.float32}
        return Linear(form=FORMATS["w4a8-row"], shape=(n, k), make=make, dtypes=dtypes)
    if dtype == torch.bfloat16:
        raise CheckpointError(
            f"{source.path}: tensor {weight!r} is bfloat16, whose 8 bits cannot tell the codes of two levels apart: "
            "dump the model in float16"
        )
    for name, tensor in (("scale.1", found.group), ("zero", found.zero)):
        _need_columns(source, weight, name, tensor, k // GROUP if k % GROUP == 0 else -1)
    make = partial(_grouped, source, weight, found.row, found.group, found.zero, found.generation)
    return Linear(form=FORMATS["w4a8-g128"], shape=(n, k), make=make, dtypes={"scale": found.dtype})


def _need_columns(source: PickleSource, weight: str, name: str, tensor: Tensor, wanted: int) -> None:
    if tensor.shape[1] != wanted:
        k = source.shape(weight)[1]
        raise CheckpointError(
            f"{source.path / 'scale.pt'}: {weight}.{name} has {tensor.shape[1]} groups for {k} columns; expected "
            + ("one per row" if wanted == 1 else f"groups of {GROUP}")
        )


def _off(source: PickleSource, weight: str, miss: Tensor, generation: str) -> None:
    """Raise CheckpointError if a weight lies further than `SLACK` steps from the grid."""
    worst = float(miss.abs().amax()) if miss.numel() else 0.0
    if not worst <= SLACK:  # NaN too
        other = {"v0.0": "v0.1", "v0.1": "v0.0"}.get(generation)
        hint = f"; a dump of generation {other} whose zeros are named as those of {generation}?" if other else ""
        raise CheckpointError(
            f"{source.path}: tensor {weight!r} is not on the grid of its scales, one weight is off by {worst:.2g} "
            f"steps{hint}"
        )


def _codes(source: PickleSource, weight: str, q: Tensor, generation: str, low: int = 0, high: int = 15) -> Tensor:
    """Return whole numbers as codes; raise CheckpointError if one is beyond low..high."""
    if q.numel() and not (low <= float(q.amin()) and float(q.amax()) <= high):
        raise CheckpointError(
            f"{source.path}: tensor {weight!r} gives codes {float(q.amin()):g} to {float(q.amax()):g} with the scales "
            f"of {generation}, allowed are {low} to {high}"
        )
    return q


def _int8(source: PickleSource, weight: str, row: Tensor) -> tuple[dict[str, Tensor], float]:
    u = source.tensor(weight).float() / row[:, None]
    q = u.round()
    _off(source, weight, u - q, "")
    codes = _codes(source, weight, q, "an int8 dump", -128, 127).to(torch.int8)
    return {"codes": codes, "scale": row}, 0.0


def _row(
    source: PickleSource, weight: str, row: Tensor, zero: Tensor, generation: str
) -> tuple[dict[str, Tensor], float]:
    """Recover codes of one scale per row: w = codes * scale - offset."""
    scale, zero = row[:, None], zero[:, None]
    w = source.tensor(weight).float()
    if generation == "v0.0":
        zero = zero + 8 if bool((zero < 0).any()) else zero
        q, offset = (w / scale).round() + zero, zero * scale
    else:
        q, offset = ((w + zero) / scale).round(), zero
        if bool((q < 0).any()):
            q, offset = q + 8, offset + 8 * scale
    _off(source, weight, (w - (q * scale - offset)) / scale, generation)
    codes = _codes(source, weight, q, generation).to(torch.uint8)
    return {"codes": pack_columns(codes), "scale": row, "zero": offset[:, 0]}, 0.0


def _grouped(
    source: PickleSource, weight: str, row: Tensor, group: Tensor, zero: Tensor, generation: str
) -> tuple[dict[str, Tensor], float]:
    """Recover codes of two levels: w = (codes * group - offset) * row, all of it in whole numbers after the first."""
    exact = source.tensor(weight).float() / row[:, None]
    u = exact.round()
    _off(source, weight, exact - u, generation)
    n, k = u.shape
    u = u.view(n, -1, GROUP)
    step, shift = group[..., None], zero[..., None]
    path, name = source.path / "scale.pt", f"{weight}.scale.1"
    if not bool(((group == group.round()) & (group >= 1) & (15 * group <= 255)).all()):
        raise CheckpointError(f"{path}: {name} holds other values than the whole numbers 1 to 17")
    if not bool((zero == zero.round()).all()):
        raise CheckpointError(f"{path}: the zeros of {weight!r} are not whole numbers")
    if generation == "v0.0":
        shift = shift + 8 if bool((zero < 0).any()) else shift
        q, offset = (u / step).round() + shift, shift * step
    else:
        q, offset = ((u + shift) / step).round(), shift
        if bool((q < 0).any()):
            q, offset = q + 8, offset + 8 * step
    _off(source, weight, u - (q * step - offset), generation)
    codes = _codes(source, weight, q, generation).view(n, k).to(torch.uint8)
    _codes(source, weight, offset, f"{generation}: zeros", 0, 255)
    return {
        "codes": pack_columns(codes),
        "scale": row,
        "group_scale": group.to(torch.uint8),
        "group_zero": offset[..., 0].to(torch.uint8),
    }, 0.0


def _kv_scales(path: Path, spec: ModelSpec) -> list[Tensor] | None:
    """Return the static KV8 scales of each layer, fp32 [2, H], one pair for all heads; None if there are none.

    They are the largest rotated key and value of calibration, divided by 127. Raises CheckpointError if a layer lacks
    them.
    """
    acts = load(path)
    names = [
        [f"model.layers.{layer}.self_attn.{place}.output" for place in ("k_rotary_emb", "v_proj")]
        for layer in range(spec.layers)
    ]
    absent = [name for pair in names for name in pair if name not in acts]
    if len(absent) == 2 * spec.layers:
        return None
    if absent:
        raise CheckpointError(f"{path}: {listed(absent)} missing, other layers have ranges of keys and values")
    scales = [torch.stack([_largest(path, name, acts[name]) for name in pair]) / 127 for pair in names]
    return [pair[:, None].repeat(1, spec.kv_heads) for pair in scales]


def _largest(path: Path, name: str, entry: object) -> Tensor:
    """Return the maximum of a range, in either generation's spelling."""
    found: object = None
    if isinstance(entry, Mapping):
        found = entry.get("dynamic_range.0.max")
        ranges = entry.get("dynamic_range")
        if found is None and isinstance(ranges, list | tuple) and ranges and isinstance(ranges[0], Mapping):
            found = ranges[0].get("max")
    if not isinstance(found, Tensor | float | int):
        raise CheckpointError(f"{path}: {name!r} holds no maximum (dynamic_range.0.max, or dynamic_range[0].max)")
    largest = torch.as_tensor(found).float().amax()
    if not bool((largest > 0) & torch.isfinite(largest)):
        raise CheckpointError(f"{path}: {name!r} has the maximum {float(largest)}, which must be positive")
    return largest
