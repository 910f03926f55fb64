"""A foreign checkpoint seen as one of ours, tensor by tensor: what every importer makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omniserve.base import log
from omniserve.base.errors import CheckpointError
from omniserve.formats.artifact import KVScheme, Scheme, check_values
from omniserve.formats.checkpoint import Source
from omniserve.formats.weight import WeightFormat

_LOG = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor that an importer makes when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear of a foreign checkpoint, as it will be in our layout.

    form, shape  its format and [N, K]
    make         returns the stored tensors, and the relative squared error of the weights (0: exact)
    dtypes       of fields that have another type than the format's first choice
    rounded      the grids cannot meet: the weights are rounded again
    """

    form: WeightFormat
    shape: tuple[int, int]
    make: Callable[[], tuple[dict[str, Tensor], float]]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounded: bool = False


class Translated:
    """A foreign checkpoint, seen as one of ours; tensors are made when they are asked for.

    origin  what it was, for people
    notes   sentences a user should read
    losses  module -> relative squared error of its weights, of the linears made so far that are not exact
    The fields of a linear are asked for one after the other, so the last one made is held.
    """

    def __init__(
        self,
        source: Source,
        *,
        origin: str,
        scheme: Scheme,
        linears: Mapping[str, Linear],
        parts: Mapping[str, Part],
        notes: Sequence[str] = (),
    ) -> None:
        self.path = source.path
        self.origin = origin
        self.scheme = scheme
        self.notes = tuple(notes)
        self.losses: dict[str, float] = {}
        self._linears = linears
        self._fields = {
            f"{module}.{name}": (part.shape, linear.dtypes.get(name, part.dtype))
            for module, linear in linears.items()
            for name, part in linear.form.fields(*linear.shape).items()
        }
        self._parts = parts
        self._config = {**source.config, "quantization_config": scheme.block()}
        if "lm_head.weight" in parts:
            self._config["tie_word_embeddings"] = False
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def config(self) -> Mapping[str, object]:
        """The foreign config.json with our description."""
        return self._config

    @property
    def rounded(self) -> tuple[str, ...]:
        """Linears that are rounded again."""
        return tuple(module for module, linear in self._linears.items() if linear.rounded)

    def names(self) -> frozenset[str]:
        """Names of all tensors, in our layout."""
        return frozenset(self._fields.keys() | self._parts.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._fields[name][0] if name in self._fields else self._part(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._fields[name][1] if name in self._fields else self._part(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor; do not write to it."""
        if name not in self._fields:
            return self._part(name).make()
        module, _, wanted = name.rpartition(".")
        if self._held[0] != module:
            tensors, loss = self._linears[module].make()
            check_values(self._linears[module].form, tensors, path=self.path, module=module)
            if loss > 0:
                self.losses[module] = loss
                _LOG.info("imported %s", log.fields(linear=module, relative_squared_error=f"{loss:.3g}"))
            self._held = module, tensors
        return self._held[1][wanted].to(self._fields[name][1])

    def described(self) -> Scheme:
        """Return the scheme with what is known once all tensors were made: the loss of each linear."""
        made_by: dict[str, object] = {**self.scheme.made_by, "imported": self.origin}
        if self.notes:
            made_by["notes"] = list(self.notes)
        if self.losses:
            made_by["relative_squared_error"] = {module: float(f"{x:.3g}") for module, x in self.losses.items()}
        if self.rounded:
            made_by["rounded_again"] = list(self.rounded)
        return Scheme(
            weights=self.scheme.weights,
            overrides=self.scheme.overrides,
            keep=self.scheme.keep,
            kv=self.scheme.kv,
            made_by=made_by,
        )

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._parts[name]


def scheme_from(
    linears: Mapping[str, Linear], *, keep: Sequence[str], kv: KVScheme, made_by: Mapping[str, object]
) -> Scheme:
    """Return the scheme of linears: the commonest format is the main one, the others are overrides."""
    names = [linear.form.name for linear in linears.values()]
    main = max(dict.fromkeys(names), key=names.count, default="w16a16")
    overrides = {module: linear.form.name for module, linear in linears.items() if linear.form.name != main}
    return Scheme(weights=main, overrides=overrides, keep=tuple(keep), kv=kv, made_by=made_by)


def kept(parts: Mapping[str, Part]) -> list[str]:
    """Return the modules of the layers whose weights are matrices in 16 bit."""
    return sorted(
        name.removesuffix(".weight")
        for name, part in parts.items()
        if name.startswith("model.layers.") and name.endswith(".weight") and len(part.shape) == 2
    )


def passed(source: Source, name: str) -> Part:
    """Return a tensor of the source as it is."""
    return Part(shape=source.shape(name), dtype=source.dtype(name), make=lambda: source.tensor(name))


def described_config(source: Source) -> Mapping[str, object]:
    """Return the config.json of a source: for a translated one with the losses known by now."""
    if isinstance(source, Translated):
        return {**source.config, "quantization_config": source.described().block()}
    return source.config
