"""compressed-tensors checkpoints: pack-quantized int4 and int8, and plain int8."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Literal, cast

import torch

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source, listed
from omniserve.formats.imports.gptq import column_order
from omniserve.formats.imports.packed import (
    FLOATS,
    INTS,
    Block,
    Grid,
    Packed,
    assemble,
    groups_of,
    need,
    outside_layers,
    positive,
    unpack,
)
from omniserve.formats.translated import Translated

WEIGHTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
STATIC = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale")
"""Static ranges of activations and of the KV cache, which are quantized dynamically here."""


def translate(source: Source, spec: ModelSpec) -> Translated:
    """Return a compressed-tensors checkpoint in our layout. Raises CheckpointError."""
    block = Block(source)
    block.need(("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision"), "format")
    groups = _weight_groups(block)
    _check_transforms(block)
    names = source.names()
    packed = {}
    for module in sorted({name.rpartition(".")[0] for name in names if name.endswith(".weight_scale")}):
        outside_layers(source, [module])
        packed[module] = _packed(source, module, groups)
    used = {f"{module}.{suffix}" for module in packed for suffix in (*WEIGHTS, "weight")}
    unread = {name for name in names if name.endswith(STATIC)}
    notes = []
    if unread:
        notes.append(
            f"{listed(unread)} not used: activations and KV are quantized dynamically, per token (and per head)"
        )
    return assemble(source, spec, packed, origin="compressed-tensors", used=used | unread, notes=notes)


def _weight_groups(block: Block) -> list[int]:
    """Return the group sizes that the config allows (-1: one scale per row). Raises CheckpointError."""
    found = []
    for name, scheme in _objects(block, "config_groups"):
        weights = scheme.get("weights")
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{block.source.path}: quantization_config: {name}.weights is missing")
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
            raise CheckpointError(
                f"{block.source.path}: quantization_config: {name}: weights of {weights.get('num_bits')!r} bits, type "
                f"{weights.get('type')!r}: must be int of 4 or 8 bits"
            )
        strategy, size = weights.get("strategy", "tensor"), weights.get("group_size")
        if strategy == "group" and type(size) is int and size > 0:
            found.append(size)
        elif strategy in ("channel", "tensor"):
            found.append(-1)
        else:
            raise CheckpointError(
                f"{block.source.path}: quantization_config: {name}: strategy={strategy!r}, group_size={size!r}: must "
                "be channel, tensor, or group with a size"
            )
    return found


def _objects(block: Block, key: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    value = block.get(key, default={})
    if not isinstance(value, Mapping) or not all(isinstance(inner, Mapping) for inner in value.values()):
        raise CheckpointError(f"{block.source.path}: quantization_config: {key} must be an object of objects")
    yield from cast(Mapping[str, Mapping[str, object]], value).items()


def _check_transforms(block: Block) -> None:
    """Raise CheckpointError if a rotation is applied to activations: those merged into the weights need nothing."""
    transforms = block.get("transform_config", default={})
    groups = transforms.get("config_groups", {}) if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"{block.source.path}: quantization_config: transform_config is not an object")
    for name, group in groups.items():
        places = group.get("apply", []) if isinstance(group, Mapping) else []
        for place in places if isinstance(places, list) else []:
            location = place.get("location") if isinstance(place, Mapping) else place
            if location not in ("weight_input", "weight_output"):
                raise CheckpointError(
                    f"{block.source.path}: quantization_config: transform {name!r} is applied at {location!r}, while "
                    "the model runs; this version reads transforms that are merged into the weights"
                )


def _packed(source: Source, module: str, allowed: list[int]) -> Packed:
    scale = f"{module}.weight_scale"
    codes = f"{module}.weight_packed"
    plain = codes not in source.names()
    if plain:
        codes = f"{module}.weight"
        need(source, codes, (torch.int8,))
        n, k = source.shape(codes)
        bits = 8
    else:
        need(source, codes, INTS)
        n, k = _shape(source, module)
        width = source.shape(codes)[1]
        if source.shape(codes)[0] != n or width not in (-(-k // 8), -(-k // 4)):
            raise CheckpointError(
                f"{source.path}: tensor {codes!r} has shape {list(source.shape(codes))}, which packs no [{n}, {k}] of "
                "4 or 8 bits"
            )
        bits = 4 if width == -(-k // 8) else 8
    shape = source.shape(scale)
    groups = shape[1] if len(shape) == 2 else 1
    group = -1 if groups == 1 and -1 in allowed else next((size for size in allowed if size > 0), -1)
    groups_of(source, scale, rows=groups, k=k, group=group)
    if shape not in ((1,), (n,), (n, groups)):
        need(source, scale, FLOATS, (n, groups))
    order = column_order(source, f"{module}.weight_g_idx", k=k, groups=groups, group=group)
    return Packed(
        shape=(n, k),
        bits=cast(Literal[4, 8], bits),
        group=group,
        scale=source.dtype(scale),
        order=order,
        read=partial(_read, source, module, (n, k, groups), cast(Literal[4, 8], bits), plain),
    )


def _shape(source: Source, module: str) -> tuple[int, int]:
    """Return [N, K] of a packed linear, from its own tensor: packing pads K."""
    name = f"{module}.weight_shape"
    need(source, name, (torch.int64, torch.int32), (2,))
    n, k = source.tensor(name).tolist()
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31):
        raise CheckpointError(f"{source.path}: tensor {name!r} says {[n, k]}")
    return n, k


def _read(source: Source, module: str, sizes: tuple[int, int, int], bits: Literal[4, 8], plain: bool) -> Grid:
    n, k, groups = sizes
    middle = 1 << (bits - 1)
    if plain:
        codes = (source.tensor(f"{module}.weight").to(torch.int16) + middle).to(torch.uint8)
    else:
        codes = unpack(source.tensor(f"{module}.weight_packed"), bits=bits)[:, :k]
    scale = positive(source, f"{module}.weight_scale").reshape(-1, groups).expand(n, groups)
    name = f"{module}.weight_zero_point"
    zeros = torch.full((n, groups), middle, dtype=torch.uint8)
    if name in source.names():
        zeros = _zeros(source, name, n, groups, bits)
        if bits == 8 and bool((zeros != middle).any()):
            raise CheckpointError(f"{source.path}: tensor {name!r} is not zero: 8-bit weights must be symmetric")
    return Grid(codes, scale, zeros)


def _zeros(source: Source, name: str, n: int, groups: int, bits: Literal[4, 8]) -> torch.Tensor:
    """Return zero points as codes uint8 [N, G]: packed along N, or one int8 each."""
    middle = 1 << (bits - 1)
    if source.dtype(name) == torch.int8:
        tensor = source.tensor(name).reshape(-1, groups).expand(n, groups).to(torch.int16) + middle
        if int(tensor.amin()) < 0 or int(tensor.amax()) >= 2 * middle:
            raise CheckpointError(f"{source.path}: tensor {name!r} holds zero points beyond {bits} bits")
        return tensor.to(torch.uint8)
    need(source, name, INTS, (-(-n * bits // 32), groups))
    return unpack(source.tensor(name).T, bits=bits)[:, :n].T
