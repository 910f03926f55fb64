"""Where an engine runs, and what it may take of its memory."""

import os
from collections.abc import Callable
from math import prod

import torch

from omniserve.base.config import PRECISIONS, DtypeName, HeadName, Options, Precision
from omniserve.base.errors import CapacityError, ConfigError
from omniserve.base.numbers import ceil_div, human_bytes
from omniserve.base.spec import Device, ModelSpec
from omniserve.base.types import PAGE
from omniserve.engine.graphs import CHUNKS, PAGES, mixtures
from omniserve.formats.blocks import SIDE
from omniserve.models.families import expected, linears
from omniserve.ops.dispatch import load_kernels

OLDEST = (8, 0)
"""The first compute capability that the kernels run on."""
BESIDE = 1 << 30
"""Bytes that CUDA, its graphs and the compiled kernels take beside what is counted."""
_ELEMENT: dict[DtypeName, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def find_device(options: Options) -> Device:
    """Return the device to run on: `auto` is a GPU that the kernels run on, else the CPU. Raises ConfigError."""
    if options.device == "cpu":
        return _cpu()
    problem = gpu_problem()
    if problem is None:
        free, total = torch.cuda.mem_get_info()
        used = total - free
        allowed = int(total * _share(options)) - used
        return Device(
            kind="cuda", memory_bytes=max(allowed, 0), capability=torch.cuda.get_device_capability(), total_bytes=total
        )
    if options.device == "cuda":
        raise ConfigError(f"device=cuda: {problem}; use --device cpu")
    return _cpu()


def _cpu() -> Device:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = pages * size
    return Device(kind="cpu", memory_bytes=free // 2, total_bytes=free)


def gpu_problem() -> str | None:
    """Return why there is no GPU to run on, or None."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is a build without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU, or its driver is older than this torch needs (`nvidia-smi` tells)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(), capability
        return f"{name} has compute capability {major}.{minor}: the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        load_kernels("cuda")
    except ConfigError as error:
        return str(error)
    return None


def _share(options: Options) -> float:
    share = 0.9 if options.gpu_memory_utilization is None else options.gpu_memory_utilization
    if not 0 < share <= 1:
        raise ConfigError(f"gpu_memory_utilization={share:g}: must be above 0 and at most 1, the share of the memory")
    return share


def taken_bytes() -> Callable[[], int]:
    """Return a function that tells how many bytes of the GPU were taken since now.

    The driver counts everybody's, what CUDA itself takes with it; what others give back meanwhile would lower that, so
    it is never less than what torch holds more.
    """
    used, held = _used_bytes(), torch.cuda.memory_reserved()
    return lambda: max(_used_bytes() - used, torch.cuda.memory_reserved() - held)


def _used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def check_dtype(options: Options, device: Device, dtype: DtypeName) -> None:
    """Raise ConfigError unless the kernels of the device compute in this dtype."""
    if device.kind == "cuda" and options.backend != "reference" and dtype not in ("float16", "bfloat16"):
        raise ConfigError(
            f"dtype={dtype}: the GPU's kernels take float16 or bfloat16; give one, or --backend reference"
        )


def weight_bytes(spec: ModelSpec, precision: Precision, dtype: DtypeName, head: HeadName) -> int:
    """Return what the model's parameters take on a device, before they are loaded."""
    modules = linears(spec)
    shapes = expected(spec) | ({"lm_head.weight": (0,)} if head == "w8" else {})
    plain = sum(prod(shape) for name, shape in shapes.items() if name.removesuffix(".weight") not in modules)
    narrow = spec.vocab * (spec.hidden + 4) if head == "w8" else 0
    return plain * _ELEMENT[dtype] + narrow + sum(_linear_bytes(n, k, precision, dtype) for n, k in modules.values())


def _linear_bytes(n: int, k: int, precision: Precision, dtype: DtypeName) -> int:
    if precision.weight == "w16a16":
        return n * k * _ELEMENT[dtype]
    if precision.weight == "w8a8":
        return n * (k + 4)
    blocks = ceil_div(n, SIDE) * ceil_div(k, SIDE)
    return blocks * (SIDE * SIDE // 2 + (0 if precision.group == -1 else 2 * SIDE)) + 8 * n


def working_bytes(spec: ModelSpec, dtype: DtypeName, longest: int) -> Callable[[int, int], int]:
    """Return a function of a step's tokens and sequences: the bytes that it takes beside weights and pages.

    longest  tokens of the longest sequence, whose keys and values are held once, in the model's dtype, for a prompt
    """
    element = _ELEMENT[dtype]
    ffn = max(spec.ffn, spec.experts.ffn if spec.experts is not None else 0)
    heads = (2 * spec.heads + 2 * spec.kv_heads) * spec.head_dim

    def count(tokens: int, seqs: int) -> int:
        # The product of gate and up, then its codes; the residual stream, its sum and their norm.
        token = 2 * ffn * element + ffn + heads * element + spec.hidden * (3 * element + 1)
        logits = 3 * seqs * spec.vocab * 4  # fp32, shared by all captured steps; draws work on two copies at most
        rows = max(seqs, max(map(sum, mixtures(seqs, tokens)), default=0))
        keys = longest + (PAGES + CHUNKS) * PAGE  # the latter of captured steps
        return (tokens + rows) * token + logits + 2 * keys * spec.kv_heads * spec.head_dim * element + BESIDE

    return count


def check_room(device: Device, spec: ModelSpec, precision: Precision, dtype: DtypeName, head: HeadName) -> int:
    """Return the bytes that are left beside the weights. Raises CapacityError, naming what would fit, if none are."""
    weights = weight_bytes(spec, precision, dtype, head)
    if weights + BESIDE < device.memory_bytes:
        return device.memory_bytes - weights
    sizes = {word: weight_bytes(spec, Precision.parse(word), dtype, head) for word in PRECISIONS}
    fitting = [word for word, size in sizes.items() if size + BESIDE < device.memory_bytes]
    advice = f"--precision {fitting[0]} takes {human_bytes(sizes[fitting[0]])}" if fitting else "no precision would fit"
    raise CapacityError(
        f"the weights take {human_bytes(weights)} at {precision.label} and the GPU has "
        f"{human_bytes(device.memory_bytes)} to give (of {human_bytes(device.total_bytes)}): {advice}"
    )
