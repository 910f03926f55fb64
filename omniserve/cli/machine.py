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
    "fastapi", "uvicorn", "llguidance", "msgspec", "prometheus-client", "lm-eval",
)  # fmt: skip
_FLAGS = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


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


def gpus() -> list[dict[str, str]]:
    """Return name, compute capability, driver and memory of each NVIDIA GPU, as the driver's tool tells."""
    names = ("name", "compute_cap", "driver_version", "memory.total", "memory.free")
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


def implementations(device: str) -> dict[str, str]:
    """Return operation -> implementation that serves it on `device`. Imports torch."""
    from omniserve import formats, ops
    from omniserve.ops.dispatch import choices

    for package in (ops, formats):  # a module registers its operations when it is imported
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    return choices(device)


def facts() -> dict[str, Any]:
    """Return what a benchmark's result must be printed with. Imports torch."""
    import torch

    from omniserve import __version__

    names = ("torch", "transformers", "numpy")
    return {
        "cpu": cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpus": [gpu["name"] for gpu in gpus()],
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
