"""Published QServe and LServe checkpoints. The only place that knows their layout (formats.md sections 1 to 5).

Nothing about the content of a published file is taken from a file: it is read from the published converters and
loaders, and checked by arithmetic.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.artifact import KVScheme, Scheme, read_linear
from omniserve.formats.checkpoint import Source, kv_scales, listed
from omniserve.formats.table import FORMATS
from omniserve.formats.translated import Linear, Part, Translated, kept, passed, scheme_from
from omniserve.formats.w4a8 import GROUP, pack_columns, unpack_columns
from omniserve.formats.weight import Field

TILE = 32
"""Rows and columns of a tile of packed weights."""

ROW, GROUPED, INT8 = "w4a8-row", "w4a8-g128", "w8a8"
FIELDS: dict[str, dict[str, str]] = {
    ROW: {"codes": "qweight", "scale": "s1_scales", "zero": "s1_szeros"},
    GROUPED: {"codes": "qweight", "scale": "s1_scales", "group_scale": "s2_scales", "group_zero": "s2_zeros"},
    INT8: {"codes": "weight", "scale": "dequant_scale"},
}
"""Our field -> the published suffix, by format."""

KV_SCALE = "self_attn.kv_scale_quant_orig"
_SKIPPED = "rotary_emb.inv_freq"


def pack_tiles(codes: Tensor) -> Tensor:
    """Return codes 0..15 uint8 [N, K] as the published `qweight`, int8 [N, K / 2]; N and K multiples of 32.

    With n = 32*I + 16*a + 8*b + c and k = 32*J + 16*d + 4*e + f, byte (I*K/32 + J)*512 + 64*c + 16*e + 8*d + 4*b + f
    holds the code (n, k) in its low nibble if a is 0, else in the high one: 16 bytes are one lane's fragment of mma
    m16n8k32. Source: formats.md section 4.
    """
    n, k = codes.shape
    axes = codes.reshape(n // TILE, 2, 2, 8, k // TILE, 2, 4, 4)  # I a b c J d e f
    low, high = axes.permute(0, 4, 3, 6, 5, 2, 7, 1).unbind(-1)  # I J c e d b f, by a
    return (low | (high << 4)).reshape(n, k // 2).view(torch.int8)


def unpack_tiles(qweight: Tensor) -> Tensor:
    """Return the codes uint8 [N, K] of a published `qweight` int8 [N, K / 2]; the inverse of `pack_tiles`."""
    n, half = qweight.shape
    packed = qweight.contiguous().view(torch.uint8).reshape(n // TILE, 2 * half // TILE, 8, 4, 2, 2, 4)
    nibbles = torch.stack((packed & 15, packed >> 4), -1)  # I J c e d b f a
    return nibbles.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(n, 2 * half)


def permute_channels(x: Tensor) -> Tensor:
    """Return per-group parameters [N, G] in the published order [G, N].

    Channel n moves to column 32*(n//32) + 4*(n%8) + (n%32)//8. Source: formats.md section 5.
    """
    n, groups = x.shape
    return x.T.reshape(groups, n // TILE, 4, 8).transpose(-1, -2).reshape(groups, n)


def natural_channels(x: Tensor) -> Tensor:
    """Return published per-group parameters [G, N] as [N, G]; the inverse of `permute_channels`."""
    groups, n = x.shape
    return x.reshape(groups, n // TILE, 8, 4).transpose(-1, -2).reshape(groups, n).T.contiguous()


def is_published(source: Source) -> bool:
    """True if the checkpoint calls itself qoq, or holds tensors that only published QServe files have."""
    block = source.config.get("quantization_config")
    if block is not None:
        return isinstance(block, Mapping) and block.get("quant_method") == "qoq"
    return any(name.endswith((".s1_scales", ".dequant_scale")) for name in source.names())


def translate(source: Source, spec: ModelSpec) -> Translated:
    """Return a published checkpoint as one of ours; codes and parameters stay what they are.

    Raises CheckpointError naming a tensor that is missing, surplus or of a wrong shape or type, and a config that
    disagrees with the tensors.
    """
    kinds = {module: kind for module in _modules(source) if (kind := _kind(source, module))}
    linears = {module: _linear(source, module, kind) for module, kind in kinds.items()}
    used = {f"{module}.{suffix}" for module, kind in kinds.items() for suffix in FIELDS[kind].values()}
    parts = {
        name: passed(source, name)
        for name in source.names()
        if name not in used and not name.endswith((_SKIPPED, KV_SCALE))
    }
    _check_config(source, linears)
    scales = kv_scales(source, spec.layers)
    if scales is not None:
        parts |= {
            f"model.layers.{layer}.self_attn.kv_scale": Part(
                shape=(2, spec.kv_heads), dtype=torch.float32, make=partial(_scale, scale)
            )
            for layer, scale in enumerate(scales)
        }
    four = any(linear.form.name != INT8 for linear in linears.values())
    kv = KVScheme(bits=8, static=True) if scales is not None else KVScheme(bits=4 if four else 8)
    scheme = scheme_from(linears, keep=kept(parts), kv=kv, made_by={"calibration": {"by": "the published checkpoint"}})
    return Translated(
        source,
        origin=f"QServe {scheme.weights}",
        scheme=scheme,
        linears=linears,
        parts=parts,
        notes=_notes(source, four),
    )


def _scale(scale: Tensor) -> Tensor:
    return scale


def _modules(source: Source) -> list[str]:
    """Return the modules of the layers that have tensors of their own."""
    return sorted({name.rpartition(".")[0] for name in source.names() if name.startswith("model.layers.")})


def _kind(source: Source, module: str) -> str | None:
    """Return the format of a published linear; None for a module in 16 bit."""
    names = source.names()
    has = {suffix for form in FIELDS.values() for suffix in form.values() if f"{module}.{suffix}" in names}
    if "weight" in has and source.dtype(f"{module}.weight").is_floating_point:
        has.discard("weight")
    if not has:
        return None
    for kind, fields in FIELDS.items():
        if has == set(fields.values()):
            return kind
    # the kind that has most in common names what is missing
    kind = max(FIELDS, key=lambda kind: len(has & set(FIELDS[kind].values())))
    wanted = set(FIELDS[kind].values())
    if missing := sorted(wanted - has):
        raise CheckpointError(f"{source.path}: {listed(f'{module}.{suffix}' for suffix in missing)} missing")
    surplus = sorted(has - wanted)
    raise CheckpointError(f"{source.path}: {listed(f'{module}.{suffix}' for suffix in surplus)} no part of {kind}")


def _linear(source: Source, module: str, kind: str) -> Linear:
    """Return one linear; every tensor's shape and type are checked against those that its codes call for."""
    codes = f"{module}.{FIELDS[kind]['codes']}"
    shape = source.shape(codes)
    if len(shape) != 2:
        raise CheckpointError(f"{source.path}: tensor {codes!r} has shape {list(shape)}, it must be a matrix")
    n, k = (shape[0], shape[1]) if kind == INT8 else (shape[0], 2 * shape[1])
    _check_size(source, codes, kind, n, k)
    dtypes = {}
    for name, wanted in _published(kind, n, k).items():
        tensor = f"{module}.{FIELDS[kind][name]}"
        given, dtype = source.shape(tensor), source.dtype(tensor)
        if kind == GROUPED and name.startswith("group_") and given != wanted.shape:
            size = f"groups of {k / given[0]:g} columns" if len(given) == 2 and given[0] else f"shape {list(given)}"
            raise CheckpointError(
                f"{source.path}: tensor {tensor!r} has {size}, shape {list(given)}; expected groups of {GROUP}, "
                f"shape {list(wanted.shape)}"
            )
        if given != wanted.shape or dtype not in (wanted.dtype, *wanted.also):
            raise CheckpointError(
                f"{source.path}: tensor {tensor!r} is {dtype} {list(given)}; expected {wanted.dtype} "
                f"{list(wanted.shape)}"
            )
        if wanted.dtype.is_floating_point:
            dtypes[name] = dtype
    return Linear(form=FORMATS[kind], shape=(n, k), make=partial(_make, source, module, kind), dtypes=dtypes)


def _check_size(source: Source, name: str, kind: str, n: int, k: int) -> None:
    """Raise CheckpointError if tiles and groups do not divide a linear [N, K]."""
    step = GROUP if kind == GROUPED else TILE
    if kind != INT8 and (n % TILE or k % step):
        raise CheckpointError(
            f"{source.path}: {name!r} holds {n} x {k} weights; QServe's {kind} has multiples of {TILE} rows and of "
            f"{step} columns"
        )


def _published(kind: str, n: int, k: int) -> dict[str, Field]:
    """Return our field -> shape and type of the published tensor of a linear [N, K]."""
    row = Field((n,), torch.float16, (torch.float32,))
    if kind == INT8:
        return {"codes": Field((n, k), torch.int8), "scale": Field((n,), torch.float32, (torch.float16,))}
    packed = Field((n, k // 2), torch.int8)
    if kind == ROW:
        return {"codes": packed, "scale": row, "zero": row}
    group = Field((k // GROUP, n), torch.int8)
    return {"codes": packed, "scale": row, "group_scale": group, "group_zero": group}


def _make(source: Source, module: str, kind: str) -> tuple[dict[str, Tensor], float]:
    """Return the stored tensors of a published linear, exactly."""
    found = {name: source.tensor(f"{module}.{suffix}") for name, suffix in FIELDS[kind].items()}
    if kind == INT8:
        return found, 0.0
    found["codes"] = pack_columns(unpack_tiles(found["codes"]))
    if kind == GROUPED:
        found["group_scale"] = natural_channels(found["group_scale"].view(torch.uint8))
        # minus the scaled zero, modulo 256, in integers: a cast of -255..0 to int8 would be undefined
        negative = natural_channels(found["group_zero"].view(torch.uint8)).to(torch.int16)
        found["group_zero"] = ((256 - negative) % 256).to(torch.uint8)
    return found, 0.0


def _check_config(source: Source, linears: Mapping[str, Linear]) -> None:
    """Raise CheckpointError if `quantization_config` says something else than the tensors."""
    block = source.config.get("quantization_config")
    if not linears:
        raise CheckpointError(f"{source.path}: quantized by 'qoq', but no linear holds QServe's tensors")
    if not isinstance(block, Mapping):
        return
    claims = {(4, -1): ROW, (4, 128): GROUPED, (8, -1): INT8}
    bits, group = block.get("wbits"), block.get("group_size", -1)
    claimed = next((kind for numbers, kind in claims.items() if numbers == (bits, group)), None)
    for module, linear in linears.items():
        if linear.form.name != claimed:
            raise CheckpointError(
                f"{source.path}: quantization_config says wbits={bits!r}, group_size={group!r}, but the tensors of "
                f"{module!r} are {linear.form.name}"
            )


def _notes(source: Source, four: bool) -> list[str]:
    notes = []
    biases = [name for name in source.names() if name.endswith(".bias")]
    if biases:
        notes.append(
            f"{len(biases)} biases were read; one of the two published converters leaves them uninitialised: compare "
            "them with the original model's"
        )
    odd = [name for name in source.names() if four and name.endswith("norm.weight") and _not_one(source, name)]
    if odd:
        notes.append(
            f"{len(odd)} norm weights are not 1 ({sorted(odd)[0]}), although QoQ folds them into the linears; they are "
            "used, while QServe itself would run with ones"
        )
    return notes


def _not_one(source: Source, name: str) -> bool:
    return bool((source.tensor(name).float() != 1).any())


class Export:
    """One of our checkpoints, seen as a published one: safetensors with QServe's names and layout.

    notes    sentences a user should read: a mean of keys is left out, which changes nothing but the accuracy of 4-bit
             keys
    rounded  linears written so far whose scales or zeros did not fit into fp16, the layout's only type for 4 bits
    Raises CheckpointError for what that layout cannot hold.
    """

    def __init__(self, source: Source, scheme: Scheme, spec: ModelSpec, linears: Sequence[str]) -> None:
        self.path = source.path
        self.notes: tuple[str, ...] = ()
        self.rounded: set[str] = set()
        self._source = source
        self._scheme = scheme
        self._parts: dict[str, Part] = {}
        self._held: tuple[str, dict[str, Tensor]] = ("", {})
        ours = set()
        for module in linears:
            kind = scheme.form(module).name
            if kind != scheme.weights or kind not in FIELDS:
                raise CheckpointError(
                    f"{source.path}: {module!r} is {kind}; QServe's layout holds w4a8-row, w4a8-g128 or w8a8, one of "
                    "them for all linears"
                )
            n, columns = source.shape(f"{module}.codes")
            k = columns if kind == INT8 else 2 * columns
            _check_size(source, module, kind, n, k)
            ours |= {f"{module}.{name}" for name in FIELDS[kind]}
            self._add(module, kind, n, k)
        for name in source.names() - ours:
            if name.endswith("self_attn.key_mean"):
                self.notes = ("the means of keys have no place in QServe's layout and were left out",)
            elif name.endswith("self_attn.kv_scale"):
                part = Part(shape=(2,), dtype=torch.float32, make=partial(self._kv_scale, name))
                self._parts[name.replace("self_attn.kv_scale", KV_SCALE)] = part
            else:
                self._parts[name] = passed(source, name)

    @property
    def config(self) -> Mapping[str, object]:
        """The config.json with SGLang's description of such files."""
        bits, group = {ROW: (4, -1), GROUPED: (4, 128), INT8: (8, -1)}[self._scheme.weights]
        block = {"quant_method": "qoq", "wbits": bits, "group_size": group}
        return {**self._source.config, "quantization_config": block}

    def names(self) -> frozenset[str]:
        """Names of all tensors, as published."""
        return frozenset(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._parts[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._parts[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._parts[name].make()

    def _add(self, module: str, kind: str, n: int, k: int) -> None:
        for name, field in _published(kind, n, k).items():
            dtype = field.dtype
            if kind == INT8 and name == "scale":
                dtype = self._source.dtype(f"{module}.scale")
            make = partial(self._published_tensor, module, name, dtype)
            self._parts[f"{module}.{FIELDS[kind][name]}"] = Part(shape=field.shape, dtype=dtype, make=make)

    def _published_tensor(self, module: str, name: str, dtype: torch.dtype) -> Tensor:
        if self._held[0] != module:
            self._held = module, read_linear(self._source, self._scheme, module)
        tensor = self._held[1][name]
        if name == "codes" and self._scheme.weights != INT8:
            return pack_tiles(unpack_columns(tensor))
        if name == "group_scale":
            return permute_channels(tensor).contiguous().view(torch.int8)
        if name == "group_zero":
            return (
                permute_channels(((256 - tensor.to(torch.int16)) % 256).to(torch.uint8)).contiguous().view(torch.int8)
            )
        stored = tensor.to(dtype)
        if not torch.equal(stored.to(tensor.dtype), tensor):
            self.rounded.add(module)
        return stored

    def _kv_scale(self, name: str) -> Tensor:
        scale = self._source.tensor(name)
        if not bool((scale == scale[:, :1]).all()):
            raise CheckpointError(f"{self.path}: tensor {name!r} differs between heads, QServe's layout holds one pair")
        return scale[:, 0].float()
