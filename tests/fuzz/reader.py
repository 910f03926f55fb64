"""Reads fuzzed model files, in a process of its own: little memory, little time for each, one sentence or none.

python -m tests.fuzz.reader {safetensors,gguf} COUNT FOLDER MODEL...
reads COUNT files that are changed at random, after those whose keys hold every kind of value in turn, of each MODEL;
prints a JSON object with what became of the files; another exception than ours ends in a traceback and exit code 1.
"""

import json
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from omniserve.base.config import Options
from omniserve.base.errors import CheckpointError, OmniserveError
from omniserve.base.types import Request, SamplingParams
from omniserve.engine.build import build
from omniserve.formats.checkpoint import kv_scales, open_checkpoint
from omniserve.models.families import check_tensors, family
from omniserve.quantize.recipe import PASSES, default
from omniserve.quantize.stream import quantize
from omniserve.text import Tokenizer
from tests.fuzz.files import as_gguf
from tests.fuzz.mutations import Draw, fuzz_gguf, fuzz_json, fuzz_safetensors, sweep_gguf, sweep_json, take
from tests.tiny import tiny_model

QUANTIZED = "quantized"
"""A checkpoint of our own, beside the families."""
SECONDS = 5
"""Time for one file."""
MEMORY = 256 << 20
"""Address space that reading one file may add to what the process has."""
SMALL: dict[str, Any] = {"hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64, "vocab": 40, "context": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "extra": {f"model.layers.{i}.self_attn.kv_scale": torch.ones(2, 1) for i in range(2)},
        "config": {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    },
    "qwen2": {},
    "mixtral": {"config": {"num_local_experts": 4, "num_experts_per_tok": 2}},
    "qwen2_moe": {"config": EXPERTS | {"shared_expert_intermediate_size": 32}},
}
KINDS = {"llama": "Q8_0", "qwen2": "F16", "mixtral": "Q4_0", "qwen2_moe": "Q5_1"}


def use(path: Path) -> None:
    """Do all that loading does with a file, and compute with what is left of it."""
    source = open_checkpoint(path)
    spec = family(source.config).spec(source.config)
    check_tensors(source, spec)
    kv_scales(source, spec.layers)
    for name in source.names():
        assert source.tensor(name).shape == source.shape(name), name
    if path.is_file():
        tokenizer = Tokenizer.load(source)
        tokenizer.decode(tokenizer.encode("abcd 12 xyz"))


def compute(path: Path) -> None:
    """Build an engine and take a few steps."""
    options = Options(max_num_seqs=1, max_num_batched_tokens=32, kv_cache_memory_bytes=1 << 20)
    engine = build(path, options).engine
    params = SamplingParams(temperature=0.0)
    engine.add(Request(id="x", tokens=[0, 0, 0], prompt=3, sampling=params, limit=2))
    while engine.has_work:
        engine.step()


@contextmanager
def bounds() -> Iterator[None]:
    """Raise TimeoutError where a file takes too long; let allocations fail where it takes too much memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"a file took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * status("VmSize") + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def status(key: str) -> int:
    """Return a figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Files:
    """The sound files, and a place for what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fuzzed"
        self.gguf = folder / "fuzzed.gguf"
        self.whole: dict[str, dict[str, bytes]] = {}
        self.parts = {}
        for name, shape in MODELS.items():
            made = tiny_model(folder / name, name, **(SMALL | shape))
            raw = {file.name: file.read_bytes() for file in made.iterdir()}
            if name == "qwen2":
                raw = self._sharded(made) | {"config.json": raw["config.json"]}
            self.whole[name] = raw
            plain = tiny_model(folder / f"{name}-plain", name, **(SMALL | shape | {"extra": None}))
            path = as_gguf(plain, folder / f"{name}.gguf", KINDS[name], words=True)
            self.parts[name] = path.read_bytes(), take(path.read_bytes())
        made = tiny_model(folder / "quantized-of", **SMALL)
        recipe = default("w4a8kv4-g128").without([word for word in PASSES if word != "rotate"])
        quantize(open_checkpoint(made), recipe, folder / QUANTIZED, calibration=None, files={})
        names = [file for file in (folder / QUANTIZED).iterdir() if file.name.startswith(("config", "model"))]
        self.whole[QUANTIZED] = {file.name: file.read_bytes() for file in names}

    @staticmethod
    def _sharded(folder: Path) -> dict[str, bytes]:
        tensors = load_file(folder / "model.safetensors")
        names = sorted(tensors)
        files = {f"model-{part + 1:05}-of-00002.safetensors": names[part::2] for part in range(2)}
        for file, mine in files.items():
            save_file({name: tensors[name] for name in mine}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, mine in files.items() for name in mine}}
        raw = {file: (folder / file).read_bytes() for file in files}
        return raw | {"model.safetensors.index.json": json.dumps(index).encode()}

    def safetensors(self, draw: Draw) -> Path:
        """Write a folder with one file changed, or two."""
        raw = dict(self.whole[draw(st.sampled_from(sorted(self.whole)))])
        for name in draw(st.lists(st.sampled_from(sorted(raw)), min_size=1, max_size=2, unique=True)):
            raw[name] = (fuzz_json if name.endswith(".json") else fuzz_safetensors)(draw, raw[name])
        return self._folder(raw)

    def ggufs(self, draw: Draw) -> Path:
        """Write one changed GGUF file."""
        return self._file(fuzz_gguf(draw, *self.parts[draw(st.sampled_from(sorted(self.parts)))]))

    def swept_safetensors(self, names: list[str]) -> Iterator[Path]:
        """Write folders whose config.json has one key at another value, of each kind of value."""
        for name in names:
            for config in sweep_json(self.whole[name]["config.json"]):
                yield self._folder(self.whole[name] | {"config.json": config})

    def swept_ggufs(self, names: list[str]) -> Iterator[Path]:
        """Write files that have one metadata key at another value, of each type."""
        for name in names:
            yield from map(self._file, sweep_gguf(self.parts[name][1]))

    def _folder(self, raw: dict[str, bytes]) -> Path:
        self.folder.mkdir(exist_ok=True)
        for old in self.folder.iterdir():
            old.unlink()
        for name, content in raw.items():
            (self.folder / name).write_bytes(content)
        return self.folder

    def _file(self, raw: bytes) -> Path:
        self.gguf.unlink(missing_ok=True)  # a file that is mapped must not be cut
        self.gguf.write_bytes(raw)
        return self.gguf


class Report:
    """What became of the files, and the most that one of them took."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.sentences: set[str] = set()
        self.seconds, self.kib = 0.0, 0

    def read(self, path: Path) -> None:
        """Read a file within bounds; whatever is raised but our errors is the reader's fault."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
        start, held = time.perf_counter(), status("VmRSS")
        with bounds():
            self.ends[self._end(path)] += 1
        self.seconds = max(self.seconds, time.perf_counter() - start)
        self.kib = max(self.kib, status("VmHWM") - held)

    def _end(self, path: Path) -> str:
        try:
            use(path)
        except CheckpointError as error:
            sentence = str(error)
        else:
            try:
                compute(path)
            except OmniserveError as error:
                return f"refused by the engine: {type(error).__name__}"
            return "served"
        assert "\n" not in sentence
        assert len(sentence) < 1000
        self.sentences.add(re.sub(r"'[^']*'|\d+", "#", sentence))
        return "refused"


def main(kind: str, count: int, folder: Path, swept: list[str]) -> None:
    torch.set_num_threads(1)
    files, report, began = Files(folder), Report(), time.perf_counter()
    for name in MODELS if kind == "gguf" else files.whole:  # libraries are loaded, sound files computed with
        path = folder / f"{name}.gguf" if kind == "gguf" else folder / name
        use(path)
        compute(path)
    sweep, make = (files.swept_ggufs, files.ggufs) if kind == "gguf" else (files.swept_safetensors, files.safetensors)
    for path in sweep(swept):
        report.read(path)
    before = sum(report.ends.values())

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(data=st.data())
    def fuzz(data: st.DataObject) -> None:
        report.read(make(data.draw))

    fuzz()
    found = {"swept": before, "fuzzed": sum(report.ends.values()) - before, **report.ends}
    found |= {"sentences": len(report.sentences), "seconds": round(time.perf_counter() - began, 1)}
    found |= {"slowest_seconds": round(report.seconds, 2), "largest_mib": report.kib // 1024}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
