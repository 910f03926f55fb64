"""What a quantization does: frozen passes, read from TOML. One default recipe per format lies in `recipes/`."""

import hashlib
import importlib.resources
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin

from omniserve.base.config import Precision, nearest
from omniserve.base.errors import CheckpointError, ConfigError
from omniserve.base.spec import ModelSpec
from omniserve.formats.kv import KVFormat, kv_format
from omniserve.formats.table import FORMATS
from omniserve.formats.weight import WeightFormat
from omniserve.quantize.hadamard import hadamard

QUANTIZED = ("w4a8-row", "w4a8-g128", "w8a8")
RANGES = ("token-head", "head", "tensor")
CONSTRUCTIONS = ("auto", "hadamard", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """format: of all linears; overrides: of single ones, by module name (`model.layers.0.mlp.down_proj`)."""

    format: str
    overrides: Mapping[str, str] = field(default_factory=dict)

    def of(self, module: str) -> WeightFormat:
        """Return the format of a linear."""
        return FORMATS[self.overrides.get(module, self.format)]


@dataclass(frozen=True, slots=True, kw_only=True)
class KV:
    """Bits of keys and values (4, 8, 16), and what shares a range: `token-head`, or static `head` or `tensor` (8)."""

    keys: int = 8
    values: int = 8
    range: str = "token-head"

    @property
    def static(self) -> bool:
        """True if scales come from calibration."""
        return self.range != "token-head"

    def formats(self) -> tuple[KVFormat | None, KVFormat | None]:
        """Return the formats of keys and values; None where 16 bits are kept."""
        return self._format(self.keys), self._format(self.values)

    def _format(self, bits: int) -> KVFormat | None:
        if bits == 16:
            return None
        return kv_format("kv4" if bits == 4 else "kv8", static=self.static)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """R1 (residual) and R2 (heads), and where the matrices come from."""

    residual: bool = True
    heads: bool = True
    construction: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reorder:
    """Which inputs are sorted by size."""

    out: bool = True
    down: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """smooth: α to try for SmoothAttention, empty for none; mean: subtract the mean key."""

    smooth: tuple[float, ...] = ()
    mean: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Smooth:
    """α to try for the inputs of down and of out; empty for none."""

    down: tuple[float, ...] = ()
    out: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """What the solver does beyond rounding to nearest.

    search   ranges by the Hessian-weighted error instead of the full range
    gptq     propagate each column's error to the columns behind it
    damp     of GPTQ and what follows it, relative to the mean diagonal of the Hessian
    descend  rounds of improving single codes after GPTQ
    refine   improve scales and zeros with the codes fixed, after each round
    reaim    δ of the aim at the outputs of the unquantized model; 0: none
    """

    search: bool = True
    gptq: bool = True
    damp: float = 0.01
    descend: int = 0
    refine: bool = True
    reaim: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """How calibration text is cut.

    samples, length  how many samples of how many tokens
    stride           tokens between the starts of samples; 0 spreads them evenly over the text
    positions        samples lie at random places below this position, so that means keep only what does not rotate
    seed             of those places
    """

    samples: int = 32
    length: int = 1024
    stride: int = 0
    positions: int = 0
    seed: int = 0


PASSES = ("rotate", "reorder", "keys", "smooth", "solve")
"""The passes a recipe may leave out, in the order in which they are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Passes in order; one that is None is not done. Without `solve`, weights are rounded to nearest."""

    name: str
    weights: Weights
    kv: KV
    rotate: Rotate | None = None
    reorder: Reorder | None = None
    keys: Keys | None = None
    smooth: Smooth | None = None
    solve: Solve | None = None
    calibration: Samples | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def sha256(self) -> str:
        """Hash of everything the recipe says."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def calibrated(self) -> bool:
        """True if any pass looks at activations."""
        return self.kv.static or any((self.reorder, self.keys, self.smooth, self.solve))

    @property
    def centred(self) -> bool:
        """True if the mean key is subtracted before keys are quantized."""
        return self.keys is not None and self.keys.mean and self.kv.keys < 16

    @property
    def transforms(self) -> list[str]:
        """What was done to the weights, for people."""
        r, o, k, s = self.rotate, self.reorder, self.keys, self.smooth
        done = {
            "R1": r is not None and r.residual,
            "R2": r is not None and r.heads,
            "reorder": o is not None and (o.out or o.down),
            "smooth-attention": k is not None and bool(k.smooth),
            "key-mean": self.centred,
            "smooth": s is not None and bool(s.down or s.out),
            "reaim": self.solve is not None and self.solve.reaim > 0,
            "gptq": self.solve is not None and self.solve.gptq,
        }
        return [name for name, yes in done.items() if yes]

    def without(self, passes: Sequence[str]) -> "Recipe":
        """Return the recipe with some passes left out, by name (`rotate`) or one switch of it (`rotate.heads`).

        Raises ConfigError.
        """
        made = self
        for word in passes:
            name, _, switch = word.partition(".")
            if name not in PASSES:
                raise ConfigError(f"without {word!r}: must be one of {', '.join(PASSES)}{nearest(name, PASSES)}")
            if not switch:
                made = replace(made, **{name: None})  # type: ignore[arg-type]  # names of passes, which may be None
                continue
            own = getattr(made, name)
            known = [f.name for f in fields(own)] if own is not None else []
            if switch not in known:
                raise ConfigError(f"without {word!r}: {name} has {', '.join(known) or 'nothing'}")
            value = getattr(own, switch)
            off: object = False if isinstance(value, bool) else () if isinstance(value, tuple) else 0
            made = replace(made, **{name: replace(own, **{switch: off})})
        return made

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError naming the pass that cannot fold into a model, and the recipe without it."""
        if self.kv.keys == 4 and spec.head_dim % 2:
            raise ConfigError(f"kv.keys=4: heads of {spec.head_dim} dims cannot be packed, they must be even")
        strict = self.rotate is not None and self.rotate.construction == "hadamard"
        for switch, size in (("residual", spec.hidden), ("heads", spec.head_dim)):
            if strict and getattr(self.rotate, switch) and hadamard(size) is None:
                raise ConfigError(
                    f"pass rotate.{switch}: no Hadamard matrix of size {size} is known; set construction = "
                    f'"auto" for a random rotation, or leave it out with --without rotate.{switch}'
                )
        self._check_columns(spec)
        self._check_overrides(spec)

    def _check_columns(self, spec: ModelSpec) -> None:
        inner = {spec.heads * spec.head_dim, spec.hidden}
        inner |= {spec.ffn} if spec.experts is None else {spec.experts.ffn, spec.experts.shared_ffn} - {0}
        for columns in sorted(inner):
            try:
                FORMATS[self.weights.format].fields(1, columns)
            except CheckpointError as error:
                raise ConfigError(f"weights.format={self.weights.format}: {error}; use w8a8") from None

    def _check_overrides(self, spec: ModelSpec) -> None:
        for module, form in self.weights.overrides.items():
            fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3")
            if module.rpartition(".")[2] in fused and form != self.weights.format:
                raise ConfigError(
                    f"weights.overrides: {module} is fused with its neighbours, which share one format; "
                    "o_proj and down_proj can differ"
                )


def for_precision(precision: Precision) -> Recipe:
    """Return the default recipe of a precision.

    Raises ConfigError if its weights are not quantized.
    """
    if precision.weight == "w16a16":
        raise ConfigError(f"precision={precision.name}: 16-bit weights need no quantizer; name w4a8kv4 or w8a8kv8")
    name = "w8a8kv8" if precision.weight == "w8a8" else "w4a8kv4-row" if precision.group == -1 else "w4a8kv4-g128"
    made = default(name)
    bits = int(precision.kv.removeprefix("kv"))
    if bits == made.kv.keys:
        return made
    if bits not in (4, 8, 16):
        raise ConfigError(f"precision={precision.name}: the KV cache must have 4, 8 or 16 bits")
    keys = None if bits == 16 else default("w4a8kv4-g128").keys if bits == 4 else made.keys
    label = precision.name if precision.weight == "w8a8" else precision.name + name[len("w4a8kv4") :]
    return replace(made, name=label, kv=KV(keys=bits, values=bits), keys=keys)


def default(name: str) -> Recipe:
    """Return a recipe that ships with the package."""
    text = importlib.resources.files("omniserve.quantize").joinpath(f"recipes/{name}.toml").read_text("utf-8")
    return parse(text, origin=f"recipe {name}")


def read(path: Path) -> Recipe:
    """Return the recipe of a TOML file. Raises ConfigError."""
    try:
        return parse(path.read_bytes().decode("utf-8"), origin=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: the recipe cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the recipe is not UTF-8 text") from None


_TABLES: dict[str, type] = {
    "weights": Weights,
    "kv": KV,
    "rotate": Rotate,
    "reorder": Reorder,
    "keys": Keys,
    "smooth": Smooth,
    "solve": Solve,
    "calibration": Samples,
}
_WORDS: dict[str, tuple[str, ...]] = {"format": QUANTIZED, "range": RANGES, "construction": CONSTRUCTIONS}
_LEAST: dict[str, int] = {"samples": 1, "length": 2}


def parse(text: str, *, origin: str) -> Recipe:
    """Return the recipe of a TOML text.

    Raises ConfigError for what TOML forbids, an unknown key (with the nearest one), a wrong type or value.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None
    for key in found:
        if key != "name" and key not in _TABLES:
            raise ConfigError(f"{origin}: unknown table {key!r}{nearest(key, _TABLES)}")
    name = found.get("name", "custom")
    if not isinstance(name, str):
        raise ConfigError(f"{origin}: name={name!r}: must be a string")
    tables = {key: _table(origin, key, found[key]) for key in _TABLES if key in found}
    if "weights" not in tables or "kv" not in tables:
        raise ConfigError(f"{origin}: must have the tables [weights] and [kv]")
    made = Recipe(name=name, **tables)
    _check_values(origin, made)
    return made


def _table(origin: str, table: str, values: object) -> Any:
    kind = _TABLES[table]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{origin}: {table} must be a table, [{table}]")
    known = {f.name: f for f in fields(kind)}
    given: dict[str, object] = {}
    for key, value in values.items():
        where = f"{origin}: {table}.{key}"
        if key not in known:
            raise ConfigError(f"{where}: unknown{nearest(key, known)}; there are {', '.join(known)}")
        given[key] = _value(where, key, known[key].type, value)
    if kind is Weights and "format" not in given:
        raise ConfigError(f"{origin}: weights.format is missing, it must be one of {', '.join(QUANTIZED)}")
    return kind(**given)


def _value(where: str, key: str, annotation: Any, value: object) -> object:
    def refuse(allowed: str) -> ConfigError:
        return ConfigError(f"{where}={value!r}: must be {allowed}")

    if get_origin(annotation) is tuple:
        numbers: list[Any] = value if isinstance(value, list) else [value]
        if not all(type(one) in (int, float) and 0 <= one <= 1 for one in numbers):
            raise refuse("a list of numbers from 0 to 1")
        return tuple(float(one) for one in numbers)
    if get_origin(annotation) is not None and get_args(annotation):
        if not isinstance(value, Mapping) or not all(form in QUANTIZED for form in value.values()):
            raise refuse(f"a table of module names to {', '.join(QUANTIZED)}")
        return dict(value)
    if annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
            raise refuse("a number from 0 to 10")
        return float(value)
    if type(value) is not annotation:
        raise refuse({bool: "true or false", int: "a whole number", str: "a string"}[annotation])
    if key in _WORDS and value not in _WORDS[key]:
        raise refuse(f"one of {', '.join(_WORDS[key])}{nearest(str(value), _WORDS[key])}")
    if annotation is int and value < _LEAST.get(key, 0):  # type: ignore[operator]  # a number
        raise refuse(f"{_LEAST.get(key, 0)} or more")
    return value


def _check_values(origin: str, made: Recipe) -> None:
    kv = made.kv
    for key, bits in (("keys", kv.keys), ("values", kv.values)):
        if bits not in (4, 8, 16):
            raise ConfigError(f"{origin}: kv.{key}={bits}: must be 4, 8 or 16")
    if kv.keys != kv.values:
        raise ConfigError(f"{origin}: kv.keys={kv.keys}, kv.values={kv.values}: must be the same number so far")
    if kv.static and (kv.keys, kv.values) != (8, 8):
        raise ConfigError(f"{origin}: kv.range={kv.range!r}: static scales exist for 8 bits alone")
    if made.solve is not None and made.solve.descend > 20:
        raise ConfigError(f"{origin}: solve.descend={made.solve.descend}: must be at most 20")
    needs = [name for name in ("reorder", "keys", "smooth", "solve") if getattr(made, name) is not None]
    if made.calibration is None and (needs or kv.static):
        raise ConfigError(f"{origin}: {needs[0] if needs else 'a static range'} needs the table [calibration]")
