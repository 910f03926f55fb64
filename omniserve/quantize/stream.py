"""The whole model, layer by layer: one layer in memory, activations in files, every layer committed to the disk.

    x = x̂ = embedding · R1
    for each layer not yet in the manifest:
        read it, fold norms, turn it; quantize it on x and x̂ (stages.py)
        write its shard and the streams behind it under temporary names; rename them; add the layer to the manifest
    embedding, final norm and head go into the last shard; then index, config.json, report; the manifest goes last

Killed at any moment, a run with the same arguments continues and ends with the same bytes: a layer depends only on
what is committed, sums are taken in a fixed order, and the number of threads is that of the first run.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omniserve.base import log
from omniserve.base.errors import CapacityError, CheckpointError, ConfigError
from omniserve.base.numbers import human_bytes
from omniserve.base.spec import ModelSpec
from omniserve.base.version import VERSION
from omniserve.formats.checkpoint import Source
from omniserve.models.families import check_tensors, family
from omniserve.quantize import export
from omniserve.quantize.calibration import Calibration
from omniserve.quantize.forward import Forward
from omniserve.quantize.hadamard import orthogonal
from omniserve.quantize.layer import Layer, Linear, read_finite, read_layer
from omniserve.quantize.recipe import Recipe
from omniserve.quantize.rotate import fold_norms, rotate_heads, rotate_residual, turned
from omniserve.quantize.solve import nearest
from omniserve.quantize.spill import Spill, write_atomically
from omniserve.quantize.stages import STEPS, Streams, Work, half, quantize_layer

FOLDER = ".quantize"
"""Of what a run needs to continue, within the output folder."""

MANIFEST = "manifest.json"

FP32_BYTES = 2 << 30
"""A stream that fits into this in fp32 is kept in fp32, a longer one in fp16."""

Progress = Callable[[str, int, int], None]
"""Called as progress(phase, done, total)."""

_LOG = log.get(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """folder: the artefact; report: what each step did; resumed: layers that an earlier run had done."""

    folder: Path
    report: Mapping[str, Any]
    resumed: int


def quantize(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    calibration: Calibration | None = None,
    files: Mapping[str, bytes] | None = None,
    device: torch.device | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Result:
    """Quantize a 16-bit checkpoint into the folder `out`, or continue where an earlier run was stopped.

    calibration  samples; needed if the recipe looks at activations
    files        further files of the artefact by name: tokenizer, generation settings
    Raises ConfigError for a recipe that does not fit the model, or a folder with something else in it; CheckpointError
    naming a tensor; CapacityError if the disk is too small.
    """
    spec = family(source.config).spec(source.config)
    check_tensors(source, spec)
    recipe.check(spec)
    if recipe.calibrated and calibration is None:
        raise ConfigError(f"recipe {recipe.name} looks at activations: it needs calibration text")
    run = _Run(source, spec, recipe, out, calibration, files or {}, device or torch.device("cpu"), progress)
    with torch.inference_mode(), run.locked():
        return run.go()


class _Run:
    """One run. What it has done is what the manifest says; nothing else is believed."""

    def __init__(
        self,
        source: Source,
        spec: ModelSpec,
        recipe: Recipe,
        out: Path,
        calibration: Calibration | None,
        files: Mapping[str, bytes],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._source, self._spec, self._recipe, self._out = source, spec, recipe, out
        self._calibration = calibration if recipe.calibrated else None
        self._files, self._device, self._progress = files, device, progress
        self._work_folder = out / FOLDER
        self._manifest_file = self._work_folder / MANIFEST
        self._shards = spec.layers + 1
        self._ticks = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output folder against other runs."""
        self._claim()
        with (self._work_folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self._out}: another process is quantizing into this folder") from None
            yield
        shutil.rmtree(self._work_folder, ignore_errors=True)

    def _claim(self) -> None:
        """Make the working folder. Raises ConfigError if the output folder holds anything but an unfinished run."""
        try:
            if self._out.is_dir() and not self._work_folder.is_dir() and any(self._out.iterdir()):
                raise ConfigError(f"{self._out}: the folder is not empty: name a new one, or empty it")
            self._work_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self._out}: no checkpoint can be written here ({error.strerror})") from None

    def go(self) -> Result:
        """Do what is left to do."""
        manifest = self._begin()
        before, threads = torch.get_num_threads(), manifest["threads"]
        resumed = len(manifest["layers"])
        if resumed:
            _LOG.info("resume %s", log.fields(folder=self._out, layers=resumed, of=self._spec.layers))
        torch.set_num_threads(threads)
        try:
            self._layers(manifest)
            if len(manifest["shards"]) < self._shards:
                self._ends(manifest)
        finally:
            torch.set_num_threads(before)
        report = self._finish(manifest)
        return Result(folder=self._out, report=report, resumed=resumed)

    # the manifest

    def _begin(self) -> dict[str, Any]:
        identity = self._identity()
        if self._manifest_file.is_file():
            manifest = self._resumable(identity)
        else:
            self._check_disk()
            manifest = {
                "identity": identity,
                "threads": torch.get_num_threads(),
                "layers": [],
                "shards": {},
                "bytes": 0,
            }
        self._sweep(len(manifest["layers"]))
        if self._calibration is not None and not manifest["layers"]:
            self._embed()
        self._commit(manifest)
        return manifest

    def _identity(self) -> dict[str, Any]:
        """What makes two runs the same."""
        return {
            "omniserve": VERSION,
            "torch": torch.__version__,
            "device": self._device.type,
            "recipe": self._recipe.sha256,
            "calibration": "" if self._calibration is None else self._calibration.sha256,
            "source": file_hashes(self._source.path, self._progress),
        }

    def _resumable(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads(self._manifest_file.read_bytes())
            before = manifest["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._manifest_file}: damaged ({error}); remove {self._out} and start anew") from None
        if other := [name for name, value in identity.items() if before.get(name) != value]:
            raise ConfigError(
                f"{self._out} holds an unfinished run with another {' and '.join(other)}: "
                "continue it with the same, or remove the folder"
            )
        return manifest

    def _commit(self, manifest: Mapping[str, Any]) -> None:
        export.write_json(self._manifest_file, manifest)

    def _sweep(self, done: int) -> None:
        """Remove what a killed run left: everything but the streams that the next layer reads."""
        keep = {MANIFEST, "lock", *(spill.path.name for spill in self._streams(done)[:2])}
        for file in self._work_folder.iterdir():
            if file.name not in keep:
                file.unlink()

    # streams

    def _spill(self, name: str, *, durable: bool = False) -> Spill:
        calibration = self._calibration
        assert calibration is not None or name, "a run without calibration has no streams"
        samples, length = (0, 0) if calibration is None else (len(calibration.ids), calibration.length)
        wide = samples * length * self._spec.hidden * 4
        return Spill(
            self._work_folder / f"{name}.bin",
            samples=samples,
            shape=(length, self._spec.heads * self._spec.head_dim if name == "attended" else self._spec.hidden),
            dtype=torch.float32 if wide <= FP32_BYTES else torch.float16,
            device=self._device,
            durable=durable,
        )

    def _streams(self, layer: int) -> tuple[Spill, Spill]:
        """Return x and x̂ in front of a layer."""
        return self._spill(f"plain-{layer:04d}", durable=True), self._spill(f"rounded-{layer:04d}", durable=True)

    def _check_disk(self) -> None:
        """Raise CapacityError unless streams and artefact fit on the disk."""
        streams = 7 * self._spill("plain").nbytes
        stored = sum(self._source_bytes(name) for name in self._source.names())
        free = shutil.disk_usage(self._work_folder).free
        if streams + stored > free:
            raise CapacityError(
                f"{self._out}: {human_bytes(streams + stored)} of disk may be needed, {human_bytes(streams)} of them "
                f"for activations, but {human_bytes(free)} are free: use fewer samples or another folder"
            )

    def _source_bytes(self, name: str) -> int:
        """Bytes of a tensor in the artefact, at most."""
        shape = self._source.shape(name)
        count = 1
        for size in shape:
            count *= size
        ends = name in ("model.embed_tokens.weight", "lm_head.weight")
        return count * 4 if ends else count + 8 * shape[0]

    def _turn(self) -> Tensor | None:
        """Return R1 [C, C], or None."""
        rotate = self._recipe.rotate
        if rotate is None or not rotate.residual:
            return None
        return orthogonal(self._spec.hidden, rotate.construction)

    def _embed(self) -> None:
        """Write both streams in front of layer 0: the embedding, exact and as it will be stored."""
        calibration, r = self._calibration, self._turn()
        assert calibration is not None
        table = read_finite(self._source, "model.embed_tokens.weight")
        plain, rounded = self._streams(0)
        with plain.writer() as exact, rounded.writer() as stored:
            for ids in calibration.ids:
                x = table[torch.tensor(ids)].float()
                x = x if r is None else turned(x, r)
                exact.add(x)
                stored.add(export.dtype_of(x).float())

    # layers

    def _layers(self, manifest: dict[str, Any]) -> None:
        total = self._spec.layers * len(STEPS) + 1
        self._ticks = len(manifest["layers"]) * len(STEPS)
        self._progress("quantize", self._ticks, total)

        def tick(step: str) -> None:
            self._ticks += 1
            self._progress("quantize", self._ticks, total)

        work = self._work()
        for number in range(len(manifest["layers"]), self._spec.layers):
            layer = self._read(number)
            if work is None:
                tensors, notes = _round(layer, self._recipe)
                self._ticks += len(STEPS) - 2
            else:
                tensors, made = quantize_layer(layer, self._layer_streams(number), work, tick)
                notes = made.as_dict()
            self._write(manifest, number, tensors)
            manifest["layers"].append(notes)
            self._commit(manifest)
            if work is not None:
                for spill in self._streams(number):
                    spill.remove()
            tick("write")

    def _work(self) -> Work | None:
        calibration = self._calibration
        if calibration is None:
            return None
        reach = max(calibration.positions) + calibration.length
        return Work(
            recipe=self._recipe,
            spec=self._spec,
            forward=Forward(self._spec, positions=reach, device=self._device),
            positions=calibration.positions,
            length=calibration.length,
            device=self._device,
        )

    def _layer_streams(self, number: int) -> Streams:
        plain, rounded = self._streams(number)
        next_plain, next_rounded = self._streams(number + 1)
        return Streams(
            plain=plain,
            rounded=rounded,
            next_plain=next_plain,
            next_rounded=next_rounded,
            middle=self._spill("middle"),
            middle_rounded=self._spill("middle-rounded"),
            attended=self._spill("attended"),
        )

    def _read(self, number: int) -> Layer:
        """Return a layer in fp32, rotated as the recipe says."""
        layer = read_layer(self._source, self._spec, number, dtype=torch.float32, device=self._device)
        rotate, r = self._recipe.rotate, self._turn()
        if r is not None:
            layer = rotate_residual(fold_norms(layer), r)
        if rotate is not None and rotate.heads:
            layer = rotate_heads(layer, orthogonal(self._spec.head_dim, rotate.construction))
        return layer

    def _write(self, manifest: dict[str, Any], number: int, tensors: Mapping[str, Tensor]) -> None:
        name = export.shard_name(number, self._shards)
        export.write_shard(self._out / name, tensors)
        manifest["shards"][name] = sorted(tensors)
        manifest["bytes"] += sum(tensor.nbytes for tensor in tensors.values())

    # the rest

    def _ends(self, manifest: dict[str, Any]) -> None:
        """Write embedding, final norm and head; with R1 the norm's weight moves into the head, which is untied."""
        r = self._turn()
        table = read_finite(self._source, "model.embed_tokens.weight")
        norm = read_finite(self._source, "model.norm.weight").float()
        embedding = table.float() if r is None else turned(table.float(), r)
        own = "lm_head.weight" in self._source.names()
        tensors = {"model.embed_tokens.weight": export.dtype_of(embedding)}
        if r is not None or own:
            head = read_finite(self._source, "lm_head.weight") if own else table
            head = head.float() if r is None else turned(head.float() * norm, r)
            tensors["lm_head.weight"] = export.dtype_of(head)
        tensors["model.norm.weight"] = half(norm if r is None else torch.ones_like(norm), "model.norm.weight")
        self._write(manifest, self._spec.layers, tensors)
        self._commit(manifest)
        self._progress("quantize", self._spec.layers * len(STEPS) + 1, self._spec.layers * len(STEPS) + 1)

    def _finish(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        scheme = export.scheme(
            self._recipe,
            self._spec,
            calibration=self._calibration,
            source_sha256=manifest["identity"]["source"],
            version=VERSION,
        )
        report = {
            "model": self._source.path.name,
            "recipe": self._recipe.as_dict(),
            "layers": [{"layer": number, **notes} for number, notes in enumerate(manifest["layers"])],
        }
        export.write_json(self._out / export.REPORT, report)
        export.write_index(self._out, manifest["shards"], manifest["bytes"])
        for name, raw in self._files.items():
            write_atomically(self._out / name, raw)
        tied = not any("lm_head.weight" in names for names in manifest["shards"].values())
        export.write_json(self._out / "config.json", export.config(self._source.config, scheme, tied=tied))
        return report


def _round(layer: Layer, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the stored tensors of a layer rounded to nearest, without calibration, and the notes on it."""
    stored: dict[str, Tensor] = {}
    errors: dict[str, dict[str, float]] = {}
    for linear in layer.linears():
        try:
            found = nearest(linear.weight, recipe.weights.of(linear.name))
        except CheckpointError as error:
            raise CheckpointError(f"{linear.name}: {error}") from None
        stored |= {f"{linear.name}.{name}": tensor for name, tensor in found.stored.items()}
        errors[linear.name] = found.relative()
        if linear.bias is not None:
            stored[f"{linear.name}.bias"] = half(linear.bias, f"{linear.name}.bias")
    stored |= plain_tensors(layer)
    return stored, {"linears": errors}


def plain_tensors(layer: Layer) -> dict[str, Tensor]:
    """Return what stays in 16 bit of a layer, by name: norms and routers."""
    attention = layer.prefix + "self_attn."
    found = {
        f"{layer.prefix}input_layernorm.weight": layer.norm1,
        f"{layer.prefix}post_attention_layernorm.weight": layer.norm2,
        f"{attention}q_norm.weight": layer.q_norm,
        f"{attention}k_norm.weight": layer.k_norm,
    }
    kept: tuple[Linear | None, ...] = (layer.router, layer.shared_gate)
    found |= {f"{linear.name}.weight": linear.weight for linear in kept if linear is not None}
    return {name: half(tensor, name) for name, tensor in found.items() if tensor is not None}


def file_hashes(path: Path, progress: Progress) -> dict[str, str]:
    """Return the SHA-256 of a checkpoint's file, or of the config and the safetensors files of its folder."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    made = {}
    for number, file in enumerate(files):
        progress("check", number, len(files))
        with file.open("rb") as opened:
            made[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    progress("check", len(files), len(files))
    return made
