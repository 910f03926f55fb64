"""Our own checkpoint: how it describes itself and what may stand in it.

Codes are stored in the logical layout (formats.md section 12); every other layout is translated to this one by an
importer, which makes a `Translated` source of it (translated.py). So the loader knows one quantized layout only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from omniserve.base.config import KVName, Precision, WeightName, nearest
from omniserve.base.errors import CheckpointError
from omniserve.base.spec import ModelSpec
from omniserve.formats.checkpoint import Source
from omniserve.formats.table import FORMATS
from omniserve.formats.w4a8 import expand, unpack_columns
from omniserve.formats.weight import WeightFormat

METHOD = "omniserve"
"""`quant_method` of our own checkpoints."""
VERSION = 1

LARGEST_GROUP_SCALE = 17
"""Beyond it 15 * group_scale leaves 255, and no offset brings all codes into int8."""

STATIC = ("head", "tensor")
"""What a static KV scale is shared by; one for a tensor is stored once for each head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVScheme:
    """How a checkpoint means its keys and values to be stored.

    bits      of keys and of values
    static    8 bits only: the checkpoint holds one scale per key head; else ranges are found per token and head
    key_mean  the checkpoint holds the mean of each head's rotated keys, which is subtracted before they are stored
    """

    bits: Literal[4, 8, 16] = 8
    static: bool = False
    key_mean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What `quantization_config` says: the formats of all linears, and the KV cache.

    weights    name of the format of all linears but those in `overrides` (module -> name) and `keep` (16 bit)
    made_by    how it was made, for people; "calibration" is empty or absent if the weights were merely rounded
    """

    weights: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    kv: KVScheme = KVScheme()
    made_by: Mapping[str, object] = field(default_factory=dict)

    def form(self, module: str) -> WeightFormat:
        """Return the format of a linear."""
        return FORMATS["w16a16" if module in self.keep else self.overrides.get(module, self.weights)]

    @property
    def precision(self) -> Precision:
        """The precision this checkpoint means to be served in."""
        group: Literal[-1, 128] = -1 if self.weights == "w4a8-row" else 128
        weight = cast(WeightName, self.weights.split("-")[0])
        return Precision(weight=weight, kv=cast(KVName, f"kv{self.kv.bits}"), group=group)

    @property
    def calibrated(self) -> bool:
        """True if the weights were fitted to calibration data."""
        return bool(self.made_by.get("calibration"))

    def block(self) -> dict[str, object]:
        """Return the `quantization_config` of config.json. Source: qoq.md section 4."""
        quantized = self.weights != "w16a16"
        plain = self.kv.bits == 16
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "weights": {
                "format": self.weights,
                "group": {"w4a8-g128": 128, "w4a8-row": -1}.get(self.weights),
                "overrides": dict(self.overrides),
                "keep": list(self.keep),
            },
            "activations": {"bits": 8, "per": "token"} if quantized else {"bits": 16, "per": None},
            "kv": {
                "key_bits": self.kv.bits,
                "value_bits": self.kv.bits,
                "per": None if plain else "head" if self.kv.static else "token-head",
                "zero": None if plain else "none" if self.kv.static else "real",
                "key_mean": self.kv.key_mean,
                "key_rotation": None,
            },
            "made_by": dict(self.made_by),
        }


def scheme_of(source: Source) -> Scheme | None:
    """Return what a checkpoint in our layout says about itself; None if it is not quantized.

    Raises CheckpointError for another method, another version, an unknown key or a value that is not allowed.
    """
    block = source.config.get("quantization_config")
    if block is None:
        return None
    method = block.get("quant_method") if isinstance(block, Mapping) else block
    if not isinstance(block, Mapping) or method != METHOD:
        raise CheckpointError(f"{source.path}: quantized by {method!r}, this version reads {', '.join(METHODS)}")
    version = block.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{source.path}: quantization_config: version={version!r}: this omniserve reads version {VERSION}"
        )
    keys = _Keys(source.path, "quantization_config", block)
    keys.known("quant_method", "version", "weights", "activations", "kv", "made_by")
    made_by = keys.mapping("made_by", default={})
    scheme = _weights(keys.inner("weights"), _kv(keys.inner("kv")), made_by)
    activations = keys.inner("activations")
    activations.known("bits", "per")
    wanted = cast(Mapping[str, object], scheme.block()["activations"])
    activations.one_of("bits", wanted["bits"])
    activations.one_of("per", wanted["per"])
    return scheme


METHODS = (METHOD, "qoq", "awq", "gptq", "compressed-tensors")
"""The methods that are read; all but the first by an importer."""


def _weights(keys: "_Keys", kv: KVScheme, made_by: Mapping[str, object]) -> Scheme:
    keys.known("format", "group", "overrides", "keep")
    names = tuple(FORMATS)
    name = cast(str, keys.one_of("format", *names))
    keys.one_of("group", *({"w4a8-g128": (128,), "w4a8-row": (-1,)}.get(name, (None, -1))))
    overrides = keys.mapping("overrides", default={})
    for module, word in overrides.items():
        if word not in names:
            raise keys.refuse(f"overrides[{module!r}]", word, ", ".join(names))
    keep = keys.values.get("keep", [])
    if not isinstance(keep, list) or not all(isinstance(module, str) for module in keep):
        raise keys.refuse("keep", keep, "a list of names")
    if both := sorted(set(keep) & overrides.keys()):
        raise keys.refuse("keep", both[0], "another module than those in overrides")
    return Scheme(weights=name, overrides=cast(Mapping[str, str], overrides), keep=tuple(keep), kv=kv, made_by=made_by)


def _kv(keys: "_Keys") -> KVScheme:
    keys.known("key_bits", "value_bits", "per", "zero", "key_mean", "key_rotation")
    bits = cast(Literal[4, 8, 16], keys.one_of("key_bits", 4, 8, 16))
    if keys.values.get("value_bits") != bits:
        raise keys.refuse("value_bits", keys.values.get("value_bits"), f"key_bits={bits}, one number for both so far")
    static = bits == 8 and keys.values.get("per") in STATIC
    if bits == 16:
        keys.one_of("per", None, "token-head")
        keys.one_of("zero", None, "real")
    elif not static:
        keys.one_of("per", "token-head", *(STATIC if bits == 8 else ()))
        keys.one_of("zero", "real")
    else:
        keys.one_of("zero", "none")
    key_mean = keys.values.get("key_mean", False)
    if not isinstance(key_mean, bool):
        raise keys.refuse("key_mean", key_mean, "true or false")
    keys.one_of("key_rotation", None)
    return KVScheme(bits=bits, static=static, key_mean=key_mean)


class _Keys:
    """One object of a description: known keys alone, values of a list; whatever else is a CheckpointError."""

    def __init__(self, path: Path, place: str, values: Mapping[str, object]) -> None:
        self.path = path
        self.place = place
        self.values = values

    def refuse(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.place}: {key}={repr(value)[:60]}: must be {allowed}")

    def known(self, *names: str) -> None:
        for key in self.values:
            if key not in names:
                raise CheckpointError(f"{self.path}: {self.place}: unknown key {key!r}{nearest(key, names)}")

    def mapping(self, key: str, default: Mapping[str, object] | None = None) -> Mapping[str, object]:
        value = self.values.get(key, default)
        if not isinstance(value, Mapping):
            raise self.refuse(key, value, "an object")
        return value

    def inner(self, key: str) -> "_Keys":
        return _Keys(self.path, f"{self.place}.{key}", self.mapping(key))

    def one_of(self, key: str, *allowed: object) -> object:
        value = self.values.get(key)
        if not any(value == word and type(value) is type(word) for word in allowed):
            words = ", ".join("null" if word is None else str(word) for word in allowed)
            raise self.refuse(key, value, words if len(allowed) == 1 else f"one of {words}")
        return value


def read_linear(source: Source, scheme: Scheme, module: str) -> dict[str, Tensor]:
    """Return the stored tensors of a linear by field, with their values checked. Raises CheckpointError."""
    form = scheme.form(module)
    tensors = {name: source.tensor(f"{module}.{name}") for name in form.fields(2, 2)}
    check_values(form, tensors, path=source.path, module=module)
    return tensors


def check_values(form: WeightFormat, tensors: Mapping[str, Tensor], *, path: Path, module: str) -> None:
    """Raise CheckpointError naming a tensor whose values no writer of this format makes.

    Scales are positive, all parameters finite, 1 <= group_scale <= 17, group_zero <= 128, and 15 * group_scale -
    group_zero <= 127, so that all codes decode into int8. Where a file of foreign origin leaves that range, every code
    that is in use must decode into int8.
    """

    def refuse(name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {f'{module}.{name}'!r} {what}")

    for name in ("weight", "scale", "zero"):
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            raise refuse(name, "holds NaN or infinity")
    if "scale" in tensors and not bool((tensors["scale"] > 0).all()):
        raise refuse("scale", "holds a scale that is not positive")
    if "group_scale" not in tensors:
        return
    scale, zero = tensors["group_scale"].to(torch.int16), tensors["group_zero"].to(torch.int16)
    if scale.numel() and not 1 <= int(scale.amin()) <= int(scale.amax()) <= LARGEST_GROUP_SCALE:
        raise refuse(
            "group_scale", f"holds values from {int(scale.amin())} to {int(scale.amax())}, allowed are 1 to 17"
        )
    if bool(((15 * scale - zero > 127) | (zero > 128)).any()):
        try:
            expand(unpack_columns(tensors["codes"]), tensors["group_scale"], tensors["group_zero"])
        except CheckpointError:
            raise refuse("group_zero", "with its codes and group_scale leaves the range of int8") from None


def key_means(source: Source, spec: ModelSpec) -> list[Tensor] | None:
    """Return the means of the rotated keys of each layer, [H, D], or None if the checkpoint has none.

    Raises CheckpointError if one is not finite.
    """
    scheme = scheme_of(source)
    if scheme is None or not scheme.kv.key_mean:
        return None
    means = []
    for layer in range(spec.layers):
        name = f"model.layers.{layer}.self_attn.key_mean"
        mean = source.tensor(name)
        if not bool(torch.isfinite(mean).all()):
            raise CheckpointError(f"{source.path}: tensor {name!r} holds NaN or infinity")
        means.append(mean)
    return means
