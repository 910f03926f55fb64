"""4- and 8-bit codes that other quantizers pack into int32, and what becomes of them here.

Rule: keep the codes; round again only where the grids cannot meet, and say so (qoq.md section 6).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from omniserve.base import log
from omniserve.base.errors import CheckpointError
from omniserve.base.numbers import align_up
from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import LARGEST_GROUP_SCALE, KVScheme
from omniserve.formats.checkpoint import Source, read_json
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Linear, Part, Translated, kept, passed, scheme_from
from omniserve.formats.w4a8 import CHUNK, GROUP, SMALLEST, pack_columns
from omniserve.formats.weight import concat

_LOG = log.get(__name__)

CANDIDATES = 200
"""Row scales that the import to g128 tries, from the smallest legal one to twice that."""

FEEDS = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}
"""Linears whose rows are the columns of another one, so that an order of columns folds into theirs."""

_OLD_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where early tools put what is `quantization_config` today."""


def settings(source: Source) -> object:
    """Return `quantization_config`, or what early tools wrote beside config.json; None if there is neither."""
    block = source.config.get("quantization_config")
    if block is not None or not any(name.endswith(".qweight") for name in source.names()):
        return block
    for name, method in _OLD_FILES.items():
        if (source.path / name).is_file():
            return {"quant_method": method, **read_json(source.path / name)}
    raise CheckpointError(
        f"{source.path}: holds packed weights (.qweight), but config.json has no quantization_config that says whose"
    )


def unpack(x: Tensor, *, bits: Literal[4, 8] = 4) -> Tensor:
    """Return the codes uint8 [R, C * 32 / bits] of int32 [R, C], the lowest bits first."""
    raw = x.contiguous().view(torch.uint8)
    return raw if bits == 8 else torch.stack((raw & 15, raw >> 4), -1).flatten(1)


def need(source: Source, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None) -> None:
    """Raise CheckpointError unless a tensor is there, of one of the types and of the shape (None: any matrix)."""
    given, dtype = source.shape(name), source.dtype(name)
    if dtype not in dtypes or (given != shape if shape is not None else len(given) != 2):
        words = " or ".join(str(allowed).removeprefix("torch.") for allowed in dtypes)
        wanted = "[rows, columns]" if shape is None else str(list(shape))
        raise CheckpointError(
            f"{source.path}: tensor {name!r} is {str(dtype).removeprefix('torch.')} {list(given)}; expected {words} "
            f"{wanted}"
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int32,)


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes of a linear: w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g] with g the group of column k.

    codes uint8 [N, K]; scales [N, G], positive floats; zeros uint8 [N, G]
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dense(self, groups: Tensor) -> Tensor:
        """Return w fp32 [N, K]; groups int64 [K]: the group of each column."""
        offset = self.codes.float().sub_(self.zeros.float()[:, groups])
        return offset.mul_(self.scales.float()[:, groups])


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One linear of a foreign checkpoint.

    shape   [N, K]
    group   columns of a group, -1: one scale per row
    order   int64 [K]: the group of each column; None: in the order of the columns
    scale   type of the stored scales
    read    returns its grid; raises CheckpointError naming the tensor that is wrong
    """

    shape: tuple[int, int]
    bits: Literal[4, 8]
    group: int
    scale: torch.dtype
    read: Callable[[], Grid]
    order: Tensor | None = None


def assemble(
    source: Source,
    spec: ModelSpec,
    packed: Mapping[str, Packed],
    *,
    origin: str,
    used: set[str],
    notes: Sequence[str] = (),
) -> Translated:
    """Return the checkpoint of packed linears in our layout; `used` names the tensors that they are read from.

    An order of columns (act-order) folds into the rows that feed them where there are such; elsewhere the linear is
    rounded again. Biases of zeros that the model has no place for, which AutoGPTQ writes, are dropped.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for module, linear in packed.items():
        order = _foldable(module, linear)
        if order is None:
            continue
        columns[module] = order
        parent, _, name = module.rpartition(".")
        rows |= {f"{parent}.{feeder}": order for feeder in FEEDS[name]}
    linears = {module: _linear(linear, columns.get(module), rows.get(module)) for module, linear in packed.items()}
    parts, dropped = {}, 0
    for name in source.names() - used:
        module, _, suffix = name.rpartition(".")
        if suffix == "bias" and not _has_bias(spec, module) and not bool(source.tensor(name).any()):
            dropped += 1
        elif module in rows:
            parts[name] = _permuted(source, name, rows[module])
        elif not name.endswith("rotary_emb.inv_freq"):
            parts[name] = passed(source, name)
    again = [module for module, linear in linears.items() if linear.rounded]
    said = [*notes]
    if dropped:
        _LOG.info("imported %s", log.fields(dropped_biases_of_zeros=dropped))
    if again:
        said.append(
            f"{len(again)} of {len(linears)} linears ({again[0]}, ...) are on a grid that W4A8 cannot hold: they are "
            "rounded again, without calibration"
        )
    made_by = {} if again else {"calibration": {"by": origin}}
    scheme = scheme_from(linears, keep=kept(parts), kv=KVScheme(), made_by=made_by)
    return Translated(source, origin=origin, scheme=scheme, linears=linears, parts=parts, notes=said)


def _has_bias(spec: ModelSpec, module: str) -> bool:
    name = module.rpartition(".")[2]
    if name in ("q_proj", "k_proj", "v_proj"):
        return spec.qkv_bias
    return spec.out_bias if name == "o_proj" else spec.mlp_bias


def _permuted(source: Source, name: str, rows: Tensor) -> Part:
    return Part(shape=source.shape(name), dtype=source.dtype(name), make=lambda: source.tensor(name)[rows])


def _foldable(module: str, linear: Packed) -> Tensor | None:
    """Return the order of columns that makes groups of neighbours, if the linears before can take it; else None."""
    if linear.order is None or linear.group < 1 or module.rpartition(".")[2] not in FEEDS:
        return None
    order = torch.argsort(linear.order, stable=True)
    return order if torch.equal(linear.order[order], _neighbours(linear)) else None


def _neighbours(linear: Packed) -> Tensor:
    """Return the group of each column if groups are neighbours, int64 [K]."""
    k = linear.shape[1]
    return torch.arange(k) // (k if linear.group < 1 else linear.group)


def _linear(linear: Packed, columns: Tensor | None, rows: Tensor | None) -> Linear:
    """Return how a packed linear is stored here: in the form that keeps most of it."""
    ordered = linear.order is None or columns is not None
    if linear.bits == 8:
        name, keeps = "w8a8", linear.group < 1
    elif linear.group < 1:
        name, keeps = "w4a8-row", True
    else:
        name, keeps = "w4a8-g128", ordered and linear.group % GROUP == 0
    exact = torch.float16 if linear.scale == torch.float16 else torch.float32
    dtypes: dict[str, torch.dtype] = {}
    if name == "w4a8-row":
        dtypes = {"scale": exact, "zero": torch.float32}
    elif name == "w8a8":
        dtypes = {"scale": exact if keeps else torch.float32}
    return Linear(
        form=FORMATS[name],
        shape=linear.shape,
        make=partial(_make, linear, name, keeps, columns, rows),
        dtypes=dtypes,
        rounded=not keeps,
    )


def _make(
    linear: Packed, name: str, keeps: bool, columns: Tensor | None, rows: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """Return the stored tensors of a linear and the relative squared error of its weights."""
    grid, groups = linear.read(), linear.order
    if columns is not None:
        grid, groups = Grid(grid.codes[:, columns], grid.scales, grid.zeros), None
    if groups is None:
        groups = _neighbours(linear)
    if not keeps:
        w = grid.dense(groups)
        stored = FORMATS[name].from_dense(w)
    elif name == "w4a8-row":
        scale = grid.scales[:, 0].float()
        stored = {"codes": pack_columns(grid.codes), "scale": scale, "zero": grid.zeros[:, 0].float() * scale}
    elif name == "w8a8":
        stored = {"codes": (grid.codes.to(torch.int16) - 128).to(torch.int8), "scale": grid.scales[:, 0]}
    else:
        w = grid.dense(groups)
        stored = keep_codes(grid.codes, *_per_128(grid, linear))
    loss = 0.0
    if not keeps or name == "w4a8-g128":
        miss = FORMATS[name].dense(stored).sub_(w)
        loss = float(miss.double().pow(2).sum() / w.double().pow(2).sum().clamp(min=1e-30))
    return {key: tensor if rows is None else tensor[rows] for key, tensor in stored.items()}, loss


def _per_128(grid: Grid, linear: Packed) -> tuple[Tensor, Tensor]:
    """Return scales fp32 and zeros int64 of groups of 128, [N, ceil(K / 128)]: larger groups are split."""
    groups = align_up(linear.shape[1], GROUP) // GROUP
    times = linear.group // GROUP
    return tuple(x.repeat_interleave(times, 1)[:, :groups] for x in (grid.scales.float(), grid.zeros.long()))  # type: ignore[return-value]  # two


def keep_codes(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """Return the g128 tensors that hold these codes: w = (codes - zeros) * scales with scales near scale * group_scale.

    codes uint8 [N, K]; scales fp32, zeros int64 [N, ceil(K / 128)]
    Per row, of 200 scales from the smallest legal one to twice that, the one of least squared error is kept. With it
    group_scale = rne(scales / scale), group_zero = zeros * group_scale. A group whose scale is below half the row's
    gets new codes, to nearest, on group_scale 1.
    Source: qoq.md section 6.
    """
    rows = max(1, 16 * CHUNK // codes.shape[1])  # the search runs on a 128th of a chunk
    parts = zip(*(torch.split(x, rows) for x in (codes, scales, zeros)), strict=True)
    return concat([_keep_some(*part) for part in parts])


def _keep_some(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    n, k = codes.shape
    largest = torch.full_like(zeros, LARGEST_GROUP_SCALE)
    largest = torch.minimum(largest, torch.where(zeros > 0, 128 // zeros.clamp(min=1), largest))
    largest = torch.minimum(largest, torch.where(zeros < 15, 127 // (15 - zeros).clamp(min=1), largest)).float()
    offset = codes.float().sub_(zeros.float().repeat_interleave(GROUP, 1)[:, :k])
    weight = torch.nn.functional.pad(offset, (0, align_up(k, GROUP) - k)).view(n, -1, GROUP).pow(2).sum(-1)

    def fitted(scale: Tensor) -> Tensor:
        return torch.minimum((scales / scale).round_(), largest).clamp_(min=1)

    smallest = (scales / largest).amax(1, keepdim=True)
    best = torch.full((n, 1), float("inf"))
    scale = smallest
    for step in range(CANDIDATES):
        tried = (smallest * (1 + step / (CANDIDATES - 1))).clamp_(min=SMALLEST).half().float()
        error = (scales - tried * fitted(tried)).square_().mul_(weight).sum(1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    group_scale = fitted(scale)
    small = scales / scale < 0.5
    if bool(small.any()):
        ratio, zero, anew = (x.repeat_interleave(GROUP, 1)[:, :k] for x in (scales / scale, zeros.float(), small))
        nearest = (offset * ratio).round_().add_(zero).clamp_(0, 15)
        codes = torch.where(anew, nearest, codes.float()).to(torch.uint8)
    return {
        "codes": pack_columns(codes),
        "scale": scale[:, 0].half(),
        "group_scale": group_scale.to(torch.uint8),
        "group_zero": (zeros.float() * group_scale).to(torch.uint8),
    }


def positive(source: Source, name: str) -> Tensor:
    """Return a tensor of scales. Raises CheckpointError if one is not a positive number."""
    scales = source.tensor(name)
    if not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise CheckpointError(f"{source.path}: tensor {name!r} holds scales that are not positive numbers")
    return scales


class Block:
    """`quantization_config` of another tool: a value that cannot be honoured is a CheckpointError."""

    def __init__(self, source: Source) -> None:
        block = settings(source)
        assert isinstance(block, Mapping), block
        self.source = source
        self.values: Mapping[str, object] = block

    def get(self, *names: str, default: object = None) -> object:
        """Return the value of the first name that is there."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), default)

    def need(self, allowed: Sequence[object], *names: str, default: object = None) -> object:
        """Return a value that must be one of `allowed`."""
        value = self.get(*names, default=default)
        if value not in allowed:
            words = " or ".join(str(word) for word in allowed)
            raise CheckpointError(
                f"{self.source.path}: quantization_config: {names[0]}={repr(value)[:60]}: must be {words}"
            )
        return value

    def group(self, *names: str) -> int:
        """Return the group size: -1 or a positive number."""
        value = self.get(*names, default=-1)
        if type(value) is not int or (value < 1 and value != -1):
            raise CheckpointError(f"{self.source.path}: quantization_config: {names[0]}={value!r}: must be -1 or more")
        return value


def groups_of(source: Source, name: str, *, rows: int, k: int, group: int) -> None:
    """Raise CheckpointError unless a tensor of `rows` groups fits K columns in groups of `group`."""
    wanted = 1 if group < 1 else align_up(k, group) // group
    if rows != wanted:
        said = "one per row" if group < 1 else f"groups of {group}"
        raise CheckpointError(
            f"{source.path}: tensor {name!r} has {rows} groups for {k} columns, but quantization_config says {said}, "
            f"which are {wanted}"
        )


def outside_layers(source: Source, modules: Sequence[str]) -> None:
    """Raise CheckpointError if a quantized module is no part of a layer: head and embedding stay in 16 bit here."""
    for module in modules:
        if not module.startswith("model.layers."):
            raise CheckpointError(f"{source.path}: {module!r} is quantized, this version keeps it in 16 bit")
