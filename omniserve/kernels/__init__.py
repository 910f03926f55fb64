"""Implementations of operations for NVIDIA GPUs, in Triton. Importing this package registers them.

`ops/dispatch.py` imports it by name when an operation first runs on such a device; nothing else does. One source
serves compute capability 8.0, 8.6, 8.9 and 9.0. docs/kernels.md says what each kernel does and what is proven.
"""

import importlib

from omniserve.base.errors import ConfigError

try:
    import triton  # noqa: F401  # asked for first, so that its absence is told in one sentence
except ImportError as error:
    raise ConfigError(
        "the GPU kernels need Triton, which CUDA builds of torch bring along, and this Python has none: "
        "install a CUDA build of torch, or use --device cpu"
    ) from error

MODULES = (
    "attention",
    "changes",
    "dense",
    "draw",
    "keep",
    "linear",
    "lists",
    "nucleus",
    "pick",
    "rows",
    "select",
    "shares",
    "write",
)
"""One file per family of operations."""

for _name in MODULES:
    importlib.import_module(f"omniserve.kernels.{_name}")
