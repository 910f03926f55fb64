"""What this machine is: processor, memory, disk, versions of packages. Torch is asked only where noted."""

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

NEEDED = ("torch", "numpy", "safetensors", "tokenizers")
OPTIONAL = (
    "gguf", "jinja2", "cyclopts", "rich", "pyyaml", "transformers", "accelerate", "huggingface-hub", "triton",
    "fastapi", "uvicorn", "llguidance", "msgspec", "prometheus-client", "httpx", "aiohttp",
    "opentelemetry-sdk", "matplotlib", "textual", "lm-eval",
)  # fmt: skip
_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "i8mm", "bf16",
    "sve", "sve2",
)  # fmt: skip
_INT8_PRODUCTS = {
    "VNNI": ("avx512_vnni", "avx_vnni", "avx_vnni_int8"),
    "AMX": ("amx_int8",),
    "NEON dot product": ("asimddp", "i8mm"),
}
"""Instructions that multiply int8 and add in int32, by the name people know."""


def version(package: str) -> str | None:
    """Return an installed package's version without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """Return the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Return the instruction sets of this processor that matter for arithmetic."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in _FLAGS if flag in flags]


def int8_instructions() -> dict[str, bool]:
    """Return which instructions for int8 products this processor has, of those its kind may have."""
    here = set(instruction_sets())
    arm = "asimd" in here
    return {
        name: not here.isdisjoint(flags) for name, flags in _INT8_PRODUCTS.items() if arm == name.startswith("NEON")
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """Return total and available memory; a container's limit counts."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = total
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = "".join(_lines(Path("/sys/fs/cgroup/memory.max"))).strip()
    if limit.isdigit():
        total = min(total, int(limit))
    return total, min(available, total)


def disk_free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds `path` or its nearest existing parent."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


GPU = ("name", "compute_cap", "driver_version", "memory.total", "memory.free")
"""What doctor tells of a GPU, by the names of the driver's tool."""

CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
"""What a benchmark tells besides."""


def gpus(names: tuple[str, ...] = GPU) -> list[dict[str, str]]:
    """Return these facts about each NVIDIA GPU, as the driver's tool tells them."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    lines = done.stdout.strip().splitlines()
    return [dict(zip(names, [part.strip() for part in line.split(",")], strict=False)) for line in lines]


def implementations(device: str, *, reference: bool = False) -> dict[str, dict[str, str]]:
    """Return operation -> name of the implementation that serves it on `device`, and why. Imports torch.

    reference  the settings ask for references instead of kernels
    """
    from omniserve.ops.dispatch import TABLE

    _register()
    found = {}
    for name, operation in sorted(TABLE.items()):
        here = [one for one in operation.implementations if one.device == device]
        chosen = "reference" if reference else operation.pick(device).name
        if reference:
            why = "backend=reference asks for it"
        elif chosen != "reference":
            (one,) = (one for one in here if one.name == chosen)
            test = one.when.__name__
            why = "needs no self-test" if test == "<lambda>" else f"passed its self-test {test}"
            why = f"needs {one.needs}, which is here" if one.needs else why
            why = "; ".join(filter(None, (why, one.inside())))
        else:
            failed = [
                f"{one.name} needs {one.needs}" if one.needs else f"{one.name} failed its self-test {one.when.__name__}"
                for one in here
            ]
            why = ", ".join(failed) or f"nothing faster is there for {device}"
        found[name] = {"name": chosen, "why": why}
    return found


def kernels() -> dict[str, Any]:
    """Return which kernel would serve each operation on a GPU, whether or not one is here. Imports torch and Triton.

    needs: what they ask of the card; operations: operation -> kernel; problem: why they cannot be loaded, or None
    """
    from omniserve.base.errors import ConfigError
    from omniserve.ops.dispatch import TABLE, load_kernels

    _register()
    try:
        load_kernels("cuda")
    except ConfigError as error:
        return {"needs": "", "operations": {}, "problem": str(error)}
    there = {name: [one for one in op.implementations if one.device == "cuda"] for name, op in sorted(TABLE.items())}
    best = {name: max(ones, key=lambda one: one.rank) for name, ones in there.items() if ones}
    needs = sorted({one.needs for one in best.values()})
    return {"needs": " and ".join(needs), "operations": {name: one.name for name, one in best.items()}, "problem": None}


def cuda() -> dict[str, Any]:
    """Return what torch and the kernels make of the GPU here. Imports torch, and Triton where there is a GPU.

    problem  why no kernel runs here, or None; tables: measured tables by which products are cut on this card
    cache    folder of the compiled kernels, and its bytes
    """
    import torch

    from omniserve.engine.device import gpu_problem

    found: dict[str, Any] = {"built_for": torch.version.cuda, "problem": gpu_problem()}
    if found["problem"] is not None:
        return found
    from omniserve.kernels.device import architecture, processors
    from omniserve.kernels.tiles import tables

    folder = _kernel_cache()
    found |= {
        "device": torch.cuda.get_device_name(),
        "capability": architecture() / 10,
        "processors": processors(),
        "tables": tables(architecture()),
        "cache": {"folder": str(folder), "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())},
    }
    return found


def _kernel_cache() -> Path:
    """Return the folder where Triton keeps what it compiled."""
    return Path(importlib.import_module("triton").knobs.cache.dir)


def _register() -> None:
    """Import every module that has operations."""
    from omniserve import formats, ops

    for package in (ops, formats):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def int8_self_test() -> dict[str, Any]:
    """Return whether `torch._int_mm` is exact on this processor, and what it can build on. Imports torch."""
    from omniserve.ops.integer import int_mm_is_exact

    return {"exact": int_mm_is_exact(), "instructions": int8_instructions()}


def hub_cache() -> Path:
    """Return the folder where huggingface_hub keeps downloaded models."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return Path.home() / ".cache" / "huggingface" / "hub"
    return Path(HF_HUB_CACHE)


def facts() -> dict[str, Any]:
    """Return what a benchmark's result must be printed with. Imports torch."""
    import torch

    from omniserve import __version__

    names = ("torch", "triton", "transformers", "numpy")
    return {
        "cpu": cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus((*GPU, *CLOCKS)),
        "cuda": torch.version.cuda,
        "versions": {"omniserve": __version__, "python": platform.python_version()}
        | {name: version(name) for name in names},
    }


def _cpuinfo(key: str) -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
