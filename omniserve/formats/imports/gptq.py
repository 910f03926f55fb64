"""GPTQ checkpoints: packed along the inputs, w = (q - z) * s; v1 files store z - 1, v2 files z."""

from functools import partial

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source
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

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def translate(source: Source, spec: ModelSpec) -> Translated:
    """Return a GPTQ checkpoint in our layout. Raises CheckpointError."""
    block = Block(source)
    block.need((4,), "bits")
    form = block.need(("gptq", "gptq_v2"), "checkpoint_format", default="gptq")
    symmetric = bool(block.need((True, False), "sym", default=True))
    group = block.group("group_size")
    modules = sorted(name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight"))
    outside_layers(source, modules)
    packed = {module: _packed(source, module, group, symmetric, form == "gptq_v2") for module in modules}
    used = {f"{module}.{suffix}" for module in modules for suffix in SUFFIXES}
    return assemble(source, spec, packed, origin=f"GPTQ, group size {group}", used=used)


def _packed(source: Source, module: str, group: int, symmetric: bool, second: bool) -> Packed:
    qweight, qzeros, scales, g_idx = (f"{module}.{suffix}" for suffix in SUFFIXES)
    need(source, qweight, INTS)
    k, n = 8 * source.shape(qweight)[0], source.shape(qweight)[1]
    need(source, scales, FLOATS)
    groups = source.shape(scales)[0]
    groups_of(source, scales, rows=groups, k=k, group=group)
    need(source, scales, FLOATS, (groups, n))
    need(source, qzeros, INTS, (groups, n // 8))
    return Packed(
        shape=(n, k),
        bits=4,
        group=group,
        scale=source.dtype(scales),
        order=column_order(source, g_idx, k=k, groups=groups, group=group),
        read=partial(_read, source, module, symmetric, second),
    )


def column_order(source: Source, name: str, *, k: int, groups: int, group: int) -> Tensor | None:
    """Return the group of each column, int64 [K], if that is not simply the order of the columns; else None.

    Raises CheckpointError if a column has a group that does not exist.
    """
    if name not in source.names():
        return None
    need(source, name, INTS, (k,))
    order = source.tensor(name).long()
    if bool((order == -1).all()) or torch.equal(order, torch.arange(k) // (k if group < 1 else group)):
        return None
    if int(order.amin()) < 0 or int(order.amax()) >= groups:
        raise CheckpointError(
            f"{source.path}: tensor {name!r} names groups {int(order.amin())} to {int(order.amax())}, there are "
            f"{groups}"
        )
    return order


def _read(source: Source, module: str, symmetric: bool, second: bool) -> Grid:
    codes = unpack(source.tensor(f"{module}.qweight").T).contiguous()
    zeros = unpack(source.tensor(f"{module}.qzeros")).T
    return Grid(codes, positive(source, f"{module}.scales").T, _zeros(source, module, zeros, symmetric, second))


def _zeros(source: Source, module: str, stored: Tensor, symmetric: bool, second: bool) -> Tensor:
    """Return the zeros uint8 [N, G] of stored ones.

    Symmetric files have zero 8 everywhere, stored as 7 (v1) or 8 (v2, also by tools that call it v1): the tensor
    tells. A stored 15 of an asymmetric v1 file is 16 to some readers and 0 to others.
    """
    name = f"{module}.qzeros"
    if symmetric:
        if not bool(((stored == 7) | (stored == 8)).all()) or int(stored.amin()) != int(stored.amax()):
            raise CheckpointError(
                f"{source.path}: tensor {name!r} holds several zeros, although the config says sym=true"
            )
        return torch.full_like(stored, 8)
    if second:
        return stored
    if bool((stored == 15).any()):
        raise CheckpointError(
            f"{source.path}: tensor {name!r} holds the zero 15 of a v1 file, which means 0 to some readers and 16 to "
            "others; convert the file to gptq_v2 with the tool that wrote it"
        )
    return stored + 1
