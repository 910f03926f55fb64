"""AWQ checkpoints, layout `gemm`: w = (q - z) * s, packed along the outputs in an order of its own."""

from functools import partial

import torch
from torch import Tensor

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

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an int32 is output 8 * j + ORDER[i]."""


def translate(source: Source, spec: ModelSpec) -> Translated:
    """Return an AWQ checkpoint in our layout. Raises CheckpointError."""
    block = Block(source)
    block.need((4,), "bits", "w_bit")
    version = str(block.get("version", default="gemm"))
    block.need((version if version.lower() == "gemm" else "gemm",), "version", default="gemm")
    block.need((True,), "zero_point", default=True)
    group = block.group("group_size", "q_group_size")
    modules = sorted(name.removesuffix(".qweight") for name in source.names() if name.endswith(".qweight"))
    outside_layers(source, modules)
    packed = {module: _packed(source, module, group) for module in modules}
    used = {f"{module}.{suffix}" for module in modules for suffix in ("qweight", "qzeros", "scales")}
    return assemble(source, spec, packed, origin=f"AWQ, group size {group}", used=used)


def _packed(source: Source, module: str, group: int) -> Packed:
    qweight, qzeros, scales = (f"{module}.{suffix}" for suffix in ("qweight", "qzeros", "scales"))
    need(source, qweight, INTS)
    k, n = source.shape(qweight)[0], 8 * source.shape(qweight)[1]
    need(source, scales, FLOATS)
    groups = source.shape(scales)[0]
    groups_of(source, scales, rows=groups, k=k, group=group)
    need(source, scales, FLOATS, (groups, n))
    need(source, qzeros, INTS, (groups, n // 8))
    return Packed(shape=(n, k), bits=4, group=group, scale=source.dtype(scales), read=partial(_read, source, module))


def _read(source: Source, module: str) -> Grid:
    codes, zeros = (_natural(unpack(source.tensor(f"{module}.{name}"))) for name in ("qweight", "qzeros"))
    return Grid(codes.T.contiguous(), positive(source, f"{module}.scales").T, zeros.T)


def _natural(codes: Tensor) -> Tensor:
    """Return codes [R, N] with the outputs in their own order."""
    place = torch.argsort(torch.tensor(ORDER))
    return codes.view(codes.shape[0], -1, 8)[..., place].flatten(1)
